"""One cluster for all tests of a file, and the tiny stage-1 run that they submit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent / "distributed"), str(ROOT)]

import stage1_scene as scene  # noqa: E402
from cluster import Cluster, why_not  # noqa: E402
from jobs import Run, losses  # noqa: E402

from free_dist.config import DataConfig, Recipe  # noqa: E402
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
        save_recipe(recipe, path)
        distribution = workplace / "ds.json"
        distribution.write_text(json.dumps(scene.section(recipe, size=2)))
        return Run(recipe=recipe, arguments=("--config", str(path), "--ds_config", str(distribution)))

    return prepared


@pytest.fixture(scope="session")
def uninterrupted(prepare: Callable[[str], Run]) -> list[float]:
    """Losses of the run as torchrun makes it on this machine, nothing happening to it."""
    run = prepare("uninterrupted")
    command = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", 2, "--master_port", scene.free_port()]
    subprocess.run(
        [str(word) for word in (*command, "launch/finetune.py", *run.arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return losses(run)
