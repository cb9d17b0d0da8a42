"""The tiny run that the distributed tests share: models, batches and DeepSpeed sections, all functions of a seed."""

from __future__ import annotations

from typing import Any

import torch

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.data.samples import IGNORE, Batch
from free_dist.ds_config import needs_frozen_copy
from free_dist.engines import Engines, build_engines
from free_dist.exits import ExitBank, FeatureClassifiers
from free_dist.training.schedule import warmup_cosine

EXIT_LAYERS = (1, 3)
WIDTH = 32
ROWS = 4
"""Rows of one global micro-batch, over all ranks."""
STEPS = 10
OPTIMIZER = {"lr": 2e-3, "betas": [0.9, 0.99], "weight_decay": 0.01, "eps": 1e-4}
"""The large eps keeps Adam from amplifying rounding where a gradient is zero in exact arithmetic (key biases)."""
CLIP = 0.5


def factor(step: int) -> float:
    """The schedule of every test run."""
    return warmup_cosine(warmup_steps=3, max_steps=STEPS)(step)


def sections(
    *, stage: int = 1, backbone_stage: int = 0, accumulation: int = 1, bf16: bool = False, world_size: int = 1
) -> dict[str, dict[str, Any]]:
    """A distribution for ``world_size`` ranks that share ROWS rows."""

    def zero(stage: int) -> dict[str, Any]:
        # Without the threshold, tensors as small as these would be replicated and nothing tested.
        return {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})

    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS // world_size,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": bf16},
    }
    trained = base | {
        "optimizer": {"type": "AdamW", "params": OPTIMIZER | {"torch_adam": True}},
        "gradient_clipping": CLIP,
        "zero_optimization": zero(stage),
    }
    return {
        "backbone": base | {"zero_optimization": zero(backbone_stage)},
        "exits": trained,
        "discriminators": trained,
    }


def modules(*, copy_frozen: bool = False, shared: bool = False) -> tuple[Blip2Backbone, ExitBank, FeatureClassifiers]:
    """The same three modules in every process."""
    model = new_model(width=WIDTH, n_blocks=4, n_heads=2)
    with torch.no_grad():  # at its tiny initial scale the head is almost uniform and every loss looks alike
        model.language_model.model.decoder.embed_tokens.weight.mul_(20)
    backbone = Blip2Backbone(model.eval().requires_grad_(False))
    bank = ExitBank(backbone, EXIT_LAYERS, init="same", copy_frozen=copy_frozen)
    torch.manual_seed(1)
    return backbone, bank, FeatureClassifiers(len(EXIT_LAYERS), WIDTH, 16, shared=shared)


def batch(seed: int, *, rank: int = 0, world_size: int = 1) -> Batch:
    """This rank's rows of global micro-batch ``seed``; rows differ widely in their number of answer tokens."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(ROWS, 3, 64, 64, generator=generator)
    ids = torch.randint(5, 100, (ROWS, 20), generator=generator)
    ids[:, :8] = 4
    targets = torch.full((ROWS, 20), IGNORE)
    for row in range(ROWS):
        first = 18 - 3 * row
        targets[row, first - 1 : 19] = ids[row, first:20]
    mine = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    rows = ids[mine]
    return Batch(
        task="vqa",
        keys=tuple(str(i) for i in range(len(rows))),
        pixel_values=pixels[mine],
        image_index=torch.arange(len(rows)),
        input_ids=rows,
        targets=targets[mine],
    )


def engines(
    ds_config: dict[str, dict[str, Any]],
    *,
    adversarial: bool = True,
    shared: bool = False,
    discriminator_steps: int = 1,
) -> Engines:
    """Engines around :func:`modules`."""
    backbone, bank, classifiers = modules(copy_frozen=needs_frozen_copy(ds_config), shared=shared)
    return build_engines(
        backbone, bank, classifiers if adversarial else None, ds_config, factor, discriminator_steps=discriminator_steps
    )


def gathered(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Full trainable weights by name, also of a sharded module; every rank calls it."""
    import deepspeed

    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().float().clone()
    return found
