"""Rows that walk the exits side by side: each stops where an exit is confident, all end with scores of one and the same token.

This is what beams need, which compete at every token.  Does not know beams, tokens already chosen, or what is done with scores.

Shape letters: R rows held, M columns of an exit head, V vocabulary, D model width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from free_dist.backbones import Backbone, Start
from free_dist.decoding.ask import ExitInquiry
from free_dist.decoding.beam_cache import BeamCache
from free_dist.decoding.policy import ExitPolicy, Scores
from free_dist.exits import ExitBank
from free_dist.exits.gate import ExitChecks


class Source(NamedTuple):
    """Where the log-probabilities of a row came from."""

    exit_layer: int | None
    """Block after which it stopped; None at full depth."""
    confidence: float | None
    """Confidence of that exit; None at full depth."""


_FULL_DEPTH = Source(None, None)


class ExitWalk:
    """Takes every row through the exits, each as deep as it needs."""

    def __init__(
        self,
        backbone: Backbone,
        bank: ExitBank | None,
        policy: ExitPolicy | None,
        checks: ExitChecks | None,
        start: Start,
        max_new_tokens: int,
        min_shared: int,
    ) -> None:
        """``bank``, ``policy`` and ``checks`` come together or not at all; the other arguments size the cache."""
        self._backbone = backbone
        self._exits = ExitInquiry(backbone, bank, policy, checks)
        capacity = start.hidden.shape[1] + max_new_tokens - 1  # the last token is never read
        self.cache = BeamCache(backbone, self._exits.exits, start, capacity, min_shared=min_shared)

    def log_probs(self, position: int) -> tuple[Tensor, list[Source]]:
        """Log-probabilities of answer token ``position`` [R, V], float32, and where each row's came from."""
        cache = self.cache
        waiting = list(range(cache.n_rows))
        earlier: list[list[int]] = [[] for _ in waiting]
        sources = [_FULL_DEPTH] * cache.n_rows
        order: list[int] = []
        parts: list[Tensor] = []
        for segment in range(len(self._exits.active)):
            hidden = cache.advance(segment, waiting)[:, -1]
            emitted, part = self._ask(segment, waiting, hidden, position, earlier, sources)
            if part is not None:
                order += emitted
                parts.append(part)
                waiting = [row for row in waiting if row not in emitted]
            if not waiting:
                break
        if waiting:
            hidden = cache.advance(len(self._exits.active), waiting, last_only=True)[:, -1]
            logits = self._backbone.lm_head(self._backbone.final_norm(hidden))
            cache.count_heads(waiting)
            order += waiting
            parts.append(torch.log_softmax(logits.float(), dim=-1))
        if len(parts) == 1:
            return parts[0], sources
        return torch.cat(parts)[torch.tensor(order, device=cache.device).argsort()], sources

    def _ask(
        self,
        segment: int,
        rows: list[int],
        hidden: Tensor,
        position: int,
        earlier: list[list[int]],
        sources: list[Source],
    ) -> tuple[list[int], Tensor | None]:
        """Ask the exit after ``segment`` about rows whose last states are ``hidden`` [R, D] -> those it is confident about.

        Also their log-probabilities, None if there are none.  Updates ``earlier`` and ``sources``, which have an entry per row
        of the cache.
        """
        if not self._exits.is_active_at(segment, position):
            return [], None
        verdict = self._exits.ask(
            self.cache, segment, rows, hidden, [position] * len(rows), [earlier[row] for row in rows]
        )
        if verdict is None:
            return [], None
        rows, scores, decision, tokens = verdict
        for row, token in zip(rows, tokens, strict=True):
            earlier[row].append(token)
        chosen = [i for i, emit in enumerate(decision.emit) if emit]
        if not chosen:
            return [], None
        layer = self.cache.segments[segment][1]
        for i in chosen:
            sources[rows[i]] = Source(layer, decision.confidences[i])
        kept = scores if len(chosen) == len(rows) else Scores(scores.logits[chosen], scores.ids)
        return [rows[i] for i in chosen], _over_vocabulary(kept, self._backbone.vocab_size)


def _over_vocabulary(scores: Scores, vocab_size: int) -> Tensor:
    """Logits of M columns -> log-probabilities of all tokens, float32 [R, V]; -inf for those the head leaves out."""
    log_probs = torch.log_softmax(scores.logits.float(), dim=-1)
    if scores.ids is None:
        return log_probs
    whole = log_probs.new_full((log_probs.shape[0], vocab_size), -math.inf)
    return whole.index_copy_(1, scores.ids, log_probs)
