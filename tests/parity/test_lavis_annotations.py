"""LAVIS's annotation files as records: made here in its layouts, written to shards and read back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from free_dist.config import MissingFileError, UserError
from free_dist.data.lavis_annotations import lavis_records, prepare
from free_dist.data.records import Question
from free_dist.data.shards import MANIFEST
from free_dist.data.stream import records

N_IMAGES = 45


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """JPEGs in the folders that the annotations name."""
    folder = tmp_path / "images"
    for n in range(N_IMAGES):
        path = folder / name(n)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (5 * n, 0, 0)).save(buffer, format="JPEG")
        path.write_bytes(buffer.getvalue())
    return folder


def name(n: int) -> str:
    return f"val2014/COCO_val2014_{n:012d}.jpg"


def save(path: Path, entries: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(entries))
    return path


def test_captions_of_both_layouts_are_gathered_by_image(images: Path, tmp_path: Path) -> None:
    train = [{"image": name(n % 2), "caption": f"caption {n}", "image_id": f"coco_{n % 2}"} for n in range(5)]
    test = [{"image": name(2), "caption": ["one", " two "]}]
    paths = [save(tmp_path / "train.json", train), save(tmp_path / "test.json", test)]
    first, second, third = lavis_records(paths, images)
    assert first.captions == ("caption 0", "caption 2", "caption 4") and second.captions == ("caption 1", "caption 3")
    assert third.captions == ("one", "two")
    assert first.key == "val2014-COCO_val2014_000000000000" and first.image == (images / name(0)).read_bytes()


def test_a_question_keeps_all_its_answers(images: Path, tmp_path: Path) -> None:
    entries = [
        {"question_id": 1, "question": "what is it?", "answer": ["cat"] * 4 + ["dog"] * 5 + ["cow"], "image": name(0)},
        {"question_id": 2, "question": "where?", "answer": ["left", "right", "right", "left"], "image": name(0)},
        {"question_id": 3, "question": "how many?", "answer": "2", "image": name(1), "dataset": "vg"},
    ]
    first, second = lavis_records([save(tmp_path / "vqa.json", entries)], images)
    assert [question.question for question in first.questions] == ["what is it?", "where?"]
    assert [question.answers for question in first.questions] == [tuple(entry["answer"]) for entry in entries[:2]]
    assert [question.answer for question in first.questions] == ["dog", "left"]
    assert second.questions == (Question(question="how many?", answers=("2",), question_id="3"),)


def test_coco_becomes_three_splits_that_stream_back(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    for n, split in enumerate(("train", "val", "test")):
        entries = [{"image": name(3 * n + i), "caption": [f"{split} {i}"]} for i in range(3)]
        save(folder / f"coco_karpathy_{split}.json", entries)
    made = prepare("coco", folder, images, tmp_path / "data")
    assert [(manifest.split, manifest.samples) for manifest in made] == [("train", 3), ("calibration", 3), ("test", 3)]
    read = list(records(tmp_path / "data", "calibration"))
    assert [record.captions for record in read] == [("val 0",), ("val 1",), ("val 2",)]
    assert read[0].image == (images / name(3)).read_bytes()


def test_vqas_calibration_images_are_not_training_images(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    asked = [{"question": "q", "answer": ["a"], "image": name(n % 40)} for n in range(80)]
    save(folder / "vqa_train.json", asked)
    save(folder / "vqa_val.json", [{"question": "q", "answer": ["a"], "image": name(n)} for n in range(40, 45)])
    prepare("vqav2", folder, images, tmp_path / "data")
    keys = {
        split: {record.key for record in records(tmp_path / "data", split)}
        for split in ("train", "calibration", "test")
    }
    assert {split: len(found) for split, found in keys.items()} == {"train": 38, "calibration": 2, "test": 5}
    assert not keys["train"] & keys["calibration"]


def test_nocaps_has_a_test_split_alone_and_an_intact_split_is_kept(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    entries = [{"image": name(0), "caption": ["a", "b"], "img_id": 0}]
    save(folder / "nocaps_val.json", entries)
    (made,) = prepare("nocaps", folder, images, tmp_path / "data")
    stamp = (tmp_path / "data" / "test" / MANIFEST).stat().st_mtime_ns
    assert (made.split, made.samples) == ("test", 1)
    assert prepare("nocaps", folder, images, tmp_path / "data") == [made]
    assert (tmp_path / "data" / "test" / MANIFEST).stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ({"image": "x"}, "want a list of entries"),
        ([{"caption": "a"}], r"entry 0: image=None: want text"),
        ([{"image": "a.jpg", "caption": 3}], "entry 0: caption=3"),
        ([{"image": "a.jpg", "question": "q"}], "entry 0: answer=None: .* test questions have none"),
        ([{"image": "a.jpg", "question": "q", "answer": []}], "entry 0: answer="),
        ([{"image": "a.jpg", "question": " ", "answer": ["a"]}], "entry 0: question="),
    ],
)
def test_entries_that_lavis_would_not_write_are_named(tmp_path: Path, entries: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        list(lavis_records([save(tmp_path / "bad.json", entries)], tmp_path))


def test_missing_files_and_images_are_named(images: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"coco_karpathy_train\.json does not exist"):
        prepare("coco", tmp_path, images, tmp_path / "data")
    (tmp_path / "cut.json").write_text('[{"image": ')
    with pytest.raises(UserError, match=r"cut\.json, line 1: not JSON"):
        list(lavis_records([tmp_path / "cut.json"], images))
    path = save(tmp_path / "elsewhere.json", [{"image": "train2014/x.jpg", "caption": "a"}])
    with pytest.raises(MissingFileError, match=r"train2014/x\.jpg does not exist; name the folder"):
        list(lavis_records([path], images))
