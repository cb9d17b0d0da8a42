"""Asking an exit: gate, exit transformer, discriminator, head, policy, in that order, on rows that reached it.

The one place where a check is made, for single sequences, batches, drafts and beams alike.  Does not know what becomes of the
answer.

Shape letters: R rows asked, S rows that got as far as the policy, D model width, K exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from free_dist.backbones import Backbone
from free_dist.decoding.cache import PendingCache
from free_dist.decoding.policy import Decision, ExitPolicy, Scores
from free_dist.exits import ExitBank, ExitTransformer
from free_dist.exits.gate import ExitChecks


class Verdict(NamedTuple):
    """What an exit says about S rows."""

    rows: list[int]
    """The rows it speaks of; the others were turned away by a gate or a discriminator."""
    scores: Scores
    """[S, M]."""
    decision: Decision
    tokens: list[int]
    """``decision.tokens`` on the host."""


class ExitInquiry:
    """The active exits of a bank, ready to be asked."""

    def __init__(
        self, backbone: Backbone, bank: ExitBank | None, policy: ExitPolicy | None, checks: ExitChecks | None
    ) -> None:
        """``bank``, ``policy`` and ``checks`` come together or not at all; without them there is no active exit."""
        self._backbone = backbone
        self._policy = policy
        self._checks = checks
        self.active: tuple[int, ...] = ()
        """Indices into the bank of the exits that can fire, shallow to deep; place s stands behind segment s."""
        self.exits: list[tuple[int, ExitTransformer]] = []
        """Their layers and transformers."""
        if bank is not None:
            assert policy is not None
            self.active = tuple(index for index in range(len(bank.exit_layers)) if policy.is_active(index))
            self.exits = [(bank.exit_layers[index], bank.transformers[index]) for index in self.active]  # type: ignore[misc]

    def is_active_at(self, segment: int, position: int) -> bool:
        """Whether the exit behind a segment can fire for answer token ``position``."""
        assert self._policy is not None
        return self._policy.is_active_at(self.active[segment], position)

    def ask(
        self,
        cache: PendingCache,
        segment: int,
        rows: list[int],
        hidden: Tensor,
        positions: Sequence[int],
        earlier: Sequence[Sequence[int]],
    ) -> Verdict | None:
        """Ask the exit behind a segment about rows of the cache, whose last states are ``hidden`` [R, D].

        ``positions`` and ``earlier``, one entry per row, are what policies want to know.  None if every row was turned away.
        """
        assert self._policy is not None and self._checks is not None  # noqa: PT018
        index = self.active[segment]
        kept = list(range(len(rows)))
        likely = self._checks.may_exit(index, hidden)
        if likely is not None:
            kept = [i for i, keep in enumerate(likely.tolist()) if keep]
            if not kept:
                return None
        features = self._backbone.final_norm(cache.run_exit(segment, [rows[i] for i in kept]))
        likely = self._checks.looks_final(index, features)
        if likely is not None:
            flags = likely.tolist()
            if not all(flags):
                kept = [i for i, keep in zip(kept, flags, strict=True) if keep]
                if not kept:
                    return None
                features = features[likely]
        scores = self._checks.scores(index, features)
        if len(kept) < len(rows):
            rows = [rows[i] for i in kept]
            positions, earlier = [positions[i] for i in kept], [earlier[i] for i in kept]
        cache.count_heads(rows)
        decision = self._policy.decide(index, scores, positions, earlier)
        return Verdict(rows, scores, decision, decision.tokens.tolist())
