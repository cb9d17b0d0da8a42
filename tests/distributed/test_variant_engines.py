"""Exits that share frozen blocks, or have none, train alike however they are distributed."""

from __future__ import annotations

import pytest
import scene
import torch
from ranks import run_ranks

from free_dist.config import CostConfig, LossConfig
from free_dist.ds_config import needs_frozen_copy
from free_dist.engines import build_engines
from free_dist.exits import ExitBank, ExitVariant
from free_dist.training.step import adversarial_step

STEPS = 6
LOSS = LossConfig(adversarial_weight=0.3)


def new_bank(name: str, *, copy_frozen: bool):
    """Backbone and exits of a kind, the same in every process; both exits start from the last block."""
    backbone, _, classifiers = scene.modules()
    torch.manual_seed(2)
    variant = ExitVariant(name=name, rank=3, bottleneck_size=8)
    bank = ExitBank(backbone, scene.EXIT_LAYERS, variant=variant, init="last", copy_frozen=copy_frozen)
    return backbone, bank, classifiers


def train(size: int, stage: int, backbone_stage: int, name: str) -> tuple[dict[str, torch.Tensor], set[str], bool]:
    ds_config = scene.sections(stage=stage, backbone_stage=backbone_stage, world_size=size)
    backbone, bank, classifiers = new_bank(name, copy_frozen=needs_frozen_copy(ds_config))
    # Classifiers have no feature that is trained, so there is nothing to judge.
    loss = LossConfig(adversarial_weight=0.0) if name == "classifier" else LOSS
    judges = classifiers if loss.adversarial_weight else None
    engines = build_engines(backbone, bank, judges, ds_config, scene.factor)
    rank = torch.distributed.get_rank()
    for step in range(STEPS):
        adversarial_step(engines, scene.batch(step, rank=rank, world_size=size), loss, cost=CostConfig(head_chunk=8))
    shares = {id(p) for p in backbone.parameters()} & {id(p) for p in bank.transformers.parameters()}
    return scene.gathered(engines.exits.module), set(bank.trainable_state_dict()), bool(shares)


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[dict[str, torch.Tensor], set[str], bool]]:
    """What one rank without sharding learns, by kind of exit."""
    return {name: run_ranks(1, train, 1, 1, 0, name)[0] for name in ("lora", "bottleneck", "classifier")}


@pytest.mark.parametrize(
    ("name", "stage", "backbone_stage"),
    [("lora", 1, 0), ("lora", 3, 3), ("bottleneck", 2, 3), ("classifier", 1, 0), ("classifier", 3, 3)],
)
def test_two_ranks_train_a_variant_like_one(alone, name: str, stage: int, backbone_stage: int) -> None:
    wanted, kept, shared = alone[name]
    assert shared == (name == "lora"), "on one rank the frozen blocks are the backbone's own"
    assert set(wanted) == kept
    initial = new_bank(name, copy_frozen=False)[1].trainable_state_dict()
    assert all((wanted[weight] - initial[weight]).abs().max() > 1e-4 for weight in wanted)
    for result, _, shares in run_ranks(2, train, 2, stage, backbone_stage, name):
        assert shares == (name == "lora" and backbone_stage == 0)
        assert result.keys() == wanted.keys()
        for weight, tensor in wanted.items():
            torch.testing.assert_close(result[weight], tensor, atol=2e-5, rtol=0, msg=lambda m, n=weight: f"{n}: {m}")
