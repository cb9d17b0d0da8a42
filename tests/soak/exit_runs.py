"""Whole small runs of stage 2 in forked ranks: started, killed at any moment, and compared with one that nobody killed.

A backbone with dropout, so that random numbers matter; captions, questions and dialogues of 40 easy-VQA images.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "distributed"), str(TESTS.parent), str(Path(__file__).parent)]

import ranks  # noqa: E402 - found by the line above, also in forked ranks
import stage1_scene  # noqa: E402

from free_dist.backbones.embedded import train_tokenizer  # noqa: E402
from free_dist.config import BackboneConfig, DataConfig, ExitsConfig, Recipe, TrainingConfig  # noqa: E402
from free_dist.data.shards import write_split  # noqa: E402
from free_dist.data.stream import corpus  # noqa: E402
from free_dist.distributed import World  # noqa: E402
from free_dist.launchers import free_port  # noqa: E402

STEPS = 14
SAVE_EVERY = 3
ROWS = 8
"""Rows of a step, over all ranks and micro-batches."""

UNEQUAL = ("time", "throughput/", "memory/", "ranks/")
"""Beginnings of the names of logged values that no two runs share."""


def prepare(workplace: Path) -> None:
    """Shards and a backbone below ``workplace``."""
    spec = importlib.util.spec_from_file_location("shared_fixtures", TESTS / "conftest.py")
    assert spec is not None and spec.loader is not None
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    for split, count in fixtures.TINY_SPLITS.items():
        records = fixtures.published_records(split, count)
        write_split(
            workplace / "data", dataset="easyvqa", split=split, records=records, total=count, records_per_shard=10
        )
    tokenizer = train_tokenizer(corpus(DataConfig(root=str(workplace / "data"))), vocab_size=512)
    stage1_scene.save_new("dropout", tokenizer, workplace / "backbone")


def recipe(workplace: Path, name: str, *, background: bool = True, **training: Any) -> Recipe:
    """A run in ``workplace/name``."""
    settings = {"max_steps": STEPS, "warmup_steps": 2, "log_every": 1, "sample_every": 10, "save_every": SAVE_EVERY}
    return Recipe(
        run_dir=str(workplace / name),
        backbone=BackboneConfig(path=str(workplace / "backbone")),
        data=DataConfig(
            root=str(workplace / "data"), shuffle_buffer=16, questions_per_image=2, max_turns=3, bad_sample_budget=1.0
        ),
        exits=ExitsConfig(exit_layers=[1, 2], discriminator_hidden_size=16),
        training=TrainingConfig(**settings | training, save_in_background=background),
    )


def sections(
    size: int, exits: int = 1, discriminators: int = 1, *, accumulation: int = 1, bf16: bool = False
) -> dict[str, Any]:
    """A distribution for ``size`` ranks with these ZeRO stages."""
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS // size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": bf16},
    }
    optimizer = {"type": "AdamW", "params": {"lr": 2e-3, "betas": [0.5, 0.99], "eps": 1e-4, "torch_adam": True}}

    def trained(stage: int) -> dict[str, Any]:
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        return base | {"optimizer": optimizer, "gradient_clipping": 1.0, "zero_optimization": zero}

    backbone = base | {"zero_optimization": {"stage": 0}}
    return {"backbone": backbone, "exits": trained(exits), "discriminators": trained(discriminators)}


def train_here(recipe: Recipe, ds_config: dict[str, Any]) -> list[str]:
    """Stage 2 on this rank; returns what was told."""
    from free_dist.training.trainer import train

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    told: list[str] = []
    train(recipe, ds_config, World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu")), told.append)
    return told


def run_until_killed(
    rng: random.Random, size: int, recipe: Recipe, ds_config: dict[str, Any], moment: str
) -> str | None:
    """Start the ranks and kill them all with SIGKILL; returns what the run was about, or None if it had ended before.

    ``moment``: ``any`` time, or as soon as some ``save`` is under way.
    """
    port = free_port()
    processes = [
        ranks._context.Process(
            target=ranks._rank,
            args=(rank, size, port, multiprocessing.Pipe(duplex=False)[1], train_here, (recipe, ds_config)),
            daemon=True,
        )
        for rank in range(size)
    ]
    left = _saves(Path(recipe.run_dir))
    for process in processes:
        process.start()
    _wait(rng, left, Path(recipe.run_dir), moment, processes)
    running = [process for process in processes if process.is_alive()]
    for process in rng.sample(processes, len(processes)):
        process.kill()
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, 0.02))
    for process in processes:
        process.join()
    return _about(Path(recipe.run_dir)) if running else None


def differences(whole: Path, cut: Path) -> list[str]:
    """What differs between the run directories of a run nobody killed and of one that was killed and went on."""
    found = [] if _entries(whole) == _entries(cut) else ["log.jsonl"]
    if (whole / "samples.jsonl").read_bytes() != (cut / "samples.jsonl").read_bytes():
        found.append("samples.jsonl")
    manifests = [
        json.loads((path / "checkpoints" / _latest(path) / "manifest.json").read_text()) for path in (whole, cut)
    ]
    # The checksums of the files are those of weights, moments and random numbers.
    for name in ("step", "files", "engines", "stream", "score"):
        if manifests[0][name] != manifests[1][name]:
            found.append(f"{name} of the last checkpoint")
    for path in sorted((whole / "export").glob("*.safetensors")):
        if path.read_bytes() != (cut / "export" / path.name).read_bytes():
            found.append(f"export/{path.name}")
    return found


def renamed(recipe: Recipe, run_dir: Path) -> Recipe:
    """The same run in another directory."""
    return replace(recipe, run_dir=str(run_dir))


def _saves(run_dir: Path) -> set[str]:
    """Saves that are under way, or that a killed process left, by the name of their directory."""
    found = set()
    for path in (run_dir / "checkpoints").glob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            found.add(path.name)
    return found


def _wait(rng: random.Random, left: set[str], run_dir: Path, moment: str, processes: list[Any]) -> None:
    log = run_dir / "log.jsonl"
    logged = _lines(log)

    def is_running() -> bool:
        return all(process.is_alive() for process in processes)

    if moment == "save":
        before = rng.randint(0, 2)  # saves of this part of the run that may end
        seen: set[str] = set()
        while is_running() and len(seen) <= before:
            found = _saves(run_dir)
            seen |= found - left
            left &= found  # a start removes what was left, and may save that step again
            time.sleep(0.0005)
        time.sleep(rng.choice([0.0, rng.uniform(0, 0.02)]))
        return
    more = rng.randint(0, STEPS // 2)  # with 0 it may die while it starts, or while it reads a checkpoint
    while is_running() and _lines(log) < logged + more:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 2.0 if more == 0 else 0.15))


def _about(run_dir: Path) -> str:
    saving = [path.name for path in (run_dir / "checkpoints").glob("*.tmp")]
    return f"after {_lines(run_dir / 'log.jsonl')} logged steps" + (f", writing {saving[0]}" if saving else "")


def _lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _latest(run_dir: Path) -> str:
    return (run_dir / "checkpoints" / "latest").read_text().strip()


def _entries(run_dir: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    # Events are left out: a process is slow in one run and not in another, and alarms look at windows that begin with a start.
    entries = [entry for entry in entries if "event" not in entry]
    return [{name: value for name, value in entry.items() if not name.startswith(UNEQUAL)} for entry in entries]
