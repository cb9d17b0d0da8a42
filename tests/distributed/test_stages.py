"""Every combination of ZeRO stages, and CPU offload, gives the trajectory of one unsharded process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import scene
import torch
from ranks import run_ranks

from free_dist.config import LossConfig
from free_dist.distributed import all_reduce_mean
from free_dist.training.step import adversarial_step

LOSS = LossConfig(adversarial_weight=0.3)
STEPS = 6
STAGES = (1, 2, 3)
OFFLOADED = {
    "exits 1": {"exits": 1},
    "exits 2, discriminators 2": {"exits": 2, "discriminators": 2},
    "exits 3": {"exits": 3},
}


def losses(ds_config: dict[str, dict[str, Any]], size: int) -> torch.Tensor:
    """Every loss of every exit at every step, [steps, 3, K], of the whole batch."""
    engines, rank = scene.engines(ds_config), torch.distributed.get_rank()
    found = []
    for step in range(STEPS):
        report = adversarial_step(engines, scene.batch(step, rank=rank, world_size=size), LOSS)
        found.append(all_reduce_mean(torch.stack([report[name] for name in ("task_loss", "g_loss", "d_loss")])))
    return torch.stack(found)


def of_stages(exits: int, discriminators: int, backbone: int, size: int) -> dict[str, dict[str, Any]]:
    ds_config = copy.deepcopy(scene.sections(stage=exits, backbone_stage=backbone, world_size=size))
    other = scene.sections(stage=discriminators, world_size=size)
    return ds_config | {"discriminators": copy.deepcopy(other["discriminators"])}


def of_all_stages(size: int, backbone: int) -> dict[tuple[int, int], torch.Tensor]:
    return {
        (exits, discriminators): losses(of_stages(exits, discriminators, backbone, size), size)
        for exits in STAGES
        for discriminators in STAGES
    }


def of_offloaded(size: int) -> dict[str, torch.Tensor]:
    found = {}
    for name, sections in OFFLOADED.items():
        ds_config = of_stages(sections["exits"], sections.get("discriminators", 1), 0, size)
        for section, stage in sections.items():
            zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
            ds_config[section] |= {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
        found[name] = losses(ds_config, size)
    return found


@pytest.fixture(scope="module")
def unsharded() -> torch.Tensor:
    (found,) = run_ranks(1, losses, of_stages(1, 1, 0, 1), 1)
    assert (found[-1] - found[0]).abs().max() > 0.1, "losses that never change prove nothing"
    return found


@pytest.mark.parametrize("backbone", [0, 3])
def test_every_combination_of_stages_has_the_unsharded_losses(unsharded: torch.Tensor, backbone: int) -> None:
    for result in run_ranks(2, of_all_stages, 2, backbone):
        assert len(result) == 9
        for stages, found in result.items():
            difference = ((found - unsharded).abs() / unsharded.abs()).max().item()
            assert difference < 1e-6, (stages, difference)


def test_optimizers_offloaded_to_the_cpu_give_the_unsharded_losses(unsharded: torch.Tensor) -> None:
    for result in run_ranks(2, of_offloaded, 2):
        for name, found in result.items():
            difference = ((found - unsharded).abs() / unsharded.abs()).max().item()
            assert difference < 1e-6, (name, difference)
