"""Pending hidden states and per-segment caches: what makes a skipped block exact instead of faked.

K active exits cut the stack of L blocks into K + 1 segments.  Every segment keeps the hidden states that reached it; a token
emitted at an exit leaves its state there, *pending*.  When a later token of the same row goes deeper, all its pending states
run that segment together with it, in one call, so every key and value is the one a full forward would have written.  The
prompt is the first, longest pending entry: deeper segments see it only when some token first needs them.  Exit transformers
are behind in the same way: positions that no check asked for only leave their keys and values there, when a check comes.

Rows of a batch are independent: each has its own pending positions, and a call runs the rows that need it.  Forgetting
positions (:meth:`PendingCache.roll_back`) is exact, because slot = position in every cache.

Does not know tokens, policies, heads or images.

Shape letters: B rows held, R rows of a call, T positions, D model width, K active exits, L blocks, C capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from free_dist.backbones import Backbone, ContiguousSpan, LayerCache, RaggedSpan, Start
from free_dist.exits import ExitTransformer


@dataclass(kw_only=True, slots=True)
class Counts:
    """Work done so far, counted by the lines that do it."""

    block_calls: int = 0
    """Backbone blocks run, one per block and call: how often a block's weights were read."""
    block_positions: int = 0
    """Backbone blocks run times the positions they ran on: the arithmetic, prompt included, padding not."""
    exit_calls: int = 0
    """Exit transformers run, one per call, whatever the number of positions."""
    head_calls: int = 0
    """Vocabulary heads run, at exits and at full depth."""

    def since(self, earlier: Counts) -> Counts:
        """The work between two counts."""
        return Counts(
            block_calls=self.block_calls - earlier.block_calls,
            block_positions=self.block_positions - earlier.block_positions,
            exit_calls=self.exit_calls - earlier.exit_calls,
            head_calls=self.head_calls - earlier.head_calls,
        )

    def copy(self) -> Counts:
        """A snapshot."""
        return Counts(
            block_calls=self.block_calls,
            block_positions=self.block_positions,
            exit_calls=self.exit_calls,
            head_calls=self.head_calls,
        )


class PendingCache:
    """Block caches, exit caches and pending hidden states of B rows."""

    def __init__(
        self, backbone: Backbone, exits: Sequence[tuple[int, ExitTransformer]], start: Start, capacity: int
    ) -> None:
        """``exits`` are the active ones, (layer, transformer) from shallow to deep; ``capacity`` is in positions."""
        self._backbone = backbone
        self._exits = tuple(exits)
        self._capacity = capacity
        self._memory = start.memory
        self.device = start.hidden.device
        self.n_rows = start.hidden.shape[0]
        """Rows held, B."""
        layers = [layer for layer, _ in self._exits]
        self.segments = tuple(pairwise((0, *layers, backbone.n_blocks)))
        """K + 1 pairs (start, stop): a segment turns ``h_start`` into ``h_stop``."""
        self.block_caches: list[LayerCache] = []
        """Caches of the blocks reached so far; block ``k`` owns entry ``k - 1``."""
        self.exit_caches: list[LayerCache | None] = [None] * len(self._exits)
        """Caches of the active exit transformers that ran so far."""
        self.counts = [Counts() for _ in range(self.n_rows)]
        """Work that each row took part in."""
        self.calls = Counts()
        """Work of all rows together: a call counts once, however many rows share it."""
        n_segments = len(self.segments)
        self._inputs: list[Tensor | None] = [None] * n_segments  # h_start of every position, [B, C + 1, D]
        self._filled = [[0] * self.n_rows for _ in range(n_segments)]  # positions that reached the segment
        self._done = [[0] * self.n_rows for _ in range(n_segments)]  # positions that ran it
        self._exit_done = [[0] * self.n_rows for _ in self._exits]
        self._store(0, start.hidden)[:, : start.hidden.shape[1]] = start.hidden
        self._filled[0] = list(start.lengths)

    def length(self, row: int) -> int:
        """Positions of a row that entered the stack."""
        return self._filled[0][row]

    def pending(self, segment: int, row: int) -> int:
        """Positions of a row waiting before a segment."""
        return self._filled[segment][row] - self._done[segment][row]

    def append(self, rows: Sequence[int], hidden: Tensor) -> None:
        """One new position for each of these rows: ``h_0`` [R, 1, D]."""
        filled = self._filled[0]
        store = self._store(0, hidden)
        if len(rows) == 1:
            position = filled[rows[0]]
            store[rows[0] : rows[0] + 1, position : position + 1] = hidden
        else:
            store[list(rows), [filled[row] for row in rows]] = hidden[:, 0]
        for row in rows:
            filled[row] += 1

    def append_tokens(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """One new position for each of these rows, by the id of its token."""
        ids = torch.tensor(tokens, device=self.device)[:, None]
        lengths = [self.length(row) for row in rows]
        past = lengths[0] if len(lengths) == 1 else torch.tensor(lengths, device=self.device)
        self.append(rows, self._backbone.embed(ids, None, past))

    def advance(self, segment: int, rows: Sequence[int], *, last_only: bool = False) -> Tensor:
        """Run a segment on everything pending there -> ``h_stop`` [R, T, D], rows aligned on the right.

        Every row needs at least one pending position.  ``last_only`` (last segment): the last output alone, [R, 1, D].
        """
        done, filled = self._done[segment], self._filled[segment]
        hidden = self._run_segment(segment, rows, done, filled, last_only=last_only)
        self._note_segment(segment, rows)
        return hidden

    def run_exit(self, exit_index: int, rows: Sequence[int]) -> Tensor:
        """An active exit on the last position that reached it, for each of these rows -> exit states [R, D], un-normed.

        Positions that were never checked leave their keys and values on the way, so the exit's cache has no holes.
        """
        done, filled = self._exit_done[exit_index], self._filled[exit_index + 1]
        state = self._run_exit(exit_index, rows, done, filled)
        self._note_exit(exit_index, rows)
        return state[:, -1]

    def count_heads(self, rows: Sequence[int]) -> None:
        """Note one vocabulary head that these rows shared."""
        self.calls.head_calls += 1
        for row in rows:
            self.counts[row].head_calls += 1

    def roll_back(self, row: int, length: int) -> None:
        """Forget a row's positions from ``length`` on, in every segment and exit."""
        if not 0 < length <= self.length(row):
            raise ValueError(f"cannot roll back a row of {self.length(row)} positions to {length}")
        for lengths in (*self._filled, *self._done, *self._exit_done):
            lengths[row] = min(lengths[row], length)

    def take_rows(self, rows: Sequence[int]) -> None:
        """Make row i what row ``rows[i]`` was: finished rows leave, beams are reordered."""
        self._move_rows(rows)
        for lengths in (*self._filled, *self._done, *self._exit_done):
            lengths[:] = [lengths[row] for row in rows]
        self.counts = [self.counts[row].copy() for row in rows]
        self.n_rows = len(rows)

    def flush(self) -> None:
        """Run everything pending to full depth, through the exits on its way; afterwards all caches are complete."""
        for segment in range(len(self.segments)):
            rows = [row for row in range(self.n_rows) if self.pending(segment, row)]
            if rows:
                self.advance(segment, rows)
        for index, done in enumerate(self._exit_done):
            rows = [row for row in range(self.n_rows) if done[row] < self._filled[index + 1][row]]
            if rows:
                self.run_exit(index, rows)

    def _run_segment(
        self, segment: int, rows: Sequence[int], starts: list[int], stops: list[int], *, last_only: bool
    ) -> Tensor:
        """Positions ``starts`` to ``stops`` (per row of the cache) through a segment -> [R, T, D] or [R, 1, D]."""
        start, stop = self.segments[segment]
        span = self._span(rows, starts, stops)
        # Blocks that no token needs never get a cache.
        while len(self.block_caches) < stop:
            self.block_caches.append(self._new_block_cache())
        hidden = span.gather(self._inputs[segment])  # type: ignore[arg-type]
        hidden = self._backbone.run_blocks(hidden, start, stop, self.block_caches, span, last_only=last_only)
        if segment + 1 < len(self.segments):
            span.scatter(self._store(segment + 1, hidden), hidden)
        return hidden

    def _run_exit(self, exit_index: int, rows: Sequence[int], starts: list[int], stops: list[int]) -> Tensor:
        """Positions ``starts`` to ``stops`` (per row of the cache) through an exit transformer -> [R, 1, D], the last one."""
        span = self._span(rows, starts, stops)
        cache = self.exit_caches[exit_index]
        if cache is None:
            cache = self.exit_caches[exit_index] = self._new_exit_cache(exit_index)
        hidden = span.gather(self._inputs[exit_index + 1])  # type: ignore[arg-type]
        return self._exits[exit_index][1](hidden, cache, span, last_only=True)

    def _note_segment(self, segment: int, rows: Sequence[int]) -> None:
        """Count one call of a segment, and mark what was pending for these rows as done."""
        start, stop = self.segments[segment]
        done, filled = self._done[segment], self._filled[segment]
        n_blocks = stop - start
        self.calls.block_calls += n_blocks
        for row in rows:
            counts = self.counts[row]
            counts.block_calls += n_blocks
            counts.block_positions += n_blocks * (filled[row] - done[row])
            self.calls.block_positions += n_blocks * (filled[row] - done[row])
            done[row] = filled[row]
            if segment + 1 < len(self.segments):
                self._filled[segment + 1][row] = filled[row]

    def _note_exit(self, exit_index: int, rows: Sequence[int]) -> None:
        """Count one call of an exit transformer, and mark what was pending for these rows as done."""
        done, filled = self._exit_done[exit_index], self._filled[exit_index + 1]
        self.calls.exit_calls += 1
        for row in rows:
            self.counts[row].exit_calls += 1
            done[row] = filled[row]

    def _move_rows(self, rows: Sequence[int]) -> None:
        """Keys, values and states of row i become those of row ``rows[i]``."""
        index = torch.tensor(rows, device=self.device)
        if self._memory is not None:
            self._memory = self._memory.take_rows(index)
        for cache in (*self.block_caches, *self.exit_caches):
            if cache is not None:
                cache.take_rows(index, self._memory)
        self._inputs = [None if store is None else store.index_select(0, index) for store in self._inputs]

    def _span(self, rows: Sequence[int], starts: list[int], stops: list[int]) -> ContiguousSpan | RaggedSpan:
        first = rows[0]
        start, stop = starts[first], stops[first]
        if len(rows) == self.n_rows and all(starts[row] == start and stops[row] == stop for row in rows):
            span = ContiguousSpan(start, stop - start, self.device)
            return self._backbone.with_shared(span, self.device)
        ragged = RaggedSpan(
            rows,
            [starts[row] for row in rows],
            [stops[row] for row in rows],
            n_rows=self.n_rows,
            capacity=self._capacity,
            device=self.device,
        )
        return self._backbone.with_shared(ragged, self.device)

    def _store(self, segment: int, hidden: Tensor) -> Tensor:
        store = self._inputs[segment]
        if store is None:
            shape = (self.n_rows, self._capacity + 1, hidden.shape[-1])
            # Zeros, not garbage: the spare slot feeds padding through blocks, and NaN there would outlive its mask.
            store = self._inputs[segment] = torch.zeros(shape, dtype=hidden.dtype, device=hidden.device)
        return store

    def _new_block_cache(self) -> LayerCache:
        """A cache for the shallowest block that has none."""
        return self._backbone.new_layer_cache(self.n_rows, self._capacity, self._memory)

    def _new_exit_cache(self, exit_index: int) -> LayerCache:
        """A cache for an active exit that has none."""
        del exit_index
        return self._backbone.new_layer_cache(self.n_rows, self._capacity, self._memory)
