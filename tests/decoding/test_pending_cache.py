"""Skipped blocks are really skipped, and what runs later is what a full forward would have run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from free_dist.decoding import Decoder, DecoderOptions, generate
from free_dist.exits.gate import ExitChecks, FullHead

N_TOKENS = 12


def decoded(backbone, bank, policy, case, *, lossless: bool = False) -> tuple[Decoder, list[int]]:
    """A decoder that has emitted N_TOKENS tokens and goes on, and every id that has entered it."""
    pixels, prompt = case
    start = backbone.start(prompt.tolist(), backbone.encode_prefix(pixels.to(backbone.block(1).fc1.weight.dtype)))
    options = DecoderOptions(max_new_tokens=N_TOKENS + 9, eos=-1, lossless=lossless, max_draft_tokens=4)
    decoder = Decoder(backbone, bank, policy, ExitChecks(FullHead(bank.lm_head)), start, options)
    while len(decoder.results()[0].records) < N_TOKENS:
        decoder.step()
    ids = prompt[0].tolist() + decoder.results()[0].tokens
    return decoder, ids[: decoder.cache.length(0)]


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
    for held, wanted in zip((cache.keys, cache.values), keys_and_values(block, hidden), strict=True):
        held = held[:, :, : hidden.shape[1]].transpose(1, 2).flatten(2)
        torch.testing.assert_close(held, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_after_a_flush_every_cache_is_that_of_a_teacher_forced_forward(in_float64, cases, scripted, seed: int) -> None:
    backbone, bank = in_float64
    case = cases[seed % len(cases)]
    with torch.inference_mode():
        state, ids = decoded(backbone, bank, scripted(seed), case)
        state.cache.flush()
        hidden = teacher_forced(backbone, bank, case, ids)
        for k in range(1, backbone.n_blocks + 1):
            assert_cache_holds(state.cache.block_caches[k - 1], backbone.block(k), hidden[k - 1])
        for i, layer in enumerate(bank.exit_layers):
            assert_cache_holds(state.cache.exit_caches[i], bank.transformers[i].block, hidden[layer])
    # Seen once each: nothing is computed twice, nothing is left out.
    assert state.cache.calls.block_positions == backbone.n_blocks * len(ids)
    assert all(state.cache.pending(segment, 0) == 0 for segment in range(len(state.cache.segments)))


@pytest.mark.parametrize("seed", range(6))
def test_cached_exit_logits_equal_an_uncached_forward(in_float64, cases, scripted, seed: int) -> None:
    backbone, bank = in_float64
    case = cases[seed % len(cases)]
    policy = scripted(seed, emit_rate=0.4)
    with torch.inference_mode():
        _, ids = decoded(backbone, bank, policy, case)
        hidden = teacher_forced(backbone, bank, case, ids)
        logits = bank.logits(bank([hidden[layer] for layer in bank.exit_layers]))
    last_of_prompt = case[1].shape[1] - 1
    for index, position, shown in policy.seen:
        torch.testing.assert_close(shown, logits[index, 0, last_of_prompt + position], rtol=1e-9, atol=1e-9)
    assert max(position for _, position, _ in policy.seen) == N_TOKENS - 1
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
        result = generate(backbone, bank, pixels, prompt, thresholds=policy, max_new_tokens=N_TOKENS, eos_token_id=-1)[
            0
        ]
    weights = [id(backbone.block(k).fc1.weight) for k in range(1, backbone.n_blocks + 1)]
    assert sum(result.blocks_executed) == sum(weight_watch.reads[weight] for weight in weights)
    claimed_positions = sum(record.block_positions for record in result.records)
    keys = [id(backbone.block(k).self_attn.k_proj.weight) for k in range(1, backbone.n_blocks + 1)]
    assert claimed_positions == sum(weight_watch.positions[weight] for weight in keys)
    exits = [id(exit_transformer.block.fc1.weight) for exit_transformer in bank.transformers]
    assert result.exit_calls == sum(weight_watch.reads[weight] for weight in exits) == len(policy.seen)
    # The head is tied to the embedding, which is read once per call of embed.
    assert result.head_calls == weight_watch.reads[id(bank.lm_head.weight)] - len(result.records)
    assert len(set(result.exit_layers)) > 1, "this seed exits everywhere at one depth: choose another"


def test_each_token_costs_the_blocks_up_to_where_it_was_emitted(backbone, bank, cases, scripted) -> None:
    pixels, prompt = cases[0]
    result = generate(backbone, bank, pixels, prompt, thresholds=scripted(1), max_new_tokens=N_TOKENS, eos_token_id=-1)[
        0
    ]
    wanted = [backbone.n_blocks if layer is None else layer for layer in result.exit_layers]
    assert result.blocks_executed == wanted
    assert result.mean_backbone_blocks == sum(wanted) / N_TOKENS


def test_blocks_behind_the_exit_never_run_when_every_token_exits(backbone, bank, cases, weight_watch) -> None:
    pixels, prompt = cases[1]
    with weight_watch:
        result = generate(backbone, bank, pixels, prompt, thresholds=0.0, max_new_tokens=N_TOKENS, eos_token_id=-1)[0]
    assert result.exit_layers == [1] * N_TOKENS and result.blocks_executed == [1] * N_TOKENS
    assert weight_watch.touched(backbone.block(1)) and weight_watch.touched(bank.transformers[0])
    assert not any(weight_watch.touched(backbone.block(k)) for k in range(2, backbone.n_blocks + 1))
    assert not any(weight_watch.touched(exit_transformer) for exit_transformer in bank.transformers[1:])


def test_an_inactive_exit_costs_nothing(backbone, bank, cases, weight_watch) -> None:
    pixels, prompt = cases[2]
    with weight_watch:
        result = generate(
            backbone, bank, pixels, prompt, thresholds=[1.0, 0.0, 1.5], max_new_tokens=4, eos_token_id=-1
        )[0]
    assert result.exit_layers == [3] * 4
    assert [record.exit_calls for record in result.records] == [1] * 4
    assert not weight_watch.touched(bank.transformers[0]) and not weight_watch.touched(bank.transformers[2])


def test_full_depth_runs_no_exit_and_one_head_per_token(backbone, bank, cases, weight_watch) -> None:
    pixels, prompt = cases[2]
    with weight_watch:
        result = generate(backbone, bank, pixels, prompt, thresholds=1.1, max_new_tokens=4, eos_token_id=-1)[0]
    assert result.blocks_executed == [backbone.n_blocks] * 4
    assert (result.exit_calls, result.head_calls) == (0, 4)
    assert not weight_watch.touched(bank.transformers)
