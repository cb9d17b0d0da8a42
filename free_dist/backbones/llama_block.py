"""One LLaMA block for decoding, one for packed training rows, and their rotary angles: the arithmetic of ``LlamaDecoderLayer``.

Both use that module's own weights.  Lean as :mod:`free_dist.backbones.opt_block` is: decoding is exact up to rounding, fires no
hooks and gathers no shards; :func:`packed_llama_block` calls the modules and has gradients.  Angles are computed
once per call and travel in ``Span.shared``.  Does not know caches beyond :class:`LayerCache`, nor embeddings and heads.

Shape letters: R rows, T new positions, S visible positions, D width, H query heads, N key-value heads, G = H / N, E head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

from free_dist.backbones.lean_layers import linear
from free_dist.backbones.packed import PackedRows
from free_dist.backbones.span import ContiguousSpan, LayerCache, Memory, Span
from free_dist.config import UserError


class LlamaShared(NamedTuple):
    """What all blocks of one call share; see ``Span.shared``."""

    cos: Tensor
    """[1, T, E], or [R, 1, T, E] where rows differ."""
    sin: Tensor
    """Like ``cos``, the first half negated: rotating then takes no negation."""
    mask: Tensor | None
    """The span's mask for G query heads folded into the positions, [1 or R, 1, G * T, S]."""
    last_mask: Tensor | None
    """The same for the last position alone, [R, 1, 1, S]."""


class RotaryAngles:
    """Positions -> cosines and sines, of any rotary variant whose angles depend on the position alone.

    Tables of all positions, made once for each type and device by the library's own rotary module: a call then only looks
    up, without waiting for the device.  The module is one of its own, outside any ``nn.Module``: converting the model to half
    precision would round the frequencies, and angles at a few hundred positions with them.
    """

    def __init__(self, config: LlamaConfig) -> None:
        """Raises UserError for angles that change with the length of the text."""
        kind = config.rope_parameters["rope_type"]
        if kind == "longrope":
            raise UserError(
                "backbone.path: this LLaMA has rope_type 'longrope', whose angles change with the length of the text, so cached "
                "keys would go stale; use a checkpoint with rope_type default, linear, dynamic, yarn or llama3"
            )
        self._rotary = LlamaRotaryEmbedding(config=config)
        self._n_positions = config.max_position_embeddings
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, n_positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Positions 0 to T - 1 -> cos and sin, each [1, T, E], in the type and on the device of ``like``."""
        cos, sin, _ = self._table(like)
        return cos[None, :n_positions], sin[None, :n_positions]

    def shared(self, span: Span, like: Tensor, groups: int) -> LlamaShared:
        """What the blocks of a call over ``span`` need, in the type and on the device of ``like``; ``groups`` is G."""
        cos_table, _, sin_table = self._table(like)
        # A slice is a view; looking positions up copies.
        where = slice(span.start, span.stop) if isinstance(span, ContiguousSpan) else span.positions(like.device)
        cos, sin = (table[where].unsqueeze(-3) for table in (cos_table, sin_table))
        mask = span.mask
        return LlamaShared(cos, sin, mask if mask is None else mask.repeat(1, 1, groups, 1), span.last_mask)

    def packed(self, rows: PackedRows, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of listed positions, for :func:`rotated`: cos and sin, each [M, 1, E], in the type and on the device of ``like``."""
        if like.dtype not in rows.shared:
            cos, _, sin = self._table(like)
            rows.shared[like.dtype] = (cos[rows.positions][:, None], sin[rows.positions][:, None])
        angles: tuple[Tensor, Tensor] = rows.shared[like.dtype]
        return angles

    def _table(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines, sines, and sines with their first half negated; each [positions, E]."""
        key = (like.dtype, like.device)
        if key not in self._tables:
            # A table first made while decoding must still serve a later training step.
            with torch.inference_mode(False):
                place = torch.empty(0, dtype=like.dtype, device=like.device)
                positions = torch.arange(self._n_positions, device=like.device)[None]
                cos, sin = (angles[0] for angles in self._rotary.to(like.device)(place, positions))
                half = sin.shape[-1] // 2
                self._tables[key] = (cos, sin, torch.cat((-sin[:, :half], sin[:, half:]), dim=-1))
        return self._tables[key]


class LlamaBlockCall:
    """``BlockCall`` of LLaMA: blocks do not own their rotary angles, so the call brings them."""

    def __init__(self, angles: RotaryAngles) -> None:
        self._angles = angles

    def __call__(
        self,
        block: nn.Module,
        hidden: Tensor,
        cache: LayerCache | None = None,
        span: Span | PackedRows | None = None,
        last_only: bool = False,
        memory: Memory | None = None,
    ) -> Tensor:
        """Run one ``LlamaDecoderLayer``: [R, T, D] -> [R, T, D], or [R, 1, D] with ``last_only``; causal.

        Decoding (a cache) takes the lean path, which fires no module hooks and needs gradients disabled.  Packed rows: see
        ``BlockCall``.
        """
        if isinstance(span, PackedRows):
            return packed_llama_block(block, hidden, span, self._angles.packed(span, hidden), last_only=last_only)
        if cache is not None:
            assert span is not None, "a cache needs the span that says where to write"
            return llama_block(block, hidden, cache, span, last_only=last_only)
        return block(hidden, position_embeddings=self._angles(hidden.shape[1], hidden))


def llama_block(block: nn.Module, hidden: Tensor, cache: LayerCache, span: Span, *, last_only: bool = False) -> Tensor:
    """[R, T, D] -> [R, T, D], causal over the cached and the T new positions, which ``span`` places in ``cache``.

    ``last_only`` caches all T positions and computes the last output alone, [R, 1, D].  Needs gradients disabled (it
    updates fresh tensors in place) and a block in evaluation mode.  ``span`` comes from ``Backbone.with_shared``.
    """
    # nn.Module.__getattr__ is a Python function; its dictionaries are read instead, which halves the time of a block.
    modules = block._modules
    attention = modules["self_attn"]
    assert isinstance(attention, LlamaAttention)
    projections = attention._modules
    shared = span.shared
    assert isinstance(shared, LlamaShared), "the span lacks its rotary angles: pass it through Backbone.with_shared"
    cos, sin, mask, last_mask = shared
    rows, n_new, _ = hidden.shape
    by_head = (rows, n_new, -1, attention.head_dim)

    normed = rms_norm(modules["input_layernorm"], hidden)
    key, value = cache.update(
        rotated(linear(projections["k_proj"], normed).view(by_head).transpose(1, 2), cos, sin),
        linear(projections["v_proj"], normed).view(by_head).transpose(1, 2),
        span,
    )
    if last_only and n_new > 1:
        hidden, normed, n_new, mask = hidden[:, -1:], normed[:, -1:], 1, last_mask
        by_head = (rows, 1, -1, attention.head_dim)
        cos, sin = cos[..., -1:, :], sin[..., -1:, :]
    query = rotated(linear(projections["q_proj"], normed).view(by_head).transpose(1, 2), cos, sin)
    attended = grouped_attention(query, key, value, mask).transpose(1, 2).reshape(rows, n_new, -1)
    hidden = linear(projections["o_proj"], attended).add_(hidden)

    mlp = modules["mlp"]
    assert mlp is not None
    maps = mlp._modules
    normed = rms_norm(modules["post_attention_layernorm"], hidden)
    gate, activation = linear(maps["gate_proj"], normed), maps["act_fn"]
    assert activation is not None
    gate = F.silu(gate, inplace=True) if type(activation) is nn.SiLU else activation(gate)
    return linear(maps["down_proj"], gate.mul_(linear(maps["up_proj"], normed))).add_(hidden)


def packed_llama_block(
    block: Any, hidden: Tensor, rows: PackedRows, angles: tuple[Tensor, Tensor], *, last_only: bool = False
) -> Tensor:
    """[M, D] -> [M, D], or of the answer positions [N, D] with ``last_only``; differentiable.  ``angles``: see ``packed``."""
    attention = block.self_attn
    assert isinstance(attention, LlamaAttention)
    by_head = (hidden.shape[0], -1, attention.head_dim)
    normed = block.input_layernorm(hidden)
    key = rotated(attention.k_proj(normed).view(by_head), *angles)
    value = attention.v_proj(normed).view(by_head)
    cos, sin = angles
    if last_only:
        hidden, normed, cos, sin = (whole.index_select(0, rows.answers) for whole in (hidden, normed, cos, sin))
    attended = rows.attend(
        rotated(attention.q_proj(normed).view(len(hidden), -1, attention.head_dim), cos, sin),
        key,
        value,
        at_answers=last_only,
        dropout=attention.attention_dropout if attention.training else 0.0,
    )
    hidden = hidden + attention.o_proj(attended)
    return hidden + block.mlp(block.post_attention_layernorm(hidden))


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [R, H, T, E] or [M, H, E] turned by their positions' angles; ``sin`` has its first half negated."""
    half = heads.shape[-1] // 2
    return (heads * cos).add_(torch.cat((heads[..., half:], heads[..., :half]), dim=-1).mul_(sin))


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Queries [R, H, T, E] on keys and values [R, N, S, E], G query heads to one of theirs -> [R, H, T, E].

    ``mask`` is that of :class:`LlamaShared`; None: plain causality from the first position, or one query that sees all.
    """
    rows, n_heads, n_new, width = query.shape
    n_shared = key.shape[1]
    causal = mask is None and n_new > 1
    if n_shared == n_heads:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
    if causal:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    # The queries of a group stand side by side as if they were positions: the cached keys are never copied.
    folded = query.reshape(rows, n_shared, -1, width)
    return F.scaled_dot_product_attention(folded, key, value, mask).view(rows, n_heads, n_new, width)


def rms_norm(module: nn.Module | None, hidden: Tensor) -> Tensor:
    """``LlamaRMSNorm`` without the cost of a module call: normed in float32, rounded, then scaled, whatever the type."""
    assert isinstance(module, LlamaRMSNorm)
    wide = hidden.float()
    scale = wide.square().mean(-1, keepdim=True).add_(module.variance_epsilon).rsqrt_()
    return (wide * scale).to(hidden.dtype).mul_(module._parameters["weight"])
