"""What a training step leaves out changes neither its losses nor its gradients: every option against padded rows, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from free_dist.backbones import Blip2Backbone, InstructBlipBackbone, TokenLayout
from free_dist.backbones.packed import Packing
from free_dist.config import ConfigError, CostConfig
from free_dist.data.samples import IGNORE, Batch
from free_dist.exits import ExitBank, ExitVariant, FeatureClassifiers
from free_dist.losses import (
    cross_entropy_loss,
    discriminator_loss,
    distillation_loss,
    generator_loss,
    head_parts,
)
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
    parts = head_parts(fake.shape[0] * fake.shape[1], cost.head_chunk)
    if mode == "supervised":
        task = cross_entropy_loss(bank, fake, wanted, parts=parts)
    else:
        task = distillation_loss(bank, fake, final, parts=parts)
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
    scale = max(tensor.detach().abs().max().item() for tensor in wanted.values())
    return max(
        float((found[name] - wanted[name]).detach().abs().max() / wanted[name].detach().abs().max())
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


@pytest.mark.parametrize(
    "variant", [ExitVariant(name="lora", rank=3), ExitVariant(name="bottleneck", bottleneck_size=8)]
)
def test_packed_rows_suit_every_kind_of_exit_and_loss(scene: Scene, variant: ExitVariant) -> None:
    backbone, classifiers, batch = scene
    bank = ExitBank(backbone, (1, 2), variant=variant).double().train()
    for name, weight in bank.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(
                weight, std=0.1
            )  # a low-rank update starts at zero, where half its gradients are zero
    wanted = losses_and_gradients(backbone, bank, classifiers, batch, CostConfig(), "unsupervised")
    found = losses_and_gradients(backbone, bank, classifiers, batch, PACKINGS[-1], "unsupervised")
    assert max(largest_error(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)) < TOLERANCE


@pytest.mark.parametrize("mode", ["supervised", "unsupervised"])
@pytest.mark.parametrize("kind", ["opt", "llama", "flan-t5"])
@pytest.mark.parametrize("head_chunk", [1, 5, 12])
def test_a_head_read_in_parts_gives_the_losses_and_gradients_of_one_read_whole(
    make_case, kind, mode, head_chunk
) -> None:
    case = make_case(kind)
    batch = batch_of(case.backbone.layout, case.pixels)
    if kind == "flan-t5":
        answers = torch.randint(6, 60, (6, 4), generator=torch.Generator().manual_seed(5))
        batch = replace(batch, targets=answers, decoder_ids=answers.roll(1, dims=1))
    bank = ExitBank(case.backbone, (1, 2)).train()
    torch.manual_seed(4)
    classifiers = FeatureClassifiers(2, 32, 16).double()
    wanted = losses_and_gradients(case.backbone, bank, classifiers, batch, CostConfig(), mode)
    found = losses_and_gradients(case.backbone, bank, classifiers, batch, CostConfig(head_chunk=head_chunk), mode)
    assert max(largest_error(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)) < TOLERANCE


def test_a_packed_list_holds_each_image_once_and_no_padding(scene: Scene) -> None:
    backbone, _, batch = scene
    opening = len(backbone.layout.opening)
    answers = batch.targets != IGNORE
    rows = backbone.pack(Packing(answers=answers, drop_padding=True, share_prefix=True), batch.image_index)
    own = sum(max(stop - opening, 1) for stop in (12, 15, 11, 20, 12, 0))
    assert len(rows.source) == len(rows.positions) == 3 * opening + own
    assert [group.shape[:2] for group in rows.everywhere] == [(3, opening), (6, 20 - opening)]
    kept = backbone.pack(Packing(answers=answers), batch.image_index)
    assert len(kept.source) == answers.numel()


def test_rows_that_share_no_image_are_not_taken_apart(scene: Scene) -> None:
    backbone, _, batch = scene
    rows = backbone.pack(Packing(answers=batch.targets[:3] != IGNORE, share_prefix=True), torch.tensor([2, 0, 1]))
    assert len(rows.everywhere) == 1 and rows.everywhere[0].keys is None, "nothing is gathered"


def test_dropout_of_an_exit_stays_that_of_its_block(make_case) -> None:
    case = make_case("opt")
    batch = batch_of(case.backbone.layout, case.pixels)
    bank = ExitBank(case.backbone, (1,)).train()
    block = bank.transformers[0].block
    answers = batch.targets != IGNORE
    features = case.backbone(**batch.inputs(), exit_layers=(1,), packing=packing_of(PACKINGS[-1], answers))

    def drawn() -> Tensor:
        with torch.no_grad():
            return bank(features.exits, span=features.span)

    still = drawn()
    assert torch.equal(drawn(), still)
    for place, name in ((block, "dropout"), (block.self_attn, "dropout")):
        setattr(place, name, 0.5)
        assert not torch.equal(drawn(), drawn())
        bank.eval()
        torch.testing.assert_close(drawn(), still)
        bank.train()
        setattr(place, name, 0.0)


def test_a_decoder_that_reads_nothing_but_answers_refuses_packed_rows(make_case) -> None:
    backbone = make_case("flan-t5").backbone
    with pytest.raises(ConfigError, match=r"cost\.drop_padding.*T5.*leave all three off"):
        backbone.check_packing(share_prefix=False)


def test_rows_whose_prefix_depends_on_their_prompt_do_not_share_it(make_case) -> None:
    backbone = make_case("llama").backbone
    backbone.prefix_reads_prompt = True  # as InstructBlipBackbone says of itself
    backbone.check_packing(share_prefix=False)
    with pytest.raises(ConfigError, match=r"cost\.share_prefix=true.*InstructBLIP"):
        backbone.check_packing(share_prefix=True)
    assert InstructBlipBackbone.prefix_reads_prompt
