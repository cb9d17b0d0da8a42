"""Exit transformers: one trainable decoder block per exit, in front of the backbone's own frozen norm and head.

An exit after block k maps ``h_k`` to a feature that the frozen head can read (FREE, arXiv 2506.06884, section 3).  Does not
know how exits are trained, when they fire, or which architecture the block has.

Shape letters: K exits, B batch, T positions, N selected positions, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from free_dist.backbones import Backbone, LayerCache, Span
from free_dist.backbones.base import BlockCall
from free_dist.config import ConfigError


class ExitTransformer(nn.Module):
    """A full replica of one decoder block, trainable and causal, with its own cache at inference."""

    def __init__(self, block: nn.Module, block_call: BlockCall) -> None:
        super().__init__()
        self.block = copy.deepcopy(block).requires_grad_(True)
        self._block_call = block_call

    def forward(
        self, hidden: Tensor, cache: LayerCache | None = None, span: Span | None = None, *, last_only: bool = False
    ) -> Tensor:
        """``h_k`` [B, T, D] -> un-normed exit state [B, T, D], or of the last position, [B, 1, D]; see ``BlockCall``."""
        return self._block_call(self.block, hidden, cache, span, last_only)


class ExitBank(nn.Module):
    """K exit transformers and the frozen final norm and head they share.

    ``final_norm`` and ``lm_head`` are the backbone's own modules, by reference unless ``copy_frozen``: a backbone about to
    be sharded must not take the exits' head with it.
    """

    def __init__(
        self, backbone: Backbone, exit_layers: Sequence[int], *, init: str = "next", copy_frozen: bool = False
    ) -> None:
        super().__init__()
        self.exit_layers = tuple(exit_layers)
        check_exit_layers(self.exit_layers, backbone.n_blocks)
        self.transformers = nn.ModuleList(
            ExitTransformer(backbone.block(init_block(k, init, backbone.n_blocks)), backbone.block_call)
            for k in self.exit_layers
        )
        final_norm, lm_head = backbone.shared_modules()
        if copy_frozen:
            final_norm, lm_head = copy.deepcopy(final_norm), copy.deepcopy(lm_head)
        self.final_norm = final_norm.requires_grad_(False)
        self.lm_head = lm_head.requires_grad_(False)

    def forward(self, taps: Sequence[Tensor], positions: Tensor | None = None) -> Tensor:
        """Hidden states ``h_k``, one [B, T, D] per exit -> normed exit features [K, N, D].

        ``positions`` [B, T] selects the N positions that are kept, row by row; None keeps all, giving [K, B, T, D].
        """
        states = [exit_transformer(tap) for exit_transformer, tap in zip(self.transformers, taps, strict=True)]
        if positions is not None:
            states = [state[positions] for state in states]
        return self.final_norm(torch.stack(states))

    def logits(self, features: Tensor) -> Tensor:
        """Normed features [..., D] -> logits [..., V] of the frozen head."""
        return self.lm_head(features)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The exit transformers' weights alone, without the shared frozen modules."""
        return {f"transformers.{name}": tensor for name, tensor in self.transformers.state_dict().items()}


def check_exit_layers(exit_layers: Sequence[int], n_blocks: int) -> None:
    """Raise ConfigError unless the layers are strictly increasing and lie in 1..L."""
    ordered = sorted(set(exit_layers))
    if not exit_layers or list(exit_layers) != ordered or ordered[0] < 1 or ordered[-1] > n_blocks:
        raise ConfigError(
            f"exits.exit_layers={list(exit_layers)}: want strictly increasing block numbers from 1 to {n_blocks}"
        )


def init_block(exit_layer: int, init: str, n_blocks: int) -> int:
    """The block, 1-based, that an exit after ``exit_layer`` is copied from; raises ConfigError for an unknown ``init``."""
    sources = {"same": exit_layer, "next": min(exit_layer + 1, n_blocks), "last": n_blocks}
    if init not in sources:
        raise ConfigError(f"exits.init={init!r}: want one of {', '.join(sources)}")
    return sources[init]
