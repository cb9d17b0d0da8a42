"""What goes wrong around a run: processes that die, stop or get stuck, disks, ports; real processes, real signals."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from free_dist.launchers import free_port
from free_dist.watchdog import EXIT_LOST_RANK, STACKS

pytestmark = pytest.mark.fault

HANG = 4.0
"""Seconds of silence after which a rank counts as lost in these tests."""

BOUND = 20.0
"""Seconds within which every process must have ended: HANG, a few intervals, and a machine that is busy."""


def stepping(rank: int, size: int, port: int, run_dir: Path, stall: float, stuck: int | None) -> None:
    """A rank that reduces a number in every step, watched; ``stuck`` does something else for ever in step 5."""
    from free_dist.distributed import World, distributed_session
    from free_dist.watchdog import Watchdog

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    descriptor = os.open(run_dir / f"stderr-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    with (
        distributed_session(timeout=timedelta(minutes=10)) as world,
        Watchdog(world, run_dir, hang_timeout=HANG, stall_timeout=stall) as watchdog,
    ):
        assert isinstance(world, World)
        for step in range(1, 100_000):
            if rank == stuck and step == 5:
                endless()
            torch.distributed.all_reduce(torch.ones(4))
            watchdog.beat(step)
            if step == 3:
                (run_dir / f"ready-{rank}").touch()
            time.sleep(0.01)


def endless() -> None:
    while True:
        time.sleep(1)


class Job:
    """Ranks of one made-up run, ended whatever happens."""

    def __init__(self, size: int, run_dir: Path, *, stall: float = 600.0, stuck: int | None = None) -> None:
        port = free_port()
        self.run_dir = run_dir
        context: Any = ranks._context
        self.processes: list[multiprocessing.Process] = [
            context.Process(target=stepping, args=(rank, size, port, run_dir, stall, stuck), daemon=True)
            for rank in range(size)
        ]

    def __enter__(self) -> Job:
        for process in self.processes:
            process.start()
        deadline = time.monotonic() + 120
        while len(list(self.run_dir.glob("ready-*"))) < len(self.processes):
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in self.processes:
            process.kill()

    def signal(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def ended(self, *survivors: int) -> float:
        """Wait until these ranks have ended; seconds that took."""
        start = time.monotonic()
        for rank in survivors:
            self.processes[rank].join(BOUND + 60)
            assert self.processes[rank].exitcode is not None, f"rank {rank} hangs"
        return time.monotonic() - start

    def said(self, rank: int) -> str:
        return (self.run_dir / f"stderr-{rank}.txt").read_text()

    def events(self) -> list[dict[str, Any]]:
        path = self.run_dir / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("number", "victim"),
    [(signal.SIGSTOP, 1), (signal.SIGSTOP, 0), (signal.SIGKILL, 1), (signal.SIGKILL, 0)],
    ids=["stop-1", "stop-0", "kill-1", "kill-0"],
)
def test_a_lost_rank_is_named_with_the_stacks_of_the_others_and_the_job_ends(
    number: signal.Signals, victim: int, tmp_path: Path
) -> None:
    with Job(3, tmp_path) as job:
        job.signal(victim, number)
        survivors = [rank for rank in range(3) if rank != victim]
        assert job.ended(*survivors) < BOUND
        for rank in survivors:
            assert job.processes[rank].exitcode == EXIT_LOST_RANK, job.said(rank)
            assert f"rank {rank}: rank {victim} " in job.said(rank), job.said(rank)
            assert all(f"rank {other} (pid" not in job.said(rank) for other in survivors), "only the lost one is named"
            stacks = (tmp_path / STACKS / f"rank-{rank}.txt").read_text()
            assert "all_reduce" in stacks and "in stepping" in stacks
        assert [event["event"] for event in job.events()].count("lost_rank") >= 1
        assert f"rank {victim} " in job.events()[-1]["message"]


def test_a_rank_whose_main_thread_is_stuck_is_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    with Job(2, tmp_path, stall=3.0, stuck=1) as job:
        assert job.ended(0, 1) < BOUND
        for rank in range(2):
            assert job.processes[rank].exitcode == EXIT_LOST_RANK
            assert "training.stall_timeout" in job.said(rank)
            assert "rank 1 (pid" in job.said(rank) and "in endless" in job.said(rank)
            assert "rank 0 (pid" not in job.said(rank)


def test_a_stopped_rank_that_goes_on_too_late_ends_by_itself(tmp_path: Path) -> None:
    with Job(2, tmp_path) as job:
        job.signal(1, signal.SIGSTOP)
        job.ended(0)
        job.signal(1, signal.SIGCONT)
        assert job.ended(1) < BOUND
        assert job.processes[1].exitcode not in (0, None)
