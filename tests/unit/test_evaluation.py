"""Metrics against published or hand-computed numbers; ratios, rows, tables and pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from free_dist.config import UserError
from free_dist.data.origin import Origin
from free_dist.data.samples import Sample
from free_dist.evaluation.benchmark import Answer, Arm, Decoded, mean_with_interval, ratio_with_interval
from free_dist.evaluation.evaluate import SampleResult, task_rows
from free_dist.evaluation.metrics import (
    MissingPackageError,
    bleu,
    cider_d,
    normalise_answer,
    ptb_like_tokens,
    vqa_accuracy,
)
from free_dist.evaluation.probe import LENS, Curve, Probe
from free_dist.evaluation.ranking import Ranked, Ranking, Reading
from free_dist.evaluation.report import terminal_table, write_report
from free_dist.evaluation.rows import SCHEMA, Row, best_row, read_results
from free_dist.evaluation.tasks import find_task


@pytest.mark.parametrize(("votes", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_of_ten_answers_is_the_leave_one_out_mean(votes: int, accuracy: float) -> None:
    assert vqa_accuracy("red", ["red"] * votes + ["blue"] * (10 - votes)) == pytest.approx(accuracy)


def test_official_mode_leaves_unanimous_answers_as_they_are() -> None:
    assert vqa_accuracy("the dog", ["dog"] * 10, normalise="official") == 0.0
    assert vqa_accuracy("the dog", ["dog"] * 10, normalise="always") == 1.0
    assert vqa_accuracy("the dog", ["dog"] * 9 + ["cat"], normalise="official") == 1.0


@pytest.mark.parametrize(
    ("score", "module"), [(cider_d, "pycocoevalcap.cider.cider"), (bleu, "pycocoevalcap.bleu.bleu")]
)
def test_a_missing_caption_package_is_the_users_to_install(monkeypatch, score, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes its import a ModuleNotFoundError
    with pytest.raises(MissingPackageError, match=r"^caption metrics need pycocoevalcap: pip install") as error:
        score(["a dog"], [["a dog"]])
    assert isinstance(error.value, UserError) and isinstance(error.value, ModuleNotFoundError)


def test_official_mode_makes_one_line_of_a_unanimous_answer() -> None:
    assert vqa_accuracy("hot\tdog\n", ["hot dog"] * 10) == 1.0


def test_single_answer_is_exact_match() -> None:
    assert vqa_accuracy("yes", ["yes"]) == 1.0
    assert vqa_accuracy("yes sir", ["yes"]) == 0.0


def test_vqa_accuracy_rejects_other_modes_and_missing_answers() -> None:
    with pytest.raises(ValueError, match="official or always"):
        vqa_accuracy("yes", ["yes"], normalise="never")
    with pytest.raises(ValueError, match="at least one answer"):
        vqa_accuracy("yes", [])


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("yes, it is!", "yes it is"),
        (" a  red\ncar ", "red car"),
        ("its", "its"),
        ("twas", "'twas"),
        ("they couldnt've", "they couldn't've"),
        ("they couldn'tve", "they couldn't've"),
        ("they couldntve", "they couldntve"),
        ("somebody'd", "somebodyd"),
        ("id", "id"),
        ("U.S.", "us"),
    ],
)
def test_answers_are_normalised_by_the_rules_of_vqa(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


def test_caption_tokens_follow_penn_treebank_without_punctuation() -> None:
    assert ptb_like_tokens("A dog's bone, isn't it? Don't!") == "a dog 's bone is n't it do n't"
    assert ptb_like_tokens("a well-known red/blue sign (3.5 m).") == "a well-known red/blue sign 3.5 m"


def test_caption_scores_reproduce_a_published_example() -> None:
    # The worked example in the documentation of the aac-metrics package.
    captions = ["a man is speaking", "rain falls"]
    references = [
        ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
        ["rain is falling hard on a surface"],
    ]
    assert np.mean(cider_d(captions, references)) == pytest.approx(0.9614, abs=1e-4)
    assert bleu(captions, references)[0] == pytest.approx(0.4278, abs=1e-4)


def test_perfect_captions_have_bleu_one_and_cider_ten() -> None:
    references = [["a red circle lies there ."], ["the blue square stands here ."]]
    captions = [texts[0] for texts in references]
    assert bleu(captions, references) == pytest.approx([1.0] * 4)
    assert cider_d(captions, references) == pytest.approx([10.0, 10.0])


def test_caption_scores_reject_missing_references() -> None:
    with pytest.raises(ValueError, match="caption 1 has no reference"):
        cider_d(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="1 captions against 2"):
        bleu(["a"], [["a"], ["b"]])


def test_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="vqa, caption, dialogue"):
        find_task("retrieval")


def test_ratio_is_of_sums_and_lies_in_its_interval() -> None:
    generator = np.random.default_rng(3)
    fast = generator.gamma(4.0, 1.0, 300)
    slow = 1.7 * fast + generator.normal(0.0, 0.5, 300)
    ratio, (low, high) = ratio_with_interval(slow.tolist(), fast.tolist())
    assert ratio == pytest.approx(slow.sum() / fast.sum())
    assert low < ratio < high
    assert low < 1.7 < high
    assert high - low < 0.1


def test_interval_narrows_with_samples_and_vanishes_without_noise() -> None:
    assert ratio_with_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, (2.0, 2.0))
    generator = np.random.default_rng(5)

    def width(n: int) -> float:
        _, (low, high) = ratio_with_interval(
            generator.gamma(2.0, 1.0, n).tolist(), generator.gamma(2.0, 1.0, n).tolist()
        )
        return high - low

    assert width(2000) < 0.5 * width(50)


def test_an_interval_over_images_is_that_of_drawing_whole_images_and_wider_where_their_answers_hang_together() -> None:
    generator = np.random.default_rng(7)
    images = np.repeat(np.arange(60), generator.integers(1, 9, 60))
    values = (generator.random(60) > 0.4)[images].astype(float)  # all answers about one image right, or all wrong
    order = generator.permutation(len(images))
    values, images = values[order], images[order]
    mean, (low, high) = mean_with_interval(values.tolist(), [f"image {i}" for i in images])
    assert mean == pytest.approx(values.mean())
    members = [values[images == image] for image in range(60)]
    means = [np.concatenate([members[i] for i in generator.integers(0, 60, 60)]).mean() for _ in range(4000)]
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    _, alone = mean_with_interval(values.tolist(), range(len(values)))
    assert alone == ratio_with_interval(values.tolist(), [1.0] * len(values))[1]
    assert high - low > 1.5 * (alone[1] - alone[0])
    with pytest.raises(ValueError, match="1 groups for 2 values"):
        mean_with_interval([1.0, 2.0], [0])


def test_intervals_of_a_rows_quality_and_speed_and_of_ranks_are_over_images() -> None:
    arms = [
        Arm(method=name, threshold=None, decode=lambda *_: Decoded([0], [1], 1)) for name in ("full", "hf", "exits")
    ]

    def answer(seconds: float) -> Answer:
        return Answer(tokens=(0,), exits=(1,), blocks=1, seconds=seconds)

    origin = Origin(candidates=("a", "b"), gold=0, relevance=(1.0, 0.0))

    def intervals(questions: int) -> list[tuple[float, float]]:
        """Of 40 questions about images that are asked so many each; those about one are all right or all wrong."""
        samples, results, ranked = [], [], []
        for i in range(40):
            right = i // 5 % 2
            samples.append(
                Sample(
                    key=f"{i}", task="vqa", image=bytes([i // questions]), turns=(), references=("a",), origin=origin
                )
            )
            text, own = "a" if right else "b", answer(1.0 + right)
            results.append(
                SampleResult(index=i, references=("a",), texts=(text,) * 3, answers=(answer(1.0), answer(1.0), own))
            )
            ranks = np.array([[[1, 2] if right else [2, 1]] * 2], dtype=np.int16)
            ranked.append(Ranked(index=i, ranks=ranks, layers=np.ones((1, 3), dtype=np.int64)))
        made = task_rows("vqa", arms, results, n_blocks=2, samples=samples)[-1].extras
        reading = Reading("full", None, None)
        ranking = Ranking(task="vqa", readings=(reading,), samples=tuple(samples), ranked=tuple(ranked)).rows()[0]
        assert ranking.mrr_interval is not None and ranking.ndcg_interval is not None
        ours = [made[name] for name in ("quality_interval", "wall_ratio_interval", "wall_ratio_hf_interval")]
        return [*ours, ranking.mrr_interval, ranking.ndcg_interval]

    for (low, high), (low_alone, high_alone) in zip(intervals(5), intervals(1), strict=True):
        assert high - low > 1.5 * (high_alone - low_alone)


def test_ratio_rejects_unpaired_values() -> None:
    with pytest.raises(ValueError, match="2 reference values against 1"):
        ratio_with_interval([1.0, 2.0], [1.0])


def row(
    method: str, threshold: float | None, quality: float, wall: float, wall_hf: float | None, task: str = "vqa"
) -> Row:
    """A made-up row of a 16-block model."""
    return Row(
        task=task,
        method=method,
        threshold=threshold,
        quality=quality,
        quality_full=0.9,
        agreement=1.0,
        mean_blocks=8.0,
        layer_ratio=2.0,
        wall_ratio=wall,
        wall_ratio_hf=wall_hf,
        n=50,
        extras={"exit_shares": {"3": 0.75, "16": 0.25}, "wall_ratio_interval": (wall - 0.1, wall + 0.1), "threads": 1},
    )


ROWS = [
    row("full", None, 0.9, 1.0, 1.8),
    row("hf", None, 0.9, 0.55, 1.0),
    row("exits", 0.5, 0.7, 2.5, 4.0),
    row("exits", 0.8, 0.895, 1.6, 2.7),
    row("exits", 0.9, 0.9, 1.4, 1.5),
    row("exits", 1.1, 0.9, 9.0, 9.0),
    row("exits_ce", 0.8, 0.9, 1.9, 1.3),
]


def test_best_row_is_judged_against_the_faster_baseline_at_99_percent_quality() -> None:
    best = best_row(ROWS, "vqa")
    assert best is not None
    assert (best.method, best.threshold, best.speed) == ("exits", 0.8, 1.6)
    assert best_row(ROWS, "vqa", min_quality_ratio=0.7) is ROWS[2]
    assert best_row(ROWS, "vqa", method="exits_ce") is ROWS[6]
    assert best_row(ROWS, "vqa", min_quality_ratio=1.1) is None
    assert best_row(ROWS, "caption") is None


def test_row_survives_json_and_keeps_its_columns_first() -> None:
    for one in ROWS:
        raw = json.loads(json.dumps(one.to_json()))
        assert tuple(raw)[: len(SCHEMA)] == SCHEMA
        assert Row.from_json(raw).to_json() == raw | {"wall_ratio_interval": raw["wall_ratio_interval"]}
    with pytest.raises(ValueError, match="column 'n'"):
        Row.from_json({name: 0 for name in SCHEMA if name != "n"})


def test_extras_may_not_replace_a_column() -> None:
    one = row("exits", 0.5, 0.9, 1.0, 1.0)
    one.extras["quality"] = 1.0
    with pytest.raises(ValueError, match="'quality'"):
        one.to_json()


def test_table_marks_the_best_row_only() -> None:
    lines = terminal_table(ROWS).splitlines()
    assert [line for line in lines if line.endswith("*")] == [lines[2 + 3]]
    assert "1.60 [1.50, 1.70]" in lines[2 + 3]


def test_report_writes_results_tables_and_pictures_that_show_something(tmp_path: Path) -> None:
    curve = Curve(layers=(1, 2, 3, 4), right=(1, 2, 3, 9), agreeing=(1, 2, 4, 10))
    trained = Curve(layers=(1, 3), right=(8, 9), agreeing=(8, 10))
    probe = Probe(task="vqa", tokens=10, curves={LENS: curve, "CE": trained, "CE + GAN": trained})
    rows = [*ROWS, row("full", None, 0.9, 1.0, None, task="caption"), row("exits", 1.1, 0.9, 1.0, None, task="caption")]
    paths = write_report(rows, [probe], tmp_path / "run")
    raw = json.loads(paths.results.read_text())
    assert (raw["format"], raw["samples"]) == (1, {"vqa": 50, "caption": 50})
    assert set(SCHEMA) <= raw["rows"][0].keys()
    assert [one.to_json() for one in read_results(paths.results)] == raw["rows"]
    text = paths.report.read_text()
    for part in ("1.60 \\[1.50, 1.70\\] times the speed", "not a speed", "| CE + GAN | 0.800 |"):
        assert part in text
    assert paths.page.read_text().startswith("<!doctype html>")
    assert len(paths.plots) == 3
    for path in paths.plots.values():
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]


def test_probes_add_up_to_the_probe_of_all() -> None:
    half = Probe(task="vqa", tokens=10, curves={LENS: Curve(layers=(1, 2), right=(3, 6), agreeing=(5, 10))})
    total = half + half
    assert total.accuracy(LENS) == half.accuracy(LENS) == {1: 0.3, 2: 0.6}
    assert total.agreement(LENS) == {1: 0.5, 2: 1.0}
    assert total.tokens == 20
