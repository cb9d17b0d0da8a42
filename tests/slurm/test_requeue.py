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
        "batch.log", f"finetune-{job.number}-0.log", f"finetune-{job.number}-1.log",
    }  # fmt: skip
