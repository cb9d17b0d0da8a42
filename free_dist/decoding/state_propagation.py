"""State propagation: what CALM does about skipped blocks, an approximation, kept as a baseline for exact pending states.

A token that left after block k has no states of its own behind it.  CALM (arXiv 2207.07061, section 3.1) copies its hidden state
``h_k`` to all deeper blocks, whose keys and values of that position are then projections of ``h_k``.  So is it here, for tokens
that were generated; a prompt is never cut short, and stays exact.  As with pending states the copies are made when a later token
goes deeper, in its own call: the caches hold then what copying at once would have left, and the weights are read anyway, so the
baseline is as fast as it can be.

Tokens are those of exact decoding where nothing exits, and may be others where something does.  Does not know tokens or policies.

Shape letters: R rows of a call, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from free_dist.backbones import Backbone, Start
from free_dist.decoding.cache import PendingCache
from free_dist.exits import ExitTransformer


class PropagatingCache(PendingCache):
    """:class:`PendingCache` in which generated positions that are pending are copied into deeper blocks instead of run."""

    def __init__(
        self, backbone: Backbone, exits: Sequence[tuple[int, ExitTransformer]], start: Start, capacity: int
    ) -> None:
        """As for :class:`PendingCache`; the positions in ``start`` are the prompts."""
        super().__init__(backbone, exits, start, capacity)
        self._prompts = list(start.lengths)

    def take_rows(self, rows: Sequence[int]) -> None:
        """Make row i what row ``rows[i]`` was."""
        super().take_rows(rows)
        self._prompts = [self._prompts[row] for row in rows]

    def roll_back(self, row: int, length: int) -> None:
        """Refused: what was copied cannot be taken back, as deeper states were computed from it."""
        raise ValueError("caches with propagated states are approximate and cannot be rolled back")

    def _run_segment(
        self, segment: int, rows: Sequence[int], starts: list[int], stops: list[int], *, last_only: bool
    ) -> Tensor:
        if segment == 0 or not any(self._copied(segment, row) for row in rows):
            return super()._run_segment(segment, rows, starts, stops, last_only=last_only)
        start, stop = self.segments[segment]
        span = self._span(rows, starts, stops)
        while len(self.block_caches) < stop:
            self.block_caches.append(self._new_block_cache())
        copied = span.gather(self._inputs[segment]).clone()  # type: ignore[arg-type]
        # Each block must see the copies as they were, and the newest position as the block before left it.
        hidden = copied
        if all(starts[row] >= self._prompts[row] for row in rows):
            for k in range(start, stop):
                newest = self._backbone.run_blocks(hidden, k, k + 1, self.block_caches, span, last_only=True)
                hidden = torch.cat([copied[:, :-1], newest], dim=1)
        else:
            is_copied = self._is_copied(rows, starts, stops)
            for k in range(start, stop):
                run = self._backbone.run_blocks(hidden, k, k + 1, self.block_caches, span)
                hidden = torch.where(is_copied, copied, run)
        if segment + 1 < len(self.segments):
            span.scatter(self._store(segment + 1, hidden), hidden)
        return hidden[:, -1:] if last_only else hidden

    def _note_segment(self, segment: int, rows: Sequence[int]) -> None:
        copied = {row: self._copied(segment, row) for row in rows}
        super()._note_segment(segment, rows)
        start, stop = self.segments[segment]
        for row, n in copied.items():
            # Keys and values of a copy are a small part of a block, and no output is computed.
            self.counts[row].block_positions -= (stop - start) * n
            self.calls.block_positions -= (stop - start) * n

    def _copied(self, segment: int, row: int) -> int:
        """Pending positions of a row that a deeper segment copies: generated ones, without the newest."""
        if segment == 0:
            return 0
        first = max(self._done[segment][row], self._prompts[row])
        return max(0, self._filled[segment][row] - 1 - first)

    def _is_copied(self, rows: Sequence[int], starts: list[int], stops: list[int]) -> Tensor:
        """Boolean [R, T, 1], rows aligned on the right as in the span."""
        n_new = max(stops[row] - starts[row] for row in rows)
        first = torch.tensor([self._prompts[row] for row in rows], device=self.device)[:, None]
        last = torch.tensor([stops[row] for row in rows], device=self.device)[:, None]
        positions = last - n_new + torch.arange(n_new, device=self.device)
        return ((positions >= first) & (positions < last - 1))[..., None]
