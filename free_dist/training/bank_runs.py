"""What is trained once below a run directory for whoever compares blocks: banks with exits after many, a fine-tuned copy.

Such a bank trains all its exits in one run, each on its own loss: exits share nothing that is trained, so every subset of them is
a bank that could have been trained alone, but for the gradient clipping, which is over all of them.  Does not know what banks are
compared for.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from free_dist.config import FinetuneConfig, Recipe, UserError
from free_dist.recipe_io import load_recipe, positive_integer
from free_dist.training.run_directory import CHECKPOINTS, RECIPE, differing_fields
from free_dist.training.runs import add_launch_arguments, run_recipe, train_once
from free_dist.training.stage1_run import SETTINGS as STAGE1_SETTINGS

BANKS = "placement"
"""Directory of the banks below a run's."""
TUNED = "tuned"
"""Directory of the fine-tuning run below a run's; the copy is its ``backbone``."""
BANK_STEPS = 150
"""Training steps of a bank with exits after all blocks."""


def add_bank_arguments(parser: argparse.ArgumentParser, *, ds_config: Path) -> None:
    """Add the run or recipe, its overrides, and how banks are trained to a launcher's parser."""
    parser.add_argument("source", type=Path, metavar="RUN_OR_RECIPE", help="a run directory, or a recipe's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe fields to change")
    add_launch_arguments(parser, ds_config=ds_config)
    parser.add_argument(
        "--bank-steps", type=positive_integer, default=BANK_STEPS,
        help="training steps of the exits after every block (default: %(default)s)",
    )  # fmt: skip


def recipe_of(source: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of a run, whose results go to that very directory, or of a YAML file.  Raises UserError for neither."""
    if source.is_dir():
        if not (source / RECIPE).is_file():
            raise UserError(
                f"{source} has no {RECIPE}: give the directory of a run, or a recipe such as launch/recipes/quickstart.yaml"
            )
        return replace(load_recipe(source / RECIPE, overrides), run_dir=str(source))
    return load_recipe(source, overrides)


def train_bank(
    recipe: Recipe,
    layers: Sequence[int],
    *,
    name: str,
    variant: str,
    adversarial: bool,
    steps: int,
    script: Path,
    ds_config: Path,
    num_processes: int,
    say: Callable[[str], None],
) -> Path:
    """The export of exits after ``layers``, trained for ``steps`` steps in ``RUN/placement/NAME`` unless it is there already.

    ``script`` is launch/train.py; ``adversarial``: with the recipe's discriminators, or without any.  An interrupted training
    goes on; a finished one keeps no checkpoints.  Raises what :func:`~free_dist.training.runs.train_once` raises.
    """
    from free_dist.backbones.embedded import resolve_backbone

    part = replace(
        recipe,
        run_dir=str(Path(recipe.run_dir) / BANKS / name),
        exits=replace(recipe.exits, exit_layers=list(layers), variant=variant),
        loss=replace(recipe.loss, adversarial_weight=recipe.loss.adversarial_weight if adversarial else 0.0),
        training=replace(recipe.training, max_steps=steps, warmup_steps=None, sample_every=0),
    )
    say(f"exits after {len(layers)} blocks, {name}, {steps} steps")
    started = time.perf_counter()
    export, reused = train_once(
        part, script=script, ds_config=ds_config, num_processes=num_processes,
        backbone=resolve_backbone(recipe.backbone.path),
    )  # fmt: skip
    shutil.rmtree(export.parent / CHECKPOINTS, ignore_errors=True)
    say(f"reusing {export}" if reused else f"trained in {time.perf_counter() - started:.0f} s")
    return export


def fine_tuned_copy(recipe: Recipe, *, steps: int, script: Path, say: Callable[[str], None]) -> Path:
    """A copy of the backbone whose language model was trained on the recipe's tasks by LoRA for ``steps`` steps, made once.

    The directory is ``RUN/tuned/backbone``; ``script`` is launch/finetune.py.  An interrupted training goes on; a finished one
    keeps no checkpoints.  Raises UserError when it fails, or when the directory holds another run.
    """
    run_dir = Path(recipe.run_dir) / TUNED
    part = replace(
        recipe,
        run_dir=str(run_dir),
        training=replace(recipe.training, max_steps=steps, warmup_steps=None, sample_every=0),
        finetune=FinetuneConfig(train=["lora"], learning_rate=5e-4, batch_size=32, eval_every=0),
    )
    copy = run_dir / "backbone"
    say(f"fine-tuned copy of the backbone, LoRA, {steps} steps")
    if (copy / "config.json").is_file() and not differing_fields(load_recipe(run_dir / RECIPE), part, STAGE1_SETTINGS):
        say(f"reusing {copy}")
        return copy
    started = time.perf_counter()
    code = run_recipe(part, [sys.executable, script])
    if code:
        raise UserError(f"fine-tuning in {run_dir} ended with code {code}: see its messages above")
    shutil.rmtree(run_dir / CHECKPOINTS, ignore_errors=True)
    say(f"trained in {time.perf_counter() - started:.0f} s")
    return copy
