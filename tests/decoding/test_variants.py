"""Every kind of exit decodes exactly: its tokens are those of a teacher-forced forward through the exits as they train."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from free_dist.config import EXIT_VARIANTS
from free_dist.decoding import generate
from free_dist.decoding.runners import StaticRunner
from free_dist.exits import ExitBank, ExitVariant
from tests.numerics.conftest import DecoderCase, new_case

LAYERS = (1, 2)
N_TOKENS = 12
KINDS = ("opt", "llama-grouped", "flan-t5")


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> DecoderCase:
    """Three prompts of mixed lengths on a model in float64, where a wrong cache cannot pass for rounding."""
    return new_case(request.param)


@pytest.fixture(scope="module", params=EXIT_VARIANTS)
def bank(request: pytest.FixtureRequest, case: DecoderCase) -> ExitBank:
    """Exits after blocks 1 and 2 with every trained weight moved, in the form in which they train."""
    variant = ExitVariant(name=request.param, rank=3, bottleneck_size=16)
    bank = ExitBank(case.backbone, LAYERS, variant=variant).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in bank.transformers.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return bank


def decode(case: DecoderCase, bank: ExitBank, policy, **settings):
    return generate(
        case.backbone,
        bank,
        case.pixels,
        case.prompts,
        thresholds=policy,
        max_new_tokens=N_TOKENS,
        eos_token_id=-1,
        **settings,
    )


def emit_at(*positions: tuple[int, ...]) -> list[list[float]]:
    """Thresholds by which each exit emits at these answer positions and nowhere else."""
    return [[0.0 if position in chosen else 0.9999 for position in range(N_TOKENS)] for chosen in positions]


@torch.no_grad()
def teacher_forced_logits(case: DecoderCase, bank: ExitBank, row: int, tokens: list[int]) -> dict[int | None, Tensor]:
    """Exit layer (None: full depth) -> logits [N, V] before each token, by one forward without caches."""
    backbone = case.backbone
    hidden, memory = case.inputs(row, tuple(tokens[:-1]))
    span = backbone.new_span(0, hidden.shape[1], hidden.device)
    depths = [backbone.run_blocks(hidden, 0, k, span=span, memory=memory) for k in (*LAYERS, backbone.n_blocks)]
    exits = bank.exit_logits(bank(depths[:-1], memory=memory, span=span))
    full = bank.logits(backbone.final_norm(depths[-1]))
    return {layer: one[0, -len(tokens) :] for layer, one in zip((*LAYERS, None), (*exits, full), strict=True)}


def test_tokens_are_those_of_a_forward_without_caches_in_whatever_form_the_exits_are(
    case: DecoderCase, bank: ExitBank, scripted
) -> None:
    outputs = [decode(case, form, scripted(1)) for form in (bank, bank.merged())]
    assert [row.tokens for row in outputs[0]] == [row.tokens for row in outputs[1]]
    assert [row.exit_layers for row in outputs[0]] == [row.exit_layers for row in outputs[1]]
    used = set()
    for index, row in enumerate(outputs[1]):
        logits = teacher_forced_logits(case, bank, index, row.tokens)
        for position, (token, layer) in enumerate(zip(row.tokens, row.exit_layers, strict=True)):
            assert token == int(logits[layer][position].argmax())
            used.add(layer)
    assert used == {*LAYERS, None}
    assert len({token for row in outputs[1] for token in row.tokens}) > 5, (
        "a model that repeats itself compares nothing"
    )


def test_exits_of_every_kind_say_something_of_their_own(case: DecoderCase, bank: ExitBank) -> None:
    own = [row.tokens for row in decode(case, bank, 0.0)]
    assert own != [case.greedy(row, N_TOKENS) for row in range(len(case.prompts))]
    full = ExitBank(case.backbone, LAYERS).eval()
    assert own != [row.tokens for row in decode(case, full, 0.0)]


def test_lossless_tokens_are_the_full_models(case: DecoderCase, bank: ExitBank, scripted) -> None:
    found = decode(case, bank.merged(), scripted(3, emit_rate=0.7), lossless=True)
    assert [row.tokens for row in found] == [case.greedy(row, N_TOKENS) for row in range(len(case.prompts))]
    assert sum(row.drafted for row in found) > sum(row.accepted for row in found)


def test_rows_alone_and_fixed_shapes_give_the_tokens_of_a_batch(case: DecoderCase, bank: ExitBank) -> None:
    bank = bank.merged()
    thresholds = emit_at((0, 3, 4, 8), (1, 2, 6, 9, 10))
    together = decode(case, bank, thresholds)
    assert {layer for row in together for layer in row.exit_layers} == {*LAYERS, None}
    for index, row in enumerate(together):
        pixels, prompt = case.pixels[index : index + 1], case.prompts[index]
        settings = {"thresholds": thresholds, "max_new_tokens": N_TOKENS, "eos_token_id": -1}
        (alone,) = generate(case.backbone, bank, pixels, prompt, **settings)
        assert (alone.tokens, alone.exit_layers) == (row.tokens, row.exit_layers)
    fixed = decode(case, bank, thresholds, runner=StaticRunner(case.backbone, bank))
    assert [(row.tokens, row.exit_layers) for row in fixed] == [(row.tokens, row.exit_layers) for row in together]


def test_beams_agree_whatever_the_form_of_the_exits(case: DecoderCase, bank: ExitBank) -> None:
    found = [decode(case, form, emit_at((0, 3, 4, 8), (1, 2, 6)), num_beams=2) for form in (bank, bank.merged())]
    assert [row.tokens for row in found[0]] == [row.tokens for row in found[1]]


def test_a_check_by_a_classifier_reads_its_own_head_and_no_other_exits_nor_the_models(weight_watch) -> None:
    case = new_case("opt")
    bank = ExitBank(case.backbone, LAYERS, variant="classifier").eval()
    with weight_watch:
        found = generate(
            case.backbone,
            bank,
            case.pixels[:1],
            case.prompts[0],
            thresholds=[1.1, 0.0],
            max_new_tokens=5,
            eos_token_id=-1,
        )
    assert found[0].exit_layers == [2] * 5
    shallow, deep = (next(exit_transformer.parameters()) for exit_transformer in bank.transformers)
    assert weight_watch.reads[id(deep)] == weight_watch.positions[id(deep)] == 5
    assert weight_watch.reads[id(shallow)] == 0 and not weight_watch.touched(case.backbone.block(3))


def test_a_check_by_a_bottleneck_reads_its_own_weights_on_one_position_and_no_block(weight_watch) -> None:
    case = new_case("opt")
    bank = ExitBank(case.backbone, LAYERS, variant="bottleneck").eval()
    with weight_watch:
        found = generate(
            case.backbone, bank, case.pixels[:1], case.prompts[0], thresholds=0.0, max_new_tokens=5, eos_token_id=-1
        )
    assert found[0].exit_layers == [1] * 5
    assert weight_watch.touched(case.backbone.block(1)) and not weight_watch.touched(case.backbone.block(2))
    down = bank.transformers[0].down.weight
    assert weight_watch.reads[id(down)] == weight_watch.positions[id(down)] == 5
