"""A stage-1 run as a directory: which settings made it, whether it goes on, and what its DeepSpeed section is.

Imports no torch.  Knows recipes and files; does not train anything.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from free_dist.atomic import write_atomically
from free_dist.config import Recipe, UserError
from free_dist.recipe_io import load_recipe, save_recipe

RECIPE = "recipe.yaml"
DISTRIBUTION = "ds_config.json"
BACKBONE = "backbone"
"""Directory of the trained backbone, below the run's; written last."""
ADAPTER = "adapter"
"""Directory of the LoRA update by itself, in peft's format."""
CHECKPOINTS = "checkpoints"
MADE = "start"
"""Directory of a backbone that had to be made before stage 1 could start from it."""
LEARNT = ("log.jsonl", CHECKPOINTS, MADE)
"""What a run directory holds once something was learnt with the settings beside it."""

SETTINGS = ("backbone", "data", "finetune", "training")
"""Sections of a recipe that decide what stage 1 learns."""

FREE_FIELDS = frozenset(
    {
        "finetune.eval_every",
        "finetune.keep_adapter",
        "finetune.save_every",
        "training.expected_world_size",
        "training.hang_timeout",
        "training.log_every",
        "training.max_skipped_in_a_row",
        "training.peak_tflops",
        "training.sample_every",
        "training.stall_timeout",
    }
)
"""Fields of those sections that may change between the parts of a resumed run."""


def engine_section(recipe: Recipe, ds_config: dict[str, dict[str, Any]] | None, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of stage 1's one engine.

    It is the section ``exits`` of a ds_config (a file without sections is that section), with the recipe's learning rate and
    weight decay; without a ds_config, float32 and ZeRO 1 with the recipe's batch size and gradient limit.  Raises UserError
    when that batch size cannot be shared by ``world_size`` processes.
    """
    settings = recipe.finetune
    if ds_config is not None:
        section = copy.deepcopy(ds_config["exits"])
    else:
        rows, rest = divmod(settings.batch_size, world_size)
        if rest:
            raise UserError(
                f"finetune.batch_size={settings.batch_size}: cannot be shared equally by {world_size} processes"
            )
        section = {
            "train_micro_batch_size_per_gpu": rows,
            "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.98], "torch_adam": True}},
            "gradient_clipping": settings.grad_clip,
            "zero_optimization": {"stage": 1},
        }
    section["optimizer"].setdefault("params", {}).update(lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return section


def check_run(recipe: Recipe, section: dict[str, Any]) -> None:
    """Raise UserError unless ``run_dir`` is new or holds an unfinished run of stage 1 with these settings.

    A run that ended before it learnt anything binds nobody: its settings may be what had to be corrected.
    """
    run_dir = Path(recipe.run_dir)
    if (run_dir / BACKBONE).exists():
        raise UserError(f"run_dir={run_dir} already holds a finished run: choose another run_dir or remove it")
    if not (run_dir / RECIPE).is_file():
        if (run_dir / "log.jsonl").exists():
            raise UserError(f"run_dir={run_dir} already holds a run without a recipe: choose another run_dir")
        return
    if not any((run_dir / name).exists() for name in LEARNT):
        return
    differing = _differences(load_recipe(run_dir / RECIPE), recipe)
    if not differing and (run_dir / DISTRIBUTION).is_file():
        former = json.loads((run_dir / DISTRIBUTION).read_text())
        differing = [
            f"--ds_config: {key} is {former.get(key)!r} there, {section.get(key)!r} here"
            for key in sorted(former.keys() | section.keys())
            if former.get(key) != section.get(key)
        ]
    if differing:
        raise UserError(
            f"run_dir={run_dir} already holds a run with other settings ({'; '.join(differing)}): start it with its own to "
            "go on, or choose another run_dir"
        )


def write_run(recipe: Recipe, section: dict[str, Any]) -> None:
    """Record what the run is, in the run's directory; the distribution is itself a valid ``--ds_config`` of stage 1."""
    run_dir = Path(recipe.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / DISTRIBUTION, json.dumps(section, indent=2).encode())
    save_recipe(recipe, run_dir / RECIPE)


def forget_log_after(log: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run repeats, so that every step is logged once."""
    if not log.is_file():
        return
    # A process killed while it wrote leaves half a line, the last one.
    whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    write_atomically(log, "".join(kept).encode())


def _differences(there: Recipe, here: Recipe) -> list[str]:
    found = []
    for section in SETTINGS:
        before, now = asdict(there)[section], asdict(here)[section]
        for name in now:
            if before[name] != now[name] and f"{section}.{name}" not in FREE_FIELDS:
                found.append(f"{section}.{name} is {before[name]!r} there, {now[name]!r} here")
    return found
