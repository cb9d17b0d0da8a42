"""The report of an evaluation: tables for terminal and Markdown, and everything written to the run directory.

Knows the columns of a row, and nothing of models or data.  Prints nothing: tables are strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from free_dist.atomic import write_atomically
from free_dist.evaluation import plots
from free_dist.evaluation.metrics_tables import markdown, metric_tables, ranking_table, unavailable
from free_dist.evaluation.probe import Probe
from free_dist.evaluation.rows import About, RankingRow, Row, best_row, tasks_of, write_results

LEGEND = """\
* **quality**: VQA accuracy (vqa), accuracy of the last answer given the true history (dialogue), CIDEr-D (caption; 1.0 is
  "100", tokenised as the table of metrics says; COCO's code prints it as "CIDEr"). *relative*: quality
  over the full model's on the same samples.
* **agreement**: share of samples whose whole generated token sequence equals the full model's.
* **blocks**: mean block calls per generated token, prefill included, an exit transformer counted as one block.
* **layer ratio**: all blocks over *blocks*. It is a count, **not a speed**: heads, vision and overhead are not in it.
* **speed / full**, **speed / HF**: wall-clock ratio against our own full-depth decoder and against Hugging Face
  `generate` on the same model: end to end from pixels to tokens, same run, interleaved sample by sample, sums of times;
  in brackets a 95% bootstrap interval over samples. Above 1 is faster. What counts is the lower of the two.
* Every row is scored on its own *n* samples; the Hugging Face rows have fewer. The row marked best was chosen on the
  samples it is reported on: for a claim, choose the threshold on the calibration split.
"""


RANKING_LEGEND = """\
* **scored by**: whose head gives the log-likelihood of every token of a candidate: the full model's, one exit's, or with a
  *threshold* the first exit that is more confident than it (a token at which none is: the full model's). *per token*: divided
  by the number of tokens. **mean layer** is where tokens were scored, a depth and not a speed: ranking computes all depths.
* **ndcg** over the samples with dense annotations (*n ndcg*), the others over those whose true answer is known.
* **same best**: share of samples whose best candidate is the full model's, read in the same way.
"""


_HEADINGS = (
    "task",
    "method",
    "threshold",
    "quality",
    "relative",
    "agreement",
    "blocks",
    "layer ratio",
    "speed / full",
    "speed / HF",
    "n",
    "best",
)


@dataclass(frozen=True, kw_only=True)
class ReportPaths:
    """Where a report lies."""

    results: Path
    """``results.json``."""
    report: Path
    """``report.md``."""
    plots: dict[str, Path]
    """Title -> PNG."""
    submissions: list[Path] = field(default_factory=list)
    """Files for official servers."""


def write_report(
    rows: Sequence[Row],
    probes: Sequence[Probe],
    run_dir: str | Path,
    *,
    labels: Mapping[str, str] | None = None,
    ranking: Sequence[RankingRow] = (),
    about: About | None = None,
) -> ReportPaths:
    """Write ``results.json``, ``probes.json``, ``report.md`` and the plots to ``run_dir``, each file when complete.

    ``probes`` may be empty; then there is no per-block picture.  ``labels`` maps methods and curves to words for legends.
    """
    directory = Path(run_dir)
    results = write_results(rows, directory, ranking=ranking, about=about)
    figures = {"Where tokens leave": plots.exit_shares(rows, directory / "exit_shares.png", labels)}
    if known := [row for row in rows if not math.isnan(row.quality)]:  # of withheld answers nobody knows a quality
        picture = plots.speed_quality(known, directory / "speed_quality.png", labels)
        figures = {"Speed and quality": picture} | figures
    if probes:
        figures["Accuracy per block"] = plots.accuracy_per_block(probes, directory / "accuracy_per_block.png", labels)
        text = json.dumps([probe.to_json() for probe in probes], indent=1) + "\n"
        write_atomically(directory / "probes.json", text.encode())
    report = directory / "report.md"
    write_atomically(report, markdown_report(rows, probes, figures, ranking).encode())
    return ReportPaths(results=results, report=report, plots=figures)


def terminal_table(rows: Sequence[Row]) -> str:
    """All rows as aligned text; ``*`` marks the fastest row of a task that keeps 99% of the full model's quality."""
    return aligned([_HEADINGS, *_cells(rows)])


def terminal_metrics(rows: Sequence[Row], ranking: Sequence[RankingRow]) -> str:
    """Everything else that was measured, as aligned text: metrics, breakdowns, ranked candidates, what could not run."""
    tables = metric_tables(rows) | ({"ranked candidates": table} if (table := ranking_table(ranking)) else {})
    parts = [f"\n{title}\n{_aligned(table)}" for title, table in tables.items()]
    parts += [f"not computed: {name}: {why}" for name, why in unavailable(rows).items()]
    return "\n".join(parts)


def markdown_report(
    rows: Sequence[Row], probes: Sequence[Probe], figures: dict[str, Path], ranking: Sequence[RankingRow] = ()
) -> str:
    """The text of ``report.md``; figures are linked by file name."""
    lines = ["# Early exits: quality and speed", ""]
    for task in tasks_of(rows):
        best = best_row(rows, task)
        if all(math.isnan(row.quality) for row in rows if row.task == task):
            lines.append(f"- **{task}**: answers are withheld, so there is no quality.")
        elif best is None:
            lines.append(f"- **{task}**: no threshold below 1 keeps 99% of the full model's quality.")
        else:
            lines.append(
                f"- **{task}**: {best.speed:.2f}x the faster baseline at {best.quality_ratio:.1%} of the full model's "
                f"quality (`{best.method}`, threshold {best.threshold:g}, n = {best.n})."
            )
    lines += ["", "## Results", "", "| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    lines += ["| " + " | ".join(cells) + " |" for cells in _cells(rows)]
    conditions = sorted({f"{row.extras['threads']} threads" for row in rows if "threads" in row.extras})
    lines += [
        "",
        "`*`: fastest row that keeps 99% of the quality."
        + (f" Timed with {', '.join(conditions)}." if conditions else ""),
    ]
    lines += ["", LEGEND]
    for title, table in metric_tables(rows).items():
        lines += [f"## {title}", "", *markdown(table), ""]
    lines += [f"- not computed: **{name}**: {why}" for name, why in unavailable(rows).items()]
    if ranking:
        lines += ["## Candidates ranked by likelihood", "", *markdown(ranking_table(ranking)), "", RANKING_LEGEND, ""]
    for title, path in figures.items():
        lines += [f"## {title}", "", f"![{title}]({path.name})", ""]
    for probe in probes:
        lines += [*_probe_table(probe), ""]
    return "\n".join(lines)


def _probe_table(probe: Probe) -> list[str]:
    blocks = sorted({k for name in probe.curves for k in probe.accuracy(name)})
    lines = [f"Teacher-forced accuracy on `{probe.task}`, {probe.tokens} answer tokens, by block:", ""]
    lines += ["| | " + " | ".join(map(str, blocks)) + " |", "|" + "---|" * (len(blocks) + 1)]
    for name in probe.curves:
        accuracy = probe.accuracy(name)
        cells = (f"{accuracy[k]:.3f}" if k in accuracy else "" for k in blocks)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    best = {task: best_row(rows, task) for task in tasks_of(rows)}
    return [
        [
            row.task,
            row.method,
            "-" if row.threshold is None else f"{row.threshold:g}",
            f"{row.quality:.3f}",
            f"{row.quality_ratio:.1%}",
            f"{row.agreement:.1%}",
            f"{row.mean_blocks:.2f}",
            f"{row.layer_ratio:.2f}",
            _with_interval(row.wall_ratio, row.extras.get("wall_ratio_interval")),
            _with_interval(row.wall_ratio_hf, row.extras.get("wall_ratio_hf_interval")),
            str(row.n),
            "*" if row is best[row.task] else "",
        ]
        for row in rows
    ]


def _with_interval(ratio: float | None, interval: Sequence[float] | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" if interval is None else f"{ratio:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, headings first, as text with columns of equal width."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)
