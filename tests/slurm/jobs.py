"""Jobs of a test cluster: submitting, waiting, reading what they left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster, kill

from free_dist.config import Recipe

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 400
"""Seconds that a test waits for anything."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run and the launcher's arguments that start it, and start it again."""

    recipe: Recipe
    arguments: tuple[str, ...]

    @property
    def directory(self) -> Path:
        return Path(self.recipe.run_dir)


def entries(run: Run) -> list[dict[str, float]]:
    """Whole lines of the log."""
    log = run.directory / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: Run) -> list[float]:
    """Of every logged step, of stage 1 (``loss``) or stage 2 (``step/loss``)."""
    found = (entry.get("loss", entry.get("step/loss")) for entry in entries(run))
    return [loss for loss in found if loss is not None]


@dataclass(frozen=True)
class Job:
    """A job of a cluster, or an element of an array."""

    cluster: Cluster
    number: str
    logs: Path

    def field(self, name: str) -> str:
        shown = self.cluster.run("scontrol", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S*)", shown)
        assert found is not None, shown
        return found[1]

    @property
    def state(self) -> str:
        return self.field("JobState")

    @property
    def restarts(self) -> int:
        return int(self.field("Restarts"))

    def wait_for(self, *states: str) -> None:
        wait(lambda: self.state in states, lambda: f"job {self.number} is {self.state}\n{self.told()}")

    def told(self) -> str:
        """The logs of the batch script and of the tasks."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted(self.logs.glob("*.log"))
        )

    def tasks(self, run: Run) -> dict[int, int]:
        """Rank -> process, as this machine numbers it, of the training processes of a run."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes().split(b"\0")
                environment = (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if Path(os.fsdecode(command[0])).name.startswith("python") and run.arguments[1].encode() in command:
                variables = dict(pair.split(b"=", 1) for pair in environment if b"=" in pair)
                if b"SLURM_STEP_ID" in variables:
                    found[int(variables[b"SLURM_PROCID"])] = int(path.name)
        return found

    def kill(self, run: Run, rank: int, number: int) -> None:
        """Send a signal to one rank alone, past Slurm."""
        kill([self.tasks(run)[rank]], number)


def submit(
    cluster: Cluster, script: str, *arguments: object, logs: Path, options: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Job:  # fmt: skip
    """sbatch with two nodes of one task each; logs of script and tasks go to ``logs``."""
    logs.mkdir(parents=True, exist_ok=True)
    sized = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
    printed = cluster.run(
        "sbatch", "--parsable", *sized, f"--output={logs}/batch.log", *options, script, *arguments,
        environment={"PYTHON": sys.executable, "LOG_DIR": str(logs), "PYTHONPATH": str(ROOT), **dict(environment or {})},
    )  # fmt: skip
    return Job(cluster, printed, logs)


def wait(is_done: Callable[[], bool], explain: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not is_done():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


def wait_for_steps(run: Run, job: Job, steps: int) -> None:
    """Until so many steps are logged."""
    wait(lambda: len(losses(run)) >= steps or job.state == "FAILED", job.told)
    assert job.state == "RUNNING", job.told()


def accounts(job: Job) -> str:
    """For a failed assertion: everything there is to read."""
    tried = subprocess.run(["ls", "-la", str(job.logs)], capture_output=True, text=True, check=False)
    return f"{job.told()}\n{tried.stdout}\n{job.cluster.logs()}"
