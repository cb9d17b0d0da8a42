"""Alignment of features with targets, and the weighting of losses: the parts of a step that need no engine."""

from __future__ import annotations

import pytest
import torch

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.config import LossConfig
from free_dist.data.samples import IGNORE
from free_dist.exits import ExitBank
from free_dist.training.step import agreement_metrics, exit_weights, task_loss, token_share

N_BLOCKS = 4


@pytest.fixture(scope="module")
def scene():
    model = new_model(width=32, n_blocks=N_BLOCKS, n_heads=2).eval().requires_grad_(False)
    model.language_model.model.decoder.embed_tokens.weight.mul_(20)
    backbone = Blip2Backbone(model)
    # An exit after block L-1 copied from block L is the full model itself.
    bank = ExitBank(backbone, (N_BLOCKS - 1,), init="next")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 64, 64, generator=generator)
    ids = torch.randint(5, 100, (3, 20), generator=generator)
    ids[:, :8] = 4
    labels = torch.full_like(ids, IGNORE)
    labels[:, 12:] = ids[:, 12:]
    # Transformers shifts labels itself; ours are shifted already.
    reference = model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    targets = torch.cat([labels[:, 1:], torch.full((3, 1), IGNORE)], dim=1)
    out = backbone(pixels, torch.arange(3), ids, bank.exit_layers)
    return bank, out, targets, reference


def identity_loss(scene, targets: torch.Tensor, **config) -> torch.Tensor:
    bank, out, _, _ = scene
    answers = targets != IGNORE
    with torch.no_grad():
        fake = bank(out.exits, answers)
    return task_loss(bank, fake, out.final[answers], targets[answers], LossConfig(**config))


def test_the_identity_exit_has_the_loss_that_transformers_computes_for_the_full_model(scene):
    torch.testing.assert_close(identity_loss(scene, scene[2])[0], scene[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [-1, 1])
def test_targets_off_by_one_position_change_that_loss(scene, shift):
    wrong = scene[2].roll(shift, dims=1)
    assert (identity_loss(scene, wrong)[0] - scene[3]).abs() > 0.05


def test_the_identity_exit_has_no_divergence_from_the_full_model_and_agrees_with_it(scene):
    bank, out, targets, _ = scene
    assert identity_loss(scene, targets, mode="unsupervised").abs().max() < 1e-6
    answers = targets != IGNORE
    metrics = agreement_metrics(bank, bank(out.exits, answers), out.final[answers], targets[answers])
    assert metrics["agreement"].tolist() == [1.0]
    torch.testing.assert_close(metrics["cosine"], torch.ones(1))
    assert metrics["accuracy"] == metrics["accuracy_full"]


def test_a_task_loss_without_weight_takes_no_part_in_the_backward_pass(scene):
    bank, out, targets, _ = scene
    answers = targets != IGNORE
    fake = bank(out.exits, answers)
    for weight, wanted in ((0.0, False), (1.0, True)):
        loss = task_loss(bank, fake, out.final[answers], targets[answers], LossConfig(task_weight=weight))
        assert loss.requires_grad == wanted


def test_exit_weights_have_mean_one_and_grow_with_depth():
    assert exit_weights((3, 6, 9), "uniform").tolist() == [1, 1, 1]
    assert exit_weights((3, 6, 9), "depth").tolist() == [0.5, 1, 1.5]
    with pytest.raises(ValueError, match=r"loss\.exit_weighting='deep'"):
        exit_weights((3, 6), "deep")


def test_one_process_has_the_whole_share_of_the_tokens():
    assert token_share(torch.tensor([[True, False], [True, True]])) == 1
