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

from free_dist.backbones.span import IndexedSpan


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


class StaticSpan(IndexedSpan):
    """T positions for each row of a :class:`StaticGeometry`, aligned on the right; padding goes to the spare slot C.

    Make one inside the code that is captured or compiled: its tensors are functions of the buffer, not of what is in it now.
    """

    def __init__(self, geometry: StaticGeometry, n_new: int, capacity: int, *, leading: bool) -> None:
        """``leading``: row r of the call is row r of the cache, so that rows are taken by a view and not by a copy."""
        rows, starts, stops, self.tokens = geometry.table.unbind(0)
        # The spare slot C is among the visible ones, but beyond every position: the mask hides it.
        super().__init__(rows, starts, stops, n_new=n_new, capacity=capacity, visible=capacity + 1)
        self.stops = stops
        """[R], positions of each row after the call; 0 for spare rows."""
        self.is_spare = stops == starts
        """[R], true where a row takes no part."""
        self._leading = leading

    def select(self, rows: Tensor) -> Tensor:
        return rows[: self.rows.shape[0]] if self._leading else rows.index_select(0, self.rows)


def copy_to_device(values: Sequence[Sequence[float]], buffer: Tensor) -> None:
    """Numbers from the host into a buffer of the same shape, without waiting for the device."""
    if buffer.is_cuda:
        # torch does not hand pinned memory out again before the copy that reads it is done.
        buffer.copy_(torch.tensor(values, dtype=buffer.dtype, pin_memory=True), non_blocking=True)
    else:
        buffer.copy_(torch.tensor(values, dtype=buffer.dtype))
