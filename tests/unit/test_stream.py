"""Stream and encoding: the order of rows, and targets that line up with positions."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from free_dist.config import ConfigError, DataConfig
from free_dist.data.records import Question, Record
from free_dist.data.samples import IGNORE, Batch, Sample, SampleEncoder, Turn, training_samples
from free_dist.data.shards import write_split
from free_dist.data.stream import (
    epoch_samples,
    global_batches,
    records,
    required_samples,
    split_samples,
    training_batches,
)


def micro_batches(
    data: DataConfig, encoder: SampleEncoder, *, micro: int, accumulation: int, world: int
) -> list[Batch]:
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
    bare = Record(key="bare", image=b"\x89PNG", questions=(Question(question="q?", answers=("yes",)),))
    write_split(tmp_path, dataset="made-up", split="train", records=[bare], total=1)
    data = DataConfig(root=str(tmp_path), tasks={"caption": 1.0})
    with pytest.raises(ValueError, match=r"data\.tasks: no record"):
        next(global_batches(data, seed=0, rows=1))


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
    turns = [Turn(prompt="p", answer=text)]
    ids, _ = tiny_encoder.encode_text(turns)
    assert tiny_encoder.decode(ids[len(tiny_encoder.encode_prompt(turns)) :]) == text


def test_the_token_that_ends_an_answer_is_no_part_of_its_text(tiny_encoder: SampleEncoder) -> None:
    ids = tiny_encoder.tokenizer.encode("a red circle", add_special_tokens=False)
    layout = replace(tiny_encoder.layout, eos_token_id=ids[-1])  # as BLIP-2's line break: a token like any other
    encoder = SampleEncoder(tiny_encoder.tokenizer, tiny_encoder.image_processor, layout, tiny_encoder.max_length)
    assert encoder.decode(ids) == tiny_encoder.decode(ids[:-1]) != tiny_encoder.decode(ids)
    assert encoder.decode([]) == ""


def test_a_task_that_a_split_has_nothing_for_is_named_with_the_split(tiny_data: DataConfig, tmp_path: Path) -> None:
    assert required_samples(tiny_data, "test", "vqa", max_samples=5) == split_samples(
        tiny_data, "test", "vqa", max_samples=5
    )
    silent = [replace(record, questions=()) for record in records(tiny_data, "test")]
    write_split(tmp_path, dataset="silent", split="test", records=silent, total=len(silent))
    with pytest.raises(ConfigError, match=f"data.root: {tmp_path}/test has nothing for task 'vqa'"):
        required_samples(DataConfig(root=str(tmp_path)), "test", "vqa")
