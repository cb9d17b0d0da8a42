"""The decoder: rows that wait before segments, segments that run when nobody can run a shallower one, tokens that leave.

Every row is independent.  It waits before some segment; the shallowest segment anyone waits for runs next, on all rows that
wait there, so rows that exit early run ahead and a deep segment is shared by as many rows as possible.  After a segment an
exit may be asked: a confident row emits its token and returns to the first segment.  Finished rows leave the caches.

In lossless mode tokens emitted by exits are drafts.  A row goes to full depth when no exit is confident, when enough tokens
are drafted, or when the last draft ends the answer; the full model then reads all of its drafts in one call, and what it does
not agree with is rolled back.

Does not know text, image files, how confidence is computed or how caches are laid out.

Shape letters: B rows, R rows of a call, T positions, D model width, V vocabulary, K active exits, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from free_dist.backbones import Backbone, Start
from free_dist.decoding.ask import ExitInquiry, Verdict
from free_dist.decoding.cache import Counts, PendingCache
from free_dist.decoding.policy import ExitPolicy, Scores
from free_dist.decoding.result import GenerationResult, TokenRecord
from free_dist.decoding.runners import StaticRunner
from free_dist.decoding.sampling import Sampler
from free_dist.decoding.speculation import DraftLength, accept_greedy, accept_sampled
from free_dist.decoding.state_propagation import PropagatingCache
from free_dist.decoding.static_cache import StaticPendingCache
from free_dist.exits import ExitBank
from free_dist.exits.gate import ExitChecks


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """How rows are decoded."""

    max_new_tokens: int
    """Longest answer, in tokens."""
    eos: int
    """Ends an answer; negative: never."""
    lossless: bool = False
    """Tokens from exits are drafts that the full model verifies."""
    max_draft_tokens: int = 16
    """Most drafts before a verification (lossless); how many are really made adapts to how many are accepted."""
    sampler: Sampler | None = None
    """None: greedy."""
    on_token: Callable[[int, int], None] | None = None
    """Called with (row, token) for every final token, in order."""
    should_stop: Callable[[int, list[int]], bool] | None = None
    """Called with (row, its tokens so far) after every final token; true ends the row."""
    state_propagation: bool = False
    """Skipped blocks see the states that exited instead of their own (approximate)."""


@dataclass(slots=True)
class _Draft:
    token: int
    exit_layer: int | None
    confidence: float | None
    probabilities: Tensor | None


@dataclass(slots=True)
class _Row:
    index: int
    """Place among the prompts."""
    verified: int
    """Positions whose output at full depth has been used (lossless)."""
    at: int = 0
    """Segment it waits for."""
    counts: Counts = field(default_factory=Counts)
    """Work at its last record."""
    records: list[TokenRecord] = field(default_factory=list)
    drafts: list[_Draft] = field(default_factory=list)
    earlier: list[int] = field(default_factory=list)
    """What the exits already checked predict for the token being decoded."""
    verifying: bool = False
    """On its way to full depth because of its drafts: no more checks."""
    unread: Counts | None = None
    """Work at its newest token, where the device alone knows that token (runners)."""
    finished: bool = False
    drafted: int = 0
    accepted: int = 0

    @property
    def answered(self) -> int:
        """Answer tokens so far, drafts included: the position of the next one."""
        return len(self.records) + len(self.drafts) + (self.unread is not None)


class Decoder:
    """Rows being decoded; :meth:`step` until :attr:`rows_left` is 0."""

    def __init__(
        self,
        backbone: Backbone,
        bank: ExitBank | None,
        policy: ExitPolicy | None,
        checks: ExitChecks | None,
        start: Start,
        options: DecoderOptions,
        runner: StaticRunner | None = None,
    ) -> None:
        """``bank``, ``policy`` and ``checks`` come together or not at all; a ``runner`` is one for just these."""
        self._backbone = backbone
        self._options = options
        self._exits = ExitInquiry(backbone, bank, policy, checks)
        capacity = start.hidden.shape[1] + options.max_new_tokens - 1  # the last token is never read
        self._static: StaticPendingCache | None = None
        if runner is None:
            kind = PropagatingCache if options.state_propagation else PendingCache
            self.cache = kind(backbone, self._exits.exits, start, capacity)
        else:
            self.cache = self._static = runner.new_cache(self._exits.active, start, capacity, policy)
        self._fuses = runner is not None and runner.fuses(policy)
        self._live = [_Row(index, length - 1) for index, length in enumerate(start.lengths)]
        self._rows = list(self._live)
        self._last = len(self.cache.segments) - 1
        self._draft_length = self._new_draft_length() if options.lossless else None

    @property
    def rows_left(self) -> int:
        """Rows that still decode."""
        return len(self._live)

    def results(self) -> list[GenerationResult]:
        """One per prompt, in their order."""
        return [
            GenerationResult(
                records=tuple(row.records), n_blocks=self._backbone.n_blocks, drafted=row.drafted, accepted=row.accepted
            )
            for row in self._rows
        ]

    def step(self) -> None:
        """Run one segment for all rows that wait for it, and what follows from it."""
        segment = min(row.at for row in self._live)
        places = [place for place, row in enumerate(self._live) if row.at == segment]
        if segment == self._last:
            self._read_full_depth(places)
        elif not self._read_to_exit_at_once(segment, places):
            self._settle(places, None)
            places = [place for place in places if not self._live[place].finished]
            if places:
                hidden = self.cache.advance(segment, places)
                for place in places:
                    self._live[place].at = segment + 1
                self._check(segment, places, hidden[:, -1])
        if any(row.finished for row in self._live):
            self._drop_finished()

    def _read_to_exit_at_once(self, segment: int, places: list[int]) -> bool:
        """The segment and the check behind it as one program, if there is one; what only the device knew is read with it."""
        if not self._fuses or not all(self._may_check(self._live[place], segment) for place in places):
            return False
        assert self._static is not None
        checked = self._static.advance_and_check(segment, places)
        if checked is None:
            return False
        for place in places:
            self._live[place].at = segment + 1
        self._settle(places, checked.read)
        self._take(segment, checked.verdict)
        return True

    def _check(self, segment: int, places: list[int], hidden: Tensor) -> None:
        """Ask the exit behind ``segment`` about the rows at ``places``, whose last states are ``hidden`` [R, D]."""
        asked = [i for i, place in enumerate(places) if self._may_check(self._live[place], segment)]
        if len(asked) < len(places):
            if not asked:
                return
            places, hidden = [places[i] for i in asked], hidden[asked]
        rows = [self._live[place] for place in places]
        positions = [row.answered for row in rows]
        verdict = self._exits.ask(self.cache, segment, places, hidden, positions, [row.earlier for row in rows])
        if verdict is not None:
            self._take(segment, verdict)

    def _take(self, segment: int, verdict: Verdict) -> None:
        """Rows that the exit behind ``segment`` is confident about emit its token, the others go on."""
        places, scores, decision, tokens = verdict
        rows = [self._live[place] for place in places]
        if True not in decision.emit:
            for row, token in zip(rows, tokens, strict=True):
                row.earlier.append(token)
            return
        predicted, probabilities = tokens, None
        if self._options.sampler is not None:
            probabilities = self._options.sampler.probabilities(scores, self._backbone.vocab_size)
            tokens = self._options.sampler.draw(probabilities).tolist()
        layer = self.cache.segments[segment][1]
        going_on: list[int] = []
        for i, (place, row) in enumerate(zip(places, rows, strict=True)):
            if row.finished:  # by the token before, which was read together with this verdict
                continue
            if not decision.emit[i]:
                row.earlier.append(predicted[i])
                continue
            draft = _Draft(
                tokens[i], layer, decision.confidences[i], None if probabilities is None else probabilities[i]
            )
            if self._options.lossless:
                row.drafts.append(draft)
                row.drafted += 1
                if draft.token == self._options.eos or row.answered == self._options.max_new_tokens:
                    row.verifying = True  # nothing is left to draft: on to full depth without a new position
                    continue
            else:
                self._finish_tokens(place, row, [draft])
            if not row.finished:
                going_on.append(place)
        self._read_tokens(going_on)

    def _may_check(self, row: _Row, segment: int) -> bool:
        if row.verifying:
            return False
        if self._draft_length is not None and len(row.drafts) >= self._draft_length.current:
            row.verifying = True
            return False
        return self._exits.is_active_at(segment, row.answered)

    def _read_full_depth(self, places: list[int]) -> None:
        """Run the last segment, and emit what it says or verify drafts with it."""
        rows = [self._live[place] for place in places]
        drafting = any(row.drafts for row in rows)
        wanted = [1] * len(rows)
        if drafting:
            wanted = [self.cache.length(place) - row.verified for place, row in zip(places, rows, strict=True)]
        sampler = self._options.sampler
        best: list[int] = []
        outputs = None if self._static is None else self._static.advance_and_read(places, last_only=not drafting)
        if outputs is None:
            hidden = self.cache.advance(self._last, places, last_only=not drafting)
            needed = torch.cat([hidden[i, -n:] for i, n in enumerate(wanted)]) if drafting else hidden[:, -1]
            logits = self._backbone.lm_head(self._backbone.final_norm(needed))
            self.cache.count_heads(places)
            if sampler is None:
                best = torch.argmax(logits, dim=-1).tolist()
        elif not drafting and self._may_read_later(rows):
            self._read_tokens(places, are_on_device=True)
            return
        else:
            logits = outputs.logits_of(wanted)
            if sampler is None:
                best = outputs.best_of(wanted)
        probabilities = logits
        if sampler is not None:
            probabilities = sampler.probabilities(Scores(logits, None), self._backbone.vocab_size)
        going_on: list[int] = []
        offset = 0
        for place, row, n in zip(places, rows, wanted, strict=True):
            tokens = [draft.token for draft in row.drafts]
            own: int | None
            if sampler is None:
                accepted, own = accept_greedy(tokens, best[offset : offset + n])
            else:
                drafted = [draft.probabilities for draft in row.drafts if draft.probabilities is not None]
                accepted, own = accept_sampled(tokens, drafted, probabilities[offset : offset + n], sampler)
            offset += n
            emitted = row.drafts[:accepted]
            if own is not None:
                emitted.append(_Draft(own, None, None, None))
            row.verified += accepted + 1
            if row.drafts:
                assert self._draft_length is not None
                self._draft_length.record(accepted, len(row.drafts))
                row.accepted += accepted
                if accepted < len(row.drafts):
                    # The first rejected draft, and what was drafted after it, were never the row's tokens.
                    self.cache.roll_back(place, row.verified)
                row.drafts = []
                row.verifying = False
            self._finish_tokens(place, row, emitted)
            if not row.finished:
                going_on.append(place)
        self._read_tokens(going_on)

    def _may_read_later(self, rows: list[_Row]) -> bool:
        """Whether these rows' tokens, just computed at full depth, may reach the host together with the next check."""
        static, options = self._static, self._options
        if static is None or not static.defers_reads or not self._fuses or not self._exits.active:
            return False
        if options.lossless or options.sampler is not None or options.should_stop is not None:
            return False
        after = [row.answered + 1 for row in rows]
        return all(next_ < options.max_new_tokens and self._exits.is_active_at(0, next_) for next_ in after)

    def _settle(self, places: list[int], read: list[int] | None) -> None:
        """Record tokens that only the device knew; ``read`` has a token for each place, or they are fetched now."""
        unread = [i for i, place in enumerate(places) if self._live[place].unread is not None]
        if not unread:
            return
        if read is None:
            assert self._static is not None
            read = self._static.latest_tokens(places)
        for i in unread:
            self._finish_tokens(places[i], self._live[places[i]], [_Draft(read[i], None, None, None)])

    def _finish_tokens(self, place: int, row: _Row, emitted: Sequence[_Draft]) -> None:
        """Record tokens that stand; the row is finished at the end of its answer."""
        options = self._options
        counts = self.cache.counts[place].copy() if row.unread is None else row.unread
        work = counts.since(row.counts)
        row.counts, row.unread = counts, None
        for draft in emitted:
            row.records.append(
                TokenRecord(
                    draft.token,
                    draft.exit_layer,
                    draft.confidence,
                    work.block_calls,
                    work.block_positions,
                    work.exit_calls,
                    work.head_calls,
                )
            )
            work = _NOTHING
            if options.on_token is not None:
                options.on_token(row.index, draft.token)
            row.finished = draft.token == options.eos or len(row.records) == options.max_new_tokens
            if options.should_stop is not None and not row.finished:
                row.finished = options.should_stop(row.index, [record.token for record in row.records])
            if row.finished:
                return

    def _read_tokens(self, places: list[int], *, are_on_device: bool = False) -> None:
        """Let the newest tokens of these rows enter the stack; the host may not know them yet."""
        if not places:
            return
        tokens = []
        for place in places:
            row = self._live[place]
            row.at = 0
            row.earlier = []
            if are_on_device:
                row.unread = self.cache.counts[place].copy()
                tokens.append(-1)
            else:
                tokens.append(row.drafts[-1].token if row.drafts else row.records[-1].token)
        self.cache.append_tokens(places, tokens)

    def _drop_finished(self) -> None:
        keep = [place for place, row in enumerate(self._live) if not row.finished]
        self._live = [self._live[place] for place in keep]
        if keep:
            self.cache.take_rows(keep)

    def _new_draft_length(self) -> DraftLength:
        """Costs in blocks: a draft runs the blocks below the first exit and the exit, and its head weighs about a block."""
        shallow = self.cache.segments[0][1] if self._exits.active else 0
        deep = self._backbone.n_blocks - shallow
        return DraftLength(self._options.max_draft_tokens, draft_cost=shallow + 2.0, verify_cost=deep + 1.0)


_NOTHING = Counts()
