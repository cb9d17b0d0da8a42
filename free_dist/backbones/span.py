"""Key-value caches, and where the new positions of one call go in them.

A :class:`Span` is built once per call and shared by all blocks of that call: which rows of the cache take part, which slots
their new positions fill, and what each may attend to.  Slot = position, always, so a cache has no holes and forgetting
positions is only a smaller number in the next span.  Does not know architectures, exits or tokens.

Shape letters: B rows of a cache, R rows of a call, T new positions, C capacity, S encoder positions, H heads, E head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """What an encoder hands to the cross-attention of a decoder."""

    states: Tensor
    """[B, S, D]."""
    mask: Tensor | None
    """Boolean [B, 1, 1, S], true where attended; None where all is."""

    def take_rows(self, rows: Tensor) -> Memory:
        """Row i of the result is row ``rows[i]``."""
        return Memory(self.states.index_select(0, rows), None if self.mask is None else self.mask.index_select(0, rows))


class Span(ABC):
    """Geometry of one call of some blocks on R rows and T new positions."""

    shared: Any = None
    """What an architecture computes once per call from the positions: rotary angles, a position bias."""
    mask: Tensor | None
    """Boolean, broadcastable to [R, 1, T, cached + T], true where attended; None: plain causality, or one query that sees all."""
    last_mask: Tensor | None
    """The mask of the last new position alone, [R, 1, 1, cached + T]; None where it sees everything."""

    @abstractmethod
    def positions(self, device: torch.device) -> Tensor:
        """Position of every new entry, [T] or [R, T]; padding entries have position 0."""

    @abstractmethod
    def write(self, store: Tensor, new: Tensor) -> Tensor:
        """Put ``new`` [R, H, T, E] into its slots of ``store`` [B, H, C + 1, E]; return what the queries may look at."""

    @abstractmethod
    def gather(self, store: Tensor) -> Tensor:
        """Entries of ``store`` [B, C + 1, D] at the new positions, [R, T, D]; padding holds whatever the spare slot does."""

    @abstractmethod
    def scatter(self, store: Tensor, new: Tensor) -> None:
        """Inverse of :meth:`gather`: ``new`` [R, T, D] into ``store`` [B, C + 1, D]."""

    def select(self, rows: Tensor) -> Tensor:
        """The rows of a per-row tensor [B, ...] that take part, [R, ...]."""
        return rows


class ContiguousSpan(Span):
    """All rows of the cache, each with the same T positions from ``start`` on: no index tensor, no copy."""

    def __init__(self, start: int, n_new: int, device: torch.device) -> None:
        self.start = start
        self.stop = start + n_new
        self.mask = causal_mask(n_new, start, device)
        self.last_mask = None

    def positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.start, self.stop, device=device)

    def write(self, store: Tensor, new: Tensor) -> Tensor:
        if self.stop > store.shape[2] - 1:
            raise ValueError(f"cache holds {store.shape[2] - 1} positions, {self.stop} are needed")
        store[:, :, self.start : self.stop] = new
        return store[:, :, : self.stop]

    def gather(self, store: Tensor) -> Tensor:
        return store[:, self.start : self.stop]

    def scatter(self, store: Tensor, new: Tensor) -> None:
        store[:, self.start : self.stop] = new


class IndexedSpan(Span):
    """Rows of the cache with new positions of their own each, aligned on the right.

    Row r has positions ``starts[r]`` to ``stops[r] - 1``; shorter rows begin with padding, which goes to the spare slot C
    that nobody attends to, so it changes nothing.  Every tensor is a function of the three index tensors.
    """

    def __init__(self, rows: Tensor, starts: Tensor, stops: Tensor, *, n_new: int, capacity: int, visible: int) -> None:
        """``rows``, ``starts``, ``stops``: [R]; ``visible``: slots that queries may look at, behind the mask."""
        device = rows.device
        positions = stops[:, None] - n_new + torch.arange(n_new, device=device)
        is_padding = positions < starts[:, None]
        self.rows = rows
        """Rows of the cache that take part, [R]."""
        self._positions = positions.masked_fill(is_padding, 0)
        self._slots = positions.masked_fill(is_padding, capacity)
        self._entries = (rows[:, None] * (capacity + 1) + self._slots).flatten()
        self._head_entries: Tensor | None = None
        self._visible = visible
        self.mask = (torch.arange(visible, device=device) <= self._positions[:, :, None])[:, None]
        self.last_mask = self.mask[:, :, -1:]

    def positions(self, device: torch.device) -> Tensor:
        return self._positions

    def write(self, store: Tensor, new: Tensor) -> Tensor:
        # One index over the flattened cache: several times faster than indexing two dimensions of it.
        n_heads, n_slots, width = store.shape[1:]
        if self._head_entries is None:
            heads = self.rows[:, None, None] * n_heads + torch.arange(n_heads, device=store.device)[:, None]
            self._head_entries = (heads * n_slots + self._slots[:, None]).flatten()
        store.view(-1, width).index_copy_(0, self._head_entries, new.reshape(-1, width))
        return self.select(store[:, :, : self._visible])

    def gather(self, store: Tensor) -> Tensor:
        return store.view(-1, store.shape[2]).index_select(0, self._entries).view(*self._slots.shape, store.shape[2])

    def scatter(self, store: Tensor, new: Tensor) -> None:
        store.view(-1, store.shape[2]).index_copy_(0, self._entries, new.reshape(-1, new.shape[2]))


class RaggedSpan(IndexedSpan):
    """An :class:`IndexedSpan` from numbers on the host, just as long and as far-looking as its rows need."""

    def __init__(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        stops: Sequence[int],
        *,
        n_rows: int,
        capacity: int,
        device: torch.device,
    ) -> None:
        n_new = max(stop - start for start, stop in zip(starts, stops, strict=True))
        index = torch.tensor([list(rows), list(starts), list(stops)], device=device)
        super().__init__(*index, n_new=n_new, capacity=capacity, visible=max(stops))
        self._all_rows = list(rows) == list(range(n_rows))

    def select(self, rows: Tensor) -> Tensor:
        return rows if self._all_rows else rows.index_select(0, self.rows)


class LayerCache:
    """Keys and values of one block, preallocated: [B, H, C + 1, E] each; the last slot takes the padding of ragged calls.

    One object belongs to one block, be it a backbone's or an exit transformer's.  It does not know how much of it is
    valid: spans say where to write and how far to look.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        n_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: Memory | None = None,
    ) -> None:
        shape = (batch_size, n_heads, capacity + 1, head_dim)
        # Zeros, not garbage: a masked slot still meets the arithmetic, and NaN would outlive its mask.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.memory = memory
        self.cross: tuple[Tensor, Tensor] | None = None
        """Keys and values of ``memory``, [B, H, S, E] each; filled by the block's first call."""

    def update(self, key: Tensor, value: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Store [R, H, T, E] new keys and values; return all that the queries may look at, [R, H, cached + T, E]."""
        return span.write(self.keys, key), span.write(self.values, value)

    def take_rows(self, rows: Tensor, memory: Memory | None) -> None:
        """Make row i what row ``rows[i]`` was; rows may be dropped or repeated.  ``memory`` is that of the new rows."""
        self.memory = memory
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        if self.cross is not None:
            self.cross = (self.cross[0].index_select(0, rows), self.cross[1].index_select(0, rows))


def causal_mask(n_new: int, n_past: int, device: torch.device) -> Tensor | None:
    """Boolean mask [1, 1, T, P + T], true where attended; None where the attention kernel's own causality suffices.

    Attention kernels align their causal mask with the first key, which is right only without cached positions; a single
    query sees everything.
    """
    if n_new == 1 or n_past == 0:
        return None
    return torch.ones(n_new, n_past + n_new, dtype=torch.bool, device=device).tril(n_past)[None, None]
