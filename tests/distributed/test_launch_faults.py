"""launch/train.py when something is wrong around it: one clear line, or the rank that is lost; real launchers and processes."""

from __future__ import annotations

import ctypes
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
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
"""Of linux/prctl.h and linux/capability.h."""


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


@pytest.mark.slow
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


def test_an_alarm_that_stops_the_run_exports_and_ends_with_its_own_code(
    workplace: Path, tiny_root: Path, tmp_path: Path
) -> None:
    changes = {"decoding__confidence_threshold": 1.1, "alarms__action": "stop", "alarms__window": 2}
    changes |= {"alarms__calibration_error": 1, "alarms__discriminator_wins": 1}
    run = arguments(workplace, tiny_root, tmp_path / "run", training__max_steps=12, **changes)
    process = start([sys.executable, *run])
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 3, said
    assert "error: alarms.action=stop: piled_exits at step 6:" in said and "Traceback" not in said
    assert "piled_exits at step 6: at decoding.confidence_threshold" in said
    assert (tmp_path / "run" / "export" / "exits.json").is_file()
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if "event" in event] == ["piled_exits"]


def test_a_missing_data_set_is_one_line(workplace: Path, tmp_path: Path) -> None:
    run = arguments(workplace, tmp_path / "nowhere", tmp_path / "run")
    assert str(tmp_path / "nowhere") in one_line([sys.executable, *run], "data.root")


def test_a_port_in_use_is_one_line(workplace: Path, tiny_root: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 29752))
        taken.listen()
        variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        run = arguments(workplace, tiny_root, tmp_path / "run")
        line = one_line([sys.executable, *run], "is in use", env=environment(MASTER_PORT="29752", **variables))
    assert "MASTER_PORT=29752" in line


@pytest.mark.parametrize("limit", [2_000, 60_000], ids=["log", "export"])
def test_a_full_disk_is_one_line(limit: int, workplace: Path, tiny_root: Path, tmp_path: Path) -> None:
    def no_larger_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run = arguments(workplace, tiny_root, tmp_path / "run")
    one_line([sys.executable, *run], os.strerror(errno.EFBIG), preexec_fn=no_larger_files)


def test_a_run_directory_that_cannot_be_written_is_one_line(workplace: Path, tiny_root: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)

    def without_privilege() -> None:
        # Root may write anywhere until it has given up this capability, which it then lacks in the program it starts.
        if os.getuid() == 0:
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)

    run = arguments(workplace, tiny_root, closed / "run")
    line = one_line([sys.executable, *run], os.strerror(errno.EACCES), preexec_fn=without_privilege)
    assert str(closed / "run") in line
