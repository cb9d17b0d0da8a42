"""launch/probe_depth.py as a user starts it: a recipe, two backbones, the files it promises; and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from free_dist.config import DataConfig
from free_dist.data.pretrained import load_pretrained
from free_dist.exits import ExitBank
from free_dist.exits.export import save_exits
from tests.programs import ROOT, launchers


def test_probe_depth_writes_curves_dips_and_overthinking_of_two_backbones(
    tiny_checkpoint: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: {tmp_path / 'run'}\nbackbone: {{path: {tiny_checkpoint}}}\n"
        f"data: {{root: {tiny_data.root}, questions_per_image: 2, max_turns: 3}}\n"
        "evaluation: {tasks: [vqa, caption], max_samples: 8}\n"
    )
    backbone, _ = load_pretrained(str(tiny_checkpoint))
    exports = {name: tmp_path / name for name in ("ce", "gan")}
    for directory in exports.values():
        save_exits(ExitBank(backbone, (1, 3)), directory, thresholds=0.9, backbone=backbone)
    said = launchers(
        [
            *("launch/probe_depth.py", recipe, "--exits", exports["gan"], "--exits-ce", exports["ce"]),
            *("--fine-tuned", tiny_checkpoint, "--lens-steps", 2, "--lens-tokens", 40),
        ]
    )
    assert "overthinking" in said
    content = json.loads((tmp_path / "run" / "mid_crisis.json").read_text())
    assert content["format"] == 1 and content["command"].startswith("python launch/probe_depth.py")
    for task in ("vqa", "caption"):
        own, other = content["tasks"][task], content["fine_tuned"][task]
        assert own["curves"].keys() == {"logit lens", "tuned lens", "CE-ET", "GAN-ET"} == own["dips"].keys()
        assert set(own["curves"]["CE-ET"]) == {"1", "3"}
        assert set(own["curves"]["logit lens"]) == {"1", "2", "3", "4"}
        assert own["curves"]["logit lens"]["4"]["accuracy"] == own["full_accuracy"]
        assert set(own["overthinking"]["tuned lens"]) == {"1", "2", "3", "any"}
        # The same backbone twice reads alike.
        assert other["curves"]["logit lens"] == own["curves"]["logit lens"]
        assert other["curves"].keys() == {"logit lens", "tuned lens"}
    for name in ("mid_crisis.png", "overthinking.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert picture.width > 500


def test_a_fine_tuned_copy_is_made_once(tiny_checkpoint: Path, tiny_data: DataConfig, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: {tmp_path / 'run'}\nbackbone: {{path: {tiny_checkpoint}}}\n"
        f"data: {{root: {tiny_data.root}, questions_per_image: 2, max_turns: 3, tasks: {{vqa: 1.0}}}}\n"
        "evaluation: {tasks: [vqa], max_samples: 4}\n"
    )
    words = ["launch/probe_depth.py", recipe, "--no-exits", "--lens-steps", 0, "--fine-tune", 3]
    copy = tmp_path / "run" / "tuned" / "backbone"
    assert f"reusing {copy}" not in launchers(words)
    content = json.loads((tmp_path / "run" / "mid_crisis.json").read_text())
    assert content["fine_tuned_backbone"] == str(copy)
    assert content["fine_tuned"].keys() == {"vqa"}
    before, after = (load_file(directory / "model.safetensors") for directory in (tiny_checkpoint, copy))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".self_attn." in name for name in changed)
    assert f"reusing {copy}" in launchers(words)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("probe_depth.py", ["{here}"], "has no recipe.yaml: give the directory of a run, or a recipe"),
        ("probe_depth.py", ["{recipe}", "--no-exits", "--exits", "x"], "--no-exits contradicts --exits"),
        ("probe_depth.py", ["{recipe}", "--fine-tuned", "x", "--fine-tune", "2"], "leave one out"),
        ("probe_depth.py", ["{recipe}", "--lens-steps", "-1"], "--lens-steps: want 0 or more"),
        ("place_exits.py", ["{here}"], "has no recipe.yaml: give the directory of a run, or a recipe"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(script: str, words: list[str], message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run_dir: runs/never\n")
    (tmp_path / "here").mkdir()
    command = [word.format(here=tmp_path / "here", recipe=recipe) for word in words]
    finished = subprocess.run(
        [sys.executable, f"launch/{script}", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert message in finished.stderr and len(finished.stderr.strip().splitlines()) == 1
