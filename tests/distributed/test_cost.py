"""Three real DeepSpeed engines on packed rows, at every kind of ZeRO stage, against one process on padded rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scene
import torch
from ranks import run_ranks

from free_dist.config import CostConfig, LossConfig
from free_dist.data.samples import Batch
from free_dist.training.step import adversarial_step

SAVING = CostConfig(drop_padding=True, share_prefix=True, answer_queries=True, head_chunk=7)
STEPS = 6


def paired(batch: Batch, opening: tuple[int, ...]) -> Batch:
    """The batch with one image for every two rows, all rows opened alike."""
    ids = batch.input_ids.clone()
    ids[:, : len(opening)] = torch.tensor(opening)
    targets = batch.targets.clone()
    return replace(
        batch,
        input_ids=ids,
        targets=targets,
        pixel_values=batch.pixel_values[::2],
        image_index=torch.arange(len(ids)) // 2,
    )


def train(size: int, stage: int, backbone_stage: int, mode: str, cost: CostConfig) -> dict[str, torch.Tensor]:
    engines = scene.engines(scene.sections(stage=stage, backbone_stage=backbone_stage, accumulation=2, world_size=size))
    opening = scene.modules()[0].layout.opening
    rank = torch.distributed.get_rank()
    config = LossConfig(adversarial_weight=0.3, mode=mode)
    for micro in range(2 * STEPS):
        batch = paired(scene.batch(micro, rank=rank, world_size=size), opening)
        adversarial_step(engines, batch, config, cost=cost, measure=True)
    return scene.gathered(engines.exits.module) | scene.gathered(engines.discriminators.module)


@pytest.fixture(scope="module")
def padded() -> dict[str, dict[str, torch.Tensor]]:
    """What one rank without sharding learns from padded rows, by mode."""
    return {mode: run_ranks(1, train, 1, 1, 0, mode, CostConfig())[0] for mode in ("supervised", "unsupervised")}


@pytest.mark.parametrize(
    ("size", "stage", "backbone_stage", "mode"),
    [(1, 1, 0, "unsupervised"), (2, 1, 3, "supervised"), (2, 2, 0, "unsupervised"), (2, 3, 3, "supervised")],
)
def test_packed_rows_train_like_padded_ones_at_every_stage(
    padded, size: int, stage: int, backbone_stage: int, mode: str
):
    wanted = padded[mode]
    initial = dict(scene.modules()[1].named_parameters()) | dict(scene.modules()[2].named_parameters())
    assert max((initial[name] - weight).abs().max().item() for name, weight in wanted.items()) > 1e-3
    for result in run_ranks(size, train, size, stage, backbone_stage, mode, SAVING):
        assert result.keys() == wanted.keys()
        for name, weight in wanted.items():
            torch.testing.assert_close(result[name], weight, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
