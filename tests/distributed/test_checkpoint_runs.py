"""Whole runs of stage 2 that are killed, go on, are refused: the loop, the launcher and the soak script."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from free_dist.config import Recipe, UserError
from free_dist.recipe_io import save_recipe
from free_dist.training.run_directory import forget_log_after
from free_dist.training.runs import check_run

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "soak"))

import exit_runs  # noqa: E402 - found by the line above
from exit_runs import ranks, train_here  # noqa: E402


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    exit_runs.prepare(directory)
    return directory


def entries(recipe: Recipe) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(recipe.run_dir) / "log.jsonl").read_text().splitlines()]


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)


@pytest.mark.fault
def test_the_soak_script_passes_a_small_share_of_its_kills() -> None:
    command = [sys.executable, "tests/soak/kill_resume.py", "--kills", "2", "--seed", "3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.stdout.splitlines()[-1] == "2 passed, 0 failed", finished.stdout + finished.stderr
    assert finished.returncode == 0


@pytest.mark.fault
def test_the_same_command_goes_on_after_kill_9_and_a_finished_run_is_refused(workplace: Path) -> None:
    recipe = exit_runs.recipe(workplace, "launched", max_steps=12, save_every=2)
    run_dir = Path(recipe.run_dir)
    save_recipe(recipe, workplace / "launched.yaml")
    (workplace / "ds.json").write_text(json.dumps(exit_runs.sections(1)))
    command = [sys.executable, "launch/train.py", "--ds_config", workplace / "ds.json"]
    command += ["--config", workplace / "launched.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(*overrides: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*map(str, command), *overrides],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    process = start()
    until((run_dir / "checkpoints" / "latest").exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    other = start("loss.task_weight=0.5", "training.seed=1")
    told = other.communicate()[0].decode()
    assert other.returncode == 2 and "Traceback" not in told
    assert "loss.task_weight is 1.0 there, 0.5 here" in told and "training.seed is 0 there, 1 here" in told
    again = start()
    told = again.communicate()[0].decode()
    assert again.returncode == 0, told
    assert re.search(r"goes on after step \d+ of 12, from .*step-", told)
    assert [entry["step"] for entry in entries(recipe)] == list(range(1, 13))
    logged = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, 13))
    assert all(len(line["samples"]) == exit_runs.ROWS for line in logged)
    finished = start()
    told = finished.communicate()[0].decode()
    assert finished.returncode == 2 and "already holds a finished run" in told and "Traceback" not in told
    environment["SLURM_RESTART_COUNT"] = (
        "1"  # its node died after the last step, and before Slurm knew that all was done
    )
    requeued = start()
    assert "nothing is left for this restart to do" in requeued.communicate()[0].decode()
    assert requeued.returncode == 0
    assert start("training.seed=1").wait() == 2


def test_logs_are_cut_back_to_the_checkpoint_also_for_tensorboard(workplace: Path) -> None:
    """A run whose newest checkpoint is gone repeats steps that it has logged."""
    recipe = exit_runs.recipe(workplace, "logs", max_steps=8, save_every=3)
    ranks.run_ranks(1, train_here, recipe, exit_runs.sections(1))
    run_dir = Path(recipe.run_dir)
    before = entries(recipe)
    (run_dir / "checkpoints" / "step-00000008" / "manifest.json").write_text("{}")
    (told,) = ranks.run_ranks(1, train_here, recipe, exit_runs.sections(1))
    assert "manifest.json cannot be read" in told[0] and "goes on after step 6 of 8" in told[1]
    after = entries(recipe)
    assert [entry["step"] for entry in after] == list(range(1, 9))
    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    shown = accumulator.Scalars("grad_norm/exits")
    assert [event.step for event in shown] == list(range(1, 9))
    assert [event.value for event in shown] == pytest.approx([entry["grad_norm/exits"] for entry in before])


def test_half_a_line_of_a_killed_writer_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "samples.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    forget_log_after(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_another_backbone_under_the_same_path_is_refused(workplace: Path) -> None:
    recipe = exit_runs.recipe(workplace, "moved", max_steps=2, save_every=1)
    ranks.run_ranks(1, train_here, recipe, exit_runs.sections(1))
    longer = replace(recipe, backbone=replace(recipe.backbone, path=str(workplace / "other")))
    (workplace / "other").mkdir()
    for path in (workplace / "backbone").iterdir():
        (workplace / "other" / path.name).write_bytes(path.read_bytes())
    weights = bytearray((workplace / "other" / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (workplace / "other" / "model.safetensors").write_bytes(weights)
    with pytest.raises(AssertionError, match=r"UserError: .* was made with frozen weights with hash files:"):
        ranks.run_ranks(1, train_here, longer, exit_runs.sections(1))


def test_other_rows_per_step_are_refused(workplace: Path) -> None:
    recipe = exit_runs.recipe(workplace, "rows", max_steps=2, save_every=1)
    ranks.run_ranks(1, train_here, recipe, exit_runs.sections(1))
    with pytest.raises(AssertionError, match="steps of 8 rows, and this start has 4"):
        ranks.run_ranks(1, train_here, recipe, exit_runs.sections(2))


def test_settings_that_change_what_is_learnt_are_refused_by_name_and_others_are_free(workplace: Path) -> None:
    recipe = exit_runs.recipe(workplace, "settings")
    run_dir = Path(recipe.run_dir)
    run_dir.mkdir()
    save_recipe(recipe, run_dir / "recipe.yaml")
    (run_dir / "ds_config.json").write_text(json.dumps(exit_runs.sections(1)))
    other = replace(recipe, exits=replace(recipe.exits, exit_layers=[1]))
    check_run(other, exit_runs.sections(1))  # nothing was learnt so far
    (run_dir / "log.jsonl").touch()
    check_run(recipe, exit_runs.sections(2, 3, 2, accumulation=2))
    check_run(replace(recipe, training=replace(recipe.training, save_every=7, keep_last=1)), exit_runs.sections(1))
    with pytest.raises(UserError, match=r"exits.exit_layers is \[1, 2\] there, \[1\] here"):
        check_run(other, exit_runs.sections(1))
    with pytest.raises(UserError, match="--ds_config, section 'exits': bf16 is"):
        check_run(recipe, exit_runs.sections(1, bf16=True))
