"""Fixtures shared by all tests: one tiny untrained backbone, and real shards of a few easy-VQA images.

Session-scoped and read-only: a test that trains, moves or patches something makes its own copy.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import easy_vqa
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_image_processor, new_model, train_tokenizer
from free_dist.config import DataConfig
from free_dist.data.easyvqa import CALIBRATION_EVERY, captions_from_answers
from free_dist.data.records import Question, Record
from free_dist.data.samples import SampleEncoder
from free_dist.data.shards import write_split
from free_dist.data.stream import corpus

TINY_SPLITS = {"train": 24, "calibration": 8, "test": 8}
"""Images in each split of ``tiny_root``; 40 in all."""


def pytest_configure() -> None:
    """One thread here and in every program that a test starts.

    Sums split over threads differ in their last bits from run to run, which is enough where two beams nearly tie and where
    two processes must agree exactly; and small models run no faster on more.
    """
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def published_records(split: str, count: int) -> Iterator[Record]:
    """The first ``count`` easy-VQA images of a split, with every question that is published for them."""
    official = "test" if split == "test" else "train"
    published = easy_vqa.get_test_questions() if official == "test" else easy_vqa.get_train_questions()
    paths = easy_vqa.get_test_image_paths() if official == "test" else easy_vqa.get_train_image_paths()
    questions: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image_id in zip(*published, strict=True):
        questions[image_id].append((question, answer))
    image_ids = sorted(questions)
    if split != "test":
        image_ids = [i for i in image_ids if (i % CALIBRATION_EVERY == 0) == (split == "calibration")]
    for image_id in image_ids[:count]:
        yield Record(
            key=f"{official}-{image_id:05d}",
            image=Path(paths[image_id]).read_bytes(),
            questions=tuple(Question(question=q, answers=(a,)) for q, a in questions[image_id]),
            captions=captions_from_answers(questions[image_id]),
        )


@pytest.fixture(scope="session")
def tiny_backbone() -> Blip2Backbone:
    """Random BLIP-2 with 4 blocks of width 32, float32, frozen, in evaluation mode."""
    return Blip2Backbone(new_model(width=32, n_blocks=4, n_heads=2).eval().requires_grad_(False))


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of shards: all three splits, 40 images in all, ten records to a shard."""
    root = tmp_path_factory.mktemp("easyvqa")
    for split, count in TINY_SPLITS.items():
        records = published_records(split, count)
        write_split(root, dataset="easyvqa", split=split, records=records, total=count, records_per_shard=10)
    return root


@pytest.fixture(scope="session")
def tiny_data(tiny_root: Path) -> DataConfig:
    """The data section of a recipe that streams ``tiny_root``."""
    return DataConfig(root=str(tiny_root), shuffle_buffer=16, questions_per_image=2, max_turns=3)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_data: DataConfig, tiny_backbone: Blip2Backbone) -> PreTrainedTokenizerBase:
    """A tokenizer trained on ``tiny_root`` that fits the tiny backbone's vocabulary."""
    return train_tokenizer(corpus(tiny_data), vocab_size=tiny_backbone.vocab_size)


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Blip2Backbone, tiny_tokenizer: PreTrainedTokenizerBase
) -> Path:
    """``tiny_backbone`` as a complete Hugging Face directory."""
    directory = tmp_path_factory.mktemp("tiny_blip2")
    tiny_backbone.model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    new_image_processor().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_encoder(tiny_backbone: Blip2Backbone, tiny_tokenizer: PreTrainedTokenizerBase) -> SampleEncoder:
    """Samples -> batches of the tiny backbone."""
    return SampleEncoder(tiny_tokenizer, new_image_processor(), tiny_backbone.layout, tiny_backbone.max_positions)
