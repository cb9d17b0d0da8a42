"""Caches of beams: what beams of one item have in common is computed for all of them, whichever comes first.

Before the first token an item is one row; its beams begin as copies of that row, and part only where their tokens do.
Deeper segments and exits may still owe them the prompt, and tokens from before they parted.  Whatever a beam runs there is
copied to the beams that share it.  Where several beams go deeper in one call with many pending positions in common, such as
the prompt, these run first, on one beam alone.  So the prompt stays lazy and is not run once per beam; the price is that a
segment's weights are read once more.  Few common positions are cheaper to run on every beam, in the call that happens anyway.

Hence a position that beams have in common has been read by all of them or by none, in every segment and exit: reordering
beams moves nothing but the positions where they differ.

Does not know tokens, scores, or how beams are chosen.

Shape letters: B rows held, H heads, C capacity, E head width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from free_dist.backbones import Backbone, Start
from free_dist.decoding.cache import PendingCache
from free_dist.exits import ExitTransformer

MIN_SHARED = 8
"""Common positions that get a call of their own; up to about 8, more positions cost less than reading the weights again."""


class BeamCache(PendingCache):
    """A :class:`PendingCache` whose rows are beams of items; beams only grow, they are not rolled back."""

    def __init__(
        self,
        backbone: Backbone,
        exits: Sequence[tuple[int, ExitTransformer]],
        start: Start,
        capacity: int,
        *,
        min_shared: int = MIN_SHARED,
    ) -> None:
        """One row per item; :meth:`take_rows` with repeated rows makes beams of them."""
        super().__init__(backbone, exits, start, capacity)
        self.items = list(range(self.n_rows))
        """The item of each row."""
        self._min_shared = max(min_shared, 1)
        self._prompts = list(start.lengths)
        # Per row, a name for each position after the prompt.  Beams of an item with the same names up to a position share it.
        self._names: list[list[int]] = [[] for _ in self.items]
        self._n_names = 0

    def append(self, rows: Sequence[int], hidden: Tensor) -> None:
        super().append(rows, hidden)
        for row in rows:
            self._names[row].append(self._n_names)
            self._n_names += 1

    def advance(self, segment: int, rows: Sequence[int], *, last_only: bool = False) -> Tensor:
        """As in :class:`PendingCache`; common positions run once, and beams that stay behind get what they share."""
        is_last = segment + 1 == len(self.segments)
        start, stop = self.segments[segment]
        run, done = super().advance, self._done[segment]

        def hand_out(sources: Sequence[int]) -> None:
            stores = [store for cache in self.block_caches[start:stop] for store in (cache.keys, cache.values)]
            inputs = None if is_last else self._inputs[segment + 1]
            if inputs is not None:
                stores.append(inputs)
            for row in self._hand_out(stores, done, sources):
                if not is_last:
                    self._filled[segment + 1][row] = done[row]

        leaders = self._run_common(
            self._filled[segment], done, rows, lambda leaders: run(segment, leaders, last_only=is_last)
        )
        hand_out(leaders)
        hidden = run(segment, rows, last_only=last_only)
        hand_out(rows)
        return hidden

    def run_exit(self, exit_index: int, rows: Sequence[int]) -> Tensor:
        """As in :class:`PendingCache`; common positions run once, and beams that stay behind get what they share."""
        run, done = super().run_exit, self._exit_done[exit_index]

        def hand_out(sources: Sequence[int]) -> None:
            cache = self.exit_caches[exit_index]
            if cache is not None:
                self._hand_out([cache.keys, cache.values], done, sources)

        filled = self._filled[exit_index + 1]
        leaders = self._run_common(filled, done, rows, lambda leaders: run(exit_index, leaders))
        hand_out(leaders)
        state = run(exit_index, rows)
        hand_out(rows)
        return state

    def take_rows(self, rows: Sequence[int]) -> None:
        """Make row i what row ``rows[i]`` was; cheap where every row keeps its item, as only differences are moved."""
        items = [self.items[row] for row in rows]
        if items == self.items:
            self._reorder(rows)
        else:
            super().take_rows(rows)
        self.items = items
        self._prompts = [self._prompts[row] for row in rows]
        self._names = [list(self._names[row]) for row in rows]

    def _common(self, row: int, other: int) -> int:
        """Positions that two beams of one item have in common."""
        length = self._prompts[row]
        for mine, theirs in zip(self._names[row], self._names[other], strict=False):
            if mine != theirs:
                break
            length += 1
        return length

    def _run_common(
        self, filled: list[int], done: list[int], rows: Sequence[int], run: Callable[[list[int]], object]
    ) -> list[int]:
        """Run what beams of an item in this call are waiting for together, once -> the rows it ran on."""
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(self.items[row], []).append(row)
        common: dict[int, int] = {}
        for leader, *others in groups.values():
            if others and filled[leader] - done[leader] >= self._min_shared:
                length = min(self._common(leader, row) for row in others)
                if length - done[leader] >= self._min_shared:
                    common[leader] = length
        if not common:
            return []
        leaders = list(common)
        whole = [filled[row] for row in leaders]
        before = [self.counts[row].copy() for row in leaders]
        for row in leaders:
            filled[row] = common[row]
        run(leaders)
        for leader, length, counts in zip(leaders, whole, before, strict=True):
            filled[leader] = length
            work = self.counts[leader].since(counts)
            for row in groups[self.items[leader]][1:]:  # the call was made for them too
                self.counts[row].block_calls += work.block_calls
                self.counts[row].block_positions += work.block_positions
                self.counts[row].exit_calls += work.exit_calls
        return leaders

    def _hand_out(self, stores: Sequence[Tensor], done: list[int], sources: Sequence[int]) -> list[int]:
        """Copy what these rows have run to beams that share it and have not -> the rows that got something."""
        receivers = []
        for source in sources:
            for row, item in enumerate(self.items):
                if item != self.items[source] or done[row] >= done[source]:
                    continue
                first, stop = done[row], min(self._common(source, row), done[source])
                if first < stop:
                    for store in stores:
                        _copy(store, source, row, first, stop)
                    done[row] = stop
                    receivers.append(row)
        return receivers

    def _reorder(self, rows: Sequence[int]) -> None:
        """Rows take each other's places within their items: same prompt, same memory, other tokens."""
        changed = [row for row, source in enumerate(rows) if row != source]
        if not changed:
            return
        first, stop = min(self._common(row, rows[row]) for row in changed), max(self._filled[0])
        targets = torch.tensor(changed, device=self.device)
        sources = torch.tensor([rows[row] for row in changed], device=self.device)
        caches = [cache for cache in (*self.block_caches, *self.exit_caches) if cache is not None]
        stores = [store for cache in caches for store in (cache.keys, cache.values)]
        stores += [store for store in self._inputs if store is not None]
        for store in stores:
            _copy(store, sources, targets, first, stop)
        for lengths in (*self._filled, *self._done, *self._exit_done):
            lengths[:] = [lengths[row] for row in rows]
        self.counts = [self.counts[row].copy() for row in rows]


def _copy(store: Tensor, sources: int | Tensor, targets: int | Tensor, first: int, stop: int) -> None:
    """Slots ``first`` to ``stop - 1`` of rows, within [B, H, C + 1, E] or [B, C + 1, D]; sources are read before any write."""
    window = store[..., first:stop, :]
    window[targets] = window[sources]
