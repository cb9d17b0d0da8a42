"""Image -> visual features for decoding: the arithmetic of ``Blip2VisionModel`` and ``Blip2QFormerModel`` on their own weights.

At batch 1 and small width, transformers' module calls and output recording take as long as the arithmetic.  These functions
read the parameters directly and keep nothing between calls, so they are exact up to rounding and see every later change of
a weight, but they neither fire forward hooks nor gather sharded parameters nor drop anything out: they are for inference on
a replicated model.  Not known here: the projection to the language model, text inside the Q-Former, recorded attention maps,
and when the functions may be used; ``supports_...`` say only whether a model's structure is the one written out here.

Shape letters: I images, P patches of an image, W width of the vision tower, Q query tokens, D width of the Q-Former, H heads.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.blip_2 import modeling_blip_2 as blip2
from transformers.models.instructblip import modeling_instructblip as instructblip

from free_dist.backbones.lean_layers import layer_norm, linear
from free_dist.config import UserError

WRITTEN_OUT = frozenset(
    {
        nn.LayerNorm,
        blip2.Blip2VisionModel,
        blip2.Blip2VisionEmbeddings,
        blip2.Blip2Encoder,
        blip2.Blip2EncoderLayer,
        blip2.Blip2Attention,
        blip2.Blip2MLP,
        # The same tower under another name.
        instructblip.InstructBlipVisionModel,
        instructblip.InstructBlipVisionEmbeddings,
        instructblip.InstructBlipEncoder,
        instructblip.InstructBlipEncoderLayer,
        instructblip.InstructBlipAttention,
        instructblip.InstructBlipMLP,
        blip2.Blip2QFormerModel,
        blip2.Blip2QFormerEncoder,
        blip2.Blip2QFormerLayer,
        blip2.Blip2QFormerAttention,
        blip2.Blip2QFormerMultiHeadAttention,
        blip2.Blip2QFormerSelfOutput,
        blip2.Blip2QFormerIntermediate,
        blip2.Blip2QFormerOutput,
    }
)
"""Classes whose ``forward`` is written out here; a subclass may compute something else."""

CALLED = frozenset(
    {
        *("qkv", "projection", "fc1", "fc2", "query", "key", "value", "dense"),
        *("activation_fn", "intermediate_act_fn", "patch_embedding", "dropout"),
    }
)
"""Names of children that stay modules: what stands in the place of a linear map or an activation runs as it is."""

SAME_ATTENTION = frozenset({"eager", "sdpa"})
"""Attention implementations of transformers that differ from the kernel used here by rounding alone."""


def supports_vision(model: nn.Module) -> bool:
    """Whether :func:`encode_patches` equals the vision tower of ``model``, a BLIP-2 or InstructBLIP.

    False if a class was replaced, a ``forward`` was overridden on an object (as offloading does), patches overlap or the
    attention implementation is another.  Wrapped or quantised linear maps and other activations are called and so
    supported.  Walks every module: ask once for a model, and again after changing its structure.
    """
    vision: Any = model._modules.get("vision_model")
    if type(vision) not in (blip2.Blip2VisionModel, instructblip.InstructBlipVisionModel) or not _is_untouched(vision):
        return False
    conv = vision.embeddings.patch_embedding
    return bool(
        type(conv) is nn.Conv2d
        and conv.stride == conv.kernel_size
        and (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1)
        and vision.config._attn_implementation in SAME_ATTENTION
    )


def supports_qformer(model: nn.Module) -> bool:
    """Whether :func:`run_qformer` equals the Q-Former of ``model``, a BLIP-2; as :func:`supports_vision`."""
    qformer: Any = model._modules.get("qformer")
    return bool(
        type(qformer) is blip2.Blip2QFormerModel
        and _is_untouched(qformer)
        and qformer.config._attn_implementation in SAME_ATTENTION
        and qformer.config.chunk_size_feed_forward == 0
    )


def _is_untouched(tower: nn.Module) -> bool:
    known = all(type(module) in WRITTEN_OUT for module in _containers(tower))
    return known and not any("forward" in vars(module) for module in tower.modules())


def encode_patches(vision_model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Normalised pixels [I, 3, height, width] -> patch features [I, P + 1, W] after the last norm, class token first.

    Equals ``vision_model(pixel_values).last_hidden_state`` of a model in evaluation mode.  Positions are not interpolated:
    as in transformers, pixels beyond the last whole patch are dropped, and fewer patches than positions take the first
    positions.  UserError if there are more patches than positions, or none.
    """
    hidden = _embed_patches(_child(vision_model, "embeddings"), pixel_values)
    for layer in cast(nn.ModuleList, _child(_child(vision_model, "encoder"), "layers")):
        hidden = _vision_layer(layer, hidden)
    return layer_norm(_child(vision_model, "post_layernorm"), hidden)


def run_qformer(qformer: nn.Module, query_tokens: Tensor, patches: Tensor) -> Tensor:
    """Query tokens [1, Q, D] and patch features [I, P + 1, W] -> query features [I, Q, D], in the Q-Former's own precision.

    Equals ``last_hidden_state`` of ``qformer`` in evaluation mode for ``query_tokens`` expanded to I rows.
    """
    norm = _child(qformer, "layernorm")
    dtype = cast(Tensor, norm.weight).dtype
    patches = patches.to(dtype)
    # One row serves all images up to the first cross-attention: until there nothing depends on an image.
    hidden = layer_norm(norm, query_tokens.to(dtype))
    for layer in cast(nn.ModuleList, _child(_child(qformer, "encoder"), "layer")):
        hidden = _query_attention(_child(layer, "attention"), hidden, hidden)
        if "crossattention" in layer._modules:
            hidden = _query_attention(_child(layer, "crossattention"), hidden, patches)
        feed_forward = _child(layer, "intermediate_query")
        inner = _child(feed_forward, "intermediate_act_fn")(linear(_child(feed_forward, "dense"), hidden))
        hidden = _add_and_norm(_child(layer, "output_query"), inner, hidden)
    return hidden


def _embed_patches(embeddings: nn.Module, pixel_values: Tensor) -> Tensor:
    parameters = embeddings._parameters
    classes, positions = cast(Tensor, parameters["class_embedding"]), cast(Tensor, parameters["position_embedding"])
    conv = _child(embeddings, "patch_embedding")
    assert isinstance(conv, nn.Conv2d)
    weight = cast(Tensor, conv._parameters["weight"])
    images, channels, height, width = pixel_values.shape
    tall, wide = conv.kernel_size
    rows, columns = height // tall, width // wide
    count = rows * columns
    if not 1 <= count < positions.shape[1]:
        raise UserError(
            f"pixel_values: {height} x {width} pixels are {count} patches, the vision tower has positions for 1 to "
            f"{positions.shape[1] - 1}; resize the image as preprocessor_config.json of the backbone says"
        )
    # Patches do not overlap, so the convolution is one matrix product, which starts faster for a single image.
    pixels = pixel_values[..., : rows * tall, : columns * wide].to(weight.dtype)
    pixels = pixels.reshape(images, channels, rows, tall, columns, wide).permute(0, 2, 4, 1, 3, 5)
    pixels = pixels.reshape(images, count, channels * tall * wide)
    patches = F.linear(pixels, weight.flatten(1), conv._parameters["bias"])
    hidden = torch.cat((classes.to(weight.dtype).expand(images, 1, -1), patches), dim=1)
    return hidden + positions[:, : count + 1].to(weight.dtype)


def _vision_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """One pre-norm block: [I, T, W] -> [I, T, W]."""
    attention = _child(layer, "self_attn")
    assert isinstance(attention, (blip2.Blip2Attention, instructblip.InstructBlipAttention))
    images, length, _ = hidden.shape
    qkv = linear(_child(attention, "qkv"), layer_norm(_child(layer, "layer_norm1"), hidden))
    by_head = qkv.view(images, length, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = by_head.unbind(0)
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(hidden.shape)
    hidden = linear(_child(attention, "projection"), attended) + hidden

    mlp = _child(layer, "mlp")
    inner = linear(_child(mlp, "fc1"), layer_norm(_child(layer, "layer_norm2"), hidden))
    return linear(_child(mlp, "fc2"), _child(mlp, "activation_fn")(inner)) + hidden


def _query_attention(block: nn.Module, hidden: Tensor, source: Tensor) -> Tensor:
    """Attention of ``hidden`` [1 or I, Q, D] to ``source`` [1 or I, S, W], then residual and norm: [1 or I, Q, D]."""
    attention = _child(block, "attention")
    assert isinstance(attention, blip2.Blip2QFormerMultiHeadAttention)
    rows, length, _ = source.shape
    heads, size = attention.num_attention_heads, attention.attention_head_size
    key = linear(_child(attention, "key"), source).view(rows, length, heads, size).transpose(1, 2)
    value = linear(_child(attention, "value"), source).view(rows, length, heads, size).transpose(1, 2)
    query = linear(_child(attention, "query"), hidden).view(*hidden.shape[:2], heads, size).transpose(1, 2)
    # Fused attention kernels want as many rows of queries as of keys.
    attended = F.scaled_dot_product_attention(query.expand(rows, -1, -1, -1), key, value).transpose(1, 2)
    return _add_and_norm(_child(block, "output"), attended.flatten(2), hidden)


def _add_and_norm(output: nn.Module, hidden: Tensor, residual: Tensor) -> Tensor:
    return layer_norm(_child(output, "LayerNorm"), linear(_child(output, "dense"), hidden) + residual)


def _containers(module: nn.Module) -> list[nn.Module]:
    """``module`` and those below it whose arithmetic is written out here, or would have to be."""
    found = [] if type(module) is nn.ModuleList else [module]
    for name, child in module.named_children():
        if name not in CALLED:
            found += _containers(child)
    return found


def _child(module: nn.Module, name: str) -> nn.Module:
    # nn.Module.__getattr__ is a Python function; reading its dictionary takes a third of the time.
    child = module._modules[name]
    assert child is not None
    return child
