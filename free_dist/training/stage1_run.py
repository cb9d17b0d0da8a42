"""A stage-1 run as a directory: which settings made it, whether it goes on, and what its DeepSpeed section is.

Imports no torch.  Knows recipes and files; does not train anything.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from free_dist.atomic import write_atomically
from free_dist.config import Recipe, UserError
from free_dist.recipe_io import save_recipe
from free_dist.training.run_directory import CHECKPOINTS, DISTRIBUTION, RECIPE, FinishedRun, check_same_run

BACKBONE = "backbone"
"""Directory of the trained backbone, below the run's; written last."""
ADAPTER = "adapter"
"""Directory of the LoRA update by itself, in peft's format."""
MADE = "start"
"""Directory of a backbone that had to be made before stage 1 could start from it."""
LEARNT = ("log.jsonl", CHECKPOINTS, MADE)
"""What a run directory holds once something was learnt with the settings beside it."""

SETTINGS = ("backbone", "data", "finetune", "training")
"""Sections of a recipe that decide what stage 1 learns."""


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
    """Raise UserError unless ``run_dir`` is new or holds an unfinished run of stage 1 with these settings;
    FinishedRun for a finished one.

    See :func:`~free_dist.training.run_directory.check_same_run`.
    """
    run_dir = Path(recipe.run_dir)
    if (run_dir / BACKBONE).exists():
        raise FinishedRun(run_dir)
    path = run_dir / DISTRIBUTION
    former = json.loads(path.read_text()) if path.is_file() else None
    check_same_run(run_dir, recipe, (former, section), sections=SETTINGS, learnt=LEARNT)


def write_run(recipe: Recipe, section: dict[str, Any]) -> None:
    """Record what the run is, in the run's directory; the distribution is itself a valid ``--ds_config`` of stage 1."""
    run_dir = Path(recipe.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / DISTRIBUTION, json.dumps(section, indent=2).encode())
    save_recipe(recipe, run_dir / RECIPE)
