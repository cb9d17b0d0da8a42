"""Training runs in processes of their own, made once: a finished run with the same settings and backbone is reused.

Knows launchers and run directories; does not train anything itself and imports no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from free_dist.config import Recipe, UserError
from free_dist.recipe_io import load_recipe, save_recipe

EXPORT = "export"
"""Directory of the trained exits, below the run directory."""

EXPORT_MANIFEST = "exits.json"
"""File in an export that is written last."""


def add_launch_arguments(parser: argparse.ArgumentParser, *, ds_config: Path) -> None:
    """Add ``--ds_config`` and ``--num_gpus``, which say how :func:`train_once` starts training, to a launcher's parser."""
    parser.add_argument(
        "--ds_config",
        type=Path,
        default=ds_config,
        metavar="FILE",
        help="how training is distributed; default: %(default)s",
    )
    parser.add_argument("--num_gpus", type=int, default=1, help="processes that train; default: %(default)s")


def refuse_existing_run(run_dir: Path) -> None:
    """Raise UserError if a run has been logged to ``run_dir``: runs are never overwritten."""
    if (run_dir / "log.jsonl").exists():
        raise UserError(f"run_dir={run_dir} already holds a run: choose another run_dir or remove it")


def same_recipe(recipe: Recipe, path: Path) -> bool:
    """Whether ``path`` holds exactly this recipe."""
    return path.is_file() and load_recipe(path) == recipe


def file_hash(directory: Path) -> str:
    """sha256 over the safetensors files of a checkpoint directory, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def is_finished(recipe: Recipe, *, ds_config: Path, backbone: Path) -> bool:
    """Whether the run directory holds a run to its last step with this recipe, distribution file and backbone."""
    run_dir = Path(recipe.run_dir)
    manifest, distribution = run_dir / EXPORT / EXPORT_MANIFEST, run_dir / "ds_config.json"
    if not (manifest.is_file() and distribution.is_file() and same_recipe(recipe, run_dir / "recipe.yaml")):
        return False
    extra = json.loads(manifest.read_text())["extra"]
    return (
        extra.get("steps") == recipe.training.max_steps
        and distribution.read_bytes() == ds_config.read_bytes()
        and extra.get("backbone_files_sha256") == file_hash(backbone)
    )


def train_once(
    recipe: Recipe, *, script: Path, ds_config: Path, num_processes: int, backbone: Path
) -> tuple[Path, bool]:
    """Train a recipe with the deepspeed launcher unless that was done before; returns (export directory, reused).

    ``backbone`` is the directory behind the recipe's ``backbone.path``.  Removes what an interrupted run, or one with other
    settings, left in ``recipe.run_dir``.  Raises UserError when the training process fails or is interrupted.
    """
    run_dir = Path(recipe.run_dir)
    export = run_dir / EXPORT
    if is_finished(recipe, ds_config=ds_config, backbone=backbone):
        return export, True
    shutil.rmtree(run_dir, ignore_errors=True)
    wanted = run_dir.parent / f"{run_dir.name}.yaml"
    wanted.parent.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, wanted)
    scripts = Path(sys.executable).parent  # where the launcher of this very environment lies
    command: list[object] = [
        scripts / "deepspeed",
        "--quiet",
        "--num_gpus",
        num_processes,
        "--master_port",
        _free_port(),
    ]
    command += [script, "--ds_config", ds_config, "--config", wanted]
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PATH": os.pathsep.join((str(scripts), os.environ.get("PATH", ""))),
    }
    if not shutil.which("nvidia-smi"):
        environment["DS_ACCELERATOR"] = "cpu"  # else every process warns that it found nothing else
    process = subprocess.Popen([str(word) for word in command], env=os.environ | environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reached the launcher and its ranks too: they export and end by themselves
        raise UserError(f"interrupted while training in {run_dir}; start again to train it anew") from None
    finally:
        wanted.unlink(missing_ok=True)
    if code or not is_finished(recipe, ds_config=ds_config, backbone=backbone):
        raise UserError(f"training in {run_dir} ended with code {code}: see its messages above")
    return export, False


def provenance() -> dict[str, str]:
    """Git commit of this code (``unknown`` outside a checkout) and the versions of what computes."""
    root = Path(__file__).resolve().parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    versions = {name: metadata.version(name) for name in ("free_dist", "torch", "deepspeed", "transformers")}
    return {"git_commit": found.stdout.strip() or "unknown", **versions}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
