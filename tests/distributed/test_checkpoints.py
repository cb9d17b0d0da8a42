"""Checkpoints of real DeepSpeed engines on gloo ranks: what comes back, on how many ranks, and how large they are."""

from __future__ import annotations

import resource
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import scene
import torch
from ranks import run_ranks

from free_dist.config import CostConfig, LossConfig, TrainingConfig
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
            report = train_step(engines, pieces, LOSS, cost=CostConfig(), measure=False)
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


ALL_STAGES = [(exits, discriminators) for exits in (1, 2, 3) for discriminators in (1, 2, 3)]


@pytest.mark.elastic
@pytest.mark.parametrize(
    "stages", [[(1, 2), (3, 1), (2, 3)], pytest.param(ALL_STAGES, marks=pytest.mark.slow)], ids=["three", "all"]
)
def test_a_run_goes_on_with_other_numbers_of_ranks(tmp_path: Path, stages: list[tuple[int, int]]) -> None:
    (whole,) = run_ranks(1, parts_of_run, [(f"{tmp_path}/whole", 8, sections(1, 1))])
    for size, until, accumulation in ((4, 2, 1), (2, 4, 2), (1, 6, 1), (2, 8, 1)):
        plans = [
            (f"{tmp_path}/{a}{b}", until, sections(size, a, other=b, accumulation=accumulation)) for a, b in stages
        ]
        for results in run_ranks(size, parts_of_run, plans):
            for result in results:
                assert result["losses"].keys() == {until - 1, until}
                for step, loss in result["losses"].items():
                    assert loss == pytest.approx(whole[0]["losses"][step], abs=1e-5)
    for name, value in whole[0]["state"].items():
        for result in results:
            torch.testing.assert_close(
                result["state"][name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def weights(accumulations: list[int]) -> list[dict[str, torch.Tensor]]:
    """Weights after some steps on the same rows, cut into so many micro-batches."""
    from free_dist.training.accumulation import train_step

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = []
    for accumulation in accumulations:
        engines = scene.engines(sections(size, 1, accumulation=accumulation))
        for step in range(STEPS):
            shares = range(rank, accumulation * size, size)
            train_step(
                engines,
                [scene.batch(step, rank=share, world_size=accumulation * size) for share in shares],
                LOSS,
                cost=CostConfig(),
                measure=False,
            )
        found.append(scene.gathered(engines.exits.module) | scene.gathered(engines.discriminators.module))
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_accumulated_micro_batches_equal_one_batch_for_both_players(size: int) -> None:
    """Rows differ widely in their number of answer tokens, so a mean of micro-batches' means would be another loss."""
    for one, *several in run_ranks(size, weights, [1, 2, 4][: 3 - size + 1]):
        for found in several:
            for name, weight in one.items():
                torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-6)


def saved_engine(directory: Path, steps: list[int], training: dict[str, Any], width: int, limit: int) -> dict[str, Any]:
    """Save an engine around one trained and one frozen matrix after each of these steps; what that took, told and left."""
    from free_dist.config import UserError
    from free_dist.engines import build_single_engine
    from free_dist.training.checkpoint import Checkpoints

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, width))
    module[1].requires_grad_(False)
    section = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
    }
    engine = build_single_engine(module, section, lambda _step: 1.0)
    engine.backward(engine(torch.ones(1, width)).sum())
    engine.step()
    checkpoints = Checkpoints(
        directory, {"one": engine}, world=this_world(), training=TrainingConfig(**training), rows_per_step=1,
        tasks={"vqa": 1.0}, backbone="", facts={},
    )  # fmt: skip
    took, error, was_done = [], "", []
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with checkpoints:
            for step in steps:
                cpu, process = time.thread_time(), time.process_time()
                checkpoints.after_step(step, torch.tensor(float(abs(step - 3))), last=False)
                stall, done = time.thread_time() - cpu, checkpoints.is_idle
                was_done.append(done)
                checkpoints.finish()
                took.append((stall, time.process_time() - process))
    except UserError as failure:
        error = str(failure)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"took": took, "error": error, "was_done": was_done, "trained": 12 * (width * width + width)}


def test_a_checkpoint_holds_what_is_trained_and_hardly_more(tmp_path: Path) -> None:
    for size in (1, 2):
        directory = tmp_path / str(size)
        result = run_ranks(size, saved_engine, directory, [1], {"save_every": 1}, 500, 0)[0]
        stored = sum(path.stat().st_size for path in (directory / "step-00000001").iterdir())
        assert result["trained"] <= stored <= 1.05 * result["trained"]


def test_a_save_keeps_the_loop_waiting_for_a_tenth_of_its_cost(tmp_path: Path) -> None:
    """In processor time of the loop's thread, which other programs do not lengthen; what the next step may wait for the copy is
    measured by benchmarks/checkpointing.py."""
    (result,) = run_ranks(1, saved_engine, tmp_path, [1, 2, 3, 4, 5, 6], {"save_every": 1}, 2500, 0)
    assert not all(result["was_done"]), "the loop waited for the file"
    stalls, whole = zip(*result["took"][1:], strict=True)  # the first one allocates the buffer
    assert statistics.median(stalls) <= 0.1 * statistics.median(whole)


def saved_before_the_next_step(directory: Path, sections: dict[str, Any]) -> dict[str, Any]:
    """Save after a step with a copy that comes long after the next step could have been taken, and take that."""
    from safetensors.torch import load_file

    from free_dist.ds_config import rows_per_step
    from free_dist.training.accumulation import train_step
    from free_dist.training.checkpoint import RANDOM, Checkpoints
    from free_dist.training.checkpoint_files import rank_file, step_directory
    from free_dist.training.checkpoint_state import EngineState

    world, engines = this_world(), scene.engines(sections)
    trained = {"exits": engines.exits, "discriminators": engines.discriminators}
    checkpoints = Checkpoints(
        directory, trained, world=world, training=TrainingConfig(save_every=1),
        rows_per_step=rows_per_step(sections, world.size), tasks={"vqa": 1.0}, backbone="", facts={},
    )  # fmt: skip
    copy, gate = checkpoints._snapshot.copy, threading.Event()

    class Watched(threading.Event):
        """Lets the copy begin a while after somebody waits for it."""

        def wait(self, timeout: float | None = None) -> bool:
            threading.Timer(0.3, gate.set).start()
            return super().wait(timeout)

    def late_copy() -> None:
        gate.wait()
        copy()

    def step(number: int) -> dict[str, torch.Tensor]:
        batch = scene.batch(number, rank=world.rank, world_size=world.size)
        train_step(engines, [batch], LOSS, cost=CostConfig(), measure=False)
        states = [EngineState(name, engine).pieces() for name, engine in trained.items()]
        return {key: value.clone() for pieces in states for key, value in pieces.items()}

    checkpoints._snapshot.copy = late_copy  # type: ignore[method-assign]
    checkpoints._copied = Watched()
    checkpoints._copied.set()
    with checkpoints:
        wanted = step(1)
        checkpoints.after_step(1, torch.tensor(0.0), last=False)
        returned = not checkpoints.is_idle
        late = threading.Timer(20, gate.set)  # where nobody waits
        late.daemon = True
        late.start()
        later, stalled = step(2), checkpoints.stalled
    saved = load_file(step_directory(directory, 1) / rank_file(world.rank))
    return {
        "returned": returned,
        "stalled": stalled,
        "names": {name for name in saved if not name.startswith(RANDOM)} == wanted.keys(),
        "moved": not any(torch.equal(value, later[name]) for name, value in wanted.items()),
        "equal": all(torch.equal(value, saved[name]) for name, value in wanted.items()),
    }


@pytest.mark.parametrize(("stage", "bf16", "size"), [(1, False, 1), (1, True, 2), (2, False, 2), (3, False, 2)])
def test_the_next_step_waits_until_what_it_changes_has_been_copied(
    stage: int, bf16: bool, size: int, tmp_path: Path
) -> None:
    sections = scene.sections(stage=stage, bf16=bf16, world_size=size)
    for result in run_ranks(size, saved_before_the_next_step, tmp_path, sections):
        assert result["returned"], "the loop waited for the copy"
        assert result["moved"] and result["names"] and result["equal"]
        assert result["stalled"] > 0.05, "what the step waited is not counted"


@pytest.mark.fault
@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_takes_no_more_ends_the_run_with_one_clear_error_on_all_ranks(
    tmp_path: Path, background: bool
) -> None:
    training = {"save_every": 1, "save_in_background": background}
    run_ranks(2, saved_engine, tmp_path, [1], training, 200, 0)
    for result in run_ranks(2, saved_engine, tmp_path, [2, 3], training, 200, 20_000):
        assert "could not write a checkpoint" in result["error"] and "File too large" in result["error"]
    assert [path.name for path in tmp_path.glob("step-*") if path.suffix != ".tmp"] == ["step-00000001"]
    assert not list(tmp_path.glob("*.tmp/rank-*")), "what did not fit takes no room"


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    """The loss is lowest at step 3."""
    training = {"save_every": 1, "keep_last": 2, "keep_best": 1}
    run_ranks(1, saved_engine, tmp_path, [1, 2, 3, 4, 5, 6, 7], training, 20, 0)
    assert sorted(path.name[-1] for path in tmp_path.glob("step-*")) == ["3", "6", "7"]
    assert (tmp_path / "latest").read_text() == "step-00000007\n"


def test_of_damaged_checkpoints_the_newest_sound_one_is_taken_and_the_others_are_named(tmp_path: Path) -> None:
    content = sections(2, 2)
    whole = run_ranks(2, part_of_run, tmp_path / "whole", STEPS, content)
    for until in (2, 4):
        run_ranks(2, part_of_run, tmp_path / "cut", until, content)
    newest = tmp_path / "cut" / "step-00000004" / "rank-00001.safetensors"
    content_of_file = bytearray(newest.read_bytes())
    content_of_file[-100] ^= 1
    newest.write_bytes(content_of_file)
    parts = run_ranks(2, part_of_run, tmp_path / "cut", STEPS, content)
    (told,) = parts[0]["told"]
    assert "step-00000004" in told and "rank-00001.safetensors has another checksum" in told and not parts[1]["told"]
    assert (tmp_path / "cut" / "step-00000004.damaged").is_dir()
    for a, b in zip(whole, parts, strict=True):
        assert {step: a["losses"][step] for step in (3, 4, 5, 6)} == b["losses"]
        assert all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"])
