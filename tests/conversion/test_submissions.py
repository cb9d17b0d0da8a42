"""Official files of every data set, converted, answered and submitted: ids, layouts and official scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import official_files as official
import pytest

from free_dist.config import DataConfig, EvaluationConfig, Recipe, UserError
from free_dist.data.published import prepare
from free_dist.data.shards import write_split
from free_dist.data.stream import records
from free_dist.evaluation.benchmark import Answer, Arm, Decoded
from free_dist.evaluation.evaluate import SampleResult, TaskEvaluation, task_rows, task_samples
from free_dist.evaluation.ranking import Ranked, Ranking, Reading
from free_dist.evaluation.rows import Row, read_results, write_results
from free_dist.evaluation.submission import check_submission, question_ids, write_submissions

ARMS = tuple(
    Arm(method=method, threshold=threshold, decode=lambda *_: Decoded([0], [1], 1))
    for method, threshold in (("full", None), ("exits", 0.9), ("exits", 1.1))
)


def recipe_of(root: Path, task: str, split: str = "test") -> Recipe:
    """Everything of a split."""
    return Recipe(
        data=DataConfig(root=str(root)), evaluation=EvaluationConfig(split=split, tasks=[task], max_samples=0)
    )


def evaluation(recipe: Recipe, *texts: str) -> TaskEvaluation:
    """Every decoder's answer to every sample; the answers come in turn."""
    (task,) = recipe.evaluation.tasks
    samples = task_samples(recipe, task)
    answer = Answer(tokens=(0,), exits=(1,), blocks=1, seconds=1.0)
    results = [
        SampleResult(
            index=i,
            references=sample.references,
            texts=(texts[i % len(texts)],) * len(ARMS),
            answers=(answer,) * len(ARMS),
        )
        for i, sample in enumerate(samples)
    ]
    rows = task_rows(task, ARMS, results, n_blocks=4, samples=samples)
    return TaskEvaluation(task=task, arms=ARMS, samples=tuple(samples), results=tuple(results), rows=tuple(rows))


def test_gqa_is_exact_and_told_apart_by_type(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.gqa(annotations, images)
    prepare("gqa", annotations, images, tmp_path / "gqa", withheld=True)
    found = evaluation(recipe_of(tmp_path / "gqa", "vqa"), "yes", "Yes.", "no")
    row = found.rows[0]
    assert row.quality == pytest.approx(1 / 3)  # six questions, "yes" is right; GQA compares as it stands
    assert row.extras["metrics"]["accuracy, always normalised"] == pytest.approx(2 / 3)
    parts = row.extras["breakdown"]
    assert {facet: list(part) for facet, part in parts.items()} == {
        "question_type": ["verify"],
        "answer_type": ["attr"],
        "openness": ["binary"],
    }
    assert parts["openness"]["binary"] == {"quality": row.quality, "n": 6, "metrics": row.extras["metrics"]}
    withheld = recipe_of(tmp_path / "gqa", "vqa", "withheld")
    assert check_submission(withheld) == "gqa"
    paths = write_submissions(tmp_path / "to", "gqa", [evaluation(withheld, "yes", "no")], None)
    assert [path.name for path in paths] == [
        "full.json",
        "exits-0.9.json",
    ]  # a decoder that never exits is the full one
    published = json.loads((annotations / "test_balanced_questions.json").read_text())
    entries = json.loads(paths[1].read_text())
    assert {entry["questionId"] for entry in entries} == set(published)
    assert entries[0] == {"questionId": entries[0]["questionId"], "prediction": "yes"}


@pytest.mark.parametrize(("dataset", "kind"), [("vqav2", "what is"), ("okvqa", "one")])
def test_vqa_accuracy_is_the_official_one_by_type(
    dataset: str, kind: str, annotations: Path, images: Path, tmp_path: Path
) -> None:
    official.vqa(annotations, okvqa=dataset == "okvqa")
    official.coco_images(images, "train2014", "val2014", "test2015")
    prepare(dataset, annotations, images, tmp_path / "data")
    recipe = recipe_of(tmp_path / "data", "vqa")
    # Of ten people seven say "net" and three "netting": leaving each out in turn gives 1 and (3 * 2/3 + 7 * 1) / 10.
    found = evaluation(recipe, "The net", "netting", "a fish")
    assert found.rows[0].quality == pytest.approx((1 + 0.9 + 0) / 3)
    assert found.rows[0].extras["breakdown"]["question_type"][kind]["quality"] == pytest.approx(found.rows[0].quality)
    paths = write_submissions(tmp_path / "to", dataset, [found], None)
    entries = json.loads(paths[0].read_text())
    assert sorted(entry["question_id"] for entry in entries) == [
        1000 * n + i for n in official.part_ids("val") for i in range(2)
    ]
    assert {(type(entry["question_id"]), type(entry["answer"])) for entry in entries} == {(int, str)}


def test_a_part_of_the_questions_is_submitted_in_its_own_order(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.vqa(annotations)
    official.coco_images(images, "train2014", "val2014", "test2015")
    prepare("vqav2", annotations, images, tmp_path / "data", withheld=True)
    recipe = recipe_of(tmp_path / "data", "vqa", "withheld")
    asked = [1000 * n for n in reversed(official.part_ids("test")[:3])]
    test_dev = official.place(tmp_path / "dev.json", {"questions": [{"question_id": q} for q in asked]})
    found = evaluation(recipe, "yes")
    assert np.isnan(found.rows[0].quality) and found.rows[0].to_json()["quality"] is None
    assert np.isnan(Row.from_json(found.rows[0].to_json()).quality)
    (path, *_) = write_submissions(tmp_path / "to", "vqav2", [found], None, questions=question_ids(test_dev))
    assert json.loads(path.read_text()) == [{"question_id": q, "answer": "yes"} for q in asked]
    with pytest.raises(UserError, match="1 of 1 questions, 5 the first, are not in the split"):
        write_submissions(tmp_path / "to", "vqav2", [found], None, questions=[5])
    with pytest.raises(UserError, match="no official file of questions"):
        question_ids(official.place(tmp_path / "other.json", {"annotations": []}))


def test_visdial_ranks_keep_the_published_order_of_candidates(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.visdial(annotations, images)
    prepare("visdial", annotations, images, tmp_path / "data", withheld=True)
    recipe = recipe_of(tmp_path / "data", "dialogue", "withheld")
    samples = task_samples(recipe, "dialogue")
    turns = json.loads((annotations / "visdial_1.0_test.json").read_text())["data"]
    assert len(samples) == len(turns["dialogs"]) == official.N_VAL
    for sample, dialogue in zip(samples, turns["dialogs"], strict=True):
        wanted = [turns["answers"][place] for place in dialogue["dialog"][-1]["answer_options"]]
        assert list(sample.origin.candidates) == wanted and sample.origin.round_id == 3
        assert sample.references == () and len(sample.turns[0].history.parts) == 3  # the caption and two answered turns
    ranks = np.arange(1, 101, dtype=np.int16)
    ranked = tuple(
        Ranked(index=i, ranks=np.stack([ranks, ranks[::-1]])[None], layers=np.zeros((1, 5), dtype=np.int64) + 1)
        for i in range(len(samples))
    )
    ranking = Ranking(task="dialogue", readings=(Reading("full", None, None),), samples=tuple(samples), ranked=ranked)
    plain, normalized = write_submissions(tmp_path / "to", "visdial", [], ranking)
    entries = json.loads(plain.read_text())
    assert entries[0] == {"image_id": 3000, "round_id": 3, "ranks": list(range(1, 101))}
    assert json.loads(normalized.read_text())[0]["ranks"] == list(range(100, 0, -1))
    assert all(row.metrics["mrr"] is row.metrics["ndcg"] is None for row in ranking.rows())
    with pytest.raises(UserError, match="no dialogue of visdial has candidates"):
        write_submissions(tmp_path / "to", "visdial", [], None)


def test_what_no_server_takes_is_refused_before_anything_runs(tiny_root: Path, annotations, images, tmp_path) -> None:
    with pytest.raises(UserError, match=r"--submission: .* holds 'easyvqa', which has no official layout"):
        check_submission(recipe_of(tiny_root, "vqa"))
    official.nocaps(annotations, images)
    prepare("nocaps", annotations, images, tmp_path / "data")
    part = recipe_of(tmp_path / "data", "caption")
    part.evaluation.max_samples = 3
    with pytest.raises(UserError, match=r"evaluation\.max_samples=3 leaves samples out"):
        check_submission(part)
    with pytest.raises(UserError, match="nocaps asks for task 'caption'"):
        check_submission(recipe_of(tmp_path / "data", "vqa"))
    found = evaluation(recipe_of(tmp_path / "data", "caption"), "a man")
    doubled = TaskEvaluation(**vars(found) | {"samples": found.samples * 2, "results": found.results * 2})
    with pytest.raises(UserError, match=r"image_id of sample .* comes twice"):
        write_submissions(tmp_path / "to", "nocaps", [doubled], None)


def test_a_split_with_records_that_cannot_be_used_is_not_submitted(annotations, images, tmp_path: Path) -> None:
    official.vqa(annotations)
    official.coco_images(images, "train2014", "val2014", "test2015")
    prepare("vqav2", annotations, images, tmp_path / "data")
    whole = list(records(tmp_path / "data", "test"))
    found = evaluation(recipe_of(tmp_path / "data", "vqa"), "yes")
    assert write_submissions(tmp_path / "to", "vqav2", [found], None, records=len(whole))

    broken = [replace(whole[0], image=b"no picture"), *whole[1:]]
    write_split(tmp_path / "broken", dataset="vqav2", split="test", records=broken, total=len(broken))
    recipe = recipe_of(tmp_path / "broken", "vqa")
    recipe.data.bad_sample_budget = 0.9
    part = evaluation(recipe, "yes")
    assert {sample.record_key for sample in part.samples} == {record.key for record in whole[1:]}
    with pytest.raises(UserError, match=f"1 of {len(whole)} records of the split gave no sample"):
        write_submissions(tmp_path / "refused", "vqav2", [part], None, records=len(whole))
    assert not (tmp_path / "refused").exists()
    asked = [int(sample.origin.question_id) for sample in part.samples]
    assert write_submissions(tmp_path / "to", "vqav2", [part], None, records=len(whole), questions=asked)

    twice = [*whole, whole[0]]  # seen before anything is decoded
    write_split(tmp_path / "twice", dataset="vqav2", split="test", records=twice, total=len(twice))
    recipe.data.root = str(tmp_path / "twice")
    with pytest.raises(UserError, match=f"1 of {len(twice)} records of the split gave no sample"):
        check_submission(recipe)
    assert check_submission(recipe, part=True) == "vqav2"


def test_an_older_list_of_rows_is_no_results_file(tmp_path: Path) -> None:
    path = write_results([], tmp_path)
    assert read_results(path) == []
    path.write_text("[]")
    with pytest.raises(UserError, match=r"results\.json is not a results\.json .*evaluate again"):
        read_results(path)
