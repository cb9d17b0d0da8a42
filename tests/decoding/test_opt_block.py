"""The lean OPT block against transformers' own layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from free_dist.backbones.base import causal_mask
from free_dist.backbones.blip2 import call_opt_block


@pytest.mark.parametrize(("n_past", "n_new"), [(0, 1), (0, 9), (7, 1), (7, 4)])
def test_lean_block_equals_hugging_face_layer(backbone, n_past: int, n_new: int) -> None:
    block = backbone.block(2)
    hidden = torch.randn(2, n_past + n_new, 32, generator=torch.Generator().manual_seed(0))
    lean, reference = (backbone.new_layer_cache(2, n_past + n_new) for _ in range(2))
    with torch.no_grad():
        for part in (hidden[:, :n_past], hidden[:, n_past:]):
            if part.shape[1] == 0:
                continue
            mask = causal_mask(part.shape[1], reference.length, part.device)
            wanted = block(part, attention_mask=mask, past_key_values=reference)
            torch.testing.assert_close(call_opt_block(block, part, lean), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lean.keys, reference.keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lean.values, reference.values, rtol=1e-5, atol=1e-5)


def test_lean_block_leaves_its_input_alone_and_follows_changed_weights(backbone) -> None:
    block = copy.deepcopy(backbone.block(2))
    hidden = torch.randn(1, 3, 32)
    kept = hidden.clone()
    with torch.no_grad():
        first = call_opt_block(block, hidden, backbone.new_layer_cache(1, 3))
        assert torch.equal(hidden, kept)
        block.fc2.weight.mul_(2.0)
        second = call_opt_block(block, hidden, backbone.new_layer_cache(1, 3))
        block.fc2.weight = nn.Parameter(block.fc2.weight / 2.0)
        third = call_opt_block(block, hidden, backbone.new_layer_cache(1, 3))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(first, third)


def test_activations_other_than_relu_and_wrapped_linears_equal_hugging_face(backbone) -> None:
    block = copy.deepcopy(backbone.block(2))
    block.activation_fn = nn.GELU()
    block.fc1 = nn.Sequential(block.fc1)
    hidden = torch.randn(1, 3, 32)
    with torch.no_grad():
        wanted = block(hidden, past_key_values=backbone.new_layer_cache(1, 3))
        torch.testing.assert_close(call_opt_block(block, hidden, backbone.new_layer_cache(1, 3)), wanted)


def test_gradients_still_flow_through_a_cached_block(backbone) -> None:
    hidden = torch.randn(1, 3, 32, requires_grad=True)
    call_opt_block(backbone.block(2), hidden, backbone.new_layer_cache(1, 3)).sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
