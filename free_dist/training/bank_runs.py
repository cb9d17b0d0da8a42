"""Banks with exits after many blocks, trained once below a run directory, for whoever wants to compare blocks.

Such a bank trains all its exits in one run, each on its own loss: exits share nothing that is trained, so every subset of them is
a bank that could have been trained alone, but for the gradient clipping, which is over all of them.  Does not know what banks are
compared for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from free_dist.config import Recipe, UserError
from free_dist.recipe_io import load_recipe, positive_integer
from free_dist.training.run_directory import RECIPE
from free_dist.training.runs import add_launch_arguments, train_once

BANKS = "placement"
"""Directory of the banks below a run's."""
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

    ``script`` is launch/train.py; ``adversarial``: with the recipe's discriminators, or without any.  Raises what
    :func:`~free_dist.training.runs.train_once` raises.
    """
    from free_dist.backbones.embedded import resolve_backbone

    part = replace(
        recipe,
        run_dir=str(Path(recipe.run_dir) / BANKS / name),
        exits=replace(recipe.exits, exit_layers=list(layers), variant=variant),
        loss=replace(recipe.loss, adversarial_weight=recipe.loss.adversarial_weight if adversarial else 0.0),
        training=replace(recipe.training, max_steps=steps, warmup_steps=None, sample_every=0, save_every=0),
    )
    say(f"exits after {len(layers)} blocks, {name}, {steps} steps")
    started = time.perf_counter()
    export, reused = train_once(
        part, script=script, ds_config=ds_config, num_processes=num_processes,
        backbone=resolve_backbone(recipe.backbone.path),
    )  # fmt: skip
    say(f"reusing {export}" if reused else f"trained in {time.perf_counter() - started:.0f} s")
    return export
