"""Training runs in processes of their own, made once: a run whose export is there, with the same recipe, is reused.

Knows launchers and run directories; does not train anything itself and imports no torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from free_dist.config import Recipe, UserError
from free_dist.recipe_io import load_recipe, save_recipe

EXPORT = "export"
"""Directory of the trained exits, below the run directory."""

EXPORT_MANIFEST = "exits.json"
"""File in an export that is written last."""


def same_recipe(recipe: Recipe, path: Path) -> bool:
    """Whether ``path`` holds exactly this recipe."""
    return path.is_file() and load_recipe(path) == recipe


def train_once(recipe: Recipe, *, script: Path, ds_config: Path, num_processes: int) -> tuple[Path, bool]:
    """Train a recipe with the deepspeed launcher unless that was done before; returns (export directory, reused).

    Removes what a stopped run, or one with another recipe, left in ``recipe.run_dir``.  Raises UserError when the training
    process fails.
    """
    run_dir = Path(recipe.run_dir)
    export = run_dir / EXPORT
    if (export / EXPORT_MANIFEST).is_file() and same_recipe(recipe, run_dir / "recipe.yaml"):
        return export, True
    shutil.rmtree(run_dir, ignore_errors=True)
    wanted = run_dir.parent / f"{run_dir.name}.yaml"
    wanted.parent.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, wanted)
    scripts = Path(sys.executable).parent  # where the launcher of this very environment lies
    command = [
        scripts / "deepspeed",
        "--num_gpus",
        str(num_processes),
        script,
        "--ds_config",
        ds_config,
        "--config",
        wanted,
    ]
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # The launcher otherwise looks for accelerators in turn and warns when it finds none.
        **({} if shutil.which("nvidia-smi") else {"DS_ACCELERATOR": "cpu"}),
        "PATH": os.pathsep.join((str(scripts), os.environ.get("PATH", ""))),
    }
    finished = subprocess.run([str(word) for word in command], env=os.environ | environment, check=False)
    wanted.unlink()
    if finished.returncode or not (export / EXPORT_MANIFEST).is_file():
        raise UserError(f"training in {run_dir} ended with code {finished.returncode}: see its messages above")
    return export, False
