"""Checkpoints of real DeepSpeed engines on gloo ranks: what comes back, on how many ranks, and how large they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scene
import torch
from ranks import run_ranks

from free_dist.config import LossConfig, TrainingConfig
from free_dist.distributed import World

LOSS = LossConfig(adversarial_weight=0.3)
STEPS = 6


def this_world() -> World:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu"))


def part_of_run(directory: Path, until: int, sections: dict[str, Any], **training: Any) -> dict[str, Any]:
    """Go on from the newest checkpoint to step ``until``, saving there; losses by step, and the state as whole tensors."""
    from free_dist.distributed import all_reduce_mean
    from free_dist.ds_config import gradient_accumulation_steps, rows_per_step
    from free_dist.training.accumulation import train_step
    from free_dist.training.checkpoint import Checkpoints, newest_sound

    world = this_world()
    told: list[str] = []
    found = newest_sound(directory, world, told.append)
    engines = scene.engines(sections)
    checkpoints = Checkpoints(
        directory,
        {"exits": engines.exits, "discriminators": engines.discriminators},
        world=world,
        training=TrainingConfig(**{"save_every": 100, **training}),
        rows_per_step=rows_per_step(sections, world.size),
        tasks={"vqa": 1.0},
        backbone="files:1",
        facts={},
    )
    done = checkpoints.restore(found)
    losses: dict[int, float] = {}
    accumulation = gradient_accumulation_steps(sections)
    with checkpoints:
        for step in range(done + 1, until + 1):
            # The rows of a step stand in the order of micro-batches, then of ranks, as the stream deals them.
            pieces = [
                scene.batch(step, rank=micro * world.size + world.rank, world_size=accumulation * world.size)
                for micro in range(accumulation)
            ]
            report = train_step(engines, pieces, LOSS, measure=False)
            losses[step] = all_reduce_mean(report["loss"]).item()
            checkpoints.after_step(step, report["loss"], last=step == until)
    return {"losses": losses, "state": whole_state(engines), "told": told, "random": torch.rand(4)}


def whole_state(engines: Any) -> dict[str, torch.Tensor]:
    """Name -> weight, moments and low-precision weight of every trained parameter, gathered by DeepSpeed itself."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, engine in (("exits", engines.exits), ("discriminators", engines.discriminators)):
        for parameter_name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                key = f"{name}/{parameter_name}"
                found[f"{key}/fp32"] = safe_get_full_fp32_param(parameter).clone()
                for moment in ("exp_avg", "exp_avg_sq"):
                    found[f"{key}/{moment}"] = safe_get_full_optimizer_state(parameter, moment).clone()
        found |= {f"{name}/{key}/used": value for key, value in scene.gathered(engine.module).items()}
        found[f"{name}/lr"] = torch.tensor(engine.get_lr())
        found[f"{name}/counters"] = torch.tensor([engine.global_steps, engine.skipped_steps, engine.global_samples])
    return found


def sections(size: int, stage: int, *, accumulation: int = 1, bf16: bool = False, other: int | None = None) -> Any:
    content = scene.sections(stage=stage, accumulation=accumulation, bf16=bf16, world_size=size * accumulation)
    if other is not None:
        content["discriminators"] = scene.sections(stage=other, accumulation=accumulation, world_size=size)[
            "discriminators"
        ] | {"train_micro_batch_size_per_gpu": scene.ROWS // size // accumulation}
    return content


def parts_of_run(plans: list[tuple[str, int, Any]]) -> list[dict[str, Any]]:
    """Several parts (directory, last step, sections), one after the other, each with engines of its own."""
    found = []
    for directory, until, content in plans:
        torch.manual_seed(7)
        found.append(part_of_run(Path(directory), until, content))
    return found


@pytest.mark.parametrize(
    ("size", "stages"),
    [(1, [(1, 2, False), (3, 3, True)]), (2, [(2, 1, False), (3, 3, False), (1, 3, False)]), (2, [(1, 1, True), (2, 2, True)])],
)  # fmt: skip
def test_what_is_restored_goes_on_bit_by_bit(tmp_path: Path, size: int, stages: list[tuple[int, int, bool]]) -> None:
    plans = []
    for number, (stage, other, bf16) in enumerate(stages):
        content = sections(size, stage, bf16=bf16, other=None if bf16 else other)
        plans.append((f"{tmp_path}/{number}/whole", STEPS, content))
        plans += [(f"{tmp_path}/{number}/cut", until, content) for until in (2, 3, STEPS)]
    for results in run_ranks(size, parts_of_run, plans):
        for first in range(0, len(results), 4):
            whole, *parts = results[first : first + 4]
            for part, steps in zip(parts, ([1, 2], [3], [4, 5, 6]), strict=True):
                assert part["losses"] == {step: whole["losses"][step] for step in steps}
            state = parts[-1]["state"]
            assert whole["state"].keys() == state.keys()
            assert all(torch.equal(whole["state"][name], state[name]) for name in state)
            assert torch.equal(whole["random"], parts[-1]["random"])


@pytest.mark.elastic
def test_a_run_goes_on_with_other_numbers_of_ranks_at_every_zero_stage(tmp_path: Path) -> None:
    stages = [(exits, discriminators) for exits in (1, 2, 3) for discriminators in (1, 2, 3)]

    def plans(size: int, until: int, accumulation: int = 1, name: str = "cut") -> list[tuple[str, int, Any]]:
        return [
            (f"{tmp_path}/{a}{b}/{name}", until, sections(size, a, other=b, accumulation=accumulation))
            for a, b in stages
        ]

    (whole,) = run_ranks(1, parts_of_run, [(f"{tmp_path}/whole", 8, sections(1, 1))])
    for size, until, accumulation in ((4, 2, 1), (2, 4, 2), (1, 6, 1), (2, 8, 1)):
        for results in run_ranks(size, parts_of_run, plans(size, until, accumulation)):
            for result in results:
                assert result["losses"].keys() == {until - 1, until}
                for step, loss in result["losses"].items():
                    assert loss == pytest.approx(whole[0]["losses"][step], abs=1e-5)
    for name, value in whole[0]["state"].items():
        for result in results:
            torch.testing.assert_close(
                result["state"][name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_checkpoint_is_hardly_larger_than_what_is_trained(tmp_path: Path) -> None:
    (result,) = run_ranks(1, part_of_run, tmp_path, 2, sections(1, 1))
    (checkpoint,) = tmp_path.glob("step-*")
    stored = sum(path.stat().st_size for path in checkpoint.iterdir())
    trained = sum(v.nbytes for name, v in result["state"].items() if name.endswith(("fp32", "exp_avg", "exp_avg_sq")))
    print(stored, trained, stored / trained, json.loads((checkpoint / "manifest.json").read_text())["files"])
