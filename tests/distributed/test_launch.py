"""launch/train.py as users start it: python, deepspeed and torchrun, on real processes, with real logs and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.checkpoint_hash import checkpoint_hash
from free_dist.config import UserError
from free_dist.distributed import World
from free_dist.exits.export import backbone_hash, load_exits, read_exits_manifest
from free_dist.recipe_io import load_recipe
from free_dist.training.finetune import save_backbone
from free_dist.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
STEPS = 4


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_backbone, tiny_encoder, tiny_root) -> Path:
    """A directory with a tiny backbone and one distribution file per number of processes, both for 16 rows a step."""
    directory = tmp_path_factory.mktemp("launch")
    save_backbone(tiny_backbone, tiny_encoder, directory / "backbone")
    content = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    for processes in (1, 2):
        for section in content.values():
            section["train_micro_batch_size_per_gpu"] = 16 // processes
        (directory / f"cpu{processes}.json").write_text(json.dumps(content))
    return directory


def overrides(workplace: Path, tiny_root: Path, name: str, **changes: object) -> list[str]:
    values = {
        "run_dir": workplace / name,
        "backbone.path": workplace / "backbone",
        "data.root": tiny_root,
        "data.max_turns": 3,
        "exits.exit_layers": "[1,3]",
        "training.max_steps": STEPS,
        "training.warmup_steps": 1,
        "training.log_every": 1,
        "training.sample_every": 2,
        "decoding.max_new_tokens": 4,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in values.items()]


def environment() -> dict[str, str]:
    path = os.pathsep.join((str(SCRIPTS), os.environ["PATH"]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}


def launch(command: list[object], timeout: int = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def logged(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(workplace: Path, tiny_root: Path) -> dict[str, Path]:
    starters: dict[str, list[object]] = {
        "python": [sys.executable, "launch/train.py", "--ds_config", workplace / "cpu1.json"],
        "deepspeed": [
            SCRIPTS / "deepspeed", "--num_gpus", 2, "launch/train.py", "--ds_config", workplace / "cpu2.json",
        ],
        "torchrun": [
            SCRIPTS / "torchrun", "--nproc_per_node", 2, "--master_port", 29611,
            "launch/train.py", "--ds_config", workplace / "cpu2.json",
        ],
    }  # fmt: skip
    for name, starter in starters.items():
        finished = launch([*starter, *overrides(workplace, tiny_root, name)])
        assert finished.returncode == 0, f"{name}:\n{finished.stdout}\n{finished.stderr}"
    return {name: workplace / name for name in starters}


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_processes_log_the_losses_of_one_on_the_same_global_batches(runs, launcher: str) -> None:
    one, two = logged(runs["python"]), logged(runs[launcher])
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two, strict=True):
        names = [name for name in a if name.startswith(("loss_", "discriminator_", "token_accuracy", "grad_norm"))]
        assert len(names) >= 10
        for name in names:
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=2e-5), (a["step"], name)
        assert a["batch/answer_tokens"] == b["batch/answer_tokens"]


def test_the_export_decodes_on_the_untouched_backbone(runs, workplace: Path, tiny_backbone) -> None:
    backbone = Blip2Backbone.from_pretrained(workplace / "backbone")
    assert backbone_hash(backbone) == backbone_hash(tiny_backbone)
    for run_dir in runs.values():
        assert read_exits_manifest(run_dir / "export").backbone_hash == checkpoint_hash(workplace / "backbone")
        assert load_exits(backbone, run_dir / "export").exit_layers == (1, 3)


def test_tensorboard_shows_what_the_page_promises(runs) -> None:
    accumulator = EventAccumulator(str(runs["deepspeed"] / "tensorboard"))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    for wanted in (
        "loss_discriminator/exit_1",
        "loss_generator/exit_3",
        "discriminator_accuracy_real/exit_1",
        "grad_norm/exits",
        "grad_norm/discriminators",
        "throughput/samples_per_second",
        "throughput/tokens_per_second",
        "memory/gib",
        "learning_rate/exits",
        "learning_rate/discriminators",
    ):
        assert wanted in tags
    assert any(tag.startswith("agreement_with_full_") for tag in tags)
    assert "samples/text_summary" in accumulator.Tags()["tensors"]


def test_a_run_directory_is_never_overwritten(runs, workplace: Path, tiny_root: Path) -> None:
    command = [sys.executable, "launch/train.py", "--ds_config", workplace / "cpu1.json"]
    finished = launch([*command, *overrides(workplace, tiny_root, "python")])
    assert finished.returncode == 2
    assert "already holds a finished run" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_too_few_processes_are_told_in_one_line(workplace: Path, tiny_root: Path) -> None:
    changes = overrides(workplace, tiny_root, "few", training__expected_world_size=2)
    finished = launch([sys.executable, "launch/train.py", "--ds_config", workplace / "cpu1.json", *changes])
    assert finished.returncode == 2
    assert "--num_gpus 2" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_rows_that_stage_1_lacks_without_a_distribution_file_are_told_by_the_recipes_field(
    workplace: Path, tiny_root: Path
) -> None:
    changes = overrides(workplace, tiny_root, "rows", training__expected_rows_per_step=256, finetune__batch_size=16)
    finished = launch([sys.executable, "launch/finetune.py", *changes])
    assert finished.returncode == 2
    assert "=256: without --ds_config, finetune.batch_size gives 16 rows per step; change finetune.batch_size, or" in (
        finished.stderr
    )


def test_sample_texts_without_their_split_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    recipe = load_recipe(None, [f"data.root={tmp_path}", "training.sample_every=100", f"run_dir={tmp_path / 'run'}"])
    world = World(rank=1, size=2, local_rank=1, device=torch.device("cpu"))
    with pytest.raises(UserError, match=f"training.sample_every=100: .* calibration split of data.root={tmp_path}"):
        train(recipe, {}, world)


def test_ctrl_c_saves_and_exports_what_was_learnt_and_leaves_no_orphan(workplace: Path, tiny_root: Path) -> None:
    changes = overrides(
        workplace, tiny_root, "interrupted", training__max_steps=100_000, training__warmup_steps=1,
        training__sample_every=0,
    )  # fmt: skip
    command = [SCRIPTS / "deepspeed", "--num_gpus", 2, "--master_port", 29617, "launch/train.py"]
    command += ["--ds_config", workplace / "cpu2.json", *changes]
    log = workplace / "interrupted" / "log.jsonl"
    process = subprocess.Popen(
        [str(word) for word in command],
        env=environment(),
        cwd=ROOT,
        start_new_session=True,  # a terminal sends Ctrl-C to the whole foreground group; this makes one of our own
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not (log.exists() and len(log.read_text().splitlines()) >= 2):
            assert time.monotonic() < deadline, "training did not start"
            assert process.poll() is None, "training ended by itself"
            time.sleep(0.2)
        started = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)
        deadline = time.monotonic() + 20
        while any(_is_running(pid) for pid in started):
            assert time.monotonic() < deadline, "a training process outlived Ctrl-C"
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert read_exits_manifest(workplace / "interrupted" / "export").exit_layers == (1, 3)
    steps = read_exits_manifest(workplace / "interrupted" / "export").extra["steps"]
    assert (workplace / "interrupted" / "checkpoints" / "latest").read_text() == f"step-{steps:08d}\n"


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
