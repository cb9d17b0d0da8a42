"""What a visual cache saves: the vision tower's share of the operations of a training sample.

Knows the plan of a run; does not know files or caches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from free_dist.config import ConfigError, Recipe
from free_dist.planning.dry_steps import VISION
from free_dist.planning.memory import plan_memory

ROWS = 8
"""Rows of the micro-batch that is run dry; shares do not depend on it, but for images that few rows share."""


def vision_share(backbone: str | Path, recipe: Recipe) -> dict[int, float]:
    """Stage -> share, 0 to 1, of a sample's floating-point operations, forward and backward, that the vision tower does.

    ``backbone``: a published name or a Hugging Face directory.  A stage that the recipe's fields do not fit is left out.  Raises
    what :func:`~free_dist.planning.memory.plan_memory` raises for the backbone.
    """
    section: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 1},
    }
    ds_config = {"backbone": {"train_micro_batch_size_per_gpu": ROWS, "zero_optimization": {"stage": 0}}}
    ds_config |= {"exits": section, "discriminators": section}
    shares = {}
    for stage in (1, 2):
        try:
            plan = plan_memory(str(backbone), recipe, ds_config, world_size=1, stage=stage)
        except ConfigError:  # exits after blocks that this backbone does not have: the recipe is one of stage 1
            continue
        shares[stage] = plan.flops_per_sample[VISION] / sum(plan.flops_per_sample.values())
    return shares
