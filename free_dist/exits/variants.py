"""What an exit is made of: a full block, a low-rank update of a frozen block, a bottleneck, or a head of its own.

A full replica of a block is what FREE trains (arXiv 2506.06884, section 3).  It saves little against a trainable vocabulary
head where blocks are as large as heads, and the two others are for that: ``lora`` adds a low-rank product to every linear map
of a frozen block (LoRA, arXiv 2106.09685) that it shares with the backbone; ``bottleneck`` is a residual adapter
(arXiv 1902.00751) without attention, so a check costs no block and keeps no keys and values.  ``classifier`` is what the paper
compares with, an independent exit classifier: the hidden state as it is, read by a trainable vocabulary head.  ``lens`` trains
nothing: the backbone's own head on the hidden state, the logit lens.  Does not know where exits stand, how they are trained, or
which architecture a block has.

Shape letters: B batch, T positions, D model width, H bottleneck width, r rank.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from free_dist.backbones import LayerCache, Memory, Span
from free_dist.backbones.base import BlockCall
from free_dist.backbones.packed import PackedRows
from free_dist.backbones.replica import replica
from free_dist.config import EXIT_VARIANTS, ConfigError, ExitsConfig

LENS = "lens"
"""The variant without any weights: nothing to train, nothing to export."""

WIDTH_TO_BOTTLENECK = 4
"""The model's width over a bottleneck's, where none is named."""

IDENTITY_STD = 1e-3
"""A bottleneck starts this close to the identity; at exactly the identity its lower map would get no gradient."""


@dataclass(frozen=True, kw_only=True)
class ExitVariant:
    """Which kind of exit transformer, and its size; ``dataclasses.asdict`` gives JSON that builds it again."""

    name: str = "full"
    """One of ``EXIT_VARIANTS``, or ``lens``."""
    rank: int = 16
    """r of ``lora``."""
    bottleneck_size: int | None = None
    """H of ``bottleneck``; None: a quarter of the model's width."""

    def __post_init__(self) -> None:
        if self.name not in (*EXIT_VARIANTS, LENS):
            raise ConfigError(f"exits.variant={self.name!r}: want one of {', '.join(EXIT_VARIANTS)}")

    @classmethod
    def from_config(cls, config: ExitsConfig) -> ExitVariant:
        """What a recipe asks for."""
        return cls(name=config.variant, rank=config.rank, bottleneck_size=config.bottleneck_size)

    def sized(self, width: int) -> ExitVariant:
        """The same with every size written out, for a model of that width D."""
        size = self.bottleneck_size or max(1, width // WIDTH_TO_BOTTLENECK)
        return ExitVariant(name=self.name, rank=self.rank, bottleneck_size=size)


class ExitTransformer(nn.Module, ABC):
    """What an exit does to a hidden state before the backbone's norm and head; causal, with its own cache at inference."""

    is_block = True
    """Whether a call costs about what a block does; counts of blocks add such calls."""

    @property
    def own_head(self) -> nn.Module | None:
        """A vocabulary head of this exit's own, normed features [..., D] -> logits [..., V]; None: the backbone's."""
        return None

    @abstractmethod
    def forward(
        self,
        hidden: Tensor,
        cache: LayerCache | None = None,
        span: Span | PackedRows | None = None,
        *,
        last_only: bool = False,
        memory: Memory | None = None,
    ) -> Tensor:
        """``h_k`` [B, T, D] -> un-normed exit state [B, T, D], or of the last position, [B, 1, D]; see ``BlockCall``.

        Of packed rows [M, D] -> [M, D], or of the answer positions, [N, D].
        """

    def merged(self) -> ExitTransformer:
        """The same function in the form that decodes fastest; itself where it has only one."""
        return self


class BlockExit(ExitTransformer):
    """A block module and how it is run; as it is, the full replica of a decoder block, all of it trainable."""

    def __init__(self, block: nn.Module, block_call: BlockCall) -> None:
        super().__init__()
        self.block = block
        self._block_call = block_call

    def forward(
        self,
        hidden: Tensor,
        cache: LayerCache | None = None,
        span: Span | PackedRows | None = None,
        *,
        last_only: bool = False,
        memory: Memory | None = None,
    ) -> Tensor:
        return self._block_call(self.block, hidden, cache, span, last_only, memory)


class LoraExit(BlockExit):
    """A frozen block whose linear maps each carry a trainable low-rank update; it starts as the block."""

    def __init__(self, block: nn.Module, block_call: BlockCall, rank: int) -> None:
        """``block``'s weights stay shared; its modules are not changed.  Raises ConfigError for a rank that saves nothing."""
        own = replica(block, by_reference=True).requires_grad_(False)
        for name, linear in list(own.named_modules()):
            if isinstance(linear, nn.Linear):
                own.set_submodule(name, LowRankLinear(linear, rank))
        super().__init__(own, block_call)

    def merged(self) -> BlockExit:
        """A frozen block with all weights of its own, the updates added to its matrices."""
        # What stands in the memo is not copied, so the frozen matrices are not doubled on the way.
        added: dict[int, Any] = {id(module): module.merged() for module in _low_rank_maps(self.block)}
        return BlockExit(copy.deepcopy(self.block, added).requires_grad_(False), self._block_call)


class LowRankLinear(nn.Linear):
    """``y = x W^T + b + x down^T up^T`` with frozen W and b; ``up`` starts at zero, so it starts as the frozen map."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        n_in, n_out = frozen.in_features, frozen.out_features
        if not 1 <= rank <= min(n_in, n_out):
            raise ConfigError(f"exits.rank={rank}: want 1 to {min(n_in, n_out)}, a linear map here is {n_in} x {n_out}")
        super().__init__(n_in, n_out, bias=frozen.bias is not None, device="meta")
        self.weight, self.bias = frozen.weight, frozen.bias
        self.down = nn.Parameter(frozen.weight.new_empty(rank, n_in))
        """[r, D_in]."""
        self.up = nn.Parameter(frozen.weight.new_zeros(n_out, rank))
        """[D_out, r]."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D_in] -> [..., D_out]."""
        return F.linear(hidden, self.weight, self.bias) + F.linear(F.linear(hidden, self.down), self.up)

    def merged(self) -> nn.Linear:
        """One frozen map of its own with the update in its matrix, added in float32 or wider."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight = self.weight.to(wide) + self.up.to(wide) @ self.down.to(wide)
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.detach().to(self.weight.dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)


class BottleneckExit(ExitTransformer):
    """``h + up(gelu(down(norm(h))))``: no attention, so it needs no cache, and positions never checked cost nothing."""

    is_block = False

    def __init__(self, width: int, size: int, like: Tensor) -> None:
        """D and H; weights get the type and device of ``like``."""
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=like.dtype, device=like.device)
        self.down = nn.Linear(width, size, dtype=like.dtype, device=like.device)
        self.up = nn.Linear(size, width, dtype=like.dtype, device=like.device)
        nn.init.normal_(self.up.weight, std=IDENTITY_STD)
        nn.init.zeros_(self.up.bias)

    def forward(
        self,
        hidden: Tensor,
        cache: LayerCache | None = None,
        span: Span | PackedRows | None = None,
        *,
        last_only: bool = False,
        memory: Memory | None = None,
    ) -> Tensor:
        hidden = _kept(hidden, span, last_only=last_only)
        # A residual stream may be wider than the weights it passes.
        normed = self.norm(hidden.to(self.norm.weight.dtype))
        return hidden + self.up(F.gelu(self.down(normed)))


class LensExit(ExitTransformer):
    """The hidden state as it is: the frozen head reads it as it reads the last layer's (the logit lens)."""

    is_block = False

    def forward(
        self,
        hidden: Tensor,
        cache: LayerCache | None = None,
        span: Span | PackedRows | None = None,
        *,
        last_only: bool = False,
        memory: Memory | None = None,
    ) -> Tensor:
        return _kept(hidden, span, last_only=last_only)


class ClassifierExit(LensExit):
    """An independent exit classifier: the hidden state as it is, and a trainable head that starts as the backbone's."""

    def __init__(self, lm_head: nn.Module) -> None:
        """``lm_head`` is copied, and left as it is."""
        super().__init__()
        self.head = copy.deepcopy(lm_head).requires_grad_(True)

    @property
    def own_head(self) -> nn.Module:
        """The head that is trained."""
        return self.head


def new_exit_transformer(
    variant: ExitVariant, block: nn.Module, block_call: BlockCall, width: int, lm_head: nn.Module
) -> ExitTransformer:
    """An untrained exit of a model of width D that starts from ``block``, or from ``lm_head``; both are left as they are.

    ``lora`` shares the block's weights; ``bottleneck`` takes nothing from the block but type and device; ``classifier`` copies
    the head and ``lens`` takes nothing.  Weights that are to be trained require gradients, all others do not.  Raises ConfigError
    for sizes that do not fit.
    """
    if variant.name == LENS:
        return LensExit()
    if variant.name == "classifier":
        return ClassifierExit(lm_head)
    if variant.name == "lora":
        return LoraExit(block, block_call, variant.rank)
    if variant.name == "bottleneck":
        size = variant.sized(width).bottleneck_size
        assert size is not None
        return BottleneckExit(width, size, next(block.parameters()))
    return BlockExit(replica(block).requires_grad_(True), block_call)


def _kept(hidden: Tensor, span: Span | PackedRows | None, *, last_only: bool) -> Tensor:
    """The positions that are asked for, of an exit whose positions know nothing of each other; see ``BlockCall``."""
    if not last_only:
        return hidden
    return hidden.index_select(0, span.answers) if isinstance(span, PackedRows) else hidden[:, -1:]


def _low_rank_maps(block: nn.Module) -> list[LowRankLinear]:
    return [module for module in block.modules() if isinstance(module, LowRankLinear)]
