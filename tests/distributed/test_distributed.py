"""Processes: joint decisions, stopping together, and starting with fewer processes than meant."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from free_dist.distributed import StopFlag, all_reduce_mean, all_reduce_sum, all_true, check_world_size


def test_fewer_processes_than_meant_is_an_error_that_says_how_to_start_more():
    check_world_size(None, 1)
    check_world_size(2, 2)
    with pytest.raises(ValueError, match=r"training.expected_world_size=2.* 1 process.*--num_gpus 2"):
        check_world_size(2, 1)


def joint() -> tuple[bool, bool, list[float], list[float]]:
    rank = torch.distributed.get_rank()
    values = torch.tensor([1.0, float(rank)])
    mean, total = all_reduce_mean(values), all_reduce_sum(values)
    assert values.tolist() == [1.0, rank], "the argument must stay as it was"
    return all_true(True), all_true(torch.tensor(rank == 0)), mean.tolist(), total.tolist()


def test_joint_decisions_are_the_same_on_every_rank():
    assert run_ranks(2, joint) == [(True, False, [1.0, 0.5], [2.0, 1.0])] * 2


def test_joint_decisions_work_without_a_process_group():
    assert all_true(True) and not all_true(torch.tensor(False))
    assert all_reduce_mean(torch.tensor([3.0])).tolist() == [3.0]


def interrupted() -> list[bool]:
    answers = []
    handler = signal.getsignal(signal.SIGINT)
    with StopFlag() as stop:
        for step in range(3):
            if step == 1 and torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            answers.append(stop.agreed())
    assert signal.getsignal(signal.SIGINT) is handler
    return answers


def test_a_signal_to_one_rank_stops_all_ranks_at_the_same_step():
    assert run_ranks(2, interrupted) == [[False, True, True]] * 2


SCRIPT = """
import sys, time
from free_dist.distributed import StopFlag, distributed_session
with distributed_session() as world, StopFlag() as stop:
    print(f"rank {world.rank} of {world.size} on {world.device}", flush=True)
    while not stop.agreed():
        time.sleep(0.01)
    if "stubborn" in sys.argv:
        time.sleep(100)
print("closed", flush=True)
"""


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    script = tmp_path / "loop.py"
    script.write_text(SCRIPT)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment["TMPDIR"] = str(tmp_path)
    command = [sys.executable, str(script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "rank 0 of 1 on cpu\n"
    return process


def test_plain_python_is_a_world_of_one_that_ctrl_c_closes_cleanly_and_compiles_nothing(tmp_path):
    process = start(tmp_path)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "closed\n")
    assert not list(tmp_path.glob("free_dist-*")), "a C++ extension was built"


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    process = start(tmp_path, "stubborn")
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_half_an_environment_is_an_error_that_names_what_is_missing(tmp_path):
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    script = "from free_dist.distributed import distributed_session\nwith distributed_session(): pass"
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "the environment lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in result.stderr
