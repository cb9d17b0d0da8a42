"""The main job end to end on a tiny model: what it leaves behind, and what a second run reuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from free_dist.config import UserError
from free_dist.recipe_io import load_recipe
from free_dist.training.finetune import save_backbone
from free_dist.training.runs import is_finished, train_once

ROOT = Path(__file__).resolve().parents[2]
DS_CONFIG = ROOT / "ds_configs" / "cpu.json"
COLUMNS = [
    "task",
    "method",
    "threshold",
    "quality",
    "quality_full",
    "agreement",
    "mean_blocks",
    "layer_ratio",
    "wall_ratio",
    "wall_ratio_hf",
    "n",
]


def quickstart(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/quickstart.py", *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_backbone, tiny_encoder, tiny_root: Path) -> tuple[Path, list[str], str]:
    directory = tmp_path_factory.mktemp("quickstart")
    save_backbone(tiny_backbone, tiny_encoder, directory / "backbone")
    overrides = [
        f"run_dir={directory / 'run'}",
        f"backbone.path={directory / 'backbone'}",
        f"data.root={tiny_root}",
        "exits.exit_layers=[1,3]",
        "training.max_steps=3",
        "training.warmup_steps=1",
        "training.sample_every=0",
        "evaluation.max_samples=4",
        "evaluation.timing_samples=2",
        "evaluation.thresholds=[0.5]",
        "evaluation.tasks=[vqa,caption]",
        "decoding.max_new_tokens=4",
    ]
    first = quickstart(*overrides)
    assert first.returncode == 0, f"{first.stdout}\n{first.stderr}"
    return directory / "run", overrides, first.stdout


def test_it_leaves_rows_of_every_method_with_the_promised_columns(finished) -> None:
    rows = json.loads((finished[0] / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"full", "hf", "exits", "exits_ce"}
    assert {row["task"] for row in rows} == {"vqa", "caption"}
    assert all(list(row)[: len(COLUMNS)] == COLUMNS for row in rows)


def test_it_prints_a_table_and_the_paths_of_plots_and_curves(finished) -> None:
    run_dir, _, printed = finished
    assert "speed / full" in printed
    for name in ("results.json", "report.md", "speed_quality.png", "accuracy_per_block.png"):
        assert str(run_dir / name) in printed
        assert (run_dir / name).stat().st_size > 0
    assert f"--logdir {run_dir}" in printed


def test_only_the_adversarial_run_has_discriminators(finished) -> None:
    logs = {method: (finished[0] / method / "log.jsonl").read_text() for method in ("exits", "exits_ce")}
    assert "loss_discriminator" in logs["exits"]
    assert "loss_discriminator" not in logs["exits_ce"]


def test_a_second_run_reuses_everything(finished) -> None:
    run_dir, overrides, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    second = quickstart(*overrides)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("reusing") == 3
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()} == before


def test_an_interrupted_or_changed_run_is_not_taken_for_finished(finished, tmp_path: Path) -> None:
    run_dir = finished[0] / "exits"
    backbone = finished[0].parent / "backbone"
    recipe = load_recipe(run_dir / "recipe.yaml")
    assert is_finished(recipe, ds_config=DS_CONFIG, backbone=backbone)
    assert not is_finished(
        replace(recipe, loss=replace(recipe.loss, task_weight=2.0)), ds_config=DS_CONFIG, backbone=backbone
    )
    measured_otherwise = replace(recipe, evaluation=replace(recipe.evaluation, max_samples=1))
    assert is_finished(measured_otherwise, ds_config=DS_CONFIG, backbone=backbone), "it would learn the same"
    assert not is_finished(recipe, ds_config=DS_CONFIG.with_name("cpu_bf16.json"), backbone=backbone)
    (tmp_path / "model.safetensors").write_bytes(b"another backbone")
    assert not is_finished(recipe, ds_config=DS_CONFIG, backbone=tmp_path)

    manifest = run_dir / "export" / "exits.json"
    kept = manifest.read_text()
    content = json.loads(kept)
    content["extra"]["steps"] -= 1  # what Ctrl-C before the last step leaves
    try:
        manifest.write_text(json.dumps(content))
        assert not is_finished(recipe, ds_config=DS_CONFIG, backbone=backbone)
    finally:
        manifest.write_text(kept)


def test_another_run_in_the_way_is_renamed_and_not_removed(finished, tmp_path: Path) -> None:
    run_dir = tmp_path / "exits"
    shutil.copytree(finished[0] / "exits", run_dir)
    recipe = load_recipe(run_dir / "recipe.yaml", [f"run_dir={run_dir}", "loss.task_weight=2"])
    fails = tmp_path / "fails.py"
    fails.write_text("raise SystemExit(3)")
    arguments = {
        "script": fails,
        "ds_config": DS_CONFIG,
        "num_processes": 1,
        "backbone": finished[0].parent / "backbone",
    }
    for number in (1, 2):
        run_dir.mkdir(exist_ok=True)
        with pytest.raises(UserError, match="ended with code"):
            train_once(recipe, **arguments)
        assert (tmp_path / f"exits.old-{number}").is_dir()
    old = tmp_path / "exits.old-1" / "export" / "exits.safetensors"
    assert old.read_bytes() == (finished[0] / "exits" / "export" / "exits.safetensors").read_bytes()
