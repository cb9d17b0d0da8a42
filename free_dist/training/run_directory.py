"""A training run as a directory: which settings made it, whether the same command goes on with it, and what it has logged.

Imports no torch.  Knows recipes and files; does not train anything and does not know what a checkpoint holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from free_dist.atomic import replaced_file
from free_dist.config import Recipe, UserError
from free_dist.ds_config import SECTIONS, UNTRAINED_KEYS
from free_dist.launchers import is_restarted
from free_dist.recipe_io import load_recipe

RECIPE = "recipe.yaml"
DISTRIBUTION = "ds_config.json"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples.jsonl"
"""Which samples every step saw: one line per step, ids in the order of the global batch."""

FREE_FIELDS = frozenset(
    {
        "data.bad_sample_budget",
        "data.cache",
        "data.read_timeout",
        "data.workers",
        "finetune.eval_every",
        "finetune.keep_adapter",
        "training.expected_world_size",
        "training.hang_timeout",
        "training.keep_best",
        "training.keep_last",
        "training.log_every",
        "training.log_samples",
        "training.max_skipped_in_a_row",
        "training.peak_tflops",
        "training.sample_every",
        "training.save_every",
        "training.save_in_background",
        "training.stall_timeout",
    }
)
"""Recipe fields that may change between the parts of a resumed run: they do not change what is learnt."""

EVALUATION = "calibration_"
"""How the names of evaluated numbers begin in the log."""


def differing_fields(there: Recipe, here: Recipe, sections: tuple[str, ...]) -> list[str]:
    """One phrase per field of these sections that two parts of one run must share and do not."""
    found = []
    for section in sections:
        before, now = asdict(there)[section], asdict(here)[section]
        for name in now:
            if before[name] != now[name] and f"{section}.{name}" not in FREE_FIELDS:
                found.append(f"{section}.{name} is {before[name]!r} there, {now[name]!r} here")
    return found


def differing_distribution(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One phrase per key of a DeepSpeed section, or of a file of sections, that changes what is learnt and differs.

    How work is spread (ZeRO stages, rows per process, accumulation) may change: the rows of a step are looked at elsewhere.
    """
    if there.keys() & set(SECTIONS) and here.keys() & set(SECTIONS):
        return [
            phrase.replace("--ds_config: ", f"--ds_config, section {name!r}: ")
            for name in SECTIONS
            for phrase in differing_distribution(there.get(name, {}), here.get(name, {}))
        ]
    return [
        f"--ds_config: {key} is {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted((there.keys() | here.keys()) - UNTRAINED_KEYS)
        if there.get(key) != here.get(key)
    ]


class FinishedRun(UserError):
    """The directory holds a run to its last step."""

    def __init__(self, run_dir: Path) -> None:
        self.told = f"run_dir={run_dir} already holds a finished run"
        super().__init__(f"{self.told}: choose another run_dir or remove it")


def left_nothing(check: Callable[[], None]) -> str:
    """What to say where a scheduler restarts a job that was lost after its run had ended; empty where something is left to do.

    ``check`` raises FinishedRun if the run had ended; for anybody but a scheduler that stays an error.
    """
    try:
        check()
    except FinishedRun as finished:
        if not is_restarted(os.environ):
            raise
        return f"{finished.told}: nothing is left for this restart to do"
    return ""


def check_same_run(
    run_dir: Path,
    recipe: Recipe,
    distributions: tuple[Mapping[str, Any] | None, Mapping[str, Any]],
    *,
    sections: tuple[str, ...],
    learnt: tuple[str, ...],
) -> None:
    """Raise UserError unless ``run_dir`` is new or holds a run with these settings, of which a start goes on.

    ``distributions``: the DeepSpeed configuration of the run that is there, if it has left one, and the one of this start.
    ``sections``: those of a recipe that decide what is learnt; ``learnt``: names below ``run_dir`` that show that something
    was.  A run that ended before it learnt anything binds nobody: its settings may be what had to be corrected.
    """
    if not (run_dir / RECIPE).is_file():
        if (run_dir / "log.jsonl").exists():
            raise UserError(f"run_dir={run_dir} already holds a run without a recipe: choose another run_dir")
        return
    if not any((run_dir / name).exists() for name in learnt):
        return
    differing = differing_fields(load_recipe(run_dir / RECIPE), recipe, sections)
    there, here = distributions
    if there is not None:
        differing += differing_distribution(there, here)
    if differing:
        raise UserError(
            f"run_dir={run_dir} already holds a run with other settings ({'; '.join(differing)}): start it with its own to "
            "go on, or choose another run_dir"
        )


def forget_log_after(log: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run repeats, so that every step is logged once."""
    if log.is_file():
        with replaced_file(log) as kept:
            kept.writelines(line for line, entry in _entries(log) if entry["step"] <= step)


def is_evaluated(log: Path, step: int) -> bool:
    """Whether the log has the evaluation after ``step``."""
    return log.is_file() and any(
        entry["step"] == step and any(key.startswith(EVALUATION) for key in entry) for _, entry in _entries(log)
    )


def _entries(log: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every whole line of a log; a process killed while it wrote leaves half a one, the last."""
    with open(log, "rb") as lines:
        yield from ((line, json.loads(line)) for line in lines if line.endswith(b"\n"))
