"""One T5 decoder block, and its position bias: the arithmetic of ``T5Block`` on that module's own weights.

Lean as :mod:`free_dist.backbones.opt_block` is: exact up to rounding, no hooks, no gathering of shards.  The keys and values
of what the encoder read are computed on a block's first call and kept in its cache, so a block that no token needs never
computes them.  The bias belongs to the first block but serves all; it is computed once per call and travels in ``Span.shared``.
Does not know the encoder, embeddings and heads, nor float16, in which T5 overflows.

Shape letters: B rows of a cache, R rows of a call, T new positions, S visible ones, M encoder positions, D width, H heads,
E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.t5.modeling_t5 import T5Attention, T5DenseGatedActDense, T5LayerNorm

from free_dist.backbones.lean_layers import linear
from free_dist.backbones.packed import PackedRows
from free_dist.backbones.span import ContiguousSpan, LayerCache, Memory, Span


class PositionBias:
    """Position bias of the decoder's self-attention, by the distance from a query back to a key."""

    def __init__(self, attention: T5Attention) -> None:
        """``attention`` is the first block's, which owns the weights."""
        self._attention = attention
        # All distances from the largest on share one bucket.
        distances = torch.arange(attention.relative_attention_max_distance + 1)
        self._buckets = attention._relative_position_bucket(
            -distances,
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )

    def __call__(self, span: Span, positions: Tensor) -> Tensor:
        """Added to the scores of a call over ``span``: [1 or R, H, T, S], with what may not be attended to masked out."""
        table = self._attention.relative_attention_bias
        if self._buckets.device != positions.device:
            self._buckets = self._buckets.to(positions.device)
        keys = torch.arange(_visible(span), device=positions.device)
        distance = positions[..., None] - keys  # [T, S] or [R, T, S]
        buckets = self._buckets[distance.clamp(0, len(self._buckets) - 1)]
        # Called as a module where a sharding engine gathers weights by its hooks; the call itself costs time.
        bias = table(buckets) if table._forward_pre_hooks else F.embedding(buckets, table.weight)
        bias = bias.movedim(-1, -3)
        bias = bias if bias.ndim == 4 else bias[None]
        if span.mask is None and distance.shape[-2] == 1:  # one query that sees all
            return bias
        mask = distance >= 0 if span.mask is None else span.mask
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)


def _visible(span: Span) -> int:
    """Slots that the queries of a call look at, S."""
    if span.mask is not None:
        return span.mask.shape[-1]
    assert isinstance(span, ContiguousSpan)
    return span.stop


def call_t5_block(
    block: nn.Module,
    hidden: Tensor,
    cache: LayerCache | None = None,
    span: Span | PackedRows | None = None,
    last_only: bool = False,
    memory: Memory | None = None,
) -> Tensor:
    """Run one ``T5Block``: [R, T, D] -> [R, T, D], or [R, 1, D] with ``last_only``; causal, and looking at the memory.

    Decoding (a cache, which holds the memory) takes the lean path, which fires no module hooks and needs gradients disabled.
    Without a cache ``memory`` must be given, and a span of all T positions that went through ``Backbone.with_shared``.
    """
    assert isinstance(span, Span), "T5's blocks need the span that holds their position bias"
    if cache is not None:
        return t5_block(block, hidden, cache, span, last_only=last_only)
    assert memory is not None, "T5's blocks need what the encoder read"
    mask = memory.mask
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device).masked_fill_(
            ~mask, torch.finfo(hidden.dtype).min
        )
    # Exits may be trained in a narrower type than the backbone's.
    output, _, _ = block(
        hidden,
        position_bias=span.shared.to(hidden.dtype),
        encoder_hidden_states=memory.states.to(hidden.dtype),
        encoder_attention_mask=mask,
    )
    return output


def t5_block(block: nn.Module, hidden: Tensor, cache: LayerCache, span: Span, *, last_only: bool = False) -> Tensor:
    """[R, T, D] -> [R, T, D], causal over the cached and the T new positions, which ``span`` places in ``cache``.

    ``last_only`` caches all T positions and computes the last output alone, [R, 1, D].  Needs gradients disabled, a block in
    evaluation mode, ``cache.memory``, and a span from ``Backbone.with_shared``.
    """
    # nn.Module.__getattr__ is a Python function; its dictionaries are read instead, which halves the time of a block.
    self_attention, cross_attention, feed_forward = (_children(layer) for layer in _children(block, "layer").values())
    bias = span.shared
    assert isinstance(bias, Tensor), "the span lacks its position bias: pass it through Backbone.with_shared"

    maps = _children(self_attention["SelfAttention"])
    n_heads = bias.shape[1]
    normed = rms_norm(self_attention["layer_norm"], hidden)
    key, value = cache.update(
        _heads(linear(maps["k"], normed), n_heads), _heads(linear(maps["v"], normed), n_heads), span
    )
    if last_only and hidden.shape[1] > 1:
        hidden, normed, bias = hidden[:, -1:], normed[:, -1:], bias[:, :, -1:]
    hidden = hidden + _attended(maps, normed, key, value, bias)

    maps = _children(cross_attention["EncDecAttention"])
    memory = cache.memory
    assert memory is not None, "a T5 block's cache needs the memory that Backbone.start returned"
    if cache.cross is None:
        key, value = (_heads(linear(maps[name], memory.states), n_heads) for name in ("k", "v"))
        cache.cross = (key.contiguous(), value.contiguous())
    key, value = (span.select(kept) for kept in cache.cross)
    mask = None if memory.mask is None else span.select(memory.mask)
    normed = rms_norm(cross_attention["layer_norm"], hidden)
    hidden = hidden + _attended(maps, normed, key, value, mask)

    return hidden + _dense(feed_forward["DenseReluDense"], rms_norm(feed_forward["layer_norm"], hidden))


def _heads(projected: Tensor, n_heads: int) -> Tensor:
    """[R, T, H * E] -> [R, H, T, E]."""
    rows, length, width = projected.shape
    return projected.view(rows, length, n_heads, width // n_heads).transpose(1, 2)


def _attended(
    maps: dict[str, nn.Module | None], normed: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """[R, T, D] queries' input -> [R, T, D].  T5 does not scale its scores."""
    query = _heads(linear(maps["q"], normed), key.shape[1])
    attended = F.scaled_dot_product_attention(query, key, value, mask, scale=1.0)
    return linear(maps["o"], attended.transpose(1, 2).flatten(2))


def _dense(module: nn.Module | None, normed: Tensor) -> Tensor:
    """Feed-forward layer, gated (FlanT5) or plain (the first T5)."""
    maps = _children(module)
    activation = maps["act"]
    assert activation is not None
    if isinstance(module, T5DenseGatedActDense):
        inner = activation(linear(maps["wi_0"], normed)).mul_(linear(maps["wi_1"], normed))
    else:
        inner = activation(linear(maps["wi"], normed))
    return linear(maps["wo"], inner)


def _children(module: nn.Module | None, name: str | None = None) -> dict[str, nn.Module | None]:
    assert module is not None
    return module._modules if name is None else _children(module._modules[name])


def rms_norm(module: nn.Module | None, hidden: Tensor) -> Tensor:
    """``T5LayerNorm`` without the cost of a module call: the variance in float32, the rest no narrower than the input."""
    assert isinstance(module, T5LayerNorm)
    weight = module._parameters["weight"]
    assert weight is not None
    scale = hidden.float().square().mean(-1, keepdim=True).add_(module.variance_epsilon).rsqrt_()
    return (hidden * scale).to(weight.dtype).mul_(weight)
