"""A real Slurm, real batch scripts, a real training: whatever happens to the job, it ends with the losses of a quiet one."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from cluster import Cluster
from jobs import Run, entries, losses, submit, wait, wait_for_steps

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

FINETUNE = "slurm/finetune.sh"


def test_usr1_to_all_tasks_saves_requeues_and_goes_on_to_the_same_losses(
    cluster: Cluster, prepare: Callable[[str], Run], uninterrupted: list[float]
) -> None:
    run = prepare("usr1")
    job = submit(cluster, FINETUNE, *run.arguments, logs=run.directory.parent / "logs-usr1")
    wait_for_steps(run, job, 20)
    cluster.run("scancel", "--signal=USR1", job.number)
    wait(lambda: job.restarts == 1, job.told)
    stopped = len(losses(run))
    job.wait_for("COMPLETED")
    assert losses(run) == uninterrupted, job.told()
    told = job.told()
    assert f"stopped after step {stopped} of" in told and f"goes on after step {stopped} of" in told
    assert "exit code 85: back into the queue for restart 1" in told
    assert {path.name for path in job.logs.glob("*.log")} == {
        "batch.log", *(f"finetune-{job.number}-{part}.log" for part in (0, 1, "srun")),
    }  # fmt: skip


def test_exits_go_on_after_a_signal_to_one_rank_and_after_a_killed_task(
    cluster: Cluster, prepare_exits: Callable[[str], Run], uninterrupted_exits: list[float]
) -> None:
    run = prepare_exits("exits")
    job = submit(cluster, "slurm/free_blip2.sh", *run.arguments, logs=run.directory.parent / "logs-exits")
    wait_for_steps(run, job, 8)
    job.kill(run, 1, signal.SIGUSR1)
    wait(lambda: job.restarts == 1, job.told)
    asked = len(losses(run))
    assert (run.directory / "checkpoints" / f"step-{asked:08d}").is_dir(), job.told()
    wait_for_steps(run, job, max(asked + 1, 25))
    job.kill(run, 0, signal.SIGKILL)
    wait(lambda: job.restarts == 2, job.told)
    job.wait_for("COMPLETED")
    assert losses(run) == uninterrupted_exits, job.told()
    assert (run.directory / "export" / "exits.safetensors").is_file()


def test_usr1_to_one_rank_then_a_killed_task_then_a_dead_node_cost_no_step(
    cluster: Cluster, prepare: Callable[[str], Run], uninterrupted: list[float]
) -> None:
    run = prepare("faults")
    job = submit(cluster, FINETUNE, *run.arguments, logs=run.directory.parent / "logs-faults")

    wait_for_steps(run, job, 8)
    job.kill(run, 1, signal.SIGUSR1)
    wait(lambda: job.restarts == 1, job.told)
    asked = len(losses(run))
    assert (run.directory / "checkpoints" / f"step-{asked:08d}").is_dir(), job.told()

    wait_for_steps(run, job, max(asked + 1, 22))
    job.kill(run, 0, signal.SIGKILL)
    wait(lambda: job.restarts == 2, job.told)

    wait_for_steps(run, job, max(len(losses(run)) + 1, 42))
    dead = job.cluster.run("scontrol", "show", "hostnames", job.field("NodeList")).split()[-1]
    cluster.crash(dead)
    try:
        wait(lambda: job.restarts == 3, lambda: f"{job.told()}\n{cluster.logs()}")
        job.wait_for("COMPLETED")
        assert dead not in cluster.run("scontrol", "show", "hostnames", job.field("NodeList")).split()
    finally:
        cluster.boot(dead)
    assert losses(run) == uninterrupted, job.told()
    assert [entry["step"] for entry in entries(run) if "calibration_loss_vqa" in entry] == [30, 60]
