"""What every backbone offers: a frozen VLM as a stack of blocks that runs from any block to any block.

Layer convention, everywhere: ``h_0`` is the embedded input and ``h_k`` the hidden state *after block k*, 1-based,
before the final norm.  Only adapters translate this to a library's own numbering.

This module does not know any architecture, and nothing about exits, training or distribution.

Shape letters: B batch, I distinct images, T text positions (image placeholders included), P cached positions,
Q query tokens, D model width, V vocabulary, H heads, L blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """The ids that a tokenizer alone does not tell: how image and text share one sequence."""

    image_token_id: int
    """Placeholder replaced by a query token's projection."""
    num_query_tokens: int
    """Placeholders per image (Q); they open the sequence."""
    bos_token_id: int
    """First text token, directly after the placeholders."""
    eos_token_id: int
    """Ends an answer."""
    pad_token_id: int
    """Fills rows on the right."""


@dataclass(frozen=True, kw_only=True)
class BackboneFeatures:
    """What one training forward of a frozen backbone yields."""

    exits: tuple[Tensor, ...]
    """``h_k`` for each requested exit layer, each [B, T, D]."""
    final: Tensor
    """Final-layer feature *after* the final norm, [B, T, D]."""


class LayerCache:
    """Keys and values of one block, preallocated: [B, H, capacity, D / H] each.

    Has the ``update`` method that transformers' attention modules call, and ignores their layer index: one object
    belongs to one block, be it a backbone's or an exit transformer's.
    """

    def __init__(
        self, *, batch_size: int, n_heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch_size, n_heads, capacity, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        """Positions held, P."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, T, D / H] keys and values; return views of everything held, [B, H, P + T, D / H]."""
        stop = self.length + key_states.shape[2]
        if stop > self.keys.shape[2]:
            raise ValueError(
                f"cache holds {self.keys.shape[2]} positions, {stop} are needed: ask for a larger capacity"
            )
        self.keys[:, :, self.length : stop] = key_states
        self.values[:, :, self.length : stop] = value_states
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length


class BlockCall(Protocol):
    """Runs one block module of this architecture; a plain function without parameters of its own."""

    def __call__(self, block: nn.Module, hidden: Tensor, cache: LayerCache | None) -> Tensor:
        """[B, T, D] -> [B, T, D], causal over the ``cache.length`` cached positions and the T new ones."""


def causal_mask(n_new: int, n_past: int, device: torch.device) -> Tensor | None:
    """Boolean mask [1, 1, T, P + T], true where attended; None where the attention kernel's own causality suffices.

    Attention kernels align their causal mask with the first key, which is right only without cached positions; a single
    query sees everything.
    """
    if n_new == 1 or n_past == 0:
        return None
    return torch.ones(n_new, n_past + n_new, dtype=torch.bool, device=device).tril(n_past)[None, None]


class Backbone(nn.Module, ABC):
    """A frozen VLM: image -> prefix -> ``h_0`` -> blocks -> final norm -> head."""

    n_blocks: int
    hidden_size: int
    vocab_size: int
    layout: TokenLayout
    max_positions: int
    """Longest sequence, image placeholders included."""

    @abstractmethod
    def encode_prefix(self, pixel_values: Tensor) -> Tensor:
        """[I, 3, height, width] normalised pixels -> visual prefix [I, Q, D]."""

    @abstractmethod
    def embed(self, input_ids: Tensor, prefix: Tensor | None = None, past_length: int = 0) -> Tensor:
        """[B, T] ids -> ``h_0`` [B, T, D]; image placeholders take the rows of ``prefix`` [B, Q, D] in order.

        ``past_length`` is the number of positions before the first id.  Rows are unpadded or padded on the right.
        """

    @abstractmethod
    def block(self, k: int) -> nn.Module:
        """The module of block ``k``, 1-based."""

    @property
    @abstractmethod
    def block_call(self) -> BlockCall:
        """How a block module of this backbone is run."""

    @abstractmethod
    def final_norm(self, hidden: Tensor) -> Tensor:
        """``h_L`` (or an exit transformer's output) [..., D] -> normed feature [..., D]."""

    @abstractmethod
    def lm_head(self, features: Tensor) -> Tensor:
        """Normed features [..., D] -> logits [..., V]."""

    @abstractmethod
    def shared_modules(self) -> tuple[nn.Module, nn.Module]:
        """The modules behind :meth:`final_norm` and :meth:`lm_head`, which exits share by reference."""

    @abstractmethod
    def new_layer_cache(self, batch_size: int, capacity: int) -> LayerCache:
        """An empty cache for one block."""

    def new_cache(self, batch_size: int, capacity: int) -> list[LayerCache]:
        """Empty caches for all L blocks; block ``k`` owns entry ``k - 1``."""
        return [self.new_layer_cache(batch_size, capacity) for _ in range(self.n_blocks)]

    def run_blocks(self, hidden: Tensor, start: int, stop: int, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """``h_start`` [B, T, D] -> ``h_stop`` [B, T, D], appending T positions to the caches of the blocks that run."""
        if not 0 <= start <= stop <= self.n_blocks:
            raise ValueError(f"run_blocks({start}, {stop}): want 0 <= start <= stop <= {self.n_blocks}")
        call = self.block_call
        for k in range(start + 1, stop + 1):
            hidden = call(self.block(k), hidden, None if cache is None else cache[k - 1])
        return hidden

    def forward(
        self, pixel_values: Tensor, image_index: Tensor, input_ids: Tensor, exit_layers: Sequence[int]
    ) -> BackboneFeatures:
        """One full forward for training: pixels [I, 3, h, w], row -> image [B], ids [B, T].

        A single top-level call, so that a sharded backbone gathers each parameter once.
        """
        hidden = self.embed(input_ids, self.encode_prefix(pixel_values)[image_index])
        taps: list[Tensor] = []
        reached = 0
        for k in exit_layers:
            hidden = self.run_blocks(hidden, reached, k)
            taps.append(hidden)
            reached = k
        hidden = self.run_blocks(hidden, reached, self.n_blocks)
        return BackboneFeatures(exits=tuple(taps), final=self.final_norm(hidden))
