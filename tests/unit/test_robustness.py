"""Corruptions, calibration error, carried thresholds, lengths and traces: each against a reference or by its own definition."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from free_dist.config import UserError
from free_dist.data.images import decode_image
from free_dist.data.prompts import Turn
from free_dist.data.samples import Sample
from free_dist.decoding.calibrate import hoeffding_bentkus_p_value
from free_dist.evaluation.benchmark import Answer, Arm, Decoded
from free_dist.evaluation.calibration import GRID, OFF
from free_dist.evaluation.evaluate import SampleResult
from free_dist.evaluation.report_traces import (
    Token,
    TracedAnswer,
    counts_by,
    read_traces,
    shares_by,
    token_classes,
    write_traces,
)
from free_dist.evaluation.robustness import Corruption, TaskAnswers, corrupted, length_rows
from free_dist.evaluation.robustness_confidence import (
    Opinions,
    calibration_error,
    calibration_interval,
    calibration_rows,
    transfer_rows,
)


def sample(pixels: np.ndarray, key: str = "a") -> Sample:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
    return Sample(key=key, task="vqa", image=buffer.getvalue(), turns=(Turn(prompt="what?", answer="red"),))


def pixels_of(one: Sample) -> np.ndarray:
    return np.asarray(decode_image(one.image), dtype=np.float64)


GREY = np.full((64, 48, 3), 128)


def test_level_zero_is_the_sample_itself_and_other_levels_change_pixels_alone() -> None:
    clean = sample(GREY)
    for kind in ("noise", "blur"):
        assert corrupted(clean, Corruption(kind=kind, level=0.0)) is clean
    spoilt = corrupted(clean, Corruption(kind="noise", level=0.1))
    assert replace(spoilt, image=clean.image) == clean
    assert pixels_of(spoilt).shape == GREY.shape


def test_noise_has_its_standard_deviation_and_follows_seed_and_key_alone() -> None:
    clean = sample(GREY)
    noise = Corruption(kind="noise", level=0.1)
    found = pixels_of(corrupted(clean, noise)) - 128
    assert found.std() == pytest.approx(25.5, rel=0.03)
    assert abs(found.mean()) < 1
    assert corrupted(clean, noise) == corrupted(clean, noise)
    assert corrupted(clean, noise, seed=1).image != corrupted(clean, noise).image
    assert corrupted(replace(clean, key="b"), noise).image != corrupted(clean, noise).image
    # The same draw at another level: twice as large, but for rounding.
    twice = pixels_of(corrupted(clean, Corruption(kind="noise", level=0.2))) - 128
    inside = np.abs(twice) < 127
    assert np.abs(twice - 2 * found)[inside].max() <= 1.5


def test_blur_spreads_a_point_by_its_standard_deviation_and_keeps_brightness() -> None:
    point = np.zeros((101, 101, 3))
    point[49:52, 49:52] = 255
    level = 0.04  # 4.04 pixels of 101
    blurred = corrupted(sample(point), Corruption(kind="blur", level=level))
    before, after = (pixels_of(one).mean(axis=2) for one in (sample(point), blurred))
    assert after.sum() == pytest.approx(before.sum(), rel=0.1)  # eight-bit rounding of faint pixels
    ticks = np.arange(101) - 50

    def variance(picture: np.ndarray) -> float:
        along = picture.sum(axis=0)
        return float((along * ticks**2).sum() / along.sum())

    assert math.sqrt(variance(after) - variance(before)) == pytest.approx(level * 101, rel=0.08)
    flat = sample(GREY)
    assert np.array_equal(pixels_of(corrupted(flat, Corruption(kind="blur", level=0.1))), GREY)


@pytest.mark.parametrize(
    ("kind", "level", "words"), [("fog", 0.1, "want one of noise, blur"), ("noise", 2.0, "0 to 1")]
)
def test_an_unknown_corruption_is_told(kind: str, level: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Corruption(kind=kind, level=level)


def reference_error(confidences: list[float], correct: list[bool], bins: int) -> Fraction:
    """The definition in exact arithmetic: cut the sorted list at i N / M, move each cut behind its run of equals."""
    pairs = sorted(zip(confidences, correct, strict=True), key=lambda pair: pair[0])
    cuts = {0, len(pairs)}
    for i in range(1, bins):
        cut = i * len(pairs) // bins
        while 0 < cut < len(pairs) and pairs[cut][0] == pairs[cut - 1][0]:
            cut += 1
        cuts.add(cut)
    edges = sorted(cuts)
    total = Fraction(0)
    for low, high in pairwise(edges):
        own = pairs[low:high]
        total += abs(sum((Fraction(c) for c, _ in own), Fraction(0)) - sum(hit for _, hit in own))
    return total / len(pairs)


@pytest.mark.parametrize("n", [1, 2, 7, 10, 103, 1000])
@pytest.mark.parametrize("decimals", [1, 16])
def test_calibration_error_is_the_exact_definition_also_with_ties_and_in_any_order(n: int, decimals: int) -> None:
    rng = np.random.default_rng(n)
    confidences = np.round(rng.random(n), decimals)
    correct = rng.random(n) < confidences**2
    found, bins = calibration_error(confidences, correct, bins=10)
    assert found == pytest.approx(float(reference_error(confidences.tolist(), correct.tolist(), 10)), abs=1e-13)
    order = rng.permutation(n)
    assert calibration_error(confidences[order], correct[order], bins=10)[0] == pytest.approx(found, abs=1e-13)
    assert sum(one.n for one in bins) == n
    assert sum(one.n * abs(one.confidence - one.accuracy) for one in bins) / n == pytest.approx(found, abs=1e-13)
    assert all(a.high < b.low for a, b in pairwise(bins))
    if decimals == 16 and n >= 10:
        assert {one.n for one in bins} <= {n // 10, n // 10 + 1}


def test_calibration_error_of_known_models() -> None:
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.5, 1.0, 20_000)
    honest = rng.random(20_000) < confidences
    assert calibration_error(confidences, honest)[0] < 0.012
    assert calibration_error(confidences, np.ones(20_000, bool))[0] == pytest.approx(0.25, abs=0.005)
    with pytest.raises(ValueError, match="above 0"):
        calibration_error([], [])


def test_calibration_interval_covers_the_truth_of_an_overconfident_model_and_narrows() -> None:
    rng = np.random.default_rng(1)

    def drawn(n: int) -> tuple[float, float]:
        confidences = rng.uniform(0.6, 1.0, n)
        correct = rng.random(n) < confidences - 0.2  # the error is 0.2 everywhere
        low, high = calibration_interval(confidences, correct, np.arange(n))
        assert low <= calibration_error(confidences, correct)[0] <= high
        return low, high

    large = drawn(3000)
    assert large[0] < 0.2 < large[1]
    small = drawn(200)
    assert large[1] - large[0] < 0.6 * (small[1] - small[0])


def test_resampling_is_over_images_not_tokens() -> None:
    rng = np.random.default_rng(2)
    confidences = np.repeat(rng.uniform(0.6, 1.0, 40), 25)
    correct = np.repeat(rng.random(40) < 0.7, 25)  # all tokens of an image are right or wrong together
    by_image = calibration_interval(confidences, correct, np.repeat(np.arange(40), 25))
    by_token = calibration_interval(confidences, correct, np.arange(1000))
    assert by_image[1] - by_image[0] > 2 * (by_token[1] - by_token[0])


def opinions(task: str, split: str, wrong_below: float, seed: int, images: int = 400) -> Opinions:
    """Two exits, three tokens an image: an exit is wrong where its confidence is below ``wrong_below``."""
    rng = np.random.default_rng(seed)
    confidences = rng.random((3 * images, 3))
    agreeing = confidences >= wrong_below
    agreeing[:, 2] = True
    numbers = np.repeat(np.arange(images), 3)
    return Opinions(
        task=task, split=split, layers=(2, 4, 16), images=numbers, confidences=confidences, right=agreeing, agreeing=agreeing
    )  # fmt: skip


def test_a_carried_threshold_is_certified_where_chosen_and_judged_where_held() -> None:
    chosen, same = opinions("vqa", "calibration", 0.6, 0), opinions("vqa", "test", 0.6, 1)
    other = opinions("caption", "test", 0.95, 2)
    rows = transfer_rows([chosen], [same, other], "exits", epsilon=0.05, delta=0.05)
    assert [(row["exit"], row["from"], row["to"]) for row in rows] == [
        (k, "vqa/calibration", to) for k in (2, 4) for to in ("vqa/test", "caption/test")
    ]
    for place, row in enumerate(rows):
        held = same if place % 2 == 0 else other
        i = (2, 4).index(row["exit"])
        fires = held.confidences[:, i] > row["threshold"]
        losses = (fires & ~held.agreeing[:, i]).reshape(-1, 3).mean(axis=1)
        assert row["got"] == pytest.approx(losses.mean())
        assert row["emitted"] == pytest.approx(fires.mean())
        assert row["interval"][0] <= row["got"] <= row["interval"][1]
        # Chosen: the fastest of the path whose p-value and those of all before it are small.
        values = []
        for threshold in GRID:
            own = (chosen.confidences[:, i] > threshold) & ~chosen.agreeing[:, i]
            values.append(hoeffding_bentkus_p_value(math.fsum(own.reshape(-1, 3).mean(axis=1)), 400, 0.05))
        passed = next((c for c, value in enumerate(values) if value > 0.05), len(values))
        assert row["threshold"] == GRID[passed - 1]
    assert all(row["got"] <= 0.05 for row in rows if row["to"] == "vqa/test")
    assert all(row["got"] > 0.2 for row in rows if row["to"] == "caption/test")


def test_an_exit_that_cannot_be_certified_stays_off_and_loses_nothing() -> None:
    few = opinions("vqa", "calibration", 0.6, 0, images=5)
    rows = transfer_rows([few], [opinions("vqa", "test", 0.6, 1)], "exits", epsilon=0.05, delta=0.05)
    assert {(row["threshold"], row["got"], row["emitted"]) for row in rows} == {(OFF, 0.0, 0.0)}


def test_calibration_rows_leave_out_the_full_models_agreement_with_itself() -> None:
    rows = calibration_rows(opinions("vqa", "test", 0.6, 3, images=30), "exits")
    targets = [(row["exit"], row["target"]) for row in rows]
    assert targets == [(2, "labels"), (2, "full model"), (4, "labels"), (4, "full model"), (16, "labels")]
    assert json.loads(json.dumps(rows))[0]["bins"][0].keys() == {"low", "high", "n", "confidence", "accuracy"}


def test_length_rows_count_what_was_generated_and_where_it_ended() -> None:
    def answer(*tokens: int, exits: tuple[int, ...]) -> Answer:
        return Answer(tokens=tokens, exits=exits, blocks=1, seconds=1.0)

    def nothing(_pixels: object, _prompt: object, _instruction: object) -> Decoded:
        raise AssertionError("no decoder is run")

    arms = tuple(Arm(method=name, threshold=value, decode=nothing) for name, value in (("full", None), ("exits", 0.5)))
    full, early = answer(5, 6, 7, 2, exits=(16,) * 4), answer(5, 2, exits=(4, 2))
    pairs = [(full, full), (full, early)]
    results = tuple(
        SampleResult(index=i, references=("a",), texts=("a", "a"), answers=pair) for i, pair in enumerate(pairs)
    )
    clean = TaskAnswers(task="caption", samples=(sample(GREY),) * 2, arms=arms, results=results)
    whole, exits = length_rows([clean], eos_token_id=2)
    assert (whole["ratio"], whole["shorter"], whole["eos_by_exit"]) == (1.0, 0.0, {"16": 1.0})
    assert (exits["mean_tokens"], exits["mean_tokens_full"], exits["ratio"]) == (3.0, 4.0, 0.75)
    assert (exits["shorter"], exits["longer"]) == (0.5, 0.0)
    assert exits["eos_by_exit"] == {"2": 0.5, "4": 0.0, "16": 0.5}
    assert exits["eos_rate_by_exit"] == {"2": 1.0, "4": 0.0, "16": 0.25}


def test_tokens_have_the_class_of_their_word() -> None:
    pieces = ["a", " red", " tri", "angle", " is", " in", " the", " im", "age", ".", "</s>"]
    ends = [False] * 10 + [True]
    found = token_classes(pieces, ends=ends)
    content, function = "content word", "function word"
    assert found == [
        function, content, content, content, function, function, function, content, content, "punctuation", "end"
    ]  # fmt: skip
    assert token_classes(["no", "</s>"], ends=[False, True]) == [content, "end"]
    assert token_classes([" isn", "'t", " ", "it"], ends=[False] * 4) == [function, function, "punctuation", function]


def traced(method: str, exits: tuple[int, ...], text: str = "a red one") -> TracedAnswer:
    words = ("function word", "content word", "end")
    tokens = tuple(Token(text=f" {i}", exit=k, word=words[min(i, 2)]) for i, k in enumerate(exits))
    return TracedAnswer(
        task="vqa", index=0, key="k", question="what?", method=method, threshold=0.5, text=text, references=("a",), tokens=tokens
    )  # fmt: skip


def test_shares_by_position_and_class_are_of_the_groups_tokens() -> None:
    answers = [traced("exits", (2, 4, 16, 16)), traced("exits", (2, 2, 2))]
    by_place = shares_by(answers, ["1", "2", "3+", "9"], "position", last=3)
    assert by_place == {"1": {2: 1.0}, "2": {2: 0.5, 4: 0.5}, "3+": {2: 1 / 3, 16: 2 / 3}}
    assert counts_by(answers, "position", last=3) == {"1": 2, "2": 2, "3+": 3}
    by_word = shares_by(answers, ["content word", "punctuation", "end"], "word")
    assert by_word == {"content word": {2: 0.5, 4: 0.5}, "end": {2: 1 / 3, 16: 2 / 3}}


def test_traces_survive_their_file_and_damage_is_named(tmp_path: Path) -> None:
    answers = (traced("exits", (2, 4), text='"<b>|x\n'), replace(traced("full", (16,)), threshold=None, picture="QUJD"))
    path = write_traces(tmp_path / "traces.jsonl", answers, n_blocks=16, command="python x", extra={"recipe": {"a": 1}})
    found = read_traces(path)
    assert (found.answers, found.n_blocks, found.command) == (answers, 16, "python x")
    assert found.extra == {"recipe": {"a": 1}}
    path.write_text(path.read_text().replace('"tokens"', '"token"'))
    with pytest.raises(UserError, match=r"traces.jsonl: no traces after 0 answers .* launch/robustness.py"):
        read_traces(path)
    path.write_text("")
    with pytest.raises(UserError, match="not of format 1"):
        read_traces(path)
