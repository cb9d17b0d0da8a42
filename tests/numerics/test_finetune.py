"""Stage 1 really trains: a few steps on real shards lower the loss, and what is saved loads back as it was."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.blip2 import load_image_processor, load_tokenizer
from free_dist.backbones.embedded import new_model
from free_dist.config import DataConfig, FinetuneConfig, Recipe, TrainingConfig
from free_dist.data.samples import SampleEncoder
from free_dist.data.stream import training_batches
from free_dist.training.finetune import answer_loss, augment, finetune
from free_dist.training.schedule import warmup_cosine


@pytest.fixture(scope="module")
def run(tiny_root: Path, tiny_tokenizer, tiny_encoder, tmp_path_factory) -> tuple[Blip2Backbone, Path]:
    backbone = Blip2Backbone(new_model(width=32, n_blocks=4, n_heads=2, seed=3))
    recipe = Recipe(
        run_dir=str(tmp_path_factory.mktemp("finetune")),
        data=DataConfig(root=str(tiny_root), max_turns=2),
        training=TrainingConfig(max_steps=30, warmup_steps=5, log_every=1),
        finetune=FinetuneConfig(batch_size=16, learning_rate=3e-3, eval_every=1000),
    )
    encoder = SampleEncoder(tiny_tokenizer, tiny_encoder.image_processor, backbone.layout, backbone.max_positions)
    finetune(backbone, encoder, recipe)
    return backbone, Path(recipe.run_dir)


def test_a_few_steps_lower_the_loss(run) -> None:
    entries = [json.loads(line) for line in (run[1] / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_saved_directory_loads_back_as_the_same_frozen_model(run, tiny_root: Path) -> None:
    backbone, run_dir = run
    directory = run_dir / "backbone"
    loaded = Blip2Backbone.from_pretrained(directory)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    encoder = SampleEncoder(
        load_tokenizer(directory), load_image_processor(directory), loaded.layout, loaded.max_positions
    )
    batch = next(training_batches(DataConfig(root=str(tiny_root)), encoder, seed=0, micro_batch_size=4))
    torch.testing.assert_close(answer_loss(loaded, batch), answer_loss(backbone, batch), rtol=1e-6, atol=1e-6)


def test_augmentation_moves_pixels_and_nothing_else(tiny_root: Path, tiny_encoder) -> None:
    batch = next(training_batches(DataConfig(root=str(tiny_root)), tiny_encoder, seed=0, micro_batch_size=8))
    moved = augment(batch, random.Random(1))
    assert moved.pixel_values.shape == batch.pixel_values.shape
    assert not torch.equal(moved.pixel_values, batch.pixel_values)
    assert torch.equal(moved.input_ids, batch.input_ids) and torch.equal(moved.targets, batch.targets)
    assert (
        moved.pixel_values.amin() >= batch.pixel_values.amin()
        and moved.pixel_values.amax() <= batch.pixel_values.amax()
    )


def test_schedule_warms_up_linearly_and_ends_at_zero() -> None:
    factor = warmup_cosine(warmup_steps=4, max_steps=20)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    values = [factor(step) for step in range(4, 21)]
    assert values == sorted(values, reverse=True) and abs(values[-1]) < 1e-12
