"""Placement by its launcher, on a tiny backbone with exits that are really trained."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from free_dist.config import DataConfig
from free_dist.exits.export import read_exits_manifest
from tests.programs import launchers


def test_the_found_set_is_also_trained_alone(tiny_checkpoint: Path, tiny_data: DataConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [
        *(f"run_dir={run}", f"backbone.path={tiny_checkpoint}", f"data.root={tiny_data.root}", "data.tasks={vqa: 1.0}"),
        *("evaluation.tasks=[vqa]", "evaluation.max_samples=6", "decoding.max_new_tokens=4"),
        *("exits.exit_layers=[1, 3]", "training.max_steps=3", "training.warmup_steps=1"),
    ]
    amounts = ["--record", 6, "--samples", 4, "--rounds", 1, "--random-sets", 1, "--bank-steps", 2]
    command = [
        "launch/place_exits.py",
        "launch/recipes/quickstart.yaml",
        *settings,
        *amounts,
        "--max-harm",
        10,
        "--retrain",
    ]
    for _ in range(12):  # on a busy machine four tiny blocks may be measured such that no exit pays, and none is found
        said = launchers(command)
        placement = json.loads((run / "placement.json").read_text())
        if placement["predicted"]["layers"]:
            break
    alone, found = placement["baselines"]["found, trained alone"], placement["predicted"]
    assert alone["layers"] == found["layers"] != []
    assert alone["measured_speed"] > 0 and alone["n"] == found["n"] == 4
    manifest = read_exits_manifest(run / "placement" / "alone" / "export")
    assert list(manifest.exit_layers) == found["layers"] and manifest.extra["steps"] == 3
    assert "found, trained alone" in said
    with Image.open(run / "placement.png") as drawn:
        assert drawn.width > 500
