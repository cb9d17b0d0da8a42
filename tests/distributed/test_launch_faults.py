"""launch/train.py when something is wrong around it: one clear line, or the rank that is lost; real launchers and processes."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from free_dist.training.finetune import save_backbone

pytestmark = pytest.mark.fault

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
NOBODY = 65534


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_backbone, tiny_encoder) -> Path:
    """A directory with a tiny backbone and a distribution file for 8 rows a process."""
    directory = tmp_path_factory.mktemp("faults")
    save_backbone(tiny_backbone, tiny_encoder, directory / "backbone")
    content = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    for section in content.values():
        section["train_micro_batch_size_per_gpu"] = 8
    (directory / "cpu.json").write_text(json.dumps(content))
    return directory


def arguments(workplace: Path, root: Path, run_dir: Path, **changes: object) -> list[str]:
    values = {
        "run_dir": run_dir,
        "backbone.path": workplace / "backbone",
        "data.root": root,
        "data.max_turns": 3,
        "exits.exit_layers": "[1,3]",
        "training.max_steps": 3,
        "training.log_every": 1,
        "training.sample_every": 0,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [
        "launch/train.py",
        "--ds_config",
        str(workplace / "cpu.json"),
        *(f"{key}={value}" for key, value in values.items()),
    ]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join((str(SCRIPTS), os.environ["PATH"]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)} | more


def start(command: list[str], **options: object) -> subprocess.Popen[str]:
    options = {"env": environment()} | options
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def one_line(command: list[str], wanted: str, **options: object) -> str:
    """The only line in which a command fails; it holds ``wanted``."""
    process = start(command, **options)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 2, said
    assert "Traceback" not in said, said
    lines = [line for line in said.splitlines() if ": error: " in line]
    assert len(lines) == 1 and wanted in lines[0], said
    return lines[0]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_stopped_rank_is_named_and_its_launcher_ends_the_job(
    launcher: str, workplace: Path, tiny_root: Path, tmp_path: Path
) -> None:
    count, port = {"torchrun": ("--nproc_per_node", 29750), "deepspeed": ("--num_gpus", 29751)}[launcher]
    starter = [str(SCRIPTS / launcher), count, "2", "--master_port", str(port)]
    run = arguments(workplace, tiny_root, tmp_path / "run", training__max_steps=100_000, training__hang_timeout=3)
    log = tmp_path / "run" / "log.jsonl"
    process = start([*starter, *run])
    try:
        deadline = time.monotonic() + 150
        while not (log.exists() and len(log.read_text().splitlines()) >= 2):
            assert time.monotonic() < deadline and process.poll() is None, "training did not start"
            time.sleep(0.2)
        everybody = psutil.Process(process.pid).children(recursive=True)
        victims = [
            p for p in everybody if p.environ().get("RANK") == "1" and "launch/train.py" in " ".join(p.cmdline())
        ]
        victims[-1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        said, _ = process.communicate(timeout=100)
        took = time.monotonic() - began
    finally:
        for other in everybody:
            if other.is_running():
                other.kill()
        process.kill()
    assert process.returncode != 0, said
    assert f"rank 0: rank 1 (pid {victims[-1].pid} on " in said, said
    assert "rank-0.txt" in said
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(event.get("event") == "lost_rank" for event in events)
    # Its own bound, and the half minute that a launcher gives processes that do not answer.
    assert took < 3 + 12 + 40, took
