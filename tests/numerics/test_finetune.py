"""Stage 1 really trains: a few steps on real shards lower the loss, and what is saved loads back as it was."""

from __future__ import annotations

import json
import random
import runpy
from pathlib import Path

import pytest
import torch

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.blip2 import load_image_processor, load_tokenizer
from free_dist.backbones.embedded import new_model
from free_dist.config import DataConfig, FinetuneConfig, Recipe, TrainingConfig, UserError
from free_dist.data.samples import SampleEncoder
from free_dist.data.stream import records, training_batches
from free_dist.recipe_io import load_recipe
from free_dist.training.finetune import answer_loss, augment_images, finetune, save_backbone
from free_dist.training.schedule import warmup_cosine
from free_dist.training.vision import distinctive_answers, pretrain_vision


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


def test_saving_replaces_the_former_checkpoint_and_a_failed_save_leaves_it(
    tiny_backbone, tiny_encoder, tmp_path: Path, monkeypatch
) -> None:
    directory = tmp_path / "backbone"
    directory.mkdir()
    (directory / "former").touch()
    with monkeypatch.context() as patch:
        patch.setattr(tiny_encoder, "image_processor", None)
        with pytest.raises(AttributeError):
            save_backbone(tiny_backbone, tiny_encoder, directory)
    assert [path.name for path in directory.iterdir()] == ["former"]
    save_backbone(tiny_backbone, tiny_encoder, directory)
    assert not (directory / "former").exists()
    assert Blip2Backbone.from_pretrained(directory).n_blocks == tiny_backbone.n_blocks
    assert list(tmp_path.iterdir()) == [directory]


def test_the_launcher_keeps_its_recipe_and_refuses_a_directory_that_holds_a_run(run, tiny_root, tmp_path: Path) -> None:
    launch = runpy.run_path(str(Path(__file__).parents[2] / "launch" / "finetune.py"))["run"]
    recipe = Recipe(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(root=str(tiny_root)),
        training=TrainingConfig(max_steps=1, warmup_steps=0),
        finetune=FinetuneConfig(batch_size=2, start=str(run[1] / "backbone"), n_blocks=4),
    )
    launch(recipe)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    with pytest.raises(UserError, match="already holds a run"):
        launch(recipe)


def test_augmentation_moves_pixels_without_inventing_any(tiny_root: Path, tiny_encoder) -> None:
    batch = next(training_batches(DataConfig(root=str(tiny_root)), tiny_encoder, seed=0, micro_batch_size=8))
    moved = augment_images(batch.pixel_values, random.Random(1))
    assert moved.shape == batch.pixel_values.shape
    assert not torch.equal(moved, batch.pixel_values)
    for before, after in zip(batch.pixel_values, moved, strict=True):
        assert set(after[0].unique().tolist()) <= set(before[0].unique().tolist())


def test_vision_pretraining_lowers_the_loss_and_leaves_the_language_model_alone(
    tiny_root: Path, tiny_tokenizer, tiny_encoder
) -> None:
    backbone = Blip2Backbone(new_model(width=32, n_blocks=2, n_heads=2, seed=4).requires_grad_(False))
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    recipe = Recipe(data=DataConfig(root=str(tiny_root)), finetune=FinetuneConfig(batch_size=8, learning_rate=1e-3))
    encoder = SampleEncoder(tiny_tokenizer, tiny_encoder.image_processor, backbone.layout, backbone.max_positions)
    first = pretrain_vision(backbone, encoder, recipe, steps=1)
    assert pretrain_vision(backbone, encoder, recipe, steps=25) < 0.8 * first
    changed = {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not any(name.startswith("model.language_model.") for name in changed)


def test_answers_common_to_most_images_are_not_labels(tiny_root: Path) -> None:
    labels = distinctive_answers(records(tiny_root, "train"))
    assert {"circle", "rectangle", "triangle"} <= set(labels)
    assert not {"yes", "no"} & set(labels)


def test_schedule_warms_up_linearly_and_ends_at_zero() -> None:
    factor = warmup_cosine(warmup_steps=4, max_steps=20)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    values = [factor(step) for step in range(4, 21)]
    assert values == sorted(values, reverse=True) and abs(values[-1]) < 1e-12
