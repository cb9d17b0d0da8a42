"""The tiny run of stage 2 that its tests share, on a backbone of ``stage1_scene``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import stage1_scene as stage1

from free_dist.config import BackboneConfig, DataConfig, DecodingConfig, ExitsConfig, Recipe, TrainingConfig


def recipe(data: DataConfig, run_dir: Path, start: Path, *, steps: int, **training: Any) -> Recipe:
    """Exits after two of three blocks, each step logged."""
    settings = {"warmup_steps": 2, "log_every": 1, "sample_every": 0} | training
    return Recipe(
        run_dir=str(run_dir),
        backbone=BackboneConfig(path=str(start)),
        data=data,
        exits=ExitsConfig(exit_layers=[1, 2], discriminator_hidden_size=16),
        training=TrainingConfig(max_steps=steps, **settings),
        decoding=DecodingConfig(max_new_tokens=4),
    )


def sections(recipe: Recipe, *, size: int) -> dict[str, dict[str, Any]]:
    """The distribution of ``size`` ranks that share ``stage1_scene.ROWS`` rows."""
    section = stage1.section(recipe, size=size)
    section["optimizer"]["params"]["lr"] = stage1.RATE
    shape = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16")
    return {"backbone": {key: section[key] for key in shape}, "exits": section, "discriminators": section}
