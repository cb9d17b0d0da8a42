"""Skipped blocks are really skipped, and what runs later is what a full forward would have run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from free_dist.decoding import DecodingState, decode_one_token, generate, prefill

N_TOKENS = 12


def decoded(backbone, bank, policy, case) -> tuple[DecodingState, list[int]]:
    """A state after N_TOKENS emitted tokens, and every id it has read."""
    pixels, prompt = case
    pixels = pixels.to(backbone.block(1).fc1.weight.dtype)
    state = DecodingState(backbone, bank, policy, prompt.shape[1] + N_TOKENS)
    tokens = [prefill(state, pixels, prompt).token]
    tokens += [decode_one_token(state).token for _ in range(N_TOKENS - 1)]
    return state, prompt[0].tolist() + tokens[:-1]


def teacher_forced(backbone, bank, case, ids: list[int]) -> list[Tensor]:
    """``h_0`` to ``h_L`` of one uncached float64 forward over the same ids."""
    hidden = [backbone.embed(torch.tensor([ids]), backbone.encode_prefix(case[0].double()))]
    for k in range(backbone.n_blocks):
        hidden.append(backbone.run_blocks(hidden[-1], k, k + 1))
    return hidden


def keys_and_values(block, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers' own attention module projects from a block's input, [1, T, D] each."""
    normed = block.self_attn_layer_norm(hidden)
    return block.self_attn.k_proj(normed), block.self_attn.v_proj(normed)


def assert_cache_holds(cache, block, hidden: Tensor) -> None:
    assert cache.length == hidden.shape[1]
    for held, wanted in zip((cache.keys, cache.values), keys_and_values(block, hidden), strict=True):
        held = held[:, :, : cache.length].transpose(1, 2).flatten(2)
        torch.testing.assert_close(held, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_after_a_flush_every_cache_is_that_of_a_teacher_forced_forward(in_float64, cases, scripted, seed: int) -> None:
    backbone, bank = in_float64
    case = cases[seed % len(cases)]
    state, ids = decoded(backbone, bank, scripted(seed), case)
    with torch.inference_mode():
        state.cache.flush()
        hidden = teacher_forced(backbone, bank, case, ids)
        for k in range(1, backbone.n_blocks + 1):
            assert_cache_holds(state.cache.block_caches[k - 1], backbone.block(k), hidden[k - 1])
        for i, layer in enumerate(bank.exit_layers):
            assert_cache_holds(state.cache.exit_caches[i], bank.transformers[i].block, hidden[layer])
    # Seen once each: nothing is computed twice, nothing is left out.
    assert state.cache.counts.block_positions == backbone.n_blocks * len(ids)
    assert all(state.cache.pending(segment) == 0 for segment in range(len(state.cache.segments)))


@pytest.mark.parametrize("seed", range(6))
def test_cached_exit_logits_equal_an_uncached_forward(in_float64, cases, scripted, seed: int) -> None:
    backbone, bank = in_float64
    case = cases[seed % len(cases)]
    policy = scripted(seed, emit_rate=0.4)
    _, ids = decoded(backbone, bank, policy, case)
    with torch.inference_mode():
        hidden = teacher_forced(backbone, bank, case, ids)
        logits = bank.logits(bank([hidden[layer] for layer in bank.exit_layers]))
    position = case[1].shape[1] - 2
    for index, shown in policy.seen:
        position += index == 0  # every token begins at the first exit
        torch.testing.assert_close(shown, logits[index, 0, position], rtol=1e-9, atol=1e-9)
    assert position == len(ids) - 1
    # Neighbouring positions and exits differ by more than the tolerance, so a misaligned comparison would fail.
    assert (logits[:, 0, 1:] - logits[:, 0, :-1]).abs().amax(-1).min() > 1e-2
    assert (logits[1:] - logits[:-1]).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("seed", range(4))
def test_blocks_claimed_are_the_blocks_whose_weights_were_read(
    backbone, bank, cases, scripted, weight_watch, seed: int
) -> None:
    pixels, prompt = cases[seed]
    policy = scripted(seed)
    with weight_watch:
        result = generate(backbone, bank, pixels, prompt, thresholds=policy, max_new_tokens=N_TOKENS, eos=-1)
    weights = [id(backbone.block(k).fc1.weight) for k in range(1, backbone.n_blocks + 1)]
    assert sum(result.blocks_executed) == sum(weight_watch.reads[weight] for weight in weights)
    claimed_positions = sum(record.block_positions for record in result.records)
    assert claimed_positions == sum(weight_watch.positions[weight] for weight in weights)
    exits = [id(exit_transformer.block.fc1.weight) for exit_transformer in bank.transformers]
    assert result.exit_calls == sum(weight_watch.reads[weight] for weight in exits) == len(policy.seen)
    # The head is tied to the embedding, which is read once per call of embed.
    assert result.head_calls == weight_watch.reads[id(bank.lm_head.weight)] - len(result.records)
    assert len(set(result.exit_layers)) > 1, "this seed exits everywhere at one depth: choose another"


def test_each_token_costs_the_blocks_up_to_where_it_was_emitted(backbone, bank, cases, scripted) -> None:
    pixels, prompt = cases[0]
    result = generate(backbone, bank, pixels, prompt, thresholds=scripted(1), max_new_tokens=N_TOKENS, eos=-1)
    wanted = [backbone.n_blocks if layer is None else layer for layer in result.exit_layers]
    assert result.blocks_executed == wanted
    assert result.mean_backbone_blocks == sum(wanted) / N_TOKENS


def test_blocks_behind_the_exit_never_run_when_every_token_exits(backbone, bank, cases, weight_watch) -> None:
    pixels, prompt = cases[1]
    with weight_watch:
        result = generate(backbone, bank, pixels, prompt, thresholds=0.0, max_new_tokens=N_TOKENS, eos=-1)
    assert result.exit_layers == [1] * N_TOKENS and result.blocks_executed == [1] * N_TOKENS
    assert weight_watch.touched(backbone.block(1)) and weight_watch.touched(bank.transformers[0])
    assert not any(weight_watch.touched(backbone.block(k)) for k in range(2, backbone.n_blocks + 1))
    assert not any(weight_watch.touched(exit_transformer) for exit_transformer in bank.transformers[1:])


def test_an_inactive_exit_costs_nothing(backbone, bank, cases, weight_watch) -> None:
    pixels, prompt = cases[2]
    with weight_watch:
        result = generate(backbone, bank, pixels, prompt, thresholds=[1.0, 0.0, 1.5], max_new_tokens=4, eos=-1)
    assert result.exit_layers == [3] * 4
    assert [record.exit_calls for record in result.records] == [1] * 4
    assert not weight_watch.touched(bank.transformers[0]) and not weight_watch.touched(bank.transformers[2])


def test_full_depth_runs_no_exit_and_one_head_per_token(backbone, bank, cases, weight_watch) -> None:
    pixels, prompt = cases[2]
    with weight_watch:
        result = generate(backbone, bank, pixels, prompt, thresholds=1.1, max_new_tokens=4, eos=-1)
    assert result.blocks_executed == [backbone.n_blocks] * 4
    assert (result.exit_calls, result.head_calls) == (0, 4)
    assert not weight_watch.touched(bank.transformers)
