"""One pre-norm OPT block for decoding: the arithmetic of ``OPTDecoderLayer`` on that module's own weights.

At batch 1 and small width, module calls and attribute look-ups cost more time than the arithmetic.  This function reads the
parameters directly, so it is exact up to float32 rounding and sees every later change of a weight, but neither fires forward
hooks nor gathers sharded parameters: it is for inference on a replicated model.  Does not know caches beyond
:class:`LayerCache`, nor when it may be used: :func:`free_dist.backbones.blip2.call_opt_block` decides.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.opt.modeling_opt import OPTAttention

from free_dist.backbones.base import LayerCache, causal_mask


def opt_block(block: nn.Module, hidden: Tensor, cache: LayerCache) -> Tensor:
    """[B, T, D] -> [B, T, D], causal over the P cached and the T new positions, which are appended to ``cache``.

    Needs gradients disabled (it updates fresh tensors in place) and a block in evaluation mode (no dropout).
    """
    # nn.Module.__getattr__ is a Python function; its dictionaries are read instead, which halves the time of a block.
    modules = block._modules
    attention = modules["self_attn"]
    assert isinstance(attention, OPTAttention)
    rows, n_new, width = hidden.shape
    by_head = (rows, n_new, attention.num_heads, width // attention.num_heads)
    projections = attention._modules
    n_past = cache.length

    normed = _layer_norm(modules["self_attn_layer_norm"], hidden)
    query = _linear(projections["q_proj"], normed).view(by_head).transpose(1, 2)
    key, value = cache.update(
        _linear(projections["k_proj"], normed).view(by_head).transpose(1, 2),
        _linear(projections["v_proj"], normed).view(by_head).transpose(1, 2),
    )
    mask = causal_mask(n_new, n_past, hidden.device)
    attended = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None and n_new > 1)
    attended = attended.transpose(1, 2).reshape(hidden.shape)
    hidden = _linear(projections["out_proj"], attended).add_(hidden)

    inner = _linear(modules["fc1"], _layer_norm(modules["final_layer_norm"], hidden))
    activation = modules["activation_fn"]
    assert activation is not None
    inner = inner.relu_() if type(activation) is nn.ReLU else activation(inner)
    return _linear(modules["fc2"], inner).add_(hidden)


def _linear(module: nn.Module | None, hidden: Tensor) -> Tensor:
    assert module is not None
    if type(module) is not nn.Linear:  # a wrapper, such as a low-rank adapter, has arithmetic of its own
        return module(hidden)
    parameters = module._parameters
    return F.linear(hidden, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]


def _layer_norm(module: nn.Module | None, hidden: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    parameters = module._parameters
    return torch.layer_norm(hidden, module.normalized_shape, parameters["weight"], parameters["bias"], module.eps)
