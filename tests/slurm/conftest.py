"""One cluster for all tests of a file, and the tiny stage-1 run that they submit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent / "distributed"), str(ROOT)]

import stage1_scene as scene  # noqa: E402
import stage2_scene as exits_scene  # noqa: E402
from cluster import Cluster, why_not  # noqa: E402
from jobs import Run, losses  # noqa: E402

from free_dist.config import DataConfig, Recipe  # noqa: E402
from free_dist.launchers import free_port  # noqa: E402
from free_dist.recipe_io import save_recipe  # noqa: E402

STEPS = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes; skips where root or Slurm is missing."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, tiny_tokenizer) -> Path:
    """A directory with a tiny backbone to start from."""
    directory = tmp_path_factory.mktemp("stage1")
    scene.save_new("opt", tiny_tokenizer, directory / "start")
    return directory


@pytest.fixture(scope="session")
def prepare(workplace: Path, tiny_data: DataConfig) -> Callable[[str], Run]:
    """Name -> a run of two processes in a directory of its own, not yet started; all are the same but for that directory."""

    def prepared(name: str) -> Run:
        recipe = scene.recipe(
            tiny_data, workplace / name, workplace / "start", steps=STEPS, train=["projection", "lora"], save_every=20,
            eval_every=30,
        )  # fmt: skip
        return written(recipe, workplace / f"{name}.yaml")

    def written(recipe: Recipe, path: Path) -> Run:
        return saved(recipe, path, scene.section(recipe, size=2))

    return prepared


@pytest.fixture(scope="session")
def prepare_exits(workplace: Path, tiny_data: DataConfig) -> Callable[[str], Run]:
    """The same for a run of stage 2 on the backbone from which those of stage 1 start."""

    def prepared(name: str) -> Run:
        recipe = exits_scene.recipe(tiny_data, workplace / name, workplace / "start", steps=STEPS, save_every=20)
        sections = exits_scene.sections(recipe, size=2)
        return saved(recipe, workplace / f"{name}.yaml", sections)

    return prepared


def saved(recipe: Recipe, path: Path, ds_config: dict[str, Any]) -> Run:
    save_recipe(recipe, path)
    distribution = path.with_suffix(".json")
    distribution.write_text(json.dumps(ds_config))
    return Run(recipe=recipe, arguments=("--config", str(path), "--ds_config", str(distribution)))


def by_torchrun(launcher: str, run: Run) -> list[float]:
    """Losses of a run as torchrun makes it on this machine, nothing happening to it."""
    command = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", 2, "--master_port", free_port()]
    subprocess.run(
        [str(word) for word in (*command, launcher, *run.arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return losses(run)


@pytest.fixture(scope="session")
def uninterrupted(prepare: Callable[[str], Run]) -> list[float]:
    """Losses of stage 1 where nothing happens to it."""
    return by_torchrun("launch/finetune.py", prepare("uninterrupted"))


@pytest.fixture(scope="session")
def uninterrupted_exits(prepare_exits: Callable[[str], Run]) -> list[float]:
    """Losses of stage 2 where nothing happens to it."""
    return by_torchrun("launch/train.py", prepare_exits("uninterrupted-exits"))
