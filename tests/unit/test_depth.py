"""Dips and overthinking against arrays worked out by hand; the tuned lens against the logit lens and by its own objective."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from free_dist.backbones import Blip2Backbone
from free_dist.config import EvaluationConfig, Recipe
from free_dist.data.stream import split_samples
from free_dist.evaluation.depth import (
    DepthReading,
    Hits,
    depth_summary,
    dip,
    joined_readings,
    largest_fall,
    overthinking,
    resampled,
    resampled_means,
)
from free_dist.evaluation.depth_lens import TunedLens, answer_states, final_log_probs, lens_divergence, train_tuned_lens
from free_dist.evaluation.depth_reading import LOGIT_LENS, TUNED_LENS, in_batches, read_batch, read_depth
from free_dist.evaluation.probe import LENS, probe_exits
from free_dist.exits import ExitBank

CPU = torch.device("cpu")


def hits(rows: list[list[int]]) -> Hits:
    right = np.array(rows, dtype=bool)
    return Hits(tuple(range(1, len(rows) + 1)), right, right)


@pytest.mark.parametrize(
    ("accuracy", "place", "depth"),
    [
        ([0.1, 0.5, 0.3, 0.7, 0.9], 2, 0.2),
        ([0.1, 0.2, 0.3], 0, 0.0),
        ([0.9, 0.4, 0.5, 0.1, 1.0], 3, 0.8),
        ([0.5, 0.6, 0.55, 0.8, 0.6], 4, 0.2),
    ],
)
def test_the_largest_fall_is_below_the_highest_shallower_block(accuracy: list[float], place: int, depth: float) -> None:
    found = largest_fall(np.array(accuracy))
    assert (int(found[0]), float(found[1])) == (place, pytest.approx(depth))


def test_a_dip_names_its_block_and_its_interval_tells_noise_from_a_fall() -> None:
    generator = np.random.default_rng(0)
    samples = np.repeat(np.arange(400), 2)
    falling = hits((generator.random((3, 800)) < np.array([[0.8], [0.4], [0.9]])).tolist())
    flat = hits((generator.random((3, 800)) < 0.7).tolist())
    weights = resampled(samples)
    found = dip(falling, samples, weights)
    assert found.block == 2
    assert found.interval[0] < found.depth < found.interval[1]
    assert found.interval[0] > 0.3 and found.interval[1] < 0.5
    noise = dip(flat, samples, weights)
    assert noise.interval[0] < 0 < noise.depth
    rising = hits([[0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]])
    assert dip(rising, np.arange(4), resampled(np.arange(4), resamples=20)) == (1, 0.0, (0.0, 0.0))


def correlated_hits(accuracy: list[float], samples: int, generator: np.random.Generator) -> Hits:
    """Blocks that mostly hit the same tokens, as blocks of one model do."""
    shared, own = generator.random(samples), generator.random((len(accuracy), samples))
    drawn = np.where(generator.random((len(accuracy), samples)) < 0.7, shared, own)
    return hits((drawn < np.array(accuracy)[:, None]).tolist())


@pytest.mark.parametrize("accuracy", [[0.7] * 3, [0.7] * 12, [0.2, 0.5, 0.8, 0.8, 0.8, 0.8]])
def test_curves_without_a_dip_have_an_interval_above_zero_in_at_most_one_repeat_of_twenty(
    accuracy: list[float],
) -> None:
    generator = np.random.default_rng(1)
    samples = np.arange(200)
    weights = resampled(samples, resamples=200)
    found = [dip(correlated_hits(accuracy, 200, generator), samples, weights) for _ in range(200)]
    assert sum(one.depth > 0 for one in found) > 100
    assert sum(one.interval[0] > 0 for one in found) <= 10


def test_a_dip_of_several_points_is_found_and_covered() -> None:
    generator = np.random.default_rng(2)
    samples = np.arange(1000)
    weights = resampled(samples, resamples=200)
    accuracy = [0.3, 0.5, 0.7, 0.62, 0.8, 0.9]
    found = [dip(correlated_hits(accuracy, 1000, generator), samples, weights) for _ in range(40)]
    assert all(one.block == 4 for one in found)
    assert sum(one.interval[0] > 0 for one in found) >= 36
    assert sum(one.interval[0] <= 0.08 <= one.interval[1] for one in found) >= 38


def test_resampled_means_are_means_over_tokens_of_the_samples_drawn() -> None:
    samples = np.array([0, 0, 0, 1])
    right = np.array([[1, 1, 0, 0]], dtype=bool)
    means = resampled_means(right, samples, np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    assert means[:, 0].tolist() == pytest.approx([2 / 3, 0.0, 0.5])
    weights = resampled(np.arange(7), resamples=50)
    assert weights.shape == (50, 7) and (weights.sum(axis=1) == 7).all()


def test_overthinking_counts_tokens_that_only_the_last_layer_gets_wrong() -> None:
    curve = hits([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]])
    last = curve.right[2]
    assert overthinking(curve, last, 3) == {"1": 0.25, "2": 0.25, "any": 0.25}
    # Two blocks that waste different tokens: "any" has both.
    other = hits([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert overthinking(other, other.right[2], 3) == {"1": 0.25, "2": 0.25, "any": 0.5}


def test_readings_join_with_samples_numbered_on_and_the_images_as_they_were() -> None:
    one = DepthReading(
        task="vqa",
        samples=np.array([0, 0, 2]),
        images=np.array([0, 0, 1]),
        full_right=np.array([1, 0, 1], dtype=bool),
        curves={"a": hits([[1, 0, 1]])},
    )
    joined = joined_readings([one, replace(one, images=np.array([1, 1, 2]))])
    assert joined.samples.tolist() == [0, 0, 2, 3, 3, 5]
    assert joined.images.tolist() == [0, 0, 1, 1, 1, 2]
    assert joined.curves["a"].right.tolist() == [[True, False, True] * 2]
    summary = depth_summary(joined, 1)
    assert (summary["tokens"], summary["samples"], summary["images"]) == (6, 6, 3)
    assert summary["full_accuracy"] == pytest.approx(2 / 3)
    row = summary["curves"]["a"]["1"]
    assert row["accuracy"] == pytest.approx(2 / 3) and row["interval"][0] <= row["accuracy"] <= row["interval"][1]


@pytest.fixture(scope="module")
def recipe(tiny_data) -> Recipe:
    return Recipe(data=tiny_data, evaluation=EvaluationConfig(split="test", tasks=["vqa", "caption"], max_samples=20))


@pytest.fixture(scope="module")
def lively() -> Blip2Backbone:
    """Four blocks that differ, so that lenses disagree with the last layer."""
    from free_dist.backbones.embedded import new_model

    model = new_model(width=32, n_blocks=4, n_heads=2, seed=3).eval().requires_grad_(False)
    for parameter in model.language_model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(8.0)
    return Blip2Backbone(model)


def test_an_untrained_tuned_lens_is_the_logit_lens(lively: Blip2Backbone, tiny_encoder, recipe: Recipe) -> None:
    lens = TunedLens(lively.n_blocks, lively.hidden_size).requires_grad_(False)
    for reading in read_depth(lively, tiny_encoder, recipe, banks={}, lens=lens):
        logit, tuned = reading.curves[LOGIT_LENS], reading.curves[TUNED_LENS]
        assert (logit.right == tuned.right).all() and (logit.agreeing == tuned.agreeing).all()
        assert logit.agreeing[-1].all() and not logit.agreeing[0].all()


def test_training_the_tuned_lens_lowers_its_divergence_on_tokens_it_has_not_seen(
    lively: Blip2Backbone, tiny_encoder, recipe: Recipe
) -> None:
    def states(split: str):
        batches = in_batches(tiny_encoder, split_samples(recipe.data, split, "caption"), CPU)
        return answer_states(lively, batches, limit=400)

    before = {name: tensor.clone() for name, tensor in lively.state_dict().items()}
    hidden, final = states("train")
    lens = train_tuned_lens(lively, hidden, final, steps=60)
    plain = TunedLens(lively.n_blocks, lively.hidden_size).requires_grad_(False)
    unseen, final = states("test")
    wanted = final_log_probs(lively, final)
    for k in range(1, lively.n_blocks):
        gaps = [float(lens_divergence(lively, one, k, unseen[k - 1], wanted)) for one in (plain, lens)]
        assert 0 < gaps[1] < 0.8 * gaps[0]
    last = lively.n_blocks
    assert float(lens_divergence(lively, lens, last, unseen[last - 1], wanted)) == pytest.approx(0.0, abs=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lively.state_dict().items())


def test_readings_count_to_the_probe_and_cover_every_exit(lively: Blip2Backbone, tiny_encoder, recipe: Recipe) -> None:
    bank = ExitBank(lively, (1, 3)).eval()
    readings = read_depth(lively, tiny_encoder, recipe, banks={"CE-ET": bank})
    probes = probe_exits(lively, tiny_encoder, {"CE-ET": bank}, recipe, quiet=True)
    for reading, probe in zip(readings, probes, strict=True):
        assert reading.tokens == probe.tokens
        for name, other in ((LOGIT_LENS, LENS), ("CE-ET", "CE-ET")):
            counts = tuple(reading.curves[name].right.sum(axis=1).tolist())
            assert counts == probe.curves[other].right
            assert tuple(reading.curves[name].agreeing.sum(axis=1).tolist()) == probe.curves[other].agreeing
        assert (reading.curves[LOGIT_LENS].right[-1] == reading.full_right).all()


def test_samples_of_a_batch_are_its_rows(lively: Blip2Backbone, tiny_encoder, recipe: Recipe) -> None:
    samples = split_samples(recipe.data, "test", "caption", max_samples=5)
    batch = tiny_encoder.collate(samples)
    reading = read_batch(lively, batch, [7, 7, 3, 4, 5], banks={})
    own = [len(tiny_encoder._answer(sample.turns[-1])) - 1 for sample in samples]  # without the end of the answer
    assert np.bincount(reading.samples).tolist() == own
    assert np.bincount(reading.images, minlength=8).tolist() == [0, 0, 0, own[2], own[3], own[4], 0, own[0] + own[1]]


def test_intervals_are_over_images(lively: Blip2Backbone, tiny_encoder, recipe: Recipe) -> None:
    """Answers to many questions about few images say as much as those images do, however many the questions."""
    reading = read_depth(lively, tiny_encoder, recipe, banks={})[0]
    assert len(set(reading.images.tolist())) < len(set(reading.samples.tolist()))
    even = reading.images[None] % 2 == 0
    alike = replace(reading, curves={"a": Hits((1,), even, even)})

    def width(one: DepthReading) -> float:
        low, high = depth_summary(one, 1)["curves"]["a"]["1"]["interval"]
        return high - low

    assert width(alike) > 1.2 * width(replace(alike, images=alike.samples))
