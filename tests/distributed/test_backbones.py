"""One adversarial step after another on every kind of backbone: sharded and on two processes as replicated in one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import scene
import torch
from ranks import run_ranks

from free_dist.config import DataConfig, LossConfig
from free_dist.data.pretrained import load_pretrained
from free_dist.data.stream import corpus, global_batches
from free_dist.ds_config import needs_frozen_copy
from free_dist.engines import build_engines
from free_dist.exits import ExitBank, FeatureClassifiers
from free_dist.training.step import adversarial_step

sys.path.append(str(Path(__file__).parents[1] / "backbones"))  # ranks import this module, too
from checkpoints import write_checkpoint

KINDS = ("blip2-flan-t5", "instructblip-flan-t5", "instructblip-vicuna", "minigpt4-llama2")
STEPS = 3
LOSS = LossConfig(adversarial_weight=0.3)


def train(size: int, stage: int, backbone_stage: int, directory: str, data: DataConfig) -> dict[str, torch.Tensor]:
    """Features of the first batch, then the weights of exits and discriminators after some steps."""
    rank = torch.distributed.get_rank()
    ds_config = scene.sections(stage=stage, backbone_stage=backbone_stage, world_size=size)
    backbone, encoder = load_pretrained(directory)
    torch.manual_seed(1)
    bank = ExitBank(backbone, scene.EXIT_LAYERS, init="same", copy_frozen=needs_frozen_copy(ds_config))
    classifiers = FeatureClassifiers(len(scene.EXIT_LAYERS), backbone.hidden_size, 16)
    engines = build_engines(backbone, bank, classifiers, ds_config, scene.factor)
    held = sum(parameter.numel() for parameter in backbone.parameters())
    assert (held == 0) == (backbone_stage == 3), "the weights are not sharded"
    rows = scene.ROWS // size
    batches = global_batches(data, seed=2, rows=scene.ROWS)
    found = {}
    for step in range(STEPS):
        batch = encoder.collate(next(batches)[rank * rows : (rank + 1) * rows])
        if step == 0:
            with torch.no_grad():
                features = engines.backbone(**batch.inputs(), exit_layers=scene.EXIT_LAYERS)
            found["features"] = torch.stack([*features.exits, features.final])[:, batch.targets >= 0]
        adversarial_step(engines, batch, LOSS)
    return found | scene.gathered(engines.exits.module) | scene.gathered(engines.discriminators.module)


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_data: DataConfig) -> str:
    path = tmp_path_factory.mktemp("checkpoints") / request.param
    write_checkpoint(request.param, path, list(corpus(tiny_data)))
    return str(path)


def test_sharded_backbones_and_two_processes_train_like_one_replicated_process(directory, tiny_data) -> None:
    (wanted,) = run_ranks(1, train, 1, 1, 0, directory, tiny_data)
    (alone,) = run_ranks(1, train, 1, 1, 3, directory, tiny_data)
    both = run_ranks(2, train, 2, 2, 3, directory, tiny_data)
    together = torch.cat([result["features"] for result in both], dim=1)
    for found in (alone["features"], together):
        # A replicated BLIP-2 encodes images by its lean path: the same up to rounding.
        torch.testing.assert_close(found, wanted["features"], rtol=0, atol=1e-5 * wanted["features"].abs().max().item())
    initial = dict(ExitBank(load_pretrained(directory)[0], scene.EXIT_LAYERS, init="same").named_parameters())
    names = [name for name in wanted if name != "features"]
    assert len([name for name in names if name.startswith("transformers.")]) > 10
    assert not [name for name in names if "relative_attention_bias" in name]
    for name in names:
        for result in (alone, *both):
            torch.testing.assert_close(result[name], wanted[name], atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        if name in initial:
            assert not torch.equal(initial[name], wanted[name]), f"{name} never moved"


def losses_in_bf16(directory: str, data: DataConfig) -> list[float]:
    """Losses of a few steps on one batch, everything in bfloat16, the backbone sharded."""
    ds_config = scene.sections(stage=2, backbone_stage=3, bf16=True)
    backbone, encoder = load_pretrained(directory)
    torch.manual_seed(1)
    bank = ExitBank(backbone, scene.EXIT_LAYERS, init="same", copy_frozen=True)
    classifiers = FeatureClassifiers(len(scene.EXIT_LAYERS), backbone.hidden_size, 16)
    engines = build_engines(backbone, bank, classifiers, ds_config, scene.factor)
    batch = encoder.collate(next(global_batches(data, seed=2, rows=scene.ROWS)))
    return [adversarial_step(engines, batch, LOSS)["loss"].item() for _ in range(6)]


@pytest.mark.parametrize("directory", ["instructblip-flan-t5"], indirect=True)
def test_bf16_training_on_a_sharded_encoder_decoder_lowers_the_loss(directory, tiny_data) -> None:
    ((first, *_, last),) = run_ranks(1, losses_in_bf16, directory, tiny_data)
    assert last < first
