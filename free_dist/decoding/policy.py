"""Exit policies: when an exit is confident enough to emit its token.

Knows logits and thresholds; does not know caches, blocks or what happens to a token that is not emitted.

Shape letters: K exits, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Decision(NamedTuple):
    """What one exit says about one position."""

    token: Tensor
    """The exit's most likely token, int64 scalar; left on its device."""
    confidence: float
    """Between 0 and 1."""
    emit: bool
    """Whether the token is emitted here and every deeper block skipped."""


class ExitPolicy(Protocol):
    """Decides, exit by exit; an exit that can never fire is inactive and costs nothing."""

    def is_active(self, exit_index: int) -> bool:
        """Whether exit ``exit_index`` of the bank (0-based, shallow to deep) can fire at all."""

    def decide(self, exit_index: int, logits: Tensor) -> Decision:
        """Logits [V] of the last position at an active exit -> decision; one host synchronisation at most."""


class MaxProbPolicy:
    """Emit where the largest softmax probability exceeds the exit's threshold (FREE, section 3).

    The comparison is strict and a probability never exceeds 1, so a threshold of 1 or more switches its exit off.
    """

    def __init__(self, thresholds: float | Sequence[float], n_exits: int) -> None:
        """One threshold for all exits, or one per exit; raises ValueError on another count, a negative value or NaN."""
        values = [thresholds] * n_exits if isinstance(thresholds, (int, float)) else list(thresholds)
        if len(values) != n_exits:
            raise ValueError(f"thresholds: {len(values)} values for {n_exits} exits; give one for all, or one per exit")
        if any(math.isnan(value) or value < 0 for value in values):
            raise ValueError(f"thresholds={values}: want numbers from 0 (always exit) to 1 or more (never exit)")
        self.thresholds = tuple(float(value) for value in values)

    def is_active(self, exit_index: int) -> bool:
        """Whether the exit's threshold lies below 1."""
        return self.thresholds[exit_index] < 1.0

    def decide(self, exit_index: int, logits: Tensor) -> Decision:
        """Logits [V] -> decision; the softmax is taken in float32."""
        probability, token = torch.softmax(logits, dim=-1, dtype=torch.float32).max(dim=-1)
        confidence = probability.item()
        return Decision(token, confidence, confidence > self.thresholds[exit_index])
