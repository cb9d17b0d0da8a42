"""Sharded evaluation, the paired clock and the probe, end to end on a tiny random model and real shards."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.config import DataConfig, DecodingConfig, EvaluationConfig, Recipe
from free_dist.data.samples import IGNORE, SampleEncoder
from free_dist.data.stream import split_samples
from free_dist.evaluation.benchmark import Answer, Arm, Decoded, Prompted, full_arm, hf_arm, run_interleaved
from free_dist.evaluation.evaluate import SampleResult, evaluate_exits, standard_arms, task_rows
from free_dist.evaluation.probe import LENS, Probe, probe_batch, probe_exits
from free_dist.evaluation.report import write_report
from free_dist.evaluation.rows import SCHEMA, Row, read_results
from free_dist.exits import ExitBank

TIMES = {
    "wall_ratio",
    "wall_ratio_hf",
    "wall_ratio_interval",
    "wall_ratio_hf_interval",
    "seconds_per_sample",
    "world_size",
}
"""Columns that differ between two runs."""


@pytest.fixture(scope="module")
def recipe(tiny_data: DataConfig) -> Recipe:
    """A sweep over three tasks that takes seconds."""
    return Recipe(
        data=tiny_data,
        decoding=DecodingConfig(max_new_tokens=4),
        evaluation=EvaluationConfig(max_samples=7, thresholds=[0.0, 1.1], timing_samples=3),
    )


@pytest.fixture(scope="module")
def lively_backbone() -> Blip2Backbone:
    """A tiny random backbone whose blocks say different things: at the usual initialisation they hardly do."""
    model = new_model(width=32, n_blocks=4, n_heads=2)
    for name, parameter in model.language_model.named_parameters():
        if "layers." in name and parameter.ndim == 2:
            parameter.data.mul_(12.0)
    return Blip2Backbone(model.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def bank(lively_backbone: Blip2Backbone) -> ExitBank:
    """Two untrained exits."""
    return ExitBank(lively_backbone, [1, 3], init="next").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows(lively_backbone: Blip2Backbone, tiny_encoder: SampleEncoder, bank: ExitBank, recipe: Recipe) -> list[Row]:
    """What one process finds."""
    return evaluate_exits(lively_backbone, tiny_encoder, {"exits": bank}, recipe, quiet=True)


def test_rows_cover_tasks_methods_and_thresholds_with_the_promised_columns(rows: list[Row]) -> None:
    found = [(row.task, row.method, row.threshold) for row in rows]
    arms = [("full", None), ("hf", None), ("exits", 0.0), ("exits", 1.1)]
    assert found == [(task, *arm) for task in ("vqa", "caption", "dialogue") for arm in arms]
    for row in rows:
        assert tuple(row.to_json())[: len(SCHEMA)] == SCHEMA
        assert row.n == (4 if row.method == "hf" else 7)  # every second of seven
        assert row.wall_ratio > 0
        assert row.wall_ratio_hf is not None
        low, high = row.extras["wall_ratio_interval"]
        assert low <= row.wall_ratio <= high
    assert {"bleu4"} <= next(row for row in rows if row.task == "caption").extras.keys()


def test_full_depth_row_is_its_own_reference(rows: list[Row]) -> None:
    for row in (row for row in rows if row.method == "full"):
        assert (row.wall_ratio, row.agreement, row.quality) == (1.0, 1.0, row.quality_full)
        assert (row.mean_blocks, row.layer_ratio) == (4.0, 1.0)


def test_threshold_above_one_and_hugging_face_give_the_full_models_answers(rows: list[Row]) -> None:
    for row in (row for row in rows if row.method == "hf" or row.threshold == 1.1):
        assert row.agreement == row.extras["token_agreement"] == 1.0
        assert row.quality == row.quality_full
        assert row.mean_blocks == 4.0
        assert row.extras["exit_shares"] == {"4": 1.0}


def test_threshold_zero_leaves_at_the_first_exit_and_counts_its_transformer_as_a_block(rows: list[Row]) -> None:
    for row in (row for row in rows if row.threshold == 0.0):
        assert row.extras["exit_shares"] == {"1": 1.0}
        assert row.mean_blocks == 1 + 1
        assert row.layer_ratio == 2.0
        assert row.agreement < 1.0


def test_arms_that_cannot_exit_run_for_the_first_bank_only(
    lively_backbone: Blip2Backbone, bank: ExitBank, recipe: Recipe
) -> None:
    arms = standard_arms(lively_backbone, {"exits": bank, "exits_ce": bank}, recipe, n_samples=7)
    assert [(arm.method, arm.threshold) for arm in arms[2:]] == [("exits", 0.0), ("exits", 1.1), ("exits_ce", 0.0)]


def test_a_backbone_alone_is_measured_and_reported(
    lively_backbone: Blip2Backbone, tiny_encoder: SampleEncoder, rows: list[Row], recipe: Recipe, tmp_path: Path
) -> None:
    alone = evaluate_exits(lively_backbone, tiny_encoder, {}, recipe, quiet=True)
    wanted = [(row.task, row.method, row.quality) for row in rows if row.method in ("full", "hf")]
    assert [(row.task, row.method, row.quality) for row in alone] == wanted
    probes = probe_exits(lively_backbone, tiny_encoder, {}, recipe)
    paths = write_report(alone, probes, str(tmp_path))
    assert [row.method for row in read_results(paths.results)] == ["full", "hf"] * 3
    assert all(path.stat().st_size for path in paths.plots.values())


def test_a_sample_counted_twice_is_noticed(
    lively_backbone: Blip2Backbone, tiny_encoder: SampleEncoder, recipe: Recipe
) -> None:
    def twice(results: list[SampleResult]) -> list[list[SampleResult]]:
        return [results, results]

    with pytest.raises(AssertionError, match="dropped or counted twice"):
        evaluate_exits(lively_backbone, tiny_encoder, {}, recipe, gather=twice, quiet=True)


def test_exits_may_not_take_a_baselines_name(
    lively_backbone: Blip2Backbone, tiny_encoder: SampleEncoder, bank: ExitBank, recipe: Recipe
) -> None:
    with pytest.raises(ValueError, match="'full' is the name of a baseline"):
        evaluate_exits(lively_backbone, tiny_encoder, {"full": bank}, recipe)


def test_agreement_and_quality_see_a_wrong_answer() -> None:
    def answer(*tokens: int, seconds: float) -> Answer:
        return Answer(tokens=tokens, exits=(4,) * len(tokens), blocks=4 * len(tokens), seconds=seconds)

    arms = [Arm(method="full", threshold=None, decode=nothing), Arm(method="exits", threshold=0.5, decode=nothing)]
    results = [
        SampleResult(
            index=i,
            references=("yes",),
            texts=("yes", "yes" if i else "no"),
            answers=(answer(1, 2, seconds=3.0), answer(1, 2 if i else 9, seconds=1.0 if i else 4.0)),
        )
        for i in range(4)
    ]
    full, exits = task_rows("vqa", arms, results, n_blocks=4)
    assert (full.quality, exits.quality, exits.quality_full) == (1.0, 0.75, 1.0)
    assert (exits.agreement, exits.extras["token_agreement"]) == (0.75, 7 / 8)
    assert exits.wall_ratio == pytest.approx(12 / 7)
    assert exits.wall_ratio_hf is None


def nothing(_pixel_values: Tensor, _prompt_ids: list[int]) -> Decoded:
    """A decoder that generates one token, for arms whose work does not matter."""
    return Decoded([1], [4], 4)


def test_clock_interleaves_arms_in_changing_order_with_collection_off() -> None:
    calls: list[tuple[str, int]] = []

    def recorder(name: str) -> Callable[[Tensor, list[int]], Decoded]:
        def decode(_pixel_values: Tensor, prompt_ids: list[int], _instruction: None) -> Decoded:
            calls.append((name, prompt_ids[0]))
            assert len(calls) <= 4 or not gc.isenabled()  # the warm-up may collect
            return Decoded([1], [4], 4)

        return decode

    arms = [
        Arm(method=name, threshold=None, decode=recorder(name), stride=stride) for name, stride in (("a", 1), ("b", 2))
    ]
    samples = [Prompted(index=i, pixel_values=torch.zeros(1), prompt_ids=[i]) for i in range(20)]
    answers = list(run_interleaved(arms, samples, warmup=2))
    assert gc.isenabled()
    timed = calls[2 * 2 :]
    assert [i for _, i in timed] == sorted(i for _, i in timed)
    assert [answer[1] is None for answer in answers] == [i % 2 == 1 for i in range(20)]
    assert all(answer[0] is not None and answer[0].seconds >= 0 for answer in answers)
    assert len({tuple(name for name, i in timed if i == sample) for sample in range(0, 20, 2)}) == 2


def test_our_full_depth_decoder_and_hugging_face_generate_the_same_tokens(
    lively_backbone: Blip2Backbone, tiny_encoder: SampleEncoder, tiny_data: DataConfig
) -> None:
    ours, theirs = full_arm(lively_backbone, max_new_tokens=6), hf_arm(lively_backbone, max_new_tokens=6)
    for sample in split_samples(tiny_data, "test", "vqa", max_samples=4):
        pixels, ids = tiny_encoder.encode_image(sample.image)[None], tiny_encoder.encode_prompt(sample.turns)
        assert list(ours.decode(pixels, ids).tokens) == list(theirs.decode(pixels, ids).tokens)


def test_logit_lens_at_the_last_block_is_the_model_itself(
    lively_backbone: Blip2Backbone, tiny_encoder: SampleEncoder, tiny_data: DataConfig
) -> None:
    batch = tiny_encoder.collate(split_samples(tiny_data, "test", "dialogue", max_samples=5))
    output = lively_backbone.model(
        pixel_values=batch.pixel_values[batch.image_index],
        input_ids=batch.input_ids,
        attention_mask=torch.ones_like(batch.input_ids),
    )
    kept = (batch.targets != IGNORE) & (batch.targets != lively_backbone.layout.eos_token_id)
    # An untrained model is never right by itself: let it be right in one row.
    batch.targets[0][kept[0]] = output.logits[0].argmax(-1)[kept[0]]
    hits = output.logits.argmax(-1)[kept] == batch.targets[kept]
    probe = probe_batch(lively_backbone, {}, batch)
    assert probe.tokens == int(kept.sum()) > 5
    assert 0 < hits.float().mean() < 1
    assert probe.accuracy(LENS)[4] == pytest.approx(hits.float().mean().item())
    assert probe.agreement(LENS)[4] == 1.0
    assert probe.agreement(LENS)[1] < 1.0


def test_exit_that_replicates_the_last_block_agrees_with_the_model(
    lively_backbone: Blip2Backbone, tiny_encoder: SampleEncoder, tiny_data: DataConfig
) -> None:
    identity = ExitBank(lively_backbone, [1, 3], init="next").eval().requires_grad_(False)
    batch = tiny_encoder.collate(split_samples(tiny_data, "test", "vqa", max_samples=6))
    probe = probe_batch(lively_backbone, {"CE": identity}, batch)
    assert probe.agreement("CE")[3] == 1.0
    # The exit after block 1 is a copy of block 2, so it reads what the lens reads one block later.
    assert probe.accuracy("CE")[1] == probe.accuracy(LENS)[2]
    assert probe.agreement("CE")[1] == probe.agreement(LENS)[2]


def test_probe_of_two_ranks_is_the_probe_of_one(
    lively_backbone: Blip2Backbone, tiny_encoder: SampleEncoder, bank: ExitBank, recipe: Recipe
) -> None:
    alone = probe_exits(lively_backbone, tiny_encoder, {"CE": bank}, recipe, batch_size=3, quiet=True)
    batches = []
    for task in recipe.evaluation.tasks:
        samples = split_samples(recipe.data, "test", task, max_samples=7)
        batches.append(
            [probe_batch(lively_backbone, {"CE": bank}, tiny_encoder.collate(samples[r::2])) for r in range(2)]
        )
    shares = iter([[one], [other]] for one, other in batches)
    both: list[Probe] = probe_exits(
        lively_backbone,
        tiny_encoder,
        {"CE": bank},
        recipe,
        rank=0,
        world_size=2,
        gather=lambda _own: next(shares),
        quiet=True,
    )
    assert [probe.to_json() for probe in both] == [probe.to_json() for probe in alone]


def without_times(row: Row) -> dict[str, object]:
    """A row without the columns that hold measured times."""
    return {name: value for name, value in row.to_json().items() if name not in TIMES}
