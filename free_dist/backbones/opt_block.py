"""One pre-norm OPT block for decoding, and one for packed training rows: ``OPTDecoderLayer`` on that module's own weights.

At batch 1 and small width, module calls and attribute look-ups cost more time than the arithmetic.  This function reads the
parameters directly, so it is exact up to float32 rounding and sees every later change of a weight, but neither fires forward
hooks nor gathers sharded parameters: it is for inference on a replicated model.  :func:`packed_opt_block` calls the modules and
has gradients.  Does not know caches beyond :class:`LayerCache`, nor embeddings and heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.opt.modeling_opt import OPTAttention

from free_dist.backbones.lean_layers import layer_norm, linear
from free_dist.backbones.packed import PackedRows
from free_dist.backbones.span import LayerCache, Memory, Span


def call_opt_block(
    block: nn.Module,
    hidden: Tensor,
    cache: LayerCache | None = None,
    span: Span | PackedRows | None = None,
    last_only: bool = False,
    memory: Memory | None = None,
) -> Tensor:
    """Run one ``OPTDecoderLayer``: [R, T, D] -> [R, T, D], or [R, 1, D] with ``last_only``; causal.

    Decoding (a cache) takes the lean path, which fires no module hooks and needs gradients disabled.  Packed rows: see
    ``BlockCall``.
    """
    if isinstance(span, PackedRows):
        return packed_opt_block(block, hidden, span, last_only=last_only)
    if cache is not None:
        assert span is not None, "a cache needs the span that says where to write"
        return opt_block(block, hidden, cache, span, last_only=last_only)
    return block(hidden)


def opt_block(block: nn.Module, hidden: Tensor, cache: LayerCache, span: Span, *, last_only: bool = False) -> Tensor:
    """[R, T, D] -> [R, T, D], causal over the cached and the T new positions, which ``span`` places in ``cache``.

    ``last_only`` caches all T positions and computes the last output alone, [R, 1, D].  Needs gradients disabled (it
    updates fresh tensors in place) and a block in evaluation mode (no dropout).
    """
    # nn.Module.__getattr__ is a Python function; its dictionaries are read instead, which halves the time of a block.
    modules = block._modules
    attention = modules["self_attn"]
    assert isinstance(attention, OPTAttention)
    rows, n_new, width = hidden.shape
    by_head = (rows, n_new, attention.num_heads, width // attention.num_heads)
    projections = attention._modules

    normed = layer_norm(modules["self_attn_layer_norm"], hidden)
    key, value = cache.update(
        linear(projections["k_proj"], normed).view(by_head).transpose(1, 2),
        linear(projections["v_proj"], normed).view(by_head).transpose(1, 2),
        span,
    )
    mask = span.mask
    if last_only and n_new > 1:
        hidden, normed, n_new, mask = hidden[:, -1:], normed[:, -1:], 1, span.last_mask
        by_head = (rows, 1, *by_head[2:])
    query = linear(projections["q_proj"], normed).view(by_head).transpose(1, 2)
    attended = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None and n_new > 1)
    attended = attended.transpose(1, 2).reshape(hidden.shape)
    hidden = linear(projections["out_proj"], attended).add_(hidden)

    inner = linear(modules["fc1"], layer_norm(modules["final_layer_norm"], hidden))
    activation = modules["activation_fn"]
    assert activation is not None
    inner = inner.relu_() if type(activation) is nn.ReLU else activation(inner)
    return linear(modules["fc2"], inner).add_(hidden)


def packed_opt_block(block: Any, hidden: Tensor, rows: PackedRows, *, last_only: bool = False) -> Tensor:
    """[M, D] -> [M, D], or of the answer positions [N, D] with ``last_only``; differentiable, with the block's own dropout."""
    attention = block.self_attn
    assert isinstance(attention, OPTAttention)
    by_head = (-1, attention.num_heads, attention.head_dim)
    normed = block.self_attn_layer_norm(hidden)
    key, value = attention.k_proj(normed).view(by_head), attention.v_proj(normed).view(by_head)
    if last_only:
        hidden, normed = hidden.index_select(0, rows.answers), normed.index_select(0, rows.answers)
    attended = rows.attend(
        attention.q_proj(normed).view(by_head),
        key,
        value,
        at_answers=last_only,
        dropout=attention.dropout if attention.training else 0.0,
    )
    # Without gradients nobody else reads the fresh tensors, and a new one costs more than the addition.
    added = F.dropout(attention.out_proj(attended), block.dropout, block.training)
    hidden = hidden + added if added.requires_grad else added.add_(hidden)
    inner = block.fc1(block.final_layer_norm(hidden))
    in_place = not inner.requires_grad and type(block.activation_fn) is nn.ReLU
    inner = block.fc2(inner.relu_() if in_place else block.activation_fn(inner))
    inner = F.dropout(inner, block.dropout, block.training)
    return hidden + inner if inner.requires_grad else inner.add_(hidden)
