"""Pending states in memory of fixed shape: :class:`PendingCache` whose calls are programs of a :class:`Frame`.

A call is rounded up to the next shape that has a program: rows to a power of two, positions to one of a few lengths.  Longer
calls, such as reading a prompt, run operator by operator on the same memory.  Does not know how programs are executed.

Shape letters: B rows held, R rows of a call, T positions, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from free_dist.backbones import LayerCache, Memory, Start
from free_dist.decoding.ask import Verdict
from free_dist.decoding.cache import PendingCache
from free_dist.decoding.frame import Frame, Outputs, Program
from free_dist.decoding.policy import Decision
from free_dist.exits.gate import Scores


class Checked(NamedTuple):
    """What a segment and the check behind it said about R rows; one host synchronisation brought all of it."""

    read: list[int]
    """The token of each row's new position, where the call embedded it."""
    verdict: Verdict


class FullDepth(NamedTuple):
    """What the full model said about R rows; spare rows may come behind them."""

    logits: Tensor
    """[R, T, V], rows aligned on the right; valid until the next call."""
    best: Tensor
    """[T, R], most likely tokens, float64; on their device."""

    def logits_of(self, wanted: Sequence[int]) -> Tensor:
        """Of the last ``wanted[r]`` positions of each row, one after the other, [sum of ``wanted``, V]."""
        return torch.cat([self.logits[i, -n:] for i, n in enumerate(wanted)])

    def best_of(self, wanted: Sequence[int]) -> list[int]:
        """Most likely tokens of the same positions; waits for the device once."""
        columns = self.best.tolist()
        return [int(column[i]) for i, n in enumerate(wanted) for column in columns[-n:]]


class StaticPendingCache(PendingCache):
    """Block caches, exit caches and pending states of B rows, in a frame that is theirs until someone else takes it over."""

    def __init__(
        self, frame_for: Callable[[int], Frame], start: Start, lengths: tuple[int, ...], *, defers_reads: bool
    ) -> None:
        """``frame_for`` gives a frame for a number of rows; ``lengths`` are the numbers of positions that have programs."""
        self._frame_for = frame_for
        self._frame = frame_for(start.hidden.shape[0])
        self._frame.take_over(self, start.lengths, start.memory)
        self._lengths = lengths
        self.defers_reads = defers_reads
        """Whether a token emitted at full depth may stay on the device until the host waits for the next check."""
        self._unembedded: dict[int, int] = {}  # row -> its newest token, negative where only the device knows it
        super().__init__(self._frame.model.backbone, self._frame.model.exits, start, self._frame.capacity)
        self._inputs = [store[: self.n_rows] for store in self._frame.inputs]

    def append(self, rows: Sequence[int], hidden: Tensor) -> None:
        """One new position for each of these rows: ``h_0`` [R, 1, D]."""
        self._embed(rows)
        super().append(rows, hidden)

    def append_tokens(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """One new position for each of these rows, embedded when the first segment runs; negative: the row's latest token."""
        self._embed(rows)
        for row, token in zip(rows, tokens, strict=True):
            self._unembedded[row] = token
            self._filled[0][row] += 1

    def latest_tokens(self, rows: Sequence[int]) -> list[int]:
        """The newest tokens of rows that were given as negative numbers and did not run yet; waits for the device."""
        latest = self._frame.latest.tolist()
        return [latest[row] for row in rows]

    def advance_and_check(self, segment: int, rows: Sequence[int]) -> Checked | None:
        """:meth:`advance`, then the exit behind the segment and its full head, in one program.

        None, with nothing done, where there is no such program: too many positions, or an exit that is behind its segment.
        """
        done = self._done[segment]
        if any(self._exit_done[segment][row] != done[row] for row in rows):
            return None
        self._reach(segment)
        self._reach_exit(segment)
        outputs = self._try("check", segment, rows, done, self._filled[segment], last_only=False)
        if outputs is None:
            return None
        self._note_segment(segment, rows)
        self._note_exit(segment, rows)
        self.count_heads(rows)
        assert outputs.report is not None
        assert outputs.logits is not None
        n = len(rows)
        read, tokens, confidences, emits = (row[:n] for row in outputs.report.tolist())
        ids = [int(token) for token in tokens]
        decision = Decision(outputs.report[1, :n], confidences, [emit > 0 for emit in emits])
        verdict = Verdict(list(rows), Scores(outputs.logits[:n], outputs.ids), decision, ids)
        return Checked([int(token) for token in read], verdict)

    def advance_and_read(self, rows: Sequence[int], *, last_only: bool) -> FullDepth | None:
        """The last segment, the full head and its most likely tokens, in one program.

        None, with nothing done, where there is no such program: too many positions.
        """
        segment = len(self.segments) - 1
        self._reach(segment)
        outputs = self._try("full", segment, rows, self._done[segment], self._filled[segment], last_only=last_only)
        if outputs is None:
            return None
        self._note_segment(segment, rows)
        self.count_heads(rows)
        assert outputs.logits is not None
        assert outputs.report is not None
        return FullDepth(outputs.logits, outputs.report)

    def roll_back(self, row: int, length: int) -> None:
        """Forget a row's positions from ``length`` on, in every segment and exit."""
        if length < self.length(row):
            self._unembedded.pop(row, None)
        super().roll_back(row, length)

    def take_rows(self, rows: Sequence[int]) -> None:
        """Make row i what row ``rows[i]`` was; more rows than before move to a larger frame."""
        super().take_rows(rows)
        unembedded = self._unembedded
        self._unembedded = {row: unembedded[source] for row, source in enumerate(rows) if source in unembedded}

    def _run_segment(
        self, segment: int, rows: Sequence[int], starts: list[int], stops: list[int], *, last_only: bool
    ) -> Tensor:
        self._reach(segment)
        outputs = self._try("segment", segment, rows, starts, stops, last_only=last_only)
        if outputs is None:
            if segment == 0:
                self._embed(rows)
            hidden = super()._run_segment(segment, rows, starts, stops, last_only=last_only)
            self._keep_cross(self.block_caches, self._frame.block_caches)
            return hidden
        assert outputs.hidden is not None
        return outputs.hidden[: len(rows)]

    def _run_exit(self, exit_index: int, rows: Sequence[int], starts: list[int], stops: list[int]) -> Tensor:
        self._reach_exit(exit_index)
        outputs = self._try("exit", exit_index, rows, starts, stops, last_only=True)
        if outputs is None:
            state = super()._run_exit(exit_index, rows, starts, stops)
            self._keep_cross([self.exit_caches[exit_index]], [self._frame.exit_caches[exit_index]])
            return state
        assert outputs.hidden is not None
        return outputs.hidden[: len(rows)]

    def _try(
        self,
        kind: str,
        place: int,
        rows: Sequence[int],
        starts: list[int],
        stops: list[int],
        *,
        last_only: bool,
    ) -> Outputs | None:
        """Run a program on positions ``starts`` to ``stops`` (per row held); None where none has the shape."""
        self._check_owner()
        if not self._has_cross(kind, place):
            return None
        longest = max(stops[row] - starts[row] for row in rows)
        n_new = next((length for length in self._lengths if length >= longest), None)
        if n_new is None:
            return None
        tokens = None
        if place == 0 and kind != "exit" and self._unembedded:
            fresh = [row for row in rows if row in self._unembedded]
            if len(fresh) == len(rows) and longest == 1 and n_new == 1:
                tokens = [self._unembedded.pop(row) for row in rows]
            else:
                self._embed(fresh)
        program = Program(
            kind=kind,  # type: ignore[arg-type]
            place=place,
            n_rows=1 << (len(rows) - 1).bit_length(),
            n_new=n_new,
            leading=list(rows) == list(range(len(rows))),
            embeds=tokens is not None,
            last_only=last_only,
        )
        return self._frame.run(program, rows, [starts[row] for row in rows], [stops[row] for row in rows], tokens)

    def _embed(self, rows: Sequence[int]) -> None:
        """Make states of the tokens that wait to be embedded."""
        for row in rows:
            token = self._unembedded.pop(row, None)
            if token is None:
                continue
            self._check_owner()
            ids = self._frame.latest[row] if token < 0 else torch.tensor(token, device=self.device)
            position = self.length(row) - 1
            hidden = self._backbone.embed(ids.view(1, 1), None, position)
            self._store(0, hidden)[row : row + 1, position : position + 1] = hidden

    def _reach(self, segment: int) -> None:
        while len(self.block_caches) < self.segments[segment][1]:
            self.block_caches.append(self._new_block_cache())

    def _reach_exit(self, exit_index: int) -> None:
        if self.exit_caches[exit_index] is None:
            self.exit_caches[exit_index] = self._new_exit_cache(exit_index)

    def _new_block_cache(self) -> LayerCache:
        self._check_owner()
        return self._rows_of(self._frame.block_cache(len(self.block_caches)), self.n_rows)

    def _new_exit_cache(self, exit_index: int) -> LayerCache:
        self._check_owner()
        return self._rows_of(self._frame.exit_cache(exit_index), self.n_rows)

    def _store(self, segment: int, hidden: Tensor) -> Tensor:
        return self._frame.inputs[segment][: self.n_rows]

    def _move_rows(self, rows: Sequence[int]) -> None:
        """Rows move within the frame, so that its addresses stay; rows that leave at the end cost nothing."""
        self._check_owner()
        source, n = self._frame, len(rows)
        if n > source.n_rows:
            self._frame = self._frame_for(n)
            self._frame.take_over(self, (), None)
        if self._frame is not source or list(rows) != list(range(n)):
            index = torch.tensor(rows, device=self.device)
            self._frame.copy_rows(source, index, n_blocks=len(self.block_caches), exits=self._exits_reached())
        kept = self._frame.block_caches
        self.block_caches = [self._rows_of(kept[i], n, cache) for i, cache in enumerate(self.block_caches)]
        for i in self._exits_reached():
            self.exit_caches[i] = self._rows_of(self._frame.exit_caches[i], n, self.exit_caches[i])
        self._inputs = [store[:n] for store in self._frame.inputs]

    def _exits_reached(self) -> list[int]:
        return [index for index, cache in enumerate(self.exit_caches) if cache is not None]

    def _rows_of(self, kept: LayerCache | None, n_rows: int, before: LayerCache | None = None) -> LayerCache:
        """The first rows of a frame's cache, by reference; what the encoder said only if the view ``before`` had it."""
        assert kept is not None
        view = copy.copy(kept)
        view.keys, view.values = kept.keys[:n_rows], kept.values[:n_rows]
        if kept.memory is not None:
            states, mask = kept.memory
            view.memory = Memory(states[:n_rows], None if mask is None else mask[:n_rows])
        view.cross = None
        if before is not None and before.cross is not None and kept.cross is not None:
            view.cross = (kept.cross[0][:n_rows], kept.cross[1][:n_rows])
        return view

    def _has_cross(self, kind: str, place: int) -> bool:
        """Whether all caches of a program hold keys and values of what the encoder read, if there is one.

        They come from the first call of a block, which runs operator by operator.
        """
        if self._frame.memory is None:
            return True
        caches: list[LayerCache | None] = []
        if kind != "exit":
            start, stop = self.segments[place]
            caches += self.block_caches[start:stop]
        if kind in ("exit", "check"):
            caches.append(self.exit_caches[place])
        return all(cache is not None and cache.cross is not None for cache in caches)

    def _keep_cross(self, views: Sequence[LayerCache | None], kept: Sequence[LayerCache | None]) -> None:
        """Move what a first call computed from the encoder's states into the frame."""
        for view, cache in zip(views, kept, strict=False):  # blocks reached by earlier generations lie behind
            if view is None or view.cross is None or cache is None or cache.cross is None:
                continue
            if view.cross[0].data_ptr() != cache.cross[0].data_ptr():
                places = tuple(store[: self.n_rows] for store in cache.cross)
                for place, computed in zip(places, view.cross, strict=True):
                    place.copy_(computed)
                view.cross = (places[0], places[1])

    def _check_owner(self) -> None:
        if self._frame.owner is not self:
            raise RuntimeError(
                "a later generation of this runner took over the memory: finish one before starting the next"
            )
