"""Converter, shards, stream and encoding: from published files to aligned tensors."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import easy_vqa
import pytest
import torch
from PIL import Image

from free_dist.config import DataConfig
from free_dist.data import easyvqa
from free_dist.data.samples import IGNORE, Batch, Record, Sample, SampleEncoder, Turn, training_samples
from free_dist.data.shards import (
    MANIFEST,
    Manifest,
    ShardError,
    read_manifest,
    record_from_fields,
    shard_paths,
    write_atomically,
    write_split,
)
from free_dist.data.stream import epoch_samples, global_batches, records, split_samples, training_batches

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
            questions=((f"is there a naïve shape {i}?", "yes"), ("what color is it?", "red")),
            captions=("a red shape", f"number {i}"),
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
        [("what color is the shape?", "red"), ("what color is the shape?", "blue"), ("what shape is present?", "circle")],
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
    assert {key: record.questions for key, record in found.items()} == expected


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


def test_sample_without_image_or_text_is_named() -> None:
    with pytest.raises(ShardError, match="sample lonely lacks its image"):
        record_from_fields({"__key__": "lonely", "__url__": "x.tar", "png": picture((0, 0, 0))})


def test_interrupted_writing_leaves_no_manifest(tmp_path: Path) -> None:
    def breaking() -> Iterator[Record]:
        yield from made_up_records(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_split(tmp_path, dataset="made-up", split="train", records=breaking(), total=9, records_per_shard=2)
    assert not (tmp_path / "train" / MANIFEST).exists()


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


# --- stream ---------------------------------------------------------------------------------------------------------


def micro_batches(data: DataConfig, encoder: SampleEncoder, *, micro: int, accumulation: int, world: int) -> list[Batch]:
    """Three global batches in the order in which one process would see their rows: by step, then by rank."""
    ranks = [
        training_batches(
            data,
            encoder,
            seed=7,
            micro_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            rank=rank,
            world_size=world,
        )
        for rank in range(world)
    ]
    return [next(batches) for _ in range(3 * accumulation) for batches in ranks]


def rows(batches: list[Batch]) -> list[tuple[str, str, list[int], list[int]]]:
    """(task, key, ids, targets) of every row, without its padding."""
    found = []
    for batch in batches:
        for key, ids, targets in zip(batch.keys, batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
            length = max(t for t, target in enumerate(targets) if target != IGNORE) + 2
            found.append((batch.task, key, ids[:length], targets[:length]))
    return found


@pytest.mark.parametrize(
    ("micro", "accumulation", "world"), [(8, 1, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)], ids=str
)
def test_order_of_rows_does_not_depend_on_processes(tiny_data, tiny_encoder, micro, accumulation, world) -> None:
    single = micro_batches(tiny_data, tiny_encoder, micro=4, accumulation=2, world=1)
    shared = micro_batches(tiny_data, tiny_encoder, micro=micro, accumulation=accumulation, world=world)
    assert rows(shared) == rows(single)


def test_order_of_rows_depends_on_seed_and_epoch(tiny_data: DataConfig) -> None:
    def keys(seed: int, epoch: int) -> list[str]:
        return [sample.key for sample in epoch_samples(tiny_data, "caption", seed=seed, epoch=epoch)]

    assert keys(0, 0) == keys(0, 0)
    assert keys(0, 0) != keys(1, 0)
    assert keys(0, 0) != keys(0, 1)


def test_an_epoch_shows_every_record_once(tiny_data: DataConfig, tiny_root: Path) -> None:
    shown = [sample.key for sample in epoch_samples(tiny_data, "dialogue", seed=0, epoch=0)]
    assert sorted(shown) == sorted(record.key for record in records(tiny_root, "train"))


def test_tasks_are_drawn_by_weight(tiny_data: DataConfig) -> None:
    data = replace(tiny_data, tasks={"vqa": 3.0, "caption": 1.0, "dialogue": 0.0})
    drawn = [batch[0].task for batch in islice(global_batches(data, seed=0, rows=2), 200)]
    assert set(drawn) == {"vqa", "caption"}
    assert 120 <= drawn.count("vqa") <= 180  # mean 150, standard deviation 6.1


def test_ranks_share_an_evaluation_without_loss_or_repetition(tiny_data: DataConfig) -> None:
    whole = split_samples(tiny_data, "test", "vqa")
    shares = [split_samples(tiny_data, "test", "vqa", rank=rank, world_size=3) for rank in range(3)]
    assert sorted(sample.key for sample in chain(*shares)) == sorted(sample.key for sample in whole)
    some = split_samples(tiny_data, "test", "vqa", max_samples=5)
    assert len(some) == 5 and all(sample in whole for sample in some)
    assert len({sample.image for sample in some}) == 5  # spread over the split, not its first rows


def test_task_without_records_is_an_error_not_an_endless_loop(tmp_path: Path) -> None:
    write(tmp_path, [Record(key="bare", image=picture((0, 0, 0)), questions=(("q?", "yes"),))])
    data = DataConfig(root=str(tmp_path), tasks={"caption": 1.0})
    with pytest.raises(ValueError, match="data.tasks: no record"):
        next(global_batches(data, seed=0, rows=1))


# --- rows -----------------------------------------------------------------------------------------------------------


def misaligned_positions(batch: Batch) -> int:
    """Answer positions whose target is not the token that stands one position further on."""
    positions = batch.targets[:, :-1] != IGNORE
    wrong = batch.targets[:, :-1][positions] != batch.input_ids[:, 1:][positions]
    return int(wrong.sum()) + int((batch.targets[:, -1] != IGNORE).sum())


def answers_in(batch: Batch, encoder: SampleEncoder, row: int) -> list[str]:
    """The answers that the targets of one row spell."""
    answers: list[list[int]] = [[]]
    for token in batch.targets[row][batch.targets[row] != IGNORE].tolist():
        if token == encoder.layout.eos_token_id:
            answers.append([])
        else:
            answers[-1].append(token)
    assert answers.pop() == []  # every answer is closed
    return [encoder.decode(answer) for answer in answers]


@pytest.mark.parametrize("task", ["vqa", "caption", "dialogue"])
def test_targets_spell_the_answers_and_nothing_else(tiny_data, tiny_encoder, task: str) -> None:
    samples = split_samples(tiny_data, "train", task)
    batch = tiny_encoder.collate(samples)
    assert misaligned_positions(batch) == 0
    for row, sample in enumerate(samples):
        assert answers_in(batch, tiny_encoder, row) == [turn.answer for turn in sample.turns]


@pytest.mark.parametrize("shift", [-1, 1])
def test_targets_off_by_one_are_seen(tiny_data, tiny_encoder, shift: int) -> None:
    batch = tiny_encoder.collate(split_samples(tiny_data, "train", "vqa"))
    assert misaligned_positions(replace(batch, targets=batch.targets.roll(shift, dims=1))) > 0


def test_prompt_is_the_beginning_of_the_row_and_the_answer_follows_it(tiny_data, tiny_encoder) -> None:
    for task in ("vqa", "caption", "dialogue"):
        for sample in split_samples(tiny_data, "test", task):
            ids, targets = tiny_encoder.encode_text(sample.turns)
            prompt = tiny_encoder.encode_prompt(sample.turns)
            answer = tiny_encoder.decode(ids[len(prompt) :])
            assert ids[: len(prompt)] == prompt
            assert targets[len(prompt) - 1] == ids[len(prompt)]
            assert targets[len(prompt) - 2] == IGNORE
            assert answer == sample.turns[-1].answer


def test_image_placeholders_and_padding_are_never_targets(tiny_data, tiny_encoder) -> None:
    batch = tiny_encoder.collate(split_samples(tiny_data, "train", "dialogue"))
    layout = tiny_encoder.layout
    assert (batch.input_ids == layout.image_token_id).sum(dim=1).eq(layout.num_query_tokens).all()
    assert (batch.input_ids[:, : layout.num_query_tokens] == layout.image_token_id).all()
    assert (batch.targets[:, : layout.num_query_tokens] == IGNORE).all()
    padding = batch.input_ids == layout.pad_token_id
    assert padding.any()
    assert (batch.targets[padding] == IGNORE).all()


def test_rows_about_one_image_share_it(tiny_data, tiny_encoder, tiny_root: Path) -> None:
    first, second = islice(records(tiny_root, "train"), 2)
    samples: list[Sample] = []
    for record in (first, second, first):
        samples += training_samples(record, "vqa", tiny_data, random.Random(0))
    batch = tiny_encoder.collate(samples)
    assert batch.image_index.tolist() == [0, 0, 1, 1, 0, 0]
    assert batch.pixel_values.shape[0] == 2
    assert torch.equal(batch.pixel_values[1], tiny_encoder.encode_image(second.image))
    assert not torch.equal(batch.pixel_values[0], batch.pixel_values[1])


def test_row_longer_than_the_backbone_names_the_field(tiny_encoder) -> None:
    turns = [Turn(prompt="Question: what? Answer:", answer="yes")] * 100
    with pytest.raises(ValueError, match=r"data\.max_turns"):
        tiny_encoder.encode_text(turns)


def test_any_text_survives_the_tokenizer(tiny_encoder) -> None:
    text = "Größe = 3 px, 日本, 🙂"
    assert tiny_encoder.decode(tiny_encoder.encode_text([Turn(prompt="p", answer=text)])[0][-60:]).endswith(text)
