"""Ablations that train several at a time: Ctrl-C and a second start end where an uninterrupted run of one at a time does; a
failure is told at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from free_dist.config import DataConfig, Recipe, UserError
from free_dist.training.runs import train_all
from tests.programs import ROOT, launchers

STEPS = 160
NAMES = ("base-seed-3", "no_gan-seed-3")


def test_interrupted_ablations_go_on_and_learn_the_same(
    tiny_checkpoint: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    def command(run: Path, jobs: int) -> list[str]:
        settings = {
            "run_dir": run, "backbone.path": tiny_checkpoint, "data.root": tiny_data.root, "data.tasks": "{vqa: 1.0}",
            "exits.exit_layers": [2], "training.max_steps": STEPS, "training.warmup_steps": 1, "training.log_every": 1,
            "evaluation.max_samples": 4, "evaluation.tasks": "[vqa]",
        }  # fmt: skip
        words = ["launch/ablate.py", "--only", "no_gan", "--seeds", "3", "--jobs", str(jobs)]
        return words + [f"{key}={value}" for key, value in settings.items()]

    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, *command(stopped, 2)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True, stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while not all(_steps(stopped / name) for name in NAMES):
            assert time.monotonic() < deadline and process.poll() is None, "training did not start"
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=120)
        left = _started_for(stopped)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 2 and left == [], "a rank outlived the launcher"
    assert told.endswith("ablate.py: error: interrupted while training; start again to go on\n")
    assert not (stopped / "ablation.json").exists()
    done = [_steps(stopped / name)[-1] for name in NAMES]
    assert max(done) < STEPS
    said = launchers(command(stopped, 2), command(stopped, 2), command(whole, 1))
    assert f"[1/2] base, seed 3, printing to {stopped / 'base-seed-3'}.log" in said
    assert said.count("[2/2] no_gan, seed 3: made before") == 1  # the second time
    assert not list(stopped.glob("*.old-*"))
    for name, steps in zip(NAMES, done, strict=True):
        assert f"goes on after step {steps} of {STEPS}" in (stopped / f"{name}.log").read_text()
        assert sorted(set(_steps(stopped / name))) == list(range(1, STEPS + 1))
        ours, wanted = ([*(run / name / "export").glob("*.safetensors")] for run in (stopped, whole))
        assert len(ours) == len(wanted) > 0
        for here, there in zip(sorted(ours), sorted(wanted), strict=True):
            tensors = load_file(there)
            assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_file(here).items())


def test_a_run_that_fails_is_told_at_once_and_no_further_one_starts(tmp_path: Path, tiny_data: DataConfig) -> None:
    recipe = Recipe(data=tiny_data, run_dir=str(tmp_path / "none"))
    recipes = {f"run {i}": replace(recipe, run_dir=str(tmp_path / f"run-{i}")) for i in range(4)}
    script = tmp_path / "fails.py"
    script.write_text(
        "import pathlib, sys, time\n"
        f"failed = pathlib.Path({str(tmp_path / 'failed')!r})\n"
        "if any('run-1.yaml' in word for word in sys.argv):\n"
        "    while not failed.exists():\n"
        "        time.sleep(0.1)\n"
        "    time.sleep(4)\n"
        "print('what went wrong')\n"
        "failed.touch()\n"
        "sys.exit(3)\n"
    )
    said: list[str] = []
    with pytest.raises(UserError, match=r"run-0 ended with code \d+: see its messages in .*run-0\.log"):
        train_all(
            recipes, jobs=2, script=script, ds_config=ROOT / "ds_configs" / "cpu.json", num_processes=1,
            backbone=lambda recipe: tmp_path, tell=said.append,
        )  # fmt: skip
    assert [line for line in said if line.startswith(("[3/4]", "[4/4]"))] == []
    told = [line.partition(":")[0] for line in said if "ended with code" in line]
    assert told == ["[1/4] run 0", "[2/4] run 1"]
    assert "what went wrong" in (tmp_path / "run-0.log").read_text()
    assert _started_for(tmp_path) == []


def _steps(run: Path) -> list[int]:
    log = run / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def _started_for(directory: Path) -> list[int]:
    """Processes whose command line names the directory or something in it."""
    running = psutil.process_iter(["cmdline"])
    return [process.pid for process in running if str(directory) in " ".join(process.info["cmdline"] or [])]
