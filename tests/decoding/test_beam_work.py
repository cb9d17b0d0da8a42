"""The work of beam search: what beams share is run once, what nobody needs is not run, and it is counted where it happens."""

from __future__ import annotations

import copy

import pytest
import torch

from free_dist.decoding import Decision, MaxProbPolicy, generate
from free_dist.decoding.beam import BeamOptions, beam_search
from free_dist.decoding.policy import PatiencePolicy
from free_dist.exits.classifier import FeatureClassifiers
from free_dist.exits.gate import ExitChecks, FullHead

N_TOKENS = 10
N_BEAMS = 5
LATE = ((2.0, 2.0, 2.0, 0.4), (2.0, 2.0, 0.4, 0.4), (0.2, 2.0, 0.3, 0.3))
"""Shallow exits are asked only when the beams have parted, so they read the prompt last."""


@pytest.fixture(scope="module")
def sharp(in_float64):
    """A float64 pair whose exits are sometimes confident."""
    backbone, bank = copy.deepcopy(in_float64)
    bank.final_norm.weight.data.mul_(2.0)
    return backbone, bank


def searched(pair, cases, order, policy, checks=None, **settings):
    """Beam search itself, on prompts of their own lengths, with ``BeamOptions`` that ``generate`` does not offer."""
    backbone, bank = pair
    pixels, prompts = torch.cat([cases[i][0] for i in order]), [cases[i][1][0].tolist() for i in order]
    options = BeamOptions(**{"num_beams": N_BEAMS, "max_new_tokens": N_TOKENS, "eos": -1, **settings})
    with torch.inference_mode():
        start = backbone.start(prompts, backbone.encode_prefix(pixels.to(backbone.block(1).fc1.weight.dtype)))
        return beam_search(backbone, bank, policy, checks or ExitChecks(FullHead(bank.lm_head)), start, options)


@pytest.mark.parametrize("policy", [MaxProbPolicy(LATE, 3), PatiencePolicy(2, 3)], ids=["probability", "patience"])
@pytest.mark.parametrize("cheap", [False, True])
def test_one_beam_is_greedy_decoding_exits_checks_and_work_included(sharp, cases, policy, cheap) -> None:
    backbone, bank = sharp
    torch.manual_seed(3)
    classifiers = [FeatureClassifiers(3, backbone.hidden_size, 4) for _ in range(2)]
    checks = ExitChecks(FullHead(bank.lm_head))
    if cheap:
        # Untrained classifiers turn away about half of the rows of a call.
        checks = ExitChecks(
            FullHead(bank.lm_head),
            gates=classifiers[0],
            gate_thresholds=[0.3] * 3,
            discriminators=classifiers[1],
            discriminator_thresholds=[0.3] * 3,
        )
    greedy = [
        generate(backbone, bank, pixels.double(), prompt, thresholds=policy, checks=checks, max_new_tokens=N_TOKENS)[0]
        for pixels, prompt in cases
    ]
    stops = {"eos": backbone.layout.eos_token_id, "early_stopping": True}
    found, _ = searched(sharp, cases, range(4), policy, checks=checks, num_beams=1, **stops)
    for row, wanted in zip(found, greedy, strict=True):
        assert [record._replace(confidence=None) for record in row.records] == [
            record._replace(confidence=None) for record in wanted.records
        ]
    layers = {layer for row in found for layer in row.exit_layers}
    assert len(layers) > 2


def test_items_of_a_batch_do_not_change_each_other_and_add_up(sharp, cases) -> None:
    policy, order = MaxProbPolicy(LATE, 3), (3, 0, 1, 2)
    eos = searched(sharp, cases, (3,), policy)[0][0].tokens[3]
    alone = [searched(sharp, cases, (i,), policy, eos=eos) for i in order]
    together, calls = searched(sharp, cases, order, policy, eos=eos)
    assert len({len(row.tokens) for row in together}) > 1
    for row, ((wanted,), _) in zip(together, alone, strict=True):
        assert (row.tokens, row.exit_layers) == (wanted.tokens, wanted.exit_layers)
        assert row.score == pytest.approx(wanted.score, abs=1e-6)
        assert [record.block_positions for record in row.records] == [
            record.block_positions for record in wanted.records
        ]
    # Nobody waits for others once it is done, and calls are shared.
    assert calls.block_positions == sum(one.block_positions for _, one in alone)
    assert calls.block_calls < 0.6 * sum(one.block_calls for _, one in alone)


def test_full_depth_work_is_the_prompt_once_and_every_beam_after_it(backbone, bank, cases) -> None:
    (row,), calls = searched((backbone, bank), cases, (2,), MaxProbPolicy(1.0, 3))
    n_prompt = cases[2][1].shape[1]
    assert calls.block_positions == backbone.n_blocks * (n_prompt + N_BEAMS * (N_TOKENS - 1))
    assert calls.block_calls == backbone.n_blocks * N_TOKENS
    assert row.blocks_executed == [backbone.n_blocks] * N_TOKENS
    assert [record.block_positions for record in row.records] == [6 * n_prompt] + [6] * (N_TOKENS - 1)
    assert row.head_calls == N_TOKENS and row.exit_calls == 0


class FirstExit:
    """The first exit emits for the rows whose numbers in the call are listed for this position, else for all."""

    def __init__(self, emitting: dict[int, tuple[int, ...]]) -> None:
        self.emitting = emitting

    def is_active(self, exit_index: int) -> bool:
        return exit_index == 0

    def is_active_at(self, exit_index: int, position: int) -> bool:
        return exit_index == 0

    def decide(self, exit_index, scores, positions, earlier):
        emit = [row in self.emitting.get(positions[0], (row,)) for row in range(len(positions))]
        return Decision(scores.logits.argmax(-1), [0.5] * len(emit), emit)


def test_a_prompt_that_several_beams_wait_for_is_run_once_per_item(in_float64, cases, weight_watch) -> None:
    backbone, _ = in_float64
    lengths = [cases[i][1].shape[1] for i in (2, 3)]
    policy = FirstExit({1: ()})
    with weight_watch:
        found, calls = searched(in_float64, cases, (2, 3), policy, max_new_tokens=2)
    apart, calls_apart = searched(in_float64, cases, (2, 3), policy, max_new_tokens=2, min_shared=1000)
    assert [row.tokens for row in found] == [row.tokens for row in apart]
    assert [row.exit_layers for row in found] == [[1, None]] * 2
    deep = backbone.n_blocks - 1
    assert calls.block_positions == backbone.n_blocks * (sum(lengths) + 2 * N_BEAMS)
    assert calls_apart.block_positions == calls.block_positions + deep * (N_BEAMS - 1) * sum(lengths)
    # The price: above the exit, weights are read once for the prompts and once for the beams.
    reads = [weight_watch.reads[id(backbone.block(k).fc1.weight)] for k in range(1, 7)]
    assert reads == [2] * 6
    assert calls.block_calls == sum(reads) == calls_apart.block_calls + deep
    # A hypothesis alone would have done the same work.
    for row, length in zip(found, lengths, strict=True):
        assert sum(record.block_positions for record in row.records) == backbone.n_blocks * (length + 1)


def test_what_one_beam_has_run_serves_the_beams_that_share_it(in_float64, cases, weight_watch) -> None:
    """At token 1 one beam goes deep with the prompt; at token 2 all do, and the prompt is not run again."""
    backbone, _ = in_float64
    n_prompt = cases[2][1].shape[1]
    with weight_watch:
        _, calls = searched(in_float64, cases, (2,), FirstExit({1: (0, 1, 3, 4), 2: ()}), max_new_tokens=3)
    positions = [weight_watch.positions[id(backbone.block(k).fc1.weight)] for k in range(1, 7)]
    assert positions[0] == n_prompt + 2 * N_BEAMS
    # The newest token of each beam, and the one before it where that did not go deep.
    assert n_prompt + 1 + N_BEAMS <= positions[1] <= n_prompt + 1 + 2 * N_BEAMS
    assert weight_watch.reads[id(backbone.block(2).fc1.weight)] == 2
    assert calls.block_calls == 3 + 5 * 2


def test_a_few_common_positions_get_no_call_of_their_own(in_float64, cases, weight_watch) -> None:
    backbone, _ = in_float64
    with weight_watch:
        searched(in_float64, cases, (1,), FirstExit({0: (), 4: ()}), max_new_tokens=5)
    assert weight_watch.reads[id(backbone.block(6).fc1.weight)] == 2


def test_tokens_from_before_the_beams_parted_are_run_once_too(in_float64, cases) -> None:
    backbone, _ = in_float64
    lengths = [prompt.shape[1] for _, prompt in cases]
    settings = {"max_new_tokens": 16, "policy": FirstExit({15: ()})}
    found, calls = searched(in_float64, cases, range(4), min_shared=1, **settings)
    apart, calls_apart = searched(in_float64, cases, range(4), min_shared=1000, **settings)
    assert [row.tokens for row in found] == [row.tokens for row in apart]
    assert {tuple(row.exit_layers) for row in found} == {(*[1] * 15, None)}
    assert calls_apart.block_positions - calls.block_positions > 5 * (N_BEAMS - 1) * (sum(lengths) + 4)
    # What a hypothesis is charged is what it would have done alone, however it was shared.
    for row, length in zip(found, lengths, strict=True):
        assert sum(record.block_positions for record in row.records) == backbone.n_blocks * (length + 15)


@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_charged_for_the_blocks_before_its_exit_whatever_other_beams_did(
    in_float64, cases, scripted, seed: int
) -> None:
    backbone, bank = in_float64
    found, _ = searched(in_float64, cases, (0, 3), scripted(seed), min_shared=1000)
    for row in found:
        assert row.blocks_executed == [layer or backbone.n_blocks for layer in row.exit_layers]
        asked = [(*bank.exit_layers, None).index(layer) + 1 for layer in row.exit_layers]
        assert [record.head_calls for record in row.records] == asked
        assert [record.exit_calls for record in row.records] == [min(count, 3) for count in asked]
    assert len({layer for row in found for layer in row.exit_layers}) > 2


def test_blocks_that_no_beam_needs_are_never_run(in_float64, cases, weight_watch) -> None:
    backbone, _ = in_float64
    with weight_watch:
        found, calls = searched(in_float64, cases, (1, 2), MaxProbPolicy(0.0, 3))
    assert not any(weight_watch.touched(backbone.block(k)) for k in range(2, 7))
    assert calls.block_calls == weight_watch.reads[id(backbone.block(1).fc1.weight)] == N_TOKENS
    assert all(row.exit_layers == [1] * N_TOKENS for row in found)
