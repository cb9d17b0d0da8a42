"""Exit policies: when an exit is confident enough to emit its token.

Four measures of confidence, all in [0, 1], and thresholds per exit and answer position.  Rows of a call are independent, and
a call waits for the device once.  Knows scores, thresholds and the tokens that shallower exits named; does not know caches,
blocks, heads, or what happens to a token that is not emitted.

Shape letters: R rows in a call, M columns of an exit head, K exits, P answer positions that have thresholds of their own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from free_dist.config import POLICY_NAMES, UserError, nearest
from free_dist.exits.gate import Scores

Thresholds = float | Sequence[float] | Sequence[Sequence[float]]
"""One for all exits, one per exit [K], or a table [K][P] per exit and answer position."""


class Decision(NamedTuple):
    """What one exit says about the next token of R rows."""

    tokens: Tensor
    """[R] int64, the exit's most likely tokens (of equals the first column); left on their device."""
    confidences: list[float]
    """R values in [0, 1]; NaN, which is never emitted, where the logits have no softmax (NaN, plus infinity)."""
    emit: list[bool]
    """R values: whether the token is emitted here and every deeper block skipped."""


class ExitPolicy(Protocol):
    """Decides, exit by exit; an exit that is not active need not be run."""

    def is_active(self, exit_index: int) -> bool:
        """Whether exit ``exit_index`` of the bank (0-based, shallow to deep) matters at any position."""

    def is_active_at(self, exit_index: int, position: int) -> bool:
        """Whether it matters for answer token ``position`` (0-based)."""

    def decide(
        self, exit_index: int, scores: Scores, positions: Sequence[int], earlier: Sequence[Sequence[int]]
    ) -> Decision:
        """Scores of R rows at one exit -> decision; one host synchronisation at most.

        ``positions``: per row, the index of the answer token.  ``earlier``: per row, the tokens that the exits checked before,
        shallow to deep, predict for this very token.
        """


class ThresholdTable:
    """Thresholds of K exits at P answer positions; positions from P on use the last column.

    The comparison is strict and no confidence exceeds 1: a threshold of 1 or more never fires.
    """

    def __init__(self, thresholds: Thresholds, n_exits: int) -> None:
        """Raises UserError on another number of exits, rows of unlike length, negative values, NaN, or no numbers."""
        entries = [thresholds] * n_exits if isinstance(thresholds, Real) else _items(thresholds)
        if len(entries) != n_exits:
            raise UserError(
                f"thresholds: {len(entries)} values for {n_exits} exits; give one for all, one per exit, "
                "or one row of answer positions per exit"
            )
        if all(isinstance(entry, Real) for entry in entries):
            entries = [[entry] for entry in entries]
        rows = [_items(entry) for entry in entries]
        lengths = [len(row) for row in rows]
        if min(lengths, default=1) == 0 or len(set(lengths)) > 1:
            raise UserError(
                f"thresholds: rows of {lengths} answer positions; want the same number, at least 1, for each exit"
            )
        if not all(isinstance(value, Real) and float(value) >= 0 for row in rows for value in row):
            raise UserError(f"thresholds={rows}: want numbers from 0 (exits soonest) to 1 or more (never exits)")
        self.values = tuple(tuple(float(value) for value in row) for row in rows)
        """[K][P]"""
        self.n_positions = max(lengths, default=1)
        """P"""

    def at(self, exit_index: int, position: int) -> float:
        """Threshold of an exit for answer token ``position`` (0-based)."""
        return self.values[exit_index][min(position, self.n_positions - 1)]

    def exceeded(self, exit_index: int, confidences: Sequence[float], positions: Sequence[int]) -> list[bool]:
        """Per row: whether its confidence exceeds the threshold of its position."""
        row = self.values[exit_index]
        if len(row) == 1:
            threshold = row[0]
            return [confidence > threshold for confidence in confidences]
        last = len(row) - 1
        return [
            confidence > row[min(position, last)] for confidence, position in zip(confidences, positions, strict=True)
        ]


class ConfidencePolicy(ABC):
    """Emit where one measure of confidence exceeds the threshold of the exit and the position."""

    def __init__(self, thresholds: Thresholds, n_exits: int) -> None:
        """Thresholds for ``n_exits`` exits; raises what :class:`ThresholdTable` raises."""
        self.thresholds = ThresholdTable(thresholds, n_exits)

    @staticmethod
    @abstractmethod
    def measure(logits: Tensor) -> tuple[Tensor, list[float]]:
        """[R, M] float32 or float64 -> (most likely columns [R] on their device, R confidences in [0, 1])."""

    def is_active(self, exit_index: int) -> bool:
        """Whether some threshold of the exit lies below 1."""
        return min(self.thresholds.values[exit_index]) < 1.0

    def is_active_at(self, exit_index: int, position: int) -> bool:
        """Whether the threshold of the exit at that answer position lies below 1."""
        return self.thresholds.at(exit_index, position) < 1.0

    def decide(
        self, exit_index: int, scores: Scores, positions: Sequence[int], earlier: Sequence[Sequence[int]]
    ) -> Decision:
        """Scores of R rows -> decision; what other exits predict is not asked."""
        columns, confidences = self.measure(widened(scores.logits))
        tokens = _tokens(columns, scores.ids)
        return Decision(tokens, confidences, self.thresholds.exceeded(exit_index, confidences, positions))


class MaxProbPolicy(ConfidencePolicy):
    """Confidence is the largest softmax probability (FREE, section 3)."""

    @staticmethod
    def measure(logits: Tensor) -> tuple[Tensor, list[float]]:
        """``max_i p_i``."""
        # The column of the logits, not of the probabilities: unlike logits may round to one probability.
        return logits.argmax(dim=-1), _largest_probability(logits).tolist()


class EntropyPolicy(ConfidencePolicy):
    """Confidence is one minus the normalised entropy of the softmax (the criterion of BranchyNet, arXiv 1709.01686).

    1 is certainty, 0 the uniform distribution.  A lone column is certain.  The number of columns is the normaliser, so a
    threshold chosen with a pruned head does not carry over to a full one.
    """

    @staticmethod
    def measure(logits: Tensor) -> tuple[Tensor, list[float]]:
        """``1 - H(p) / log M``."""
        # Minus infinity is a legal logit and would give 0 * inf; e^-1000 is 0 even in float64.
        logarithms = torch.log_softmax(logits, dim=-1).clamp_(min=-1000.0)
        negative_entropy = logarithms.exp().mul_(logarithms).sum(dim=-1).tolist()
        normaliser = math.log(logits.shape[-1]) or 1.0
        # Rounding may fall below 0 by a hair.  The order of the arguments keeps NaN.
        return logits.argmax(dim=-1), [max(1.0 + value / normaliser, 0.0) for value in negative_entropy]


class MarginPolicy(ConfidencePolicy):
    """Confidence is the lead of the most likely token over the second (the softmax measure of CALM, arXiv 2207.07061)."""

    @staticmethod
    def measure(logits: Tensor) -> tuple[Tensor, list[float]]:
        """``p_(1) - p_(2)``; the second is 0 where there is one column only."""
        columns = logits.argmax(dim=-1, keepdim=True)
        probabilities = torch.softmax(logits, dim=-1)
        first = probabilities.amax(dim=-1)
        # topk is slower for a large vocabulary, and names any of several equals.
        second = probabilities.scatter_(-1, columns, 0.0).amax(dim=-1)
        return columns.squeeze(-1), (first - second).tolist()


class PatiencePolicy:
    """Emit when the last ``patience`` checked exits, this one included, predict the same token.

    The criterion of PABEE (arXiv 2006.04152), which counts agreements: its patience t is ``patience = t + 1`` here.  Confidence
    is the largest softmax probability of this exit, which says more than the share of agreement (always 1 where emitted) and
    means the same as with MaxProbPolicy; it must exceed the threshold too.  Threshold 0 asks for agreement alone; 1 or more
    takes the exit out: it is not run and has no say.
    """

    def __init__(self, patience: int, n_exits: int, thresholds: Thresholds = 0.0) -> None:
        """Raises UserError for a patience that ``n_exits`` exits cannot reach, and what :class:`ThresholdTable` raises."""
        if not 1 <= patience <= n_exits:
            raise UserError(f"patience={patience}: with {n_exits} exits want 1 to {n_exits} that agree")
        self.patience = patience
        self.thresholds = ThresholdTable(thresholds, n_exits)
        columns = [[value < 1.0 for value in column] for column in zip(*self.thresholds.values, strict=True)]
        # Fewer exits than must agree: none of them can fire, so none is worth running.
        reachable = [column if sum(column) >= patience else [False] * n_exits for column in columns]
        self._active = tuple(zip(*reachable, strict=True))

    def is_active(self, exit_index: int) -> bool:
        """Whether the exit can fire or agree with one that fires, at some position."""
        return any(self._active[exit_index])

    def is_active_at(self, exit_index: int, position: int) -> bool:
        """Whether the exit can fire or agree with one that fires, at that answer position."""
        return self._active[exit_index][min(position, self.thresholds.n_positions - 1)]

    def decide(
        self, exit_index: int, scores: Scores, positions: Sequence[int], earlier: Sequence[Sequence[int]]
    ) -> Decision:
        """Scores of R rows and what the exits before predict -> decision."""
        logits = widened(scores.logits)
        tokens = _tokens(logits.argmax(dim=-1), scores.ids)
        confidence = _largest_probability(logits)
        ids, confidences = (
            (tokens.tolist(), confidence.tolist()) if tokens.is_cpu else _fetched_together(tokens, confidence)
        )
        needed = self.patience - 1
        emit = [
            sure and len(before) >= needed and all(other == token for other in before[len(before) - needed :])
            for sure, token, before in zip(
                self.thresholds.exceeded(exit_index, confidences, positions), ids, earlier, strict=True
            )
        ]
        return Decision(tokens, confidences, emit)


class FixedDepthPolicy:
    """Emit at one exit, always, whatever it says: a model cut off after that exit's block.

    No softmax is computed; the confidence is 1.
    """

    def __init__(self, exit_index: int, n_exits: int) -> None:
        """Raises UserError unless the bank has such an exit, 0-based."""
        if not 0 <= exit_index < n_exits:
            raise UserError(f"exit_index={exit_index}: with {n_exits} exits want 0 to {n_exits - 1}")
        self._exit_index = exit_index

    def is_active(self, exit_index: int) -> bool:
        """Whether this is the exit."""
        return exit_index == self._exit_index

    def is_active_at(self, exit_index: int, position: int) -> bool:
        """The same at every answer position."""
        return exit_index == self._exit_index

    def decide(
        self, exit_index: int, scores: Scores, positions: Sequence[int], earlier: Sequence[Sequence[int]]
    ) -> Decision:
        """The most likely token of every row."""
        tokens = _tokens(scores.logits.argmax(dim=-1), scores.ids)
        return Decision(tokens, [1.0] * len(positions), [True] * len(positions))


def make_policy(name: str, thresholds: Thresholds, n_exits: int, *, patience: int = 2) -> ExitPolicy:
    """The policy of that name (one of ``POLICY_NAMES``); ``patience`` is read by "patience" only.

    Raises UserError for an unknown name, and what the policy raises.
    """
    match name:
        case "max_prob":
            return MaxProbPolicy(thresholds, n_exits)
        case "entropy":
            return EntropyPolicy(thresholds, n_exits)
        case "margin":
            return MarginPolicy(thresholds, n_exits)
        case "patience":
            return PatiencePolicy(patience, n_exits, thresholds)
    raise UserError(
        f"exit policy {name!r}: want one of {', '.join(POLICY_NAMES)}; did you mean {nearest(name, POLICY_NAMES)!r}?"
    )


def _items(values: object) -> list:
    """The items of a list or tuple; raises UserError for anything else."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise UserError(f"thresholds: {values!r} is not a number or a list of numbers")
    return list(values)


def widened(logits: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _tokens(columns: Tensor, ids: Tensor | None) -> Tensor:
    """Columns [R] -> their tokens [R], by ``Scores.ids``."""
    return columns if ids is None else ids.index_select(0, columns)  # half the price of ids[columns]


def _largest_probability(logits: Tensor) -> Tensor:
    """[R, M] -> [R].  Faster than max and logsumexp, and as exact at large logits, where their difference is not."""
    return torch.softmax(logits, dim=-1).amax(dim=-1)


def _fetched_together(tokens: Tensor, confidence: Tensor) -> tuple[list[int], list[float]]:
    """Both [R] as numbers, in one transfer from a device that is waited for.  On the CPU two ``tolist`` cost less."""
    # float64 holds every id exactly, float32 only those up to 2^24.
    ids, confidences = torch.stack((tokens.double(), confidence.double())).tolist()
    return [int(token) for token in ids], confidences
