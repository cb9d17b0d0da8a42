"""From a run directory to the sections of its report: what was measured, as tables, plots and claims, and what was not.

Every section names the command that measures it; a section without data is that command alone.  Computes nothing but
what a claim compares.  Does not know HTML or Markdown, and runs nothing."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from free_dist.config import UserError
from free_dist.evaluation import report_claims as claims
from free_dist.evaluation import report_figures as figures
from free_dist.evaluation import report_tables as tables
from free_dist.evaluation.ablation import AblationRow, ablation_table
from free_dist.evaluation.metrics_tables import metric_tables, ranking_table, unavailable
from free_dist.evaluation.report_blocks import (
    Block,
    Claim,
    Claims,
    Example,
    Examples,
    Missing,
    Pictures,
    RunReport,
    Section,
    ShownAnswer,
    ShownToken,
    Table,
    Text,
    number,
    percent,
    threshold_text,
)
from free_dist.evaluation.report_legends import (
    ABLATION_LEGEND,
    COSTS_LEGEND,
    RANKING_LEGEND,
    RESULTS_LEGEND,
    ROBUSTNESS_LEGEND,
)
from free_dist.evaluation.report_sources import PROBES, STEPS, RunDirectory, Step, UnreadableFile, or_user_error
from free_dist.evaluation.report_traces import (
    CLASSES,
    TRACES,
    TracedAnswer,
    Traces,
    counts_by,
    position_name,
    read_traces,
    shares_by,
)
from free_dist.evaluation.rows import RankingRow, Results, Row, best_row, read_all_results
from free_dist.evaluation.training_curves import RunLog, read_log

POSITIONS = 8
"""Answer positions told apart; later ones count with the last."""
SHOWN_EXAMPLES = 4
"""Examples per task, of those whose picture was kept."""
CURVES = ("loss_", "agreement_with_full_", "discriminator_accuracy_", "grad_norm")
"""Beginnings of the groups of training numbers that are drawn."""


@dataclass(frozen=True)
class RunSections:
    """Builds the sections of one run; reading a malformed file raises UserError naming it."""

    run: RunDirectory
    lenient: bool = False
    """Show a malformed file as a gap instead, with what is wrong with it."""

    @cached_property
    def files(self) -> dict[str, dict[str, Any] | Missing]:
        """File of a step -> what it holds, or what is missing."""
        return {step.file: self._read(step) for step in STEPS}

    def _read(self, step: Step) -> dict[str, Any] | Missing:
        gap = Missing(what=step.name, command=self.run.command(step))
        try:
            return self.run.measured(step.file) or gap
        except UserError as error:
            return self._gap(gap, error)

    def _gap(self, gap: Missing, error: UserError) -> Missing:
        if not self.lenient:
            raise error
        return replace(gap, why=error.reason if isinstance(error, UnreadableFile) else str(error))

    @cached_property
    def labels(self) -> dict[str, str]:
        """Method -> what its exits were trained with."""
        named = {}
        for method, manifest in self.run.manifests().items():
            loss = manifest.get("extra", {}).get("loss", {})
            if "mode" in loss:
                task_loss = "CE" if loss["mode"] == "supervised" else "KL"
                named[method] = f"{task_loss}+GAN" if loss.get("adversarial_weight", 0) > 0 else f"{task_loss} only"
        return named | {"full": "full depth", "hf": "Hugging Face"}

    @cached_property
    def measured(self) -> Results | None:
        """All of ``results.json``; None without it."""
        path = self.run.path / "results.json"
        return read_all_results(path) if path.is_file() else None

    @property
    def results(self) -> tuple[Row, ...]:
        """Rows of ``results.json``; empty without it."""
        return () if self.measured is None else self.measured.rows

    @property
    def ranking(self) -> tuple[RankingRow, ...]:
        """Ranked candidates of ``results.json``; empty without any."""
        return () if self.measured is None else self.measured.ranking

    @cached_property
    def traces(self) -> Traces | None:
        """The traces, where there are any."""
        path = self.run.path / TRACES
        return read_traces(path) if path.is_file() else None

    def report(self) -> RunReport:
        """All sections."""
        made = [
            self._section("Quality and speed", "results.json", self._results),
            self._section("Where tokens leave", "robustness.json", self._shares, source=TRACES),
            self._section("Examples", "robustness.json", self._examples, source=TRACES),
            self._section("Comparison with other methods", "comparison.json", self._comparison),
            self._section("Placement under a budget", "placement.json", self._placement),
            self._with_probes(self._section("Mid-crisis and overthinking", "mid_crisis.json", self._depth)),
            self._section("Robustness", "robustness.json", self._robustness),
            self._section("Where the time goes", "robustness.json", self._costs),
            self._section("Ablations", "ablation/ablation.json", self._ablation),
            self._training(),
            self._provenance(),
        ]
        found: list[Block] = [Claims(claims=tuple(self._claims()))]
        found += [content for content in self.files.values() if isinstance(content, Missing)]
        summary = Section(title="Summary", blocks=tuple(found))
        return RunReport(name=str(self.run.path), sections=(summary, *made))

    def _claims(self) -> list[Claim]:
        makers = {
            "results.json": lambda content: claims.result_claims(self.results, self.labels),
            "comparison.json": claims.comparison_claims,
            "placement.json": claims.placement_claims,
            "mid_crisis.json": claims.depth_claims,
            "robustness.json": lambda content: claims.robustness_claims(content, self.labels),
            "ablation/ablation.json": claims.ablation_claims,
        }
        found = []
        for file, content in self.files.items():
            if isinstance(content, Missing):
                continue
            command = self._command(file, content)
            try:
                texts = or_user_error(lambda c=content, f=file: makers[f](c), self.run.place(file))  # type: ignore[misc]
            except UserError:
                if not self.lenient:
                    raise
                continue  # its section says why
            found += [Claim(text=text, command=command) for text in texts]
        return found

    def _command(self, file: str, content: Mapping[str, Any]) -> str:
        step = next(step for step in STEPS if step.file == file)
        return str(content.get("command") or self.run.command(step))

    def _section(
        self, title: str, file: str, build: Callable[[Mapping[str, Any]], list[Block]], *, source: str | None = None
    ) -> Section:
        """A section made of one measured file, or of the command that measures it."""
        content = self.files[file]
        if isinstance(content, Missing):
            return Section(title=title, blocks=(content,))
        step = next(step for step in STEPS if step.file == file)
        gap = Missing(what=step.name, command=self.run.command(step))
        if source is not None and not (self.run.path / source).is_file():
            return Section(title=title, blocks=(gap,))
        try:
            blocks = or_user_error(lambda: build(content), self.run.place(file))
        except UserError as error:
            return Section(title=title, blocks=(self._gap(gap, error),))
        return Section(title=title, blocks=tuple(blocks), command=self._command(file, content))

    def _results(self, _content: Mapping[str, Any]) -> list[Block]:
        return [
            Pictures(pictures=tuple(figures.speed_quality(self.results, self.labels))),
            tables.results_table(self.results, self.labels),
            Text(text=RESULTS_LEGEND),
            tables.further_table(self.results, self.labels),
            *(tables.of_lines(title, lines) for title, lines in metric_tables(self.results).items()),
            *(Text(text=f"not computed: {name}: {why}") for name, why in unavailable(self.results).items()),
            *self._ranking(),
        ]

    def _ranking(self) -> list[Block]:
        lines = ranking_table(self.ranking)
        return [tables.of_lines("candidates ranked by likelihood", lines), Text(text=RANKING_LEGEND)] if lines else []

    def _points(self, task: str) -> tuple[str, list[float]]:
        """The method shown for a task, that of its best row where it was traced, and its traced thresholds."""
        assert self.traces is not None
        own = [(a.method, a.threshold) for a in self.traces.answers if a.task == task and a.threshold is not None]
        points = [(method, threshold) for method, threshold in dict.fromkeys(own) if threshold is not None]
        best = best_row(self.results, task)
        traced = [method for method, _ in points]
        method = best.method if best is not None and best.method in traced else next(iter(traced), "")
        return method, sorted(threshold for name, threshold in points if name == method)

    def _shares(self, _content: Mapping[str, Any]) -> list[Block]:
        assert self.traces is not None
        blocks: list[Block] = []
        for task in dict.fromkeys(answer.task for answer in self.traces.answers):
            method, thresholds = self._points(task)
            named = self.labels.get(method, method)
            every = [a for a in self.traces.answers if (a.task, a.method) == (task, method)]
            layers = sorted({t.exit for a in every for t in a.tokens} | {self.traces.n_blocks})
            pictures, listed = [], []
            for threshold in thresholds:
                own = [answer for answer in every if answer.threshold == threshold]
                value = threshold_text(threshold)
                for key, kind, groups in (
                    ("position", "answer position", [position_name(i, POSITIONS) for i in range(1, POSITIONS + 1)]),
                    ("word", "class of word", list(CLASSES)),
                ):
                    shares = shares_by(own, groups, key, last=POSITIONS)
                    counts = counts_by(own, key, last=POSITIONS)
                    name = f"exits_{task}_{value.replace('.', '_')}_{key}"
                    title = f"{task}, {named} at {value}: exits by {kind}"
                    pictures.append(figures.share_figure(name, title, shares, layers))
                    listed += [
                        (value, kind, group, *(percent(share.get(k, 0.0)) for k in layers), number(counts[group]))
                        for group, share in shares.items()
                    ]
            caption = f"{task}, {named}: where tokens leave"
            blocks += [Pictures(pictures=tuple(pictures)), tables.shares_table(caption, listed, layers)]
        return blocks

    def _examples(self, _content: Mapping[str, Any]) -> list[Block]:
        assert self.traces is not None
        layers = sorted({t.exit for a in self.traces.answers for t in a.tokens} | {self.traces.n_blocks})
        depths = figures.depths_of(layers)
        shown = []
        for task in dict.fromkeys(answer.task for answer in self.traces.answers):
            method, thresholds = self._points(task)
            points = [("full", None), *((method, threshold) for threshold in thresholds)]
            pictured = [a for a in self.traces.answers if a.task == task and a.picture is not None][:SHOWN_EXAMPLES]
            for one in pictured:
                same = [a for a in self.traces.answers if (a.task, a.index) == (task, one.index)]
                answers = [a for point in points for a in same if (a.method, a.threshold) == point]
                assert one.picture is not None
                shown.append(
                    Example(
                        name=f"example_{task}_{one.index}",
                        picture=one.picture,
                        title=f"{task}, {one.key}",
                        question=one.question,
                        references=one.references[:3],
                        answers=tuple(self._shown_answer(answer, depths) for answer in answers),
                    )
                )
        full = self.traces.n_blocks
        named = {k: f"block {k}" + (" (full depth)" if k == full else "") for k in layers}
        legend = tuple(ShownToken(text=text, exit=k, depth=depths[k]) for k, text in named.items())
        return [Examples(examples=tuple(shown), legend=legend)]

    def _shown_answer(self, answer: TracedAnswer, depths: Mapping[int, float]) -> ShownAnswer:
        name = self.labels.get(answer.method, answer.method)
        label = name if answer.threshold is None else f"{name} at {threshold_text(answer.threshold)}"
        tokens = tuple(ShownToken(text=t.text, exit=t.exit, depth=depths[t.exit]) for t in answer.tokens)
        return ShownAnswer(label=label, tokens=tokens)

    def _comparison(self, content: Mapping[str, Any]) -> list[Block]:
        rows = content["rows"]
        return [Pictures(pictures=tuple(figures.comparison_figures(rows))), tables.comparison_table(rows)]

    def _placement(self, content: Mapping[str, Any]) -> list[Block]:
        budget, seconds = content.get("budget"), content.get("search_seconds")
        if isinstance(budget, Mapping):
            budget = ", ".join(f"{name} {number(value)}" for name, value in budget.items())
        left = len(content.get("points", []))
        facts = f"Budget: {budget}. The search took {number(seconds, 1)} s and left {left} points on the front."
        return [
            Text(text=facts),
            Pictures(pictures=tuple(figures.placement_figures(content))),
            tables.placement_table("all tasks", content),
            *(tables.placement_table(task, own) for task, own in content.get("tasks", {}).items()),
            *([Text(text=str(content["note"]))] if content.get("note") else []),
        ]

    def _depth(self, content: Mapping[str, Any]) -> list[Block]:
        blocks: list[Block] = []
        for name, title, found in (
            ("depth", "Accuracy per block, frozen language model", content["tasks"]),
            ("depth_fine_tuned", "Accuracy per block, fine-tuned language model", _tasks(content.get("fine_tuned"))),
        ):
            if not found:
                continue
            blocks.append(Text(text=f"{title}."))
            blocks.append(Pictures(pictures=tuple(figures.depth_figures(found, name=name, title=title))))
            blocks.append(tables.dips_table(found))
            blocks += [tables.depth_table(task, one) for task, one in found.items()]
        return blocks

    def _with_probes(self, section: Section) -> Section:
        """The section with what the evaluation itself read of every block, without intervals."""
        try:
            found = self.run.probes()
        except UserError as error:
            gap = self._gap(Missing(what="accuracy per block", command=self.run.command(STEPS[0])), error)
            return replace(section, blocks=(*section.blocks, gap))
        if not found:
            return section
        listed = [tables.depth_table(task, one, self.labels) for task, one in found.items()]
        text = Text(
            text=f"Printed by the evaluation itself ({PROBES}; no intervals, the end-of-answer token left out):"
        )
        return replace(section, blocks=(*section.blocks, text, *listed))

    def _robustness(self, content: Mapping[str, Any]) -> list[Block]:
        return [
            Pictures(pictures=tuple(figures.robustness_figures(content, self.labels))),
            Text(text=ROBUSTNESS_LEGEND),
            tables.corruption_table(content["corruptions"], self.labels),
            tables.transfer_table(content["transfer"], self.labels),
            tables.ece_table(content["ece"], self.labels),
            tables.length_table(content["length"], self.labels),
        ]

    def _costs(self, content: Mapping[str, Any]) -> list[Block]:
        rows = content.get("costs")
        if not rows:
            step = next(step for step in STEPS if step.file == "robustness.json")
            return [Missing(what="cost breakdown", command=self.run.command(step))]
        return [
            Pictures(pictures=tuple(figures.cost_figures(rows))),
            tables.cost_table(rows, self.labels),
            Text(text=COSTS_LEGEND),
        ]

    def _ablation(self, content: Mapping[str, Any]) -> list[Block]:
        return [
            tables.of_lines("", ablation_table([AblationRow.from_json(row) for row in content["rows"]])),
            Text(text=ABLATION_LEGEND),
        ]

    def _training(self) -> Section:
        logs = self.run.logs()
        command = shlex.join(["python", "launch/draw_curves.py", str(self.run.path / "exits")])
        if not logs:
            step = STEPS[0]
            gap = Missing(what="training curves", command=self.run.command(step))
            return Section(title="Training curves", blocks=(gap,))
        blocks: list[Block] = []
        for name, path in logs.items():
            log = read_log(path)
            kept = {key: points for key, points in log.curves.items() if key.startswith(CURVES)}
            drawn = figures.training_figures(name, RunLog(curves=kept, events=log.events))
            events = f" Alarms and skipped steps: {len(log.events)}." if log.events else ""
            blocks.append(Text(text=f"{self.labels.get(name, name)} ({path}).{events}"))
            blocks.append(Pictures(pictures=tuple(drawn)))
        first = next(iter(logs.values())).parent
        return Section(
            title="Training curves",
            blocks=tuple(blocks),
            command=command if len(logs) > 1 else shlex.join(["python", "launch/draw_curves.py", str(first)]),
        )

    def _provenance(self) -> Section:
        rows = []
        for file, content in self.files.items():
            if not isinstance(content, Missing):
                made = content.get("provenance") or {}
                rows.append(
                    (
                        file,
                        self._command(file, content),
                        ", ".join(f"{k} {v}" for k, v in made.items()) or "not recorded",
                    )
                )
        listed = Table(caption="measured files", headings=("file", "command", "made with"), rows=tuple(rows))
        exits = tables.exits_table(self.run.manifests(), self.labels)
        return Section(title="Provenance", blocks=(listed, exits))


def _tasks(content: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """``fine_tuned`` may be tasks, or hold them under ``tasks``."""
    return {} if not content else content.get("tasks", content)
