"""A BLIP captioner and filter trained from a backbone's vision tower, and the ablation that trains exits on what they wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from torch import nn

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_image_processor
from free_dist.config import DataConfig, UserError
from free_dist.data.capfilt import CapFiltSettings
from free_dist.data.capfilt_models import BlipCaptioner, BlipFilter
from free_dist.data.capfilt_training import BlipTraining, train_blip
from free_dist.data.images import decode_image
from free_dist.data.pretrained import load_pretrained
from free_dist.data.stream import records
from tests.programs import ROOT, launchers


def test_both_models_learn_the_captions_of_a_few_images(tiny_data: DataConfig, tmp_path: Path) -> None:
    different = {}
    for record in records(tiny_data, "train"):
        caption = next(caption for caption in record.captions if "," in caption)  # signs are part of what is learnt
        different[caption] = replace(record, captions=(caption,))
    few = list(different.values())[:6]
    texts = {record.key: record.captions[0] for record in few}
    backbone, encoder = load_pretrained("embedded")
    settings = BlipTraining(layers=1, steps=250, batch_size=8)
    train_blip(few, backbone.model.vision_model, encoder.image_processor, tmp_path, settings)
    images = [decode_image(record.image) for record in few]
    write = CapFiltSettings(min_length=6, max_length=35, top_p=0.1)
    written = BlipCaptioner(tmp_path / "captioner").write(images, [record.key for record in few], write)
    assert [own for (own,) in written] == list(texts.values())
    candidates = [list(texts.values())] * len(few)
    scores = BlipFilter(tmp_path / "filter").score(images, candidates)
    right = [own[i] for i, own in enumerate(scores)]
    wrong = [score for i, own in enumerate(scores) for j, score in enumerate(own) if j != i]
    assert fmean(right) > 0.8 and fmean(wrong) < 0.3


def test_other_towers_and_captions_without_difference_are_refused(
    tiny_backbone: Blip2Backbone, tiny_data: DataConfig, tmp_path: Path
) -> None:
    first = next(iter(records(tiny_data, "train")))
    one = [replace(first, captions=first.captions[:1])] * 3
    vision, processor = tiny_backbone.model.vision_model, new_image_processor()
    with pytest.raises(UserError, match="no two different ones"):
        train_blip(one, vision, processor, tmp_path, BlipTraining(steps=1))
    for other in (nn.Linear(2, 2), None):
        with pytest.raises(UserError, match=f"a {type(other).__name__} has not the shape of BLIP's vision tower"):
            train_blip(records(tiny_data, "train"), other, processor, tmp_path, BlipTraining(steps=1))
    assert not any(tmp_path.iterdir())


def test_a_damaged_picture_is_left_out(tiny_backbone: Blip2Backbone, tiny_data: DataConfig, tmp_path: Path) -> None:
    damaged = [
        replace(record, image=record.image[:60] if i == 1 else record.image)
        for i, record in enumerate(records(tiny_data, "train"))
    ]
    vision = tiny_backbone.model.vision_model
    train_blip(damaged, vision, new_image_processor(), tmp_path, BlipTraining(steps=1))
    assert {path.name for path in tmp_path.iterdir()} == {"captioner", "filter"}


def test_the_ablation_makes_its_data_and_trains_on_it(
    tiny_checkpoint: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = "launch/recipes/ablation.yaml"
    settings = [
        *(f"run_dir={run}", f"backbone.path={tiny_checkpoint}", f"data.root={tiny_data.root}", "data.tasks={vqa: 1.0}"),
        *("exits.exit_layers=[2]", "training.max_steps=2", "training.warmup_steps=1", "evaluation.max_samples=4"),
        "evaluation.tasks=[vqa]",  # a filter of five steps may keep no caption at all
    ]
    said = launchers(
        ["launch/ablate.py", "--only", "capfilt", "--seeds", 0, "--blip-steps", 5, "--config", recipe, *settings]
    )
    assert "capfilt" in said
    found = json.loads((run / "ablation.json").read_text())
    assert {row["ablation"] for row in found["rows"]} == {"base", "capfilt"}
    made = run / "capfilt-5-steps" / "data"
    assert all(len(record.synthetic_captions) <= 1 for record in records(made, "train"))
    assert f"root: {made}" in (run / "capfilt-seed-0" / "recipe.yaml").read_text()
    words = [
        "launch/train_blip.py",
        "--data",
        tiny_data.root,
        "--images",
        500,
        "--out",
        made.parent,
        "--backbone",
        tiny_checkpoint,
    ]
    again = launchers([*words, "--steps", 5])
    assert str(made.parent / "filter") in again and "step/s" not in again
    refused = subprocess.run(
        [sys.executable, *map(str, words), "--steps", "6"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and "holds models of another --steps (5)" in refused.stderr
