"""When the preamble puts a job back into the queue, on a real Slurm; what the job runs is a small program in bash."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import Job, submit, wait

pytestmark = pytest.mark.slurm

PROGRAM = """#!/bin/bash
# Stands for the interpreter: notes how it was started, then does as the test wants.
trap 'trap "" TERM USR1; echo "USR1 at restart ${SLURM_RESTART_COUNT:-0}" >>"$LOG_DIR/signals"; exit 85' USR1
trap 'trap "" TERM USR1; echo "TERM at restart ${SLURM_RESTART_COUNT:-0}" >>"$LOG_DIR/signals"; exit 85' TERM
echo "$*" >>"$LOG_DIR/started-$SLURM_PROCID"
eval "$BEHAVIOUR"
"""
WAIT = "until [[ -e $LOG_DIR/finish ]]; do sleep 0.05; done"
ONCE = f"[[ ${{SLURM_RESTART_COUNT:-0}} -gt 0 ]] || {WAIT}"
"""The first start lasts until a signal comes, the second ends at once."""
ASK = "{ [[ $SLURM_PROCID != 0 ]] || exit 85; sleep 30 & wait; }"
"""Rank 0 asks to be started again; were rank 1 to ask too, and first, rank 0 might be ended before it has begun."""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program"
    path.write_text(PROGRAM)
    path.chmod(0o755)
    return path


def send(
    cluster: Cluster, program: Path, behaviour: str, *arguments: str, options: tuple[str, ...] = (), **variables: str
) -> Job:
    environment = {"PYTHON": str(program), "BEHAVIOUR": behaviour} | variables
    logs = program.parent / "logs"
    return submit(cluster, "slurm/free_blip2.sh", *arguments, logs=logs, options=options, environment=environment)


def lines(job: Job, name: str) -> list[str]:
    path = job.logs / name
    return path.read_text().splitlines() if path.is_file() else []


def test_the_signal_before_the_time_limit_reaches_every_task_and_the_job_starts_again(cluster, program) -> None:
    # Slurm looks every half minute and signals up to that much too early: 15 to 45 seconds after the start.
    # Whoever ends first makes srun end the other one by TERM, so the first waits until the other has been asked too, which then
    # takes no notice of TERM.
    asked = 'echo "USR1 at restart ${SLURM_RESTART_COUNT:-0}" >>"$LOG_DIR/signals"'
    both = 'until (( $(wc -l <"$LOG_DIR/signals") == 2 )); do sleep 0.05; done'
    patient = f"trap 'trap : TERM; {asked}; {both}; exit 85' USR1; {ONCE}"
    job = send(cluster, program, patient, "a b", options=("--time=2", "--signal=USR1@75"))
    job.wait_for("COMPLETED")
    assert job.restarts == 1
    assert lines(job, "signals") == ["USR1 at restart 0"] * 2
    assert lines(job, "started-0") == lines(job, "started-1") == ["launch/train.py a b"] * 2


def test_a_job_that_keeps_asking_gives_up_at_the_cap(cluster, program) -> None:
    job = send(cluster, program, ASK, MAX_RESTARTS="1")
    job.wait_for("FAILED")
    assert job.restarts == 1 and job.field("ExitCode") == "85:0"
    assert len(lines(job, "started-0")) == 2
    assert "after 1 restarts, and MAX_RESTARTS=1: giving up" in job.told()


def test_a_task_that_fails_by_itself_ends_the_job_and_the_other_task(cluster, program) -> None:
    # The other task is asked to stop by srun, and ends with the code of a task that has saved.  It is given the time to begin:
    # srun asks as soon as the first has failed, whether or not the other listens yet.
    fails = "[[ $SLURM_PROCID != 0 ]] || { until [[ -e $LOG_DIR/started-1 ]]; do sleep 0.05; done; exit 3; }"
    job = send(cluster, program, f"{fails}; {WAIT}", MAX_RESTARTS="2")
    job.wait_for("FAILED")
    assert job.restarts == 0 and job.field("ExitCode") == "3:0"
    assert lines(job, "signals") == ["TERM at restart 0"]


def test_a_killed_task_starts_the_job_again_unless_that_is_switched_off(cluster, program) -> None:
    killed = f"[[ ${{SLURM_RESTART_COUNT:-0}} -gt 0 ]] && exit 0; [[ $SLURM_PROCID = 1 ]] && kill -KILL $$; {WAIT}"
    job = send(cluster, program, killed)
    job.wait_for("COMPLETED")
    assert job.restarts == 1
    job = send(cluster, program, killed, REQUEUE_CODES="85")
    job.wait_for("FAILED")
    assert job.restarts == 0 and job.field("ExitCode") == "137:0"


def test_a_cancelled_job_does_not_come_back(cluster, program) -> None:
    job = send(cluster, program, WAIT)
    wait(lambda: bool(lines(job, "started-0")) and bool(lines(job, "started-1")), job.told)
    cluster.run("scancel", job.number)
    wait(lambda: job.state == "CANCELLED" and len(lines(job, "signals")) == 2, job.told)
    wait(lambda: cluster.run("sinfo", "-ho", "%T") == "idle", job.told)
    assert job.state == "CANCELLED" and job.restarts == 0


def test_preemption_by_a_job_of_more_weight_is_survived(cluster, program) -> None:
    job = send(cluster, program, ONCE)
    wait(lambda: bool(lines(job, "started-0")) and bool(lines(job, "started-1")), job.told)
    urgent = cluster.run(
        "sbatch", "--parsable", "-purgent", "--nodes=3", "--output=/dev/null", "--wrap=sleep 1", "--exclusive"
    )
    job.wait_for("COMPLETED")
    assert job.restarts == 1 and lines(job, "signals") == ["TERM at restart 0"] * 2
    assert Job(cluster, urgent, job.logs).state == "COMPLETED"


def test_a_job_comes_back_while_its_signal_is_still_on_the_way_to_another_node(cluster, program) -> None:
    # Until node 2 has taken the signal, Slurm calls the job SIGNALING, whatever it is besides.
    job = send(cluster, program, f"[[ $SLURM_PROCID = 1 ]] && exit 0; {ONCE}")
    wait(lambda: bool(lines(job, "started-0")) and bool(lines(job, "started-1")), job.told)
    cluster.run("pkill", "-STOP", "slurmd", on="n2")
    try:
        cluster.run("sbatch", "-purgent", "--nodes=3", "--output=/dev/null", "--wrap=sleep 1", "--exclusive")
        wait(lambda: job.state == "SIGNALING" and "exit code 85" in job.told(), job.told)
        time.sleep(1)  # by now the script has asked for the state of its job
        assert job.state == "SIGNALING"
    finally:
        cluster.run("pkill", "-CONT", "slurmd", on="n2")
    job.wait_for("COMPLETED")
    assert job.restarts == 1 and lines(job, "signals") == ["TERM at restart 0"]


def test_only_the_element_of_an_array_that_asks_starts_again_the_last_one_too(cluster, program) -> None:
    asking = f"[[ $* != *seed=7* || ${{SLURM_RESTART_COUNT:-0}} -gt 0 ]] || {ASK}"
    array = send(
        cluster, program, asking, "--sweep", "training.seed=5,6,7", "run_dir=runs/sweep", options=("--array=0-2",)
    )  # fmt: skip
    elements = [Job(cluster, f"{array.number}_{i}", array.logs) for i in range(3)]
    for element in elements:
        element.wait_for("COMPLETED")
    assert [element.restarts for element in elements] == [0, 0, 1]
    assert sorted(lines(array, "started-0")) == [
        f"launch/train.py run_dir=runs/sweep/training.seed-{seed} training.seed={seed}" for seed in (5, 6, 7, 7)
    ]
