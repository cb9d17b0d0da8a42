"""Runs of stage 2 as directories, and in processes of their own, made once: a finished run with the same settings is reused.

Knows launchers and run directories; does not train anything itself and imports no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from free_dist.config import Recipe, UserError
from free_dist.ds_config import read_ds_config
from free_dist.launchers import free_port
from free_dist.recipe_io import load_recipe, positive_integer, save_recipe
from free_dist.training.run_directory import (
    CHECKPOINTS,
    DISTRIBUTION,
    RECIPE,
    FinishedRun,
    check_same_run,
    differing_fields,
)

EXPORT = "export"
"""Directory of the trained exits, below the run directory."""

BACKBONE_FILES = "backbone_files_sha256"
"""Name, in manifests of exports and checkpoints, of the :func:`file_hash` of the backbone."""

EXPORT_MANIFEST = "exits.json"
"""File in an export that is written last."""


PAUSE = 20.0
"""An interval between logged steps that is so many times the usual one holds a pause."""

SETTINGS = ("backbone", "data", "exits", "loss", "training")
"""Sections of a recipe that decide what stage 2 learns."""

LEARNT = ("log.jsonl", CHECKPOINTS, EXPORT)
"""What a run directory holds once something was learnt with the settings beside it."""


LAUNCH = "FREE_DIST_LAUNCH"
"""Environment variable by which everything that one launcher started can be found again."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """How a program runs beside others."""

    jobs: int = 1
    """How many share the cores."""
    log: Path | None = None
    """File to which its output is appended instead of shown."""
    stopped: threading.Event = field(default_factory=threading.Event)
    """Set by Ctrl-C and by a failure: no further program starts."""


ALONE = Beside()


def add_launch_arguments(parser: argparse.ArgumentParser, *, ds_config: Path) -> None:
    """Add ``--ds_config`` and ``--num_gpus``, which say how :func:`train_once` starts training, to a launcher's parser."""
    parser.add_argument(
        "--ds_config",
        type=Path,
        default=ds_config,
        metavar="FILE",
        help="how training is distributed; default: %(default)s",
    )
    parser.add_argument(
        "--num_gpus", type=positive_integer, default=1, help="processes that train; default: %(default)s"
    )


def check_run(recipe: Recipe, ds_config: dict[str, dict[str, Any]]) -> None:
    """Raise UserError unless ``run_dir`` is new or holds an unfinished run of stage 2 with these settings;
    FinishedRun for a finished one.

    See :func:`~free_dist.training.run_directory.check_same_run`.
    """
    run_dir = Path(recipe.run_dir)
    path = run_dir / DISTRIBUTION
    former = read_ds_config(path) if path.is_file() else None
    check_same_run(run_dir, recipe, (former, ds_config), sections=SETTINGS, learnt=LEARNT)
    if exported_steps(run_dir) >= recipe.training.max_steps:
        raise FinishedRun(run_dir)


def exported_steps(run_dir: Path) -> int:
    """Steps that the exits in a run's export were trained for; 0 without an export."""
    manifest = run_dir / EXPORT / EXPORT_MANIFEST
    return int(json.loads(manifest.read_text())["extra"].get("steps", 0)) if manifest.is_file() else 0


def same_recipe(recipe: Recipe, path: Path) -> bool:
    """Whether ``path`` holds exactly this recipe."""
    return path.is_file() and load_recipe(path) == recipe


def file_hash(directory: Path, pattern: str = "*.safetensors") -> str:
    """sha256 over the weight files of a checkpoint directory, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob(pattern)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def learns_alike(recipe: Recipe, run_dir: Path) -> bool:
    """Whether the recipe of a run directory decides what is learnt as this one does, whatever it decodes and measures."""
    path = run_dir / RECIPE
    return path.is_file() and not differing_fields(load_recipe(path), recipe, SETTINGS)


def is_finished(recipe: Recipe, *, ds_config: Path, backbone: Path) -> bool:
    """Whether the run directory holds a run to its last step that learnt what this recipe, distribution file and backbone
    teach."""
    run_dir = Path(recipe.run_dir)
    manifest, distribution = run_dir / EXPORT / EXPORT_MANIFEST, run_dir / DISTRIBUTION
    if not (manifest.is_file() and distribution.is_file() and learns_alike(recipe, run_dir)):
        return False
    extra = json.loads(manifest.read_text())["extra"]
    return (
        extra.get("steps") == recipe.training.max_steps
        and distribution.read_bytes() == ds_config.read_bytes()
        and extra.get(BACKBONE_FILES) == file_hash(backbone)
    )


def goes_on(recipe: Recipe, *, ds_config: Path, backbone: Path) -> bool:
    """Whether the run directory holds an unfinished run that learns alike, with this distribution file and this backbone."""
    run_dir = Path(recipe.run_dir)
    distribution = run_dir / DISTRIBUTION
    if not learns_alike(recipe, run_dir) or not distribution.is_file():
        return False
    saved = sorted((run_dir / CHECKPOINTS).glob("step-????????/manifest.json"))
    return (
        bool(saved)
        and exported_steps(run_dir) < recipe.training.max_steps
        and distribution.read_bytes() == ds_config.read_bytes()
        and json.loads(saved[-1].read_text()).get(BACKBONE_FILES) == file_hash(backbone)
    )


def train_all(
    recipes: Mapping[str, Recipe],
    *,
    jobs: int,
    script: Path,
    ds_config: Path,
    num_processes: int,
    backbone: Callable[[Recipe], Path],
    tell: Callable[[str], None],
) -> dict[str, Path]:
    """:func:`train_once` for every recipe, ``jobs`` at a time; returns name -> export directory, in the order of ``recipes``.

    ``backbone``: a recipe -> the directory behind its ``backbone.path``.  With several jobs, what a run prints is in
    ``RUN_DIR.log``.  The first that fails, and Ctrl-C, keep the others from starting; those that run end first (by Ctrl-C they
    save, and a second call goes on with them).  Raises UserError as :func:`train_once`.
    """
    jobs, stopped = min(jobs, len(recipes)), threading.Event()

    def one(number: int, name: str) -> Path | None:
        if stopped.is_set():
            return None
        recipe = recipes[name]
        log = file_beside(recipe, "log") if jobs > 1 else None
        tell(f"[{number}/{len(recipes)}] {name}" + (f", printing to {log}" if log else ""))
        try:
            export, reused = train_once(
                recipe, script=script, ds_config=ds_config, num_processes=num_processes, backbone=backbone(recipe),
                company=Beside(jobs=jobs, log=log, stopped=stopped),
            )  # fmt: skip
        except UserError as error:
            stopped.set()
            tell(f"[{number}/{len(recipes)}] {name}: {error}")  # at once, not when the others have ended
            raise
        tell(f"[{number}/{len(recipes)}] {name}: {'made before' if reused else 'done'}")
        return export

    pool = ThreadPoolExecutor(jobs)
    try:
        try:
            running = {pool.submit(one, number, name): name for number, name in enumerate(recipes, start=1)}
            exports = {running[done]: done.result() for done in as_completed(running)}
        except KeyboardInterrupt:
            stopped.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    except KeyboardInterrupt:
        raise UserError("interrupted while training; start again to go on") from None
    return {name: export for name in recipes if (export := exports[name]) is not None}


def train_once(
    recipe: Recipe,
    *,
    script: Path,
    ds_config: Path,
    num_processes: int,
    backbone: Path,
    company: Beside = ALONE,
) -> tuple[Path, bool]:
    """Train a recipe with the deepspeed launcher unless that was done before; returns (export directory, reused).

    ``backbone`` is the directory behind the recipe's ``backbone.path``.  Goes on with an interrupted run; what else stands in
    ``recipe.run_dir`` is renamed and told.  Raises UserError when the training process fails or is interrupted.
    """
    run_dir = Path(recipe.run_dir)
    export = run_dir / EXPORT
    if is_finished(recipe, ds_config=ds_config, backbone=backbone):
        return export, True
    if run_dir.exists() and not goes_on(recipe, ds_config=ds_config, backbone=backbone):
        aside = next(path for n in count(1) if not (path := run_dir.with_name(f"{run_dir.name}.old-{n}")).exists())
        run_dir.rename(aside)
        if (log := file_beside(recipe, "log")).exists():
            log.rename(aside.with_name(f"{aside.name}.log"))
        print(f"{run_dir} held another run, which is now {aside}", flush=True)  # noqa: T201 - launchers' own progress
    scripts = Path(sys.executable).parent  # where the launcher of this very environment lies
    command: list[object] = [
        scripts / "deepspeed",
        "--quiet",
        "--num_gpus",
        num_processes,
        "--master_port",
        free_port(),
    ]
    command += [script, "--ds_config", ds_config]
    code = run_recipe(recipe, command, num_processes=num_processes, company=company)
    if code or not is_finished(recipe, ds_config=ds_config, backbone=backbone):
        raise UserError(
            f"training in {run_dir} ended with code {code}: see its messages {f'in {company.log}' if company.log else 'above'}"
        )
    return export, False


def file_beside(recipe: Recipe, suffix: str) -> Path:
    """``RUN_DIR.suffix``."""
    run_dir = Path(recipe.run_dir)
    return run_dir.parent / f"{run_dir.name}.{suffix}"


def run_recipe(recipe: Recipe, command: Sequence[object], *, num_processes: int = 1, company: Beside = ALONE) -> int:
    """Run a program that trains this recipe, which it is given by ``--config``; returns and raises as :func:`run_program`."""
    wanted = file_beside(recipe, "yaml")
    wanted.parent.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, wanted)
    try:
        return run_program(
            [*command, "--config", wanted], run_dir=Path(recipe.run_dir), num_processes=num_processes, company=company
        )
    finally:
        wanted.unlink(missing_ok=True)


def run_program(command: Sequence[object], *, run_dir: Path, num_processes: int = 1, company: Beside = ALONE) -> int:
    """Run a program of this environment that trains in ``run_dir``, as ``num_processes`` processes; returns its code.

    Returns when all processes have ended that it started, not only itself: a launcher that Ctrl-C ends does not wait for its
    ranks, which are still saving.  Raises UserError when interrupted.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // (num_processes * company.jobs))
    mark = uuid.uuid4().hex
    environment = {
        LAUNCH: mark,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
    }
    if not shutil.which("nvidia-smi"):
        environment["DS_ACCELERATOR"] = "cpu"  # else every process warns that it found nothing else
    if company.stopped.is_set():
        raise UserError(f"stopped before training in {run_dir} began")
    with ExitStack() as opened:
        output = opened.enter_context(company.log.open("ab")) if company.log else None
        process = subprocess.Popen(
            [str(word) for word in command],
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
        )
    try:
        code = process.wait()
        _wait_for_all(mark)
    except KeyboardInterrupt:  # which reached the launcher and its ranks too: they save and end by themselves
        process.wait()
        _wait_for_all(mark)
        raise UserError(f"interrupted while training in {run_dir}; start again to go on") from None
    return code


def _wait_for_all(mark: str) -> None:
    """Return when no process has the mark of a launch in its environment; zombies have none."""
    while any((process.info["environ"] or {}).get(LAUNCH) == mark for process in psutil.process_iter(["environ"])):
        time.sleep(0.1)


def training_seconds(run_dir: Path) -> float | None:
    """Seconds between the first and the last logged step of a run, over all steps; None where nothing was logged twice.

    Starting is not in it.  A pause between a stop and its continuation counts as one usual interval.
    """
    log = run_dir / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    points = sorted({line["step"]: line["time"] for line in lines if "step" in line and "time" in line}.items())
    paces = [(after[1] - before[1], after[0] - before[0]) for before, after in pairwise(points)]
    if not paces:
        return None
    usual = median(seconds / steps for seconds, steps in paces)
    counted = sum(seconds if seconds < PAUSE * usual * steps else usual * steps for seconds, steps in paces)
    return counted * points[-1][0] / (points[-1][0] - points[0][0])


def provenance() -> dict[str, str]:
    """Git commit of this code (``unknown`` outside a checkout) and the versions of what computes."""
    root = Path(__file__).resolve().parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    versions = {name: metadata.version(name) for name in ("free_dist", "torch", "deepspeed", "transformers")}
    return {"git_commit": found.stdout.strip() or "unknown", **versions}
