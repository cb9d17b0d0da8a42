"""The scripts beside training, on a real Slurm with their real launchers: what two nodes make is what one process makes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import Run, submit, wait

from free_dist.evaluation.rows import Row, read_results
from tests.small_blip import capfilt_words, captioned_files, save_captioner, save_filter

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def alone(*words: str) -> None:
    """One process on this machine."""
    subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
        capture_output=True, timeout=300,
    )  # fmt: skip


def measured(directory: Path) -> list[Row]:
    """The rows of an evaluation without what depends on clocks and on how many processes there were."""
    rows = read_results(directory / "results.json")
    return [replace(row, wall_ratio=0.0, wall_ratio_hf=None, extras={}) for row in rows]


def test_an_evaluation_that_is_cut_off_starts_again_and_counts_what_one_process_counts(
    cluster: Cluster, prepare_exits: Callable[[str], Run], uninterrupted_exits: list[float]
) -> None:
    assert uninterrupted_exits
    trained = prepare_exits("uninterrupted-exits")
    shared = (
        "--exits",
        str(trained.directory / "export"),
        *trained.arguments[:2],
        "evaluation.timing_samples=0",
        "evaluation.tasks=[vqa]",
    )
    # Many thresholds, so that it lasts until the signal comes and is heard.
    sweep = f"evaluation.thresholds={[round(0.03 * i, 2) for i in range(1, 32)]}"
    run_dir = trained.directory.parent / "evaluated"
    run = Run(recipe=replace(trained.recipe, run_dir=str(run_dir)), arguments=(*shared, sweep, f"run_dir={run_dir}"))
    job = submit(cluster, "slurm/evaluate.sh", *run.arguments, logs=run_dir.parent / "logs-evaluate")
    wait(lambda: "evaluate vqa" in job.told() or job.state == "FAILED", job.told)
    job.kill(run, 1, signal.SIGUSR1)
    job.wait_for("COMPLETED")
    assert job.restarts == 1, job.told()
    assert "exit code 85: back into the queue for restart 1" in job.told()
    alone("launch/evaluate.py", *shared, sweep, f"run_dir={run_dir}-alone")
    assert measured(run_dir) == measured(run_dir.with_name("evaluated-alone"))


def test_captions_of_two_nodes_that_were_cut_off_are_those_of_one_process(
    cluster: Cluster, prepare_exits: Callable[[str], Run], tiny_root: Path, tmp_path: Path
) -> None:
    save_captioner(tmp_path / "captioner")
    save_filter(tmp_path / "filter")
    out = tmp_path / "captioned"
    longer = ("--batch-size", 1, "--captions", 60)  # it lasts until the signal comes
    words = capfilt_words(tmp_path, tiny_root, out, *longer)
    run = Run(recipe=prepare_exits("unused").recipe, arguments=tuple(words))
    job = submit(cluster, "slurm/capfilt.sh", *run.arguments, logs=tmp_path / "logs")
    wait(lambda: (out / ".train.capfilt").is_dir() or job.state == "FAILED", job.told)
    job.kill(run, 1, signal.SIGUSR1)
    job.wait_for("COMPLETED")
    assert job.restarts == 1, job.told()
    alone("launch/capfilt.py", *capfilt_words(tmp_path, tiny_root, tmp_path / "alone", *longer))
    assert captioned_files(out) == captioned_files(tmp_path / "alone")
