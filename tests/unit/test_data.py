"""Converter and shards: from published files to records on disk and back."""

from __future__ import annotations

import io
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import easy_vqa
import pytest
from PIL import Image

from free_dist.atomic import write_atomically
from free_dist.config import UserError
from free_dist.data import easyvqa
from free_dist.data.records import DialogueTurn, Question, Record, SyntheticCaption
from free_dist.data.shards import (
    MANIFEST,
    Manifest,
    ShardError,
    is_intact,
    read_manifest,
    shard_paths,
    write_split,
)
from free_dist.data.stream import records

SPLITS = ("train", "calibration", "test")


def picture(colour: tuple[int, int, int], file_format: str = "PNG") -> bytes:
    """A real encoded image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), colour).save(buffer, format=file_format)
    return buffer.getvalue()


def made_up_records(count: int = 5) -> list[Record]:
    return [
        Record(
            key=f"made-{i:03d}",
            image=picture((40 * i, 0, 0)),
            image_id=f"{i}" if i % 2 else None,
            questions=(
                Question(question=f"is there a naïve shape {i}?", answers=("yes", "no"), question_id=f"{i}1"),
                Question(question="what color is it?", answers=()),
            ),
            captions=("a red shape", f"number {i}"),
            synthetic_captions=(SyntheticCaption(text="a shape", model="m", score=0.75, threshold=0.5),) * (i % 2),
            dialogue=(
                DialogueTurn(
                    question="is it red?", answer="yes", candidates=("no", "yes"), gold=1, relevance=(0.0, 0.9)
                ),
                DialogueTurn(question="is it big?", answer=None),
            ),
        )
        for i in range(count)
    ]


def write(root: Path, rows: list[Record], *, split: str = "train", records_per_shard: int = 2) -> Manifest:
    return write_split(
        root, dataset="made-up", split=split, records=rows, total=len(rows), records_per_shard=records_per_shard
    )


# --- converter ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_questions() -> dict[tuple[str, int], list[tuple[str, str]]]:
    """All questions of the package by (split, image)."""
    questions: dict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
    for split, published in (("train", easy_vqa.get_train_questions()), ("test", easy_vqa.get_test_questions())):
        for question, answer, image in zip(*published, strict=True):
            questions[split, image].append((question, answer))
    return questions


def answer_from_facts(question: str, colour: str, shape: str) -> str:
    """What easy-VQA answers about an image of one object: the opposite direction of ``known_facts``."""
    words = question.rstrip("?").split()
    if words[0] == "what":
        return colour if "color" in words else shape
    named = next(word for word in words if word in (*easyvqa.COLOURS, *easyvqa.SHAPES))
    present = named in (colour, shape)
    return "yes" if present != ("not" in words or "no" in words) else "no"


def test_known_facts_answer_every_published_question(published_questions) -> None:
    settled = 0
    for questions in published_questions.values():
        colour, shape = easyvqa.known_facts(questions)
        if colour and shape:
            settled += 1
            assert all(answer_from_facts(question, colour, shape) == answer for question, answer in questions)
    assert settled > 0.8 * len(published_questions)


def test_captions_name_the_object_and_deny_every_other_shape(published_questions) -> None:
    captioned = 0
    for questions in islice(published_questions.values(), 500):
        colour, shape = easyvqa.known_facts(questions)
        captions = easyvqa.captions_from_answers(questions)
        assert bool(captions) == bool(colour and shape)
        for caption in captions:
            captioned += 1
            assert f"a {colour} {shape}" in caption
            assert all(word in caption for word in easyvqa.SHAPES)
            assert [word for word in easyvqa.COLOURS if word in caption.split()] == [colour]
    assert captioned


@pytest.mark.parametrize(
    "questions",
    [
        [("is there a circle?", "yes"), ("is there a circle?", "no"), ("what color is the shape?", "red")],
        [
            ("what color is the shape?", "red"),
            ("what color is the shape?", "blue"),
            ("what shape is present?", "circle"),
        ],
        [("is there a circle?", "no"), ("what color is the shape?", "red")],
        [("is there not a circle?", "yes"), ("what color is the shape?", "red")],
        [],
    ],
)
def test_contradictory_or_insufficient_answers_give_no_caption(questions: list[tuple[str, str]]) -> None:
    assert None in easyvqa.known_facts(questions)
    assert easyvqa.captions_from_answers(questions) == ()


def test_negated_questions_settle_facts() -> None:
    questions = [("is no circle present?", "no"), ("does the image not contain a teal shape?", "no")]
    assert easyvqa.known_facts(questions) == ("teal", "circle")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole of easy-VQA."""
    root = tmp_path_factory.mktemp("converted")
    easyvqa.prepare(root)
    return root


def test_conversion_keeps_every_published_image_and_question(converted: Path, published_questions) -> None:
    found = {record.key: record for split in SPLITS for record in records(converted, split)}
    expected = {f"{split}-{image:05d}": tuple(pairs) for (split, image), pairs in published_questions.items()}
    told = {key: tuple((q.question, *q.answers) for q in record.questions) for key, record in found.items()}
    assert told == expected


def test_no_image_stands_in_two_splits(converted: Path) -> None:
    keys = {split: {record.key for record in records(converted, split)} for split in SPLITS}
    assert all(keys.values())
    assert sum(len(part) for part in keys.values()) == len(set.union(*keys.values()))
    assert all(key.startswith("test-") for key in keys["test"])  # the official test split, and nothing else
    assert not any(key.startswith("test-") for key in keys["train"] | keys["calibration"])


def test_finished_splits_are_kept_as_they_are(tiny_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tiny_root, root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.tar")}
    assert easyvqa.prepare(root) == [read_manifest(tiny_root, split) for split in SPLITS]
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.tar")} == before


@pytest.mark.parametrize("damage", ["delete the shard", "flip one byte", "break the manifest"])
def test_a_damaged_split_is_made_again_as_it_was(converted: Path, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "copy"
    shutil.copytree(converted, root)
    whole = read_manifest(root, "test")
    shard = root / "test" / whole.shards[-1].name
    content = shard.read_bytes()
    if damage == "delete the shard":
        shard.unlink()
    elif damage == "flip one byte":
        shard.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
    else:
        (root / "test" / MANIFEST).write_text("{")
    assert not is_intact(root, "test")
    untouched = {path: path.stat().st_mtime_ns for path in (root / "train").iterdir()}
    assert easyvqa.prepare(root)[-1] == whole
    assert shard.read_bytes() == content
    assert is_intact(root, "test")
    assert {path: path.stat().st_mtime_ns for path in (root / "train").iterdir()} == untouched


# --- shards ---------------------------------------------------------------------------------------------------------


def test_records_survive_shards_in_order(tmp_path: Path) -> None:
    rows = [*made_up_records(), Record(key="jpeg", image=picture((1, 2, 3), "JPEG"), captions=("„quoted“",))]
    manifest = write(tmp_path, rows)
    assert [shard.samples for shard in manifest.shards] == [2, 2, 2]
    assert manifest.samples == len(rows)
    assert list(records(tmp_path, "train")) == rows


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, made_up_records()) for name in "ab")
    assert first == second
    for shard in first.shards:
        assert (tmp_path / "a/train" / shard.name).read_bytes() == (tmp_path / "b/train" / shard.name).read_bytes()
    changed = made_up_records()
    changed[0] = replace(changed[0], captions=("another",))
    other = write(tmp_path / "c", changed)
    assert [a.sha256 == b.sha256 for a, b in zip(first.shards, other.shards, strict=True)] == [False, True, True]


def test_missing_split_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"train/manifest.json does not exist; make the shards with"):
        shard_paths(tmp_path, "train")


def test_shard_errors_are_the_users_to_put_right() -> None:
    assert issubclass(ShardError, UserError)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, made_up_records())
    (tmp_path / "train" / "000001.tar").unlink()
    with pytest.raises(ShardError, match=r"train/000001\.tar"):
        shard_paths(tmp_path, "train")


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, made_up_records())
    shard = tmp_path / "train" / "000002.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"train/000002\.tar"):
        shard_paths(tmp_path, "train")


def test_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path, made_up_records())
    path = tmp_path / "train" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(ShardError, match="schema version 99"):
        read_manifest(tmp_path, "train")


def test_interrupted_writing_leaves_no_manifest(tmp_path: Path) -> None:
    def breaking() -> Iterator[Record]:
        yield from made_up_records(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_split(tmp_path, dataset="made-up", split="train", records=breaking(), total=9, records_per_shard=2)
    assert not (tmp_path / "train" / MANIFEST).exists()


def test_interrupted_rewriting_leaves_no_manifest_of_the_former_split(tmp_path: Path) -> None:
    write(tmp_path, made_up_records())
    test_interrupted_writing_leaves_no_manifest(tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
