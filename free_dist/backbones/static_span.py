"""A span of fixed shapes: the same kernels on the same memory in every call, so that calls can be captured or compiled.

Where a call's positions lie is data, not code: a few numbers per row in one small buffer on the device.  All that follows
from them (positions, slots, mask) is computed on the device too, and attention runs over the whole capacity behind a mask.
Does not know graphs, compilers, architectures, or who owns the caches.

Shape letters: B rows of a cache, R rows of a call (spare rows included), T new positions, C capacity, H heads, E head width,
D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from free_dist.backbones.span import Span


class StaticGeometry:
    """Which rows and positions a call runs, in a buffer that outlives the call.

    Row r of the call has the new positions ``starts[r]`` to ``stops[r] - 1`` of cache row ``rows[r]``.  A call of fewer rows
    leaves spare ones, which have no positions.
    """

    def __init__(self, n_rows: int, device: torch.device) -> None:
        self.n_rows = n_rows
        """Rows of a call, R."""
        self.table = torch.zeros(4, n_rows, dtype=torch.long, device=device)
        """[4, R]: rows, starts, stops, and the id of the one new token where the call embeds it (negative: see elsewhere)."""

    def refill(
        self, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int], tokens: Sequence[int] | None = None
    ) -> None:
        """Describe the next call, one value per row that takes part; does not wait for the device."""
        n_spare = self.n_rows - len(rows)
        # A spare row must point at some row of the cache, and at none twice: it writes to that row's spare slot.
        spare = [row for row in range(self.n_rows) if row not in rows][:n_spare] if n_spare else []
        nothing = [0] * n_spare
        tokens = [0] * len(rows) if tokens is None else tokens
        copy_to_device([[*rows, *spare], [*starts, *nothing], [*stops, *nothing], [*tokens, *nothing]], self.table)


class StaticSpan(Span):
    """T positions for each row of a :class:`StaticGeometry`, aligned on the right; padding goes to the spare slot C.

    Make one inside the code that is captured or compiled: its tensors are functions of the buffer, not of what is in it now.
    """

    def __init__(self, geometry: StaticGeometry, n_new: int, capacity: int, *, leading: bool) -> None:
        """``leading``: row r of the call is row r of the cache, so that rows are taken by a view and not by a copy."""
        self.rows, starts, stops, self.tokens = geometry.table.unbind(0)
        self.stops = stops
        """[R], positions of each row after the call; 0 for spare rows."""
        self.is_spare = stops == starts
        """[R], true where a row takes no part."""
        device = geometry.table.device
        positions = stops[:, None] - n_new + torch.arange(n_new, device=device)
        is_padding = positions < starts[:, None]
        self._leading = leading
        self._positions = positions.masked_fill(is_padding, 0)
        self._slots = positions.masked_fill(is_padding, capacity)
        self._entries = (self.rows[:, None] * (capacity + 1) + self._slots).flatten()
        self._head_entries: Tensor | None = None
        # The spare slot C lies beyond every position, so no query sees it.
        self.mask = (torch.arange(capacity + 1, device=device) <= self._positions[:, :, None])[:, None]
        self.last_mask = self.mask[:, :, -1:]

    def positions(self, device: torch.device) -> Tensor:
        return self._positions

    def write(self, store: Tensor, new: Tensor) -> Tensor:
        n_heads, n_slots, width = store.shape[1:]
        if self._head_entries is None:
            heads = self.rows[:, None, None] * n_heads + torch.arange(n_heads, device=store.device)[:, None]
            self._head_entries = (heads * n_slots + self._slots[:, None]).flatten()
        store.view(-1, width).index_copy_(0, self._head_entries, new.reshape(-1, width))
        return self.select(store)

    def select(self, rows: Tensor) -> Tensor:
        return rows[: self.rows.shape[0]] if self._leading else rows.index_select(0, self.rows)

    def gather(self, store: Tensor) -> Tensor:
        return store.view(-1, store.shape[2]).index_select(0, self._entries).view(*self._slots.shape, store.shape[2])

    def scatter(self, store: Tensor, new: Tensor) -> None:
        store.view(-1, store.shape[2]).index_copy_(0, self._entries, new.reshape(-1, new.shape[2]))


def copy_to_device(values: Sequence[Sequence[float]], buffer: Tensor) -> None:
    """Numbers from the host into a buffer of the same shape, without waiting for the device."""
    if buffer.is_cuda:
        # torch does not hand pinned memory out again before the copy that reads it is done.
        buffer.copy_(torch.tensor(values, dtype=buffer.dtype, pin_memory=True), non_blocking=True)
    else:
        buffer.copy_(torch.tensor(values, dtype=buffer.dtype))
