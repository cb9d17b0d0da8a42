"""Lossless decoding: the full model's tokens, its distribution, and caches as if nothing had been drafted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from free_dist.decoding import generate
from free_dist.decoding.sampling import Sampler
from free_dist.decoding.speculation import DraftLength, accept_greedy, accept_sampled
from free_dist.exits import ExitBank
from tests.decoding.test_pending_cache import assert_cache_holds, decoded, teacher_forced

N_TOKENS = 20


@pytest.mark.parametrize("seed", range(8))
def test_greedy_tokens_are_those_of_full_depth_whatever_the_exits_draft(
    backbone, bank, cases, scripted, seed: int
) -> None:
    pixels, prompt = cases[seed % len(cases)]
    full = generate(backbone, None, pixels, prompt, max_new_tokens=N_TOKENS, eos_token_id=-1)[0]
    for eos in (-1, full.tokens[7]):
        wanted = full.tokens if eos < 0 else full.tokens[: full.tokens.index(eos) + 1]
        policy = scripted(seed, emit_rate=(0.3, 0.9)[seed % 2])
        found = generate(
            backbone, bank, pixels, prompt, thresholds=policy, max_new_tokens=N_TOKENS, eos_token_id=eos, lossless=True
        )[0]
        assert found.tokens == wanted
        assert found.drafted > 0
        # A rejected draft costs, an accepted one keeps the exit that made it.
        assert sum(layer is not None for layer in found.exit_layers) == found.accepted


@pytest.mark.parametrize("max_draft_tokens", [1, 2, 5, 16])
def test_perfect_drafts_are_all_accepted_and_verified_together(backbone, cases, max_draft_tokens: int) -> None:
    perfect = ExitBank(backbone, (backbone.n_blocks - 1,), init="next")
    pixels, prompt = cases[1]
    full = generate(backbone, None, pixels, prompt, max_new_tokens=N_TOKENS, eos_token_id=-1)[0]
    found = generate(
        backbone,
        perfect,
        pixels,
        prompt,
        thresholds=0.0,
        max_new_tokens=N_TOKENS,
        eos_token_id=-1,
        lossless=True,
        max_draft_tokens=max_draft_tokens,
    )[0]
    assert found.tokens == full.tokens
    assert found.accepted == found.drafted
    verifications = sum(found.blocks_executed) - (backbone.n_blocks - 1) * N_TOKENS
    assert verifications <= -(-N_TOKENS // 2)  # the last block ran once per verification
    if max_draft_tokens == 1:
        assert verifications == N_TOKENS // 2


@pytest.mark.parametrize("seed", range(6))
def test_after_rejections_every_cache_is_that_of_a_teacher_forced_forward(
    in_float64, cases, scripted, seed: int
) -> None:
    backbone, bank = in_float64
    case = cases[seed % len(cases)]
    with torch.inference_mode():
        decoder, ids = decoded(backbone, bank, scripted(seed, emit_rate=0.8), case, lossless=True)
        row = decoder.results()[0]
        assert row.accepted < row.drafted, "this seed has no rejection: choose another"
        decoder.cache.roll_back(0, len(ids))
        decoder.cache.flush()
        hidden = teacher_forced(backbone, bank, case, ids)
        for k in range(1, backbone.n_blocks + 1):
            assert_cache_holds(decoder.cache.block_caches[k - 1], backbone.block(k), hidden[k - 1])
        for i, layer in enumerate(bank.exit_layers):
            if decoder.cache.exit_caches[i] is not None:
                assert_cache_holds(decoder.cache.exit_caches[i], bank.transformers[i].block, hidden[layer])


def test_blocks_claimed_are_the_blocks_whose_weights_were_read(backbone, bank, cases, scripted, weight_watch) -> None:
    pixels, prompt = cases[2]
    with weight_watch:
        found = generate(
            backbone,
            bank,
            pixels,
            prompt,
            thresholds=scripted(3),
            max_new_tokens=N_TOKENS,
            eos_token_id=-1,
            lossless=True,
        )[0]
    weights = [id(backbone.block(k).fc1.weight) for k in range(1, backbone.n_blocks + 1)]
    assert sum(found.blocks_executed) == sum(weight_watch.reads[weight] for weight in weights)


def test_greedy_acceptance_by_hand() -> None:
    assert accept_greedy([5, 6, 7], [5, 6, 7, 8]) == (3, 8)
    assert accept_greedy([5, 6, 7], [5, 6, 7]) == (3, None)
    assert accept_greedy([5, 6, 7], [5, 9, 7, 8]) == (1, 9)
    assert accept_greedy([], [4]) == (0, 4)


def chi_square(found: Counter, wanted: torch.Tensor, n: int) -> float:
    return sum((found[token] - n * p) ** 2 / (n * p) for token, p in enumerate(wanted.tolist()) if p > 0)


@pytest.mark.parametrize("seed", range(3))
def test_sampled_tokens_have_exactly_the_full_models_distribution(seed: int) -> None:
    """The first two tokens out of the rejection rule, over many draws, against the full model's joint distribution."""
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(generator=generator)
    n_tokens, n_draws = 5, 8_000
    # First-token and second-token tables: the second depends on the first.
    p1, q1 = torch.rand(2, n_tokens, generator=generator).pow(2).double()
    p2, q2 = torch.rand(2, n_tokens, n_tokens, generator=generator).pow(2).double()
    q1[1] = 0.0  # a token the exit never drafts must still come out
    for table in (p1, q1, p2, q2):
        table /= table.sum(-1, keepdim=True)
    found: Counter = Counter()
    drafted_as_is: Counter = Counter()
    for _ in range(n_draws):
        first = int(sampler.draw(q1[None])[0])
        second = int(sampler.draw(q2[first][None])[0])
        drafted_as_is[first * n_tokens + second] += 1
        accepted, own = accept_sampled([first, second], [q1, q2[first]], torch.stack([p1, p2[first]]), sampler)
        tokens = [first, second][:accepted] + ([] if own is None else [own])
        if len(tokens) == 1:  # the first draft was replaced: the next token comes from the full model
            tokens.append(int(sampler.draw(p2[tokens[0]][None])[0]))
        found[tokens[0] * n_tokens + tokens[1]] += 1
    joint = (p1[:, None] * p2).flatten()
    limit = 51.2  # 99.9% quantile of chi-square with 24 degrees of freedom
    assert chi_square(found, joint, n_draws) < limit
    assert chi_square(drafted_as_is, joint, n_draws) > 10 * limit


def test_sampling_through_drafts_has_the_full_models_distribution_end_to_end(backbone, bank, cases) -> None:
    pixels, prompt = cases[0]
    n_rows, n_batches = 200, 10
    prefix = backbone.encode_prefix(pixels).expand(n_rows, -1, -1)
    prompts = prompt.tolist() * n_rows

    def pairs(bank=None, **settings) -> Counter:
        generator = torch.Generator().manual_seed(1)
        settings |= {"max_new_tokens": 2, "eos_token_id": -1, "do_sample": True, "temperature": 0.25, "top_k": 4}
        batches = [
            generate(backbone, bank, None, prompts, prefix=prefix, generator=generator, **settings)
            for _ in range(n_batches)
        ]
        return Counter(tuple(row.tokens) for batch in batches for row in batch)

    full = pairs()
    lossless = pairs(bank, thresholds=0.0, lossless=True)
    lossy = pairs(bank, thresholds=0.0)

    def distance(a: Counter, b: Counter) -> float:
        """Two-sample chi-square over its degrees of freedom, common outcomes only."""
        keys = [key for key in a | b if a[key] + b[key] >= 20]
        return sum((a[key] - b[key]) ** 2 / (a[key] + b[key]) for key in keys) / max(1, len(keys) - 1)

    assert distance(full, lossless) < 2.5, (full, lossless)
    assert distance(full, lossy) > 10


def test_draft_length_follows_acceptance() -> None:
    eager = DraftLength(16, draft_cost=4.0, verify_cost=15.0)
    timid = DraftLength(16, draft_cost=4.0, verify_cost=15.0)
    for _ in range(60):
        eager.record(eager.current, eager.current)
        timid.record(0, timid.current)
    assert eager.current == 16 and timid.current == 1
    assert timid.acceptance < 0.2 and eager.acceptance > 0.95


def test_draft_length_is_the_best_of_all_lengths_for_its_rate() -> None:
    for draft_cost, verify_cost in ((1.0, 1.0), (3.0, 15.0), (1.0, 40.0)):
        length = DraftLength(12, draft_cost=draft_cost, verify_cost=verify_cost)
        rate = length.acceptance
        values = {g: (1 - rate ** (g + 1)) / (1 - rate) / (g * draft_cost + verify_cost) for g in range(1, 13)}
        assert values[length.current] == pytest.approx(max(values.values()))
