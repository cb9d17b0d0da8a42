"""What a training step leaves out changes neither its losses nor its gradients: every option against padded rows, in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from free_dist.backbones import Blip2Backbone, TokenLayout
from free_dist.config import CostConfig
from free_dist.data.samples import IGNORE, Batch
from free_dist.exits import ExitBank, FeatureClassifiers
from free_dist.losses import cross_entropy_loss, discriminator_loss, distillation_loss, generator_loss
from free_dist.training.step import packing_of

TOLERANCE = 1e-10
"""Relative, of float64, where a wrong position cannot pass for rounding; what is promised is 1e-6."""

PACKINGS = [
    CostConfig(drop_padding=drop, share_prefix=share, answer_queries=queries)
    for drop, share, queries in product((False, True), repeat=3)
    if drop or share or queries
]
"""Every combination."""


def name_of(cost: CostConfig) -> str:
    return "+".join(name for name in ("drop_padding", "share_prefix", "answer_queries") if vars(cost)[name])


def batch_of(layout: TokenLayout, pixels: Tensor) -> Batch:
    """Six rows on three images, in no order: several answers a row, an answer right after the opening, a row without any."""
    generator = torch.Generator().manual_seed(3)
    opening, length = len(layout.opening), 20
    ids = torch.randint(6, 60, (6, length), generator=generator)
    ids[:, :opening] = torch.tensor(layout.opening)
    targets = torch.full((6, length), IGNORE)
    for row, spans in enumerate([((9, 12),), ((6, 8), (12, 15)), ((opening - 1, 11),), ((17, 20),), ((11, 12),), ()]):
        for first, stop in spans:
            targets[row, first:stop] = torch.randint(6, 60, (stop - first,), generator=generator)
    return Batch(
        task="vqa",
        keys=tuple("abcdef"),
        pixel_values=pixels,
        image_index=torch.tensor([1, 0, 2, 1, 1, 0]),
        input_ids=ids,
        targets=targets,
    )


def losses_and_gradients(
    backbone: Blip2Backbone, bank: ExitBank, classifiers: FeatureClassifiers, batch: Batch, cost: CostConfig, mode: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses of both players, and the gradients of each for its own weights."""
    answers = batch.targets != IGNORE
    wanted = batch.targets[answers]
    with torch.no_grad():
        features = backbone(**batch.inputs(), exit_layers=bank.exit_layers, packing=packing_of(cost, answers))
    final = features.final if cost.packs else features.final[answers]
    fake = bank(features.exits, answers, memory=features.memory, span=features.span)
    if mode == "supervised":
        task = cross_entropy_loss(bank, fake, wanted, chunk=cost.head_chunk)
    else:
        task = distillation_loss(bank, fake, final, chunk=cost.head_chunk)
    generator = generator_loss(classifiers(fake))
    discriminator = discriminator_loss(classifiers(final.expand_as(fake)), classifiers(fake.detach()))
    weights = {name: weight for name, weight in bank.named_parameters() if weight.requires_grad}
    own = dict(classifiers.named_parameters())
    taken = torch.autograd.grad((task + 0.3 * generator).sum(), list(weights.values()), retain_graph=True)
    found = torch.autograd.grad(discriminator.sum(), list(own.values()))
    gradients = dict(zip((*weights, *own), (*taken, *found), strict=True))
    return {"task": task, "generator": generator, "discriminator": discriminator}, gradients


def largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference over the largest value, of all tensors that are not zero in exact arithmetic."""
    assert found.keys() == wanted.keys()
    scale = max(float(tensor.abs().max()) for tensor in wanted.values())
    return max(
        float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max())
        for name in wanted
        if wanted[name].abs().max() > 1e-9 * scale  # a key bias shifts all scores of a softmax alike
    )


Scene = tuple[Blip2Backbone, FeatureClassifiers, Batch]


@pytest.fixture(scope="module", params=["opt", "llama", "llama-grouped"])
def scene(request: pytest.FixtureRequest, make_case: Callable[..., Any]) -> Scene:
    case = make_case(request.param)
    torch.manual_seed(4)
    classifiers = FeatureClassifiers(2, 32, 16).double()
    return case.backbone, classifiers, batch_of(case.backbone.layout, case.pixels)


@pytest.mark.parametrize("cost", PACKINGS, ids=name_of)
@pytest.mark.parametrize("exit_layers", [(1, 2), (2, 3)], ids=["before the last block", "after the last block"])
def test_packed_rows_give_the_losses_and_gradients_of_padded_ones(scene: Scene, cost: CostConfig, exit_layers) -> None:
    backbone, classifiers, batch = scene
    bank = ExitBank(backbone, exit_layers).train()
    wanted = losses_and_gradients(backbone, bank, classifiers, batch, CostConfig(), "supervised")
    found = losses_and_gradients(backbone, bank, classifiers, batch, cost, "supervised")
    assert max(largest_error(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)) < TOLERANCE
