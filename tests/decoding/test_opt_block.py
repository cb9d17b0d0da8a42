"""The lean OPT block against transformers' own layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from free_dist.backbones import ContiguousSpan, LayerCache
from free_dist.backbones.opt_block import call_opt_block
from free_dist.backbones.span import causal_mask

CPU = torch.device("cpu")


def run_once(backbone, block: nn.Module, hidden: Tensor) -> Tensor:
    """The lean block on an empty cache."""
    n_new = hidden.shape[1]
    cache = backbone.new_layer_cache(hidden.shape[0], n_new)
    return call_opt_block(block, hidden, cache, ContiguousSpan(0, n_new, CPU))


@pytest.mark.parametrize(("n_past", "n_new"), [(0, 1), (0, 9), (7, 1), (7, 4)])
@torch.no_grad()
def test_lean_block_equals_hugging_face_layer(backbone, n_past: int, n_new: int) -> None:
    block = backbone.block(2)
    hidden = torch.randn(2, n_past + n_new, 32, generator=torch.Generator().manual_seed(0))
    lean: LayerCache = backbone.new_layer_cache(2, n_past + n_new)
    reference = DynamicCache()
    layer = block.self_attn.layer_idx
    start = 0
    for part in (hidden[:, :n_past], hidden[:, n_past:]):
        if part.shape[1] == 0:
            continue
        wanted = block(part, attention_mask=causal_mask(part.shape[1], start, CPU), past_key_values=reference)
        ours = call_opt_block(block, part, lean, ContiguousSpan(start, part.shape[1], CPU))
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
        start += part.shape[1]
    torch.testing.assert_close(lean.keys[:, :, :start], reference.layers[layer].keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lean.values[:, :, :start], reference.layers[layer].values, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_lean_block_leaves_its_input_alone_and_follows_changed_weights(backbone) -> None:
    block = copy.deepcopy(backbone.block(2))
    hidden = torch.randn(1, 3, 32)
    kept = hidden.clone()
    first = run_once(backbone, block, hidden)
    assert torch.equal(hidden, kept)
    block.fc2.weight.mul_(2.0)
    second = run_once(backbone, block, hidden)
    block.fc2.weight = nn.Parameter(block.fc2.weight / 2.0)
    third = run_once(backbone, block, hidden)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(first, third)


@torch.no_grad()
def test_activations_other_than_relu_and_wrapped_linears_equal_hugging_face(backbone) -> None:
    block = copy.deepcopy(backbone.block(2))
    block.activation_fn = nn.GELU()
    block.fc1 = nn.Sequential(block.fc1)
    hidden = torch.randn(1, 3, 32)
    torch.testing.assert_close(run_once(backbone, block, hidden), block(hidden))


def test_gradients_flow_through_a_block_without_a_cache_as_through_the_layer(backbone) -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn(1, 3, 32, generator=generator.manual_seed(1), requires_grad=True) for _ in range(2))
    call_opt_block(backbone.block(2), ours).square().sum().backward()
    mask = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    backbone.block(2)(theirs, attention_mask=mask).square().sum().backward()
    assert ours.grad is not None and ours.grad.abs().sum() > 0
    torch.testing.assert_close(ours.grad, theirs.grad)
