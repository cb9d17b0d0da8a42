"""Cheap checks replayed on recorded rows: emissions, agreement, expected blocks, and where checking pays.

Teacher-forced throughout: a token emitted early does not change the rows after it, as it may when decoding.
Costs are weights read, in units of one block (:class:`~free_dist.exits.gate.CheckCosts`): the limit of batch-1 decoding.
They are not times; those are measured by decoding.  Does not know data sets or files.

Shape letters: K exits, N rows, D model width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from free_dist.backbones import Backbone
from free_dist.config import EXIT_HEADS, TASKS
from free_dist.exits.check_files import FittedChecks, Table, build_checks
from free_dist.exits.check_fitting import CHUNK, CheckRows, doubled, screen_agreement, worthwhile_positions
from free_dist.exits.gate import CheckCosts, CheckOptions, ExitChecks, linear_head, setting_name
from free_dist.exits.transformer import ExitBank


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What every exit's checks say of every row, whether or not a shallower exit had emitted it: [K, N] each."""

    gate: Tensor
    """The gate lets the row through; all true without gates."""
    discriminator: Tensor
    """The discriminator lets it through; all true without discriminators."""
    sure: Tensor
    """The head's confidence exceeds the exit's threshold."""
    tokens: Tensor
    """The head's most likely token."""
    costs: CheckCosts

    @property
    def emits(self) -> Tensor:
        """Gate, discriminator and head agree to emit."""
        return self.gate & self.discriminator & self.sure

    @property
    def blocks(self) -> Tensor:
        """Cost of a visit: the gate's, and where it lets through that of what lies behind it."""
        head = self.costs.discriminator + self.discriminator * self.costs.head
        return self.costs.gate + self.gate * (self.costs.exit_transformer + head)

    def with_only(self, *, gate: bool, discriminator: bool) -> Answers:
        """The same head with the gates or the discriminators taken away."""
        everything = torch.ones_like(self.gate)
        return replace(
            self,
            gate=self.gate if gate else everything,
            discriminator=self.discriminator if discriminator else everything,
            costs=self.costs._replace(
                gate=self.costs.gate * gate, discriminator=self.costs.discriminator * discriminator
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One setting of the checks on N rows, exits asked from shallow to deep."""

    emitted: float
    """Share of rows that some exit emits."""
    agreement: float
    """Share of the emitted rows whose token is the full model's; 1 when none is emitted."""
    backbone_blocks: float
    """Mean blocks run per row, checks left out."""
    check_blocks: float
    """Mean cost of all checks of a row, in blocks."""
    fruitless_visit: float
    """Mean cost, in blocks, of a visit to an exit that does not emit; 0 when there is none."""

    @property
    def total_blocks(self) -> float:
        """Backbone and checks together."""
        return self.backbone_blocks + self.check_blocks


@dataclass(frozen=True, kw_only=True)
class GateQuality:
    """How one exit's gate, or discriminator, separates the rows that the exit emits rightly."""

    exit_layer: int
    rate: float
    """Share of rows whose full check emits the full model's token."""
    passed: float
    """Share of rows let through."""
    recall: float
    """Share of the right emissions let through; 1 when there is none."""
    precision: float
    """Share of the rows let through that are right emissions; 1 when none is let through."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What fitted checks do on held-out rows."""

    rows: int
    gates: tuple[GateQuality, ...]
    discriminators: tuple[GateQuality, ...]
    coverage: dict[int, float]
    """Size of a pruned head -> share of the full model's tokens that it holds."""
    screen: dict[int, float]
    """Rank of the screen -> share of exit features from which it reads the full head's token."""
    everywhere: dict[str, Outcome]
    """Setting of the checks -> outcome, every exit asked at every answer position."""
    where_it_pays: dict[str, Outcome]
    """The same, asked only where ``worthwhile`` says so."""


@torch.inference_mode()
def ask(
    checks: ExitChecks, rows: CheckRows, thresholds: Sequence[float], backbone: Backbone, bank: ExitBank
) -> Answers:
    """Put every row to every exit's checks, on the CPU and in float32."""
    parts = []
    for k, threshold in enumerate(thresholds):
        for hidden, features in zip(rows.hidden[k].split(CHUNK), rows.features[k].split(CHUNK), strict=True):
            everything = torch.ones(len(hidden), dtype=torch.bool)
            gate, discriminator = checks.may_exit(k, hidden), checks.looks_final(k, features)
            logits, ids = checks.scores(k, features)
            confidence, column = torch.softmax(logits, dim=-1, dtype=torch.float32).max(-1)
            parts.append(
                (
                    everything if gate is None else gate,
                    everything if discriminator is None else discriminator,
                    confidence > threshold,
                    column if ids is None else ids[column],
                )
            )
    gate, discriminator, sure, tokens = (
        torch.cat(column).view(len(thresholds), -1) for column in zip(*parts, strict=True)
    )
    return Answers(
        gate=gate,
        discriminator=discriminator,
        sure=sure,
        tokens=tokens,
        costs=checks.costs(backbone, bank.transformers[0]),
    )


def ask_all(
    bank: ExitBank, fitted: FittedChecks, rows: CheckRows, backbone: Backbone, *, rescored: int = CheckOptions.rescored
) -> dict[str, Answers]:
    """Setting -> answers, for every combination of gate, discriminator and head, at the fitted sizes and thresholds."""
    found = {}
    for head in EXIT_HEADS:
        options = CheckOptions(gate=True, discriminator=True, head=head, rescored=rescored)
        answers = ask(build_checks(bank, fitted, options), rows, fitted.thresholds, backbone, bank)
        for gate, discriminator in itertools.product((False, True), repeat=2):
            name = setting_name(gate=gate, discriminator=discriminator, head=head)
            found[name] = answers.with_only(gate=gate, discriminator=discriminator)
    return found


def outcome(
    answers: Answers, rows: CheckRows, *, exit_layers: Sequence[int], n_blocks: int, asked: Tensor | None = None
) -> Outcome:
    """Walk every row from exit to exit; ``asked`` bool [K, N] leaves exits out."""
    n_rows = len(rows.final_tokens)
    left = torch.ones(n_rows, dtype=torch.bool)
    right = torch.zeros(n_rows, dtype=torch.bool)
    blocks = torch.full((n_rows,), float(n_blocks))
    spent, fruitless, visits = torch.zeros(n_rows), torch.zeros(n_rows), torch.zeros(n_rows)
    for k, layer in enumerate(exit_layers):
        visited = left if asked is None else left & asked[k]
        fires = visited & answers.emits[k]
        blocks[fires] = layer
        right |= fires & (answers.tokens[k] == rows.final_tokens)
        spent += visited * answers.blocks[k]
        fruitless += (visited & ~fires) * answers.blocks[k]
        visits += visited & ~fires
        left = left & ~fires
    emitted = int((~left).sum())
    return Outcome(
        emitted=emitted / n_rows,
        agreement=int(right.sum()) / emitted if emitted else 1.0,
        backbone_blocks=float(blocks.mean()),
        check_blocks=float(spent.mean()),
        fruitless_visit=float(fruitless.sum() / visits.sum().clamp(min=1)),
    )


def with_positions(
    fitted: FittedChecks,
    answers: Mapping[str, Answers],
    rows: CheckRows,
    *,
    exit_layers: Sequence[int],
    n_blocks: int,
    n_positions: int,
) -> FittedChecks:
    """``fitted`` with ``worthwhile`` of every task and setting, as the answers on these rows have it.

    Tasks are kept apart: an exit that always emits the answers of one may never emit those of another.  The rows must not
    have trained the gates, which would look better than they are.
    """
    worthwhile: dict[str, dict[str, Table]] = {}
    for index in torch.unique(rows.tasks).tolist():
        here = rows.tasks == index
        tables = {}
        for setting, answer in answers.items():
            pays = worthwhile_positions(
                answer.emits[:, here],
                answer.blocks[:, here],
                rows.positions[here],
                exit_layers=exit_layers,
                n_blocks=n_blocks,
                n_positions=n_positions,
            )
            tables[setting] = tuple(tuple(row) for row in pays.tolist())
        worthwhile[TASKS[index]] = tables
    return replace(fitted, worthwhile=worthwhile)


def worth_asking(fitted: FittedChecks, setting: str, rows: CheckRows) -> Tensor:
    """Whether ``worthwhile`` has an exit asked about a row, bool [K, N]; false for a task it does not know."""
    asked = torch.zeros(rows.confidences.shape, dtype=torch.bool)
    for task, tables in fitted.worthwhile.items():
        pays = torch.tensor(tables[setting])
        here = rows.tasks == TASKS.index(task)
        asked[:, here] = pays[:, rows.positions[here].clamp(max=pays.shape[1] - 1)]
    return asked


def measure(fitted: FittedChecks, bank: ExitBank, backbone: Backbone, rows: CheckRows) -> CheckReport:
    """Everything above on rows that no part of the fitting has seen."""
    answers = ask_all(bank, fitted, rows, backbone)
    both = answers[setting_name(gate=True, discriminator=True, head=EXIT_HEADS[0])]
    layers, n_blocks = bank.exit_layers, backbone.n_blocks
    return CheckReport(
        rows=len(rows.final_tokens),
        gates=_quality(both.gate, rows, fitted.thresholds, layers),
        discriminators=_quality(both.discriminator, rows, fitted.thresholds, layers),
        coverage=vocabulary_coverage(fitted.token_order, rows.final_tokens),
        screen=screen_agreement(linear_head(bank), fitted.down, fitted.lift, rows),
        everywhere={name: outcome(one, rows, exit_layers=layers, n_blocks=n_blocks) for name, one in answers.items()},
        where_it_pays={
            name: outcome(one, rows, exit_layers=layers, n_blocks=n_blocks, asked=worth_asking(fitted, name, rows))
            for name, one in answers.items()
        },
    )


def vocabulary_coverage(order: Tensor, tokens: Tensor) -> dict[int, float]:
    """Size of a pruned head (64, doubled up to V) -> share of ``tokens`` [...] that it holds."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    places = rank[tokens.flatten()]
    return {size: float((places < size).double().mean()) for size in doubled(64, len(order))}


def _quality(
    passed: Tensor, rows: CheckRows, thresholds: Sequence[float], layers: Sequence[int]
) -> tuple[GateQuality, ...]:
    """One entry per exit, for what gates or discriminators let through, bool [K, N]."""
    wanted = rows.confident(thresholds) & rows.agreeing()
    entries = []
    for k, layer in enumerate(layers):
        both = int((wanted[k] & passed[k]).sum())
        n_wanted, n_passed = int(wanted[k].sum()), int(passed[k].sum())
        entries.append(
            GateQuality(
                exit_layer=layer,
                rate=n_wanted / len(wanted[k]),
                passed=n_passed / len(wanted[k]),
                recall=both / n_wanted if n_wanted else 1.0,
                precision=both / n_passed if n_passed else 1.0,
            )
        )
    return tuple(entries)
