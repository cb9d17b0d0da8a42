"""The benchmark's decoders, scripted exits and costs: against the real decoder's own counts, Hugging Face and float64."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from free_dist.backbones import Blip2Backbone
from free_dist.config import DataConfig, DecodingConfig, EvaluationConfig, Recipe
from free_dist.data.samples import SampleEncoder
from free_dist.decoding import generate
from free_dist.decoding.runners import RUNNERS, make_runner
from free_dist.evaluation.arms import hugging_face, ours
from free_dist.evaluation.benchmark import Answer, median_with_interval
from free_dist.evaluation.benchmark_rows import predicted_speedup, quality_columns, time_rows
from free_dist.evaluation.cost_model import DecodeCosts, ExitSetting, token_costs
from free_dist.evaluation.int8 import Int8Linear, int8_copy
from free_dist.evaluation.measure_costs import CostMeter
from free_dist.evaluation.operating_points import Model, Runners, choose, operating, timed, within
from free_dist.evaluation.shape import Script, Shape, random_backbone, random_checks
from free_dist.evaluation.shape_benchmark import ShapePlan, run_shape
from free_dist.evaluation.task_benchmark import Amounts, benchmark_task
from free_dist.evaluation.tasks import TaskScorer
from free_dist.exits import ExitBank

LIMIT = 6
SMALL = Shape(n_blocks=6, width=64, n_heads=2, inner=256, vocab_size=400, n_queries=2)


@pytest.fixture(scope="module")
def shaped() -> tuple[Blip2Backbone, ExitBank]:
    """Random weights of a small shape, and exits after blocks 1, 3 and 5."""
    backbone = random_backbone(SMALL, dtype=torch.float32)
    return backbone, ExitBank(backbone, (1, 3, 5)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def recipe(tiny_data: DataConfig) -> Recipe:
    """Three short answers a task."""
    return Recipe(
        data=tiny_data, decoding=DecodingConfig(max_new_tokens=LIMIT), evaluation=EvaluationConfig(max_samples=3)
    )


@pytest.fixture(scope="module")
def model(tiny_backbone: Blip2Backbone, tiny_encoder: SampleEncoder, recipe: Recipe) -> Model:
    """Two untrained exits on the tiny backbone."""
    bank = ExitBank(tiny_backbone, (1, 2)).eval().requires_grad_(False)
    return Model(backbone=tiny_backbone, encoder=tiny_encoder, bank=bank, recipe=recipe)


def counting_costs(n_blocks: int, *, per_position: bool) -> DecodeCosts:
    """Costs that count: a block is 1 per call or per position, everything else is told apart by its size."""
    block = {1: 1.0, 2: 2.0} if per_position else {1: 1.0}
    return DecodeCosts(
        n_blocks=n_blocks,
        block=block,
        last_block=block,
        head=0.0,
        exit_heads={"full": 1e6},
        gate=0.0,
        token=0.0,
        segment=0.0,
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("gate", [False, True])
def test_the_cost_model_runs_the_blocks_and_checks_that_the_decoder_counts(
    shaped: tuple[Blip2Backbone, ExitBank], seed: int, gate: bool
) -> None:
    backbone, bank = shaped
    chooser = random.Random(seed)
    layers = [chooser.choice((*bank.exit_layers, backbone.n_blocks)) for _ in range(12)]
    checks = random_checks(backbone, bank, "full", gate=gate, size=0)
    script = checks.script = Script(layers, bank.exit_layers)
    prompt = [backbone.layout.image_token_id] * SMALL.n_queries + [5, 6, 7]
    generation = generate(
        backbone,
        bank,
        None,
        prompt,
        prefix=torch.randn(1, SMALL.n_queries, SMALL.width),
        thresholds=script,
        checks=checks,
        max_new_tokens=len(layers),
        eos_token_id=-1,
    )
    emitted = [backbone.n_blocks if layer is None else layer for layer in generation[0].exit_layers]
    assert emitted == layers
    setting = ExitSetting(layers=bank.exit_layers, gate=gate)
    counts = generation.calls
    for per_position, wanted in ((False, counts.block_calls), (True, counts.block_positions)):
        costs = counting_costs(backbone.n_blocks, per_position=per_position)
        tokens = token_costs(costs, setting, layers, prompt=len(prompt))
        assert sum(token["blocks"] for token in tokens) == wanted
        assert sum(token["checks"] for token in tokens) // 1e6 == counts.exit_calls
    if gate:
        assert counts.exit_calls == sum(layer < backbone.n_blocks for layer in layers)


def test_a_gate_opens_in_vain_as_often_as_it_is_told() -> None:
    script = Script([9] * 400, (1, 3), false_open=0.25)
    opened = 0
    for position in range(400):
        assert script.is_active_at(0, position)
        opened += script.opens_gate(0)
    assert abs(opened / 400 - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_a_backbone_of_true_shapes_computes_numbers_and_shares_no_block(
    shaped: tuple[Blip2Backbone, ExitBank],
) -> None:
    backbone, _ = shaped
    blocks = [backbone.block(k) for k in range(1, SMALL.n_blocks + 1)]
    for a, b in pairwise(blocks):
        assert not torch.equal(a.fc1.weight, b.fc1.weight) and a.fc1.weight.data_ptr() != b.fc1.weight.data_ptr()
    assert blocks[0].fc1.weight.shape == (SMALL.inner, SMALL.width)
    text = backbone.model.language_model
    assert text.lm_head.weight is text.model.decoder.embed_tokens.weight
    prefix = backbone.encode_prefix(torch.randn(1, 3, 28, 28))
    prompt = [backbone.layout.image_token_id] * SMALL.n_queries + [5]
    hidden = backbone.start([prompt], prefix).hidden
    logits = backbone.lm_head(backbone.final_norm(backbone.run_blocks(hidden, 0, SMALL.n_blocks)))
    assert logits.isfinite().all() and logits.std() > 0


def test_the_shape_benchmark_times_every_decoder_on_every_token(shaped: tuple[Blip2Backbone, ExitBank]) -> None:
    backbone, bank = shaped
    shares = {"shallow": {1: 0.5, 3: 0.25}, "deep": {5: 0.25}}
    plan = ShapePlan(distributions=shares, tokens=4, prompt=5, rounds=2, cost_samples=1, pruned_size=40, rank=8)
    result = run_shape(backbone, bank, plan, int8=int8_copy(backbone))
    longer = run_shape(backbone, bank, replace(plan, seconds=1000.0, rounds=1))
    assert {row["tokens"] for row in longer.arms} == {12}  # no more than three times as many
    names = ["full", "mechanism", "int8", "shallow", "shallow, plain checks", "deep", "deep, plain checks"]
    assert [row["name"] for row in result.arms] == names
    for row in result.arms:
        assert row["tokens"] == 8 and row["seconds_per_token"] > 0
        assert (row["error"] is None) == (row["name"] in ("full", "mechanism", "int8"))
    errors = [row["predicted_speedup"] / row["speedup"] - 1 for row in result.arms if row["error"] is not None]
    assert result.cost_model_error == pytest.approx(max(map(abs, errors)))
    assert 0 < result.check_blocks < result.check_blocks_plain


def test_costs_are_positive_and_grow_with_what_is_computed() -> None:
    backbone = random_backbone(replace(SMALL, width=256, inner=1024, n_blocks=4), dtype=torch.float32)
    bank = ExitBank(backbone, (1,)).eval().requires_grad_(False)
    checks = {"full": random_checks(backbone, bank, "full", gate=False, size=0)}
    gated = random_checks(backbone, bank, "pruned", gate=True, size=8)
    meter = CostMeter(backbone, bank, checks, gated=gated, positions=(1, 64))
    with pytest.raises(ValueError, match="nothing was measured"):
        meter.costs()
    for _ in range(5):
        meter.sample()
    costs = meter.costs()
    assert min(costs.head, costs.gate, costs.token, costs.segment, *costs.exit_heads.values()) > 0
    assert costs.block[64] > costs.block[1] == costs.last_block[1]
    assert costs.last_block[64] < costs.block[64]
    assert costs.exit_transformer is None


@pytest.mark.parametrize(("variant", "is_block"), [("lora", True), ("bottleneck", False)])
def test_exits_that_are_no_blocks_are_timed_by_themselves_and_are_cheaper(variant: str, is_block: bool) -> None:
    backbone = random_backbone(replace(SMALL, width=512, inner=2048, n_blocks=4), dtype=torch.float32)
    bank = ExitBank(backbone, (1,), variant=variant).merged().eval().requires_grad_(False)
    checks = {"full": random_checks(backbone, bank, "full", gate=False, size=0)}
    meter = CostMeter(backbone, bank, checks, positions=(1, 4))
    for _ in range(5):
        meter.sample()
    costs = meter.costs()
    if is_block:
        assert costs.exit_transformer is None
    else:
        assert costs.exit_transformer is not None and 0 < costs.exit_transformer < 0.5 * costs.block[1]


def test_int8_rounds_each_weight_to_its_nearest_level() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40).eval().requires_grad_(False)
    quantised = Int8Linear(linear)
    steps = quantised.scales.double()[:, None]
    # Half a level, and what clipping to 127 levels of a scale rounded to bfloat16 may add.
    assert ((quantised.weight.double() * steps - linear.weight.double()).abs() <= steps * 0.76).all()
    hidden = torch.randn(3, 5, 96)
    reference = hidden.double() @ (quantised.weight.double() * steps).T + linear.bias.double()
    found = quantised(hidden)
    assert found.dtype == hidden.dtype and found.shape == (3, 5, 40)
    assert (found.double() - reference).abs().max() < 0.02 * reference.abs().max()


def test_an_int8_copy_shares_everything_but_its_linear_maps_and_leaves_the_original_alone(
    backbone: Blip2Backbone, cases: list[tuple[Tensor, Tensor]]
) -> None:
    before = {name: parameter.clone() for name, parameter in backbone.named_parameters()}
    copied = int8_copy(backbone)
    assert all(torch.equal(parameter, before[name]) for name, parameter in backbone.named_parameters())
    assert copied.model.vision_model is not backbone.model.vision_model
    shared = dict(backbone.named_parameters())
    assert all(parameter is shared[name] for name, parameter in copied.named_parameters())
    for k in range(1, backbone.n_blocks + 1):
        assert type(copied.block(k).fc1) is Int8Linear and type(backbone.block(k).fc1) is nn.Linear
    pixels, prompt = cases[1]
    hidden = backbone.embed(prompt, backbone.encode_prefix(pixels))
    exact = backbone.run_blocks(hidden, 0, 6)
    assert (copied.run_blocks(hidden, 0, 6) - exact).norm() < 0.1 * exact.norm()
    generate(copied, None, pixels, prompt, max_new_tokens=3)


def test_decoders_without_exits_answer_alike_and_a_split_has_three_parts(
    backbone: Blip2Backbone, cases: list[tuple[Tensor, Tensor]]
) -> None:
    arms = [ours(backbone, method="full", max_new_tokens=LIMIT), hugging_face(backbone, max_new_tokens=LIMIT)]
    for pixels, ids in cases[:2]:
        prompt = ids[0].tolist()
        own, theirs = (arm.arm.decode(pixels, prompt).tokens for arm in arms)
        assert list(own) == list(theirs)
        for arm in arms:
            split = arm.split(pixels, prompt)
            assert split.vision > 0 and split.prefill > 0 and split.decode >= 0


def test_forced_answers_have_one_length_in_every_decoder(
    backbone: Blip2Backbone, bank: ExitBank, cases: list[tuple[Tensor, Tensor]]
) -> None:
    pixels, ids = cases[1]
    often = generate(backbone, None, pixels, ids, max_new_tokens=4)[0].tokens[1]
    layout = backbone.layout
    backbone.layout = replace(layout, eos_token_id=often)  # a token that really occurs ends natural answers
    try:
        exits = {"thresholds": (0.0, 0.0, 0.0), "max_new_tokens": LIMIT, "eos": -1}
        arms = [
            ours(backbone, method="full", max_new_tokens=LIMIT, eos=-1),
            ours(backbone, bank, method="lossy", **exits),
            ours(backbone, bank, method="lossless", lossless=True, **exits),
            hugging_face(backbone, max_new_tokens=LIMIT, eos=-1),
        ]
        assert [len(arm.arm.decode(pixels, ids[0].tolist()).tokens) for arm in arms] == [LIMIT] * 4
        natural = ours(backbone, method="full", max_new_tokens=LIMIT).arm.decode(pixels, ids[0].tolist())
        assert len(natural.tokens) <= 2
    finally:
        backbone.layout = layout


def test_operating_points_are_chosen_without_the_test_split(model: Model, tiny_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "easyvqa"
    shutil.copytree(tiny_root, root)
    shutil.rmtree(root / "test")
    alone = replace(model, recipe=replace(model.recipe, data=replace(model.recipe.data, root=str(root))))
    lossy, lossless = choose(
        alone, "vqa", candidates=(0.0, 0.9), samples=6, finalists=2, contest_samples=2, min_quality=0.99
    )
    for point in (lossy, lossless):
        assert point.layers(model.bank) and all(value in (point.threshold, 1.1) for value in point.thresholds)


FEW = Amounts(
    candidates=(0.5,),
    shown=(0.0,),
    calibration_samples=4,
    contest_samples=1,
    finalists=1,
    samples=8,
    rounds=1,
    split_samples=2,
    fixed_samples=2,
    fixed_tokens=3,
    batches=1,
    compiled=False,
)
"""As little as shows every part."""


def test_a_task_yields_a_row_per_decoder_and_kind_of_length(model: Model) -> None:
    costs = counting_costs(model.backbone.n_blocks, per_position=True)
    backbone, bank = model.backbone, model.bank
    runners = Runners(full=make_runner("eager", backbone), exits=make_runner("eager", backbone, bank))
    result = benchmark_task(replace(model, int8=int8_copy(backbone), runners=runners), "vqa", FEW, costs)
    through = ["full, runner", "lossy, runner", "lossless, runner"]
    methods = ["full", "lossy", "lossy, all exits", "lossless", *through, "hf", "int8"]
    found = [(row["method"], row["batch_size"], row["length"]) for row in result.arms]
    batched = [(method, 8, "natural") for method in methods[:3]]
    assert found == [
        *((method, 1, "natural") for method in methods),
        *((method, 1, "forced, 3 tokens") for method in methods),
        *batched,
    ]
    assert result.lossless["identical"] == result.lossless["samples"] == 8
    assert result.batch8_ratio == min(row["speedup"] for row in result.arms[-2:])
    assert result.batch8_ratio_chosen == result.arms[-2]["speedup"]
    assert result.lossy["speedup"] == max(result.arms[i]["speedup"] for i in (1, 5))
    exact = ("full, runner", "lossless, runner", "hf")
    assert [row["identical"] for row in result.arms[: len(methods)] if row["method"] in exact] == [8, 8, 8]


def test_cheap_checks_count_where_they_cost_no_quality(model: Model) -> None:
    checks = random_checks(model.backbone, model.bank, "pruned", gate=True, size=8)
    costs = counting_costs(model.backbone.n_blocks, per_position=True)
    result = benchmark_task(replace(model, checks=checks), "vqa", FEW, costs)
    rows = {row["method"]: row for row in result.arms if (row["length"], row["batch_size"]) == ("natural", 1)}
    assert rows["lossless, cheap checks"]["identical"] == result.lossless["identical"] == 8
    assert result.lossless["speedup"] == max(rows[name]["speedup"] for name in rows if name.startswith("lossless"))
    may = ["lossy", *(name for name in ["lossy, cheap checks"] if (rows[name]["quality_ratio"] or 0) >= 0.99)]
    assert result.lossy["speedup"] == max(rows[name]["speedup"] for name in may)


def test_speed_is_told_against_the_fastest_exact_decoder_without_exits() -> None:
    class Nothing:
        pass

    def arm(method: str):
        named = ours(Nothing(), method=method, max_new_tokens=1)  # type: ignore[arg-type]
        return replace(named, arm=replace(named.arm, method=method))

    arms = [arm(method) for method in ("full", "lossy", "hf", "int8")]
    rows = time_rows(arms, [[4.0, 4.0], [1.0, 3.0], [2.0, 4.0], [0.1, 0.1]], task="vqa", length="natural")
    assert {row["speedup_over"] for row in rows} == {"hf"}
    assert [row["speedup"] for row in rows[:3]] == pytest.approx([6 / 8, 6 / 4, 1.0])
    assert [row["speedup_over_full"] for row in rows[:3]] == pytest.approx([1.0, 8 / 4, 8 / 6])
    many = [[4.0] * 20, [1.0, 1.0, 3.0, 3.0] * 5]
    alone, paired = (
        time_rows(arms[:2], many, task="vqa", length="natural", images=images)[1]["speedup_interval"]
        for images in (None, [i // 2 for i in range(20)])
    )
    assert paired[1] - paired[0] > 1.2 * (alone[1] - alone[0])


def test_quality_is_relative_to_the_full_model_and_layers_are_counted_over_tokens() -> None:
    def answer(tokens: tuple[int, ...], blocks: int) -> Answer:
        return Answer(tokens=tokens, exits=(4,) * len(tokens), blocks=blocks, seconds=1.0)

    answers = [[answer((1, 2), 8), answer((1, 2), 4)], [answer((3,), 4), answer((5,), 2)]]
    texts = [["red", "red"], ["yes", "no"]]
    full, other = quality_columns(answers, texts, [["red"], ["yes"]], scorer=TaskScorer("vqa"), n_blocks=4)
    assert (full["quality"], other["quality"], other["quality_ratio"]) == (1.0, 0.5, 0.5)
    assert (full["identical"], other["identical"]) == (2, 1)
    name = "layer_ratio (a count of blocks, not a speed)"
    assert (full[name], other[name]) == (1.0, 2.0)


def test_a_predicted_speedup_counts_vision_on_both_sides() -> None:
    costs = counting_costs(8, per_position=False)
    costs = replace(costs, exit_heads={"full": 0.0})
    answers = [Answer(tokens=(1, 2), exits=(2, 2), blocks=0, seconds=0.0)]
    # Per token: 2 blocks and an exit transformer against 8 blocks.
    assert predicted_speedup(costs, (2,), answers, [3], vision=0.0) == pytest.approx(16 / 6)
    assert predicted_speedup(costs, (2,), answers, [3], vision=10.0) == pytest.approx(26 / 16)


def test_times_are_medians_over_rounds_and_a_deadline_leaves_a_few_samples(model: Model, recipe: Recipe) -> None:
    assert median_with_interval([3.0, 1.0, 2.0])[0] == 2.0
    assert median_with_interval([5.0] * 4) == (5.0, (5.0, 5.0))
    from free_dist.data.stream import split_samples

    prompts = list(model.prompted(split_samples(recipe.data, "test", "vqa", max_samples=5)))
    assert len(list(within(prompts, None))) == 5
    assert len(list(within(prompts, 0.0))) == 3  # long past
    arm = ours(
        model.backbone, model.bank, method="lossy", max_new_tokens=2, thresholds=operating(model.bank, 0.0).thresholds
    )
    answers, times = timed([arm], prompts, rounds=2, deadline=0.0)
    assert len(answers) == len(times[0]) == 3 and min(times[0]) > 0


def test_missing_exits_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    command = [sys.executable, "launch/benchmark.py", "--preset", "embedded", "--exits", str(tmp_path / "none")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "make quickstart" in refused.stderr and "Traceback" not in refused.stderr


def test_the_launcher_offers_the_runners_there_are() -> None:
    command = [sys.executable, "launch/benchmark.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{{{','.join(RUNNERS)}}}" in "".join(shown.split())


def test_the_launchers_result_is_json(shaped: tuple[Blip2Backbone, ExitBank]) -> None:
    backbone, bank = shaped
    plan = ShapePlan(distributions={"one": {1: 0.5}}, tokens=2, prompt=4, rounds=1, pruned_size=8, rank=4, plain=False)
    assert json.loads(json.dumps(run_shape(backbone, bank, plan).arms))
