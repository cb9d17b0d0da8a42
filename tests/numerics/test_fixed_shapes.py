"""Decoding in memory of fixed shape, on every decoder type: grouped heads, rotary angles, position biases, encoders."""

from __future__ import annotations

import random

import pytest
import torch

from free_dist.decoding import MaxProbPolicy, generate
from free_dist.decoding.execution import Compiled
from free_dist.decoding.runners import StaticRunner
from free_dist.exits import ExitBank

N_TOKENS = 12


def perturbed_bank(backbone) -> ExitBank:
    """Exits after blocks 1 and 2 whose weights are their own."""
    bank = ExitBank(backbone, (1, 2)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in bank.transformers.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return bank


@pytest.mark.parametrize("lossless", [False, True])
def test_every_decoder_type_decodes_in_fixed_shapes_as_in_exact_ones(case, lossless: bool) -> None:
    bank = perturbed_bank(case.backbone)
    runner = StaticRunner(case.backbone, bank, defers_reads=True)
    depths = set()
    for seed in range(4):
        rng = random.Random(seed)
        table = [[rng.choice((0.0, 0.9999999, 2.0)) for _ in range(N_TOKENS)] for _ in range(2)]
        for rows in ([0], [0, 1, 2], [2, 1]):
            prompts = [case.prompts[row] for row in rows]
            arguments = {"max_new_tokens": N_TOKENS - len(rows), "eos_token_id": -1, "lossless": lossless}
            exact, fixed = (
                generate(
                    case.backbone,
                    bank,
                    case.pixels[rows],
                    prompts,
                    thresholds=MaxProbPolicy(table, 2),
                    runner=used,
                    **arguments,
                )
                for used in (None, runner)
            )
            assert [row.tokens for row in fixed] == [row.tokens for row in exact]
            assert [row.exit_layers for row in fixed] == [row.exit_layers for row in exact]
            assert fixed.calls == exact.calls
            depths |= {layer for row in exact for layer in row.exit_layers}
    assert lossless or depths == {None, 1, 2}


@pytest.mark.parametrize("case", ["flan-t5", "llama-grouped"], indirect=True)
def test_nothing_of_one_prompt_is_left_for_the_next(case) -> None:
    bank = perturbed_bank(case.backbone)
    runner = StaticRunner(case.backbone, bank)
    arguments = {"thresholds": [0.0, 0.9999999], "max_new_tokens": 6, "eos_token_id": -1}
    fresh = [
        generate(case.backbone, bank, case.pixels, case.prompts, runner=runner, **arguments)[row] for row in (0, 1)
    ]
    for frame in runner.frames():
        for buffer in frame.buffers():
            buffer.fill_(float("nan") if buffer.is_floating_point() else 1)
    pixels, prompts = case.pixels[:2].flip(0), case.prompts[1::-1]
    again = generate(case.backbone, bank, pixels, prompts, runner=runner, **arguments)
    assert [row.tokens for row in again] == [row.tokens for row in reversed(fresh)]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["opt", "llama-yarn", "flan-t5"], indirect=True)
def test_programs_of_every_decoder_type_are_one_graph_for_the_compiler(case) -> None:
    """Traced whole or not at all, and run as traced."""
    bank = perturbed_bank(case.backbone)
    runner = StaticRunner(case.backbone, bank, execution=Compiled(backend="aot_eager"), lengths=(1, 4))
    policy = MaxProbPolicy([[0.9999999, 0.9999999, 0.0, 0.0, 0.9999999], [0.0, 0.9999999, 2.0, 2.0, 0.9999999]], 2)
    arguments = {"thresholds": policy, "max_new_tokens": 8, "eos_token_id": -1}
    exact = generate(case.backbone, bank, case.pixels[:1], case.prompts[:1], **arguments)
    fixed = generate(case.backbone, bank, case.pixels[:1], case.prompts[:1], runner=runner, **arguments)
    assert fixed[0].tokens == exact[0].tokens and fixed[0].exit_layers == exact[0].exit_layers
    assert set(exact[0].exit_layers) == {None, 1, 2}
