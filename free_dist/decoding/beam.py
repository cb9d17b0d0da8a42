"""Beam search in which every beam exits on its own.

At each step every beam walks the exits.  Where one is confident, the beam's continuations are scored by the log-softmax of
that exit's head; otherwise by the full model's.  Candidates of all beams of an item then compete by their summed
log-probability, in the way of transformers' beam search: the 2 num_beams best are kept, a finished one counts if it is among
the first num_beams, and a finished one's score is its sum over length ** length_penalty.  With no active exit the sequences
and scores are those of ``transformers``' ``generate(num_beams=...)``; scores are in float32, as there.

Beams of an item wait for each other, since they compete; what they have in common runs once (``beam_cache``).  Items that are
done leave.  Does not know text, images, or how confidence is computed.

Shape letters: N items, R rows (beams of all items), M columns of an exit head, V vocabulary, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from free_dist.backbones import Backbone, Start
from free_dist.config import UserError
from free_dist.decoding.beam_cache import MIN_SHARED, BeamCache
from free_dist.decoding.cache import Counts
from free_dist.decoding.exit_walk import ExitWalk, Source
from free_dist.decoding.policy import ExitPolicy
from free_dist.decoding.result import GenerationResult, TokenRecord
from free_dist.exits import ExitBank
from free_dist.exits.gate import ExitChecks


@dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """How beams are chosen; raises UserError for values that cannot run."""

    num_beams: int
    """Hypotheses followed per item."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    eos: int
    """Ends an answer; negative: never."""
    length_penalty: float = 1.0
    """Exponent of the length in a score: above 0 favours long answers, below 0 short ones."""
    early_stopping: bool | str = False
    """When ``num_beams`` hypotheses are finished.  True: stop.  False: stop when the best open one would not enter them if it
    ended now.  "never": stop when it cannot enter them at any length."""
    min_shared: int = MIN_SHARED
    """Positions that several beams wait to run in common, from which they run once; 1: always."""

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise UserError(f"num_beams={self.num_beams}: want at least 1")
        if not math.isfinite(self.length_penalty):
            raise UserError(f"length_penalty={self.length_penalty}: want a finite number")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise UserError(f'early_stopping={self.early_stopping!r}: want True, False or "never"')


class _Candidate(NamedTuple):
    """A beam of an item with one more token."""

    total: float
    """Summed log-probability."""
    score: float
    """``total`` over length ** length_penalty: its score if it ended here."""
    bound: float
    """The best score its continuations are taken to reach."""
    beam: int
    """The beam it continues, as its place among the item's."""
    token: int


class _Beam(NamedTuple):
    total: float
    records: tuple[TokenRecord, ...]
    counts: Counts
    """Work of its row at its last record."""


@dataclass(slots=True)
class _Item:
    index: int
    """Place among the prompts."""
    beams: list[_Beam] = field(default_factory=lambda: [_Beam(0.0, (), Counts())])
    finished: list[tuple[float, _Beam]] = field(default_factory=list)
    """Best first, at most ``num_beams``."""
    done: bool = False


def beam_search(
    backbone: Backbone,
    bank: ExitBank | None,
    policy: ExitPolicy | None,
    checks: ExitChecks | None,
    start: Start,
    options: BeamOptions,
) -> tuple[tuple[GenerationResult, ...], Counts]:
    """The best hypothesis of each of N items, and the work of all beams together, where a shared call counts once.

    Each result's ``score`` is the hypothesis' own, with the length penalty.  Its records tell the history of that hypothesis
    alone: the exit that scored each token, the exit's confidence (of its most likely token, which need not be the one chosen),
    and the work its row took part in, over all the rows it passed through.  That work is counted in full however many beams
    shared it, so it is what the hypothesis would have needed alone, less what another beam with the same beginning ran earlier.

    ``bank``, ``policy`` and ``checks`` come together or not at all; callers check shapes and sizes.  Raises UserError where
    the vocabulary is too small for so many beams, plain ValueError where log-probabilities are not numbers.
    """
    if 2 * options.num_beams > backbone.vocab_size:
        raise UserError(f"num_beams={options.num_beams}: want at most {backbone.vocab_size // 2}, half the vocabulary")
    walk = ExitWalk(backbone, bank, policy, checks, start, options.max_new_tokens, options.min_shared)
    cache = walk.cache
    items = [_Item(index) for index in range(cache.n_rows)]
    live = items
    n_tokens = 0
    while live:
        log_probs, sources = walk.log_probs(n_tokens)
        n_tokens += 1
        rows_per_item = cache.n_rows // len(live)
        parents: list[int] = []
        for place, (item, candidates) in enumerate(
            zip(live, _candidates(log_probs, live, n_tokens, options), strict=True)
        ):
            offset = place * rows_per_item
            running = _extend(item, candidates, sources[offset:], cache.counts[offset:], n_tokens, options)
            if not item.done:
                parents += [offset + candidate.beam for candidate in running]
        live = [item for item in live if not item.done]
        if live:
            cache.take_rows(parents)
            _read_tokens(backbone, cache, [beam.records[-1].token for item in live for beam in item.beams])
    results = []
    for item in items:
        if not item.finished:
            raise ValueError("the log-probabilities of every beam are NaN or infinite: the model's logits overflow")
        score, beam = item.finished[0]
        results.append(GenerationResult(records=beam.records, n_blocks=backbone.n_blocks, score=score))
    return tuple(results), cache.calls


def _candidates(
    log_probs: Tensor, live: Sequence[_Item], n_tokens: int, options: BeamOptions
) -> list[list[_Candidate]]:
    """Log-probabilities [R, V] -> each item's 2 num_beams best continuations, best first; one host synchronisation."""
    totals = log_probs.new_tensor([[beam.total for beam in item.beams] for item in live])
    vocab_size = log_probs.shape[-1]
    summed = (log_probs.view(*totals.shape, vocab_size) + totals[:, :, None]).flatten(1)
    # Twice as many as beams: every beam has one end-of-sequence token, so at least num_beams go on.
    best, flat = summed.topk(2 * options.num_beams)
    reach = n_tokens
    if options.early_stopping == "never" and options.length_penalty > 0:
        # Sums fall with length, but the divisor grows: the longest answer may score best.
        reach = options.max_new_tokens
    columns = (best, best / n_tokens**options.length_penalty, best / reach**options.length_penalty, flat)
    table = torch.stack([column.double() for column in columns], dim=-1).tolist()
    return [
        [
            _Candidate(total, score, bound, int(index) // vocab_size, int(index) % vocab_size)
            for total, score, bound, index in row
        ]
        for row in table
    ]


def _extend(
    item: _Item,
    candidates: Sequence[_Candidate],
    sources: Sequence[Source],
    counts: Sequence[Counts],
    n_tokens: int,
    options: BeamOptions,
) -> list[_Candidate]:
    """Give an item its next beams and finished hypotheses -> the candidates that became beams, in the beams' order.

    ``sources`` and ``counts`` belong to the item's rows.
    """

    def extended(candidate: _Candidate) -> _Beam:
        beam, row = item.beams[candidate.beam], counts[candidate.beam]
        work = row.since(beam.counts)
        record = TokenRecord(
            candidate.token,
            *sources[candidate.beam],
            work.block_calls,
            work.block_positions,
            work.exit_calls,
            work.head_calls,
        )
        return _Beam(candidate.total, (*beam.records, record), row.copy())

    is_last = n_tokens == options.max_new_tokens
    running: list[_Candidate] = []
    for rank, candidate in enumerate(candidates):
        if is_last or candidate.token == options.eos:
            # Tokens that a pruned head leaves out have a probability of 0 and fill the places nobody else takes.
            if rank < options.num_beams and candidate.total > -math.inf:
                item.finished.append((candidate.score, extended(candidate)))
        elif len(running) < options.num_beams:
            running.append(candidate)
    item.finished.sort(key=lambda scored: -scored[0])
    del item.finished[options.num_beams :]
    item.beams = [extended(candidate) for candidate in running]
    is_full = len(item.finished) == options.num_beams
    item.done = (
        is_last
        or not running[0].total > -math.inf
        or (is_full and (options.early_stopping is True or not running[0].bound > item.finished[-1][0]))
    )
    return running


def _read_tokens(backbone: Backbone, cache: BeamCache, tokens: list[int]) -> None:
    """Let the newest token of every row enter the stack."""
    lengths = [cache.length(row) for row in range(cache.n_rows)]
    ids = torch.tensor(tokens, device=cache.device)[:, None]
    past = lengths[0] if len(set(lengths)) == 1 else torch.tensor(lengths, device=cache.device)
    cache.append(range(cache.n_rows), backbone.embed(ids, None, past))
