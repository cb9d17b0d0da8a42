"""Three real DeepSpeed engines on packed rows, at every kind of ZeRO stage, against plain PyTorch on padded ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scene
import torch
from ranks import run_ranks
from reference import reference_weights

from free_dist.config import CostConfig, LossConfig
from free_dist.data.samples import IGNORE, Batch
from free_dist.training.step import adversarial_step

COST = CostConfig(drop_padding=True, share_prefix=True, answer_queries=True, head_chunk=7)
STEPS = 6


def shared(batch: Batch) -> Batch:
    """The batch with one image for all rows of this rank, and opening tokens that agree."""
    ids = batch.input_ids.clone()
    ids[:, 8] = 2
    targets = batch.targets.clone()
    targets[:, 7] = IGNORE
    return replace(batch, input_ids=ids, targets=targets, image_index=torch.zeros_like(batch.image_index))


def train(size: int, stage: int, backbone_stage: int, mode: str, cost: CostConfig) -> dict[str, torch.Tensor]:
    engines = scene.engines(scene.sections(stage=stage, backbone_stage=backbone_stage, accumulation=2, world_size=size))
    rank = torch.distributed.get_rank()
    config = LossConfig(adversarial_weight=0.3, mode=mode)
    for micro in range(2 * STEPS):
        batch = scene.batch(micro, rank=rank, world_size=size)
        batch = replace(batch, input_ids=opened(batch.input_ids))
        adversarial_step(engines, batch, config, cost=cost, measure=True)
    return scene.gathered(engines.exits.module) | scene.gathered(engines.discriminators.module)
