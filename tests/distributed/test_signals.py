"""A signal to one process at any moment: all agree, what was learnt is saved, and the exit code says who asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import stage1_scene as scene
import torch
from ranks import run_ranks

from free_dist.config import Recipe
from free_dist.distributed import REQUEUE, Interrupted, StopFlag
from free_dist.launchers import free_port
from free_dist.stopping import INTERRUPTED, StopSignals
from free_dist.training.run_directory import CHECKPOINTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, REQUEUE), (signal.SIGUSR1, REQUEUE), (signal.SIGINT, INTERRUPTED)]
)
def test_a_signal_that_came_before_the_loop_is_read_in_it_and_the_code_outlives_it(number: int, code: int) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with StopSignals() as program:
        os.kill(os.getpid(), number)
        with StopFlag() as stop:
            assert stop.agreed()
        assert program.asked and program.exit_code == code
    assert {number: signal.getsignal(number) for number in before} == before


def both_ask() -> tuple[bool, int]:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT if torch.distributed.get_rank() else signal.SIGTERM)
        return stop.agreed(), stop.exit_code


def test_ctrl_c_wins_over_the_launcher_that_passes_it_on_and_all_ranks_end_alike() -> None:
    assert run_ranks(2, both_ask) == [(True, INTERRUPTED)] * 2


def work_of_different_lengths(asks: bool) -> tuple[int, bool]:
    done = 0
    with StopFlag() as stop:
        for step in range(2 + 6 * torch.distributed.get_rank()):
            if asks and step == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
            if stop.agreed():
                return done, True
            done += 1
        return done, stop.agreed_while_others_work()


def test_a_rank_that_is_done_waits_for_the_others_or_stops_with_them() -> None:
    assert run_ranks(2, work_of_different_lengths, False) == [(2, False), (8, False)]
    assert run_ranks(2, work_of_different_lengths, True) == [(2, True), (4, True)]


LEAVING = """
import os, signal, threading, time
from free_dist.stopping import Interrupted, stop_clearly

def bombard():
    while True:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.001)

with stop_clearly() as stop:
    threading.Thread(target=bombard, daemon=True).start()
    while not stop.asked:
        time.sleep(0.001)
    if {raises}:
        raise Interrupted("saved")
"""


@pytest.mark.parametrize(("raises", "code"), [(True, REQUEUE), (False, 0)])
def test_further_signals_do_not_change_the_code_of_a_program_that_is_leaving(raises: bool, code: int) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", LEAVING.format(raises=raises)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (finished.returncode, finished.stderr) == (code, "")
    assert finished.stdout == ("\nsaved\n" if raises else "")


AT_ONCE = """
import os, signal, time
from free_dist.stopping import stop_clearly
with stop_clearly(at_once=True):
    os.kill(os.getpid(), signal.{name})
    time.sleep(100)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", REQUEUE), ("SIGUSR1", REQUEUE), ("SIGINT", INTERRUPTED)])
def test_a_program_that_keeps_nothing_ends_at_once_in_one_line(name: str, code: int) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", AT_ONCE.format(name=name)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (finished.returncode, finished.stderr) == (code, "")
    assert finished.stdout == f"\nstopped by {name}; the same command starts over\n"


SWALLOWED = """
import os, signal, time, weakref
from free_dist.stopping import stop_clearly

class Held:
    pass

def ask(*_):
    os.kill(os.getpid(), signal.SIGUSR1)

def in_a_callback():
    held = Held()
    reference = weakref.ref(held, ask)
    del held

def where_everything_is_caught():
    try:
        ask()
    except BaseException:
        pass

with stop_clearly(at_once=True):
    {where}()
    time.sleep(30)
"""


@pytest.mark.parametrize("where", ["in_a_callback", "where_everything_is_caught"])
def test_a_program_that_keeps_nothing_ends_where_its_stop_was_swallowed_first(where: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", SWALLOWED.format(where=where)], capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == REQUEUE, finished.stderr
    assert finished.stdout == "\nstopped by SIGUSR1; the same command starts over\n"


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("start")
    scene.save_new("dropout", tiny_tokenizer, directory)
    return directory


def signalled(recipe: Recipe, section: dict[str, Any], start: Path, moment: str) -> str:
    """Stage 1, in which rank 1 sends itself SIGUSR1 once, at a moment inside a part of the loop."""
    from free_dist.training import finetune
    from free_dist.training.checkpoint import Checkpoints

    def once(function: Any) -> Any:
        called = []

        def first(*arguments: Any, **named: Any) -> Any:
            if not called and torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            called.append(True)
            return function(*arguments, **named)

        return first

    evaluate, forward, save = finetune._evaluate, finetune.AnswerScores.forward, Checkpoints.save

    def evaluate_signalled(*arguments: Any) -> bool:
        finetune.AnswerScores.forward = once(forward)
        try:
            return evaluate(*arguments)
        finally:
            finetune.AnswerScores.forward = forward

    if moment == "evaluation":
        finetune._evaluate = evaluate_signalled
    else:
        Checkpoints.save = once(save)
    with pytest.raises(Interrupted) as stop:
        scene.stage1(recipe, section, start)
    return str(stop.value)


def deterministic(run_dir: Path) -> list[dict[str, float]]:
    """What the log says of training and evaluation, without times and memory."""
    lines = (json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k in ("step", "loss") or k.startswith("calibration")} for line in lines]


@pytest.mark.parametrize(("moment", "saved"), [("evaluation", 3), ("save", 3)])
def test_a_signal_inside_an_evaluation_or_a_save_costs_no_step_and_no_line_of_the_log(
    start: Path, tiny_data, tmp_path, moment: str, saved: int
) -> None:
    """During an evaluation the step before it is saved; during a save the step after it."""
    recipe = scene.recipe(
        tiny_data, tmp_path / "run", start, eval_every=3 if moment == "evaluation" else 0,
        save_every=2 if moment == "save" else 100,
    )  # fmt: skip
    section = scene.section(recipe, size=2)
    messages = run_ranks(2, signalled, recipe, section, start, moment)
    assert messages[0] == messages[1] and f"stopped after step {saved} of {scene.STEPS}" in messages[0]
    assert (tmp_path / "run" / CHECKPOINTS / f"step-{saved:08d}").is_dir()
    run_ranks(2, scene.stage1, recipe, section, start)
    whole = scene.recipe(tiny_data, tmp_path / "whole", start, eval_every=recipe.finetune.eval_every)
    run_ranks(2, scene.stage1, whole, section, start)
    found = deterministic(tmp_path / "run")
    assert found == deterministic(tmp_path / "whole")
    assert sum("loss" not in line for line in found) == (2 if moment == "evaluation" else 0)


CACHE = """
import os, signal, sys
from free_dist.data.visual_cache_maker import CacheMaker
from launch import cache_vision
features = CacheMaker._features

def signalled(self, batch):
    os.kill(os.getpid(), signal.{name})
    return features(self, batch)

CacheMaker._features = signalled
sys.argv = ["cache_vision.py", *sys.argv[1:]]
cache_vision.main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", REQUEUE), ("SIGINT", INTERRUPTED)])
def test_a_signal_while_the_vision_cache_is_made_keeps_what_was_computed(tiny_data, tmp_path, name, code) -> None:
    arguments = [f"data.root={tiny_data.root}", f"data.visual_cache={tmp_path / 'cache'}"]
    run = {
        "cwd": ROOT,
        "env": os.environ | {"PYTHONPATH": str(ROOT)},
        "capture_output": True,
        "text": True,
        "timeout": 200,
    }
    cut = subprocess.run([sys.executable, "-c", CACHE.format(name=name), *arguments], check=False, **run)  # type: ignore[call-overload]
    assert cut.returncode == code, cut.stderr
    assert "keeps 16 images; the same command goes on" in cut.stdout
    whole = subprocess.run([sys.executable, "launch/cache_vision.py", *arguments], check=False, **run)  # type: ignore[call-overload]
    assert whole.returncode == 0, whole.stderr
    assert "holds 16 images already" in whole.stdout and "40 images," in whole.stdout


def start_two(command: list[str], port: int, output: Path) -> list[subprocess.Popen[bytes]]:
    """Two ranks without a launcher, so that each one's own exit code can be read."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    started = []
    for rank in range(2):
        with open(output.with_suffix(f".{rank}"), "w") as told:
            started.append(
                subprocess.Popen(
                    [sys.executable, *command], cwd=ROOT, stdout=told, stderr=told,
                    env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
            )  # fmt: skip
    return started


def test_usr1_to_one_process_while_it_captions_ends_both_with_the_requeue_code(tiny_root, tmp_path) -> None:
    from tests.small_blip import save_captioner, save_filter

    save_captioner(tmp_path / "captioner")
    save_filter(tmp_path / "filter")
    command = [
        "launch/capfilt.py", "--source", str(tiny_root), "--out", str(tmp_path / "out"), "--captions", "2", "--min-length", "6",
        "--max-length", "12", "--batch-size", "1", "--captioner", str(tmp_path / "captioner"),
        "--filter", str(tmp_path / "filter"),
    ]  # fmt: skip
    processes = start_two(command, free_port(), tmp_path / "first")
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "out" / ".train.capfilt").is_dir():
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.005)
        processes[1].send_signal(signal.SIGUSR1)
        codes = [process.wait(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    told = "".join((tmp_path / f"first.{rank}").read_text() for rank in range(2))
    assert codes == [REQUEUE, REQUEUE], told
    assert told.count("the same command goes on") == 1 and "Traceback" not in told
    processes = start_two(command, free_port(), tmp_path / "second")
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    assert "24 images, 48 captions written" in (tmp_path / "second.0").read_text()
