"""The losses against their equations, written out naively in float64."""

from __future__ import annotations

import pytest
import torch

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.exits import ExitBank
from free_dist.losses import cross_entropy_loss, discriminator_loss, distillation_loss, generator_loss

K, N, D = 2, 11, 32


@pytest.fixture(scope="module")
def bank() -> ExitBank:
    backbone = Blip2Backbone(new_model(width=D, n_blocks=4, n_heads=2).eval().requires_grad_(False))
    return ExitBank(backbone, (1, 3))


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(K, N, D, generator=torch.Generator().manual_seed(0)) * 20


@pytest.fixture
def final() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1)) * 20


def head64(bank: ExitBank, features: torch.Tensor) -> torch.Tensor:
    return features.double() @ bank.lm_head.weight.double().T


def test_adversarial_losses_are_their_equations():
    real, fake = torch.randn(2, K, N, generator=torch.Generator().manual_seed(2)) * 3
    judged_real, judged_fake = torch.sigmoid(real.double()), torch.sigmoid(fake.double())
    torch.testing.assert_close(
        discriminator_loss(real, fake).double(),
        (-judged_real.log() - (1 - judged_fake).log()).mean(-1),
        rtol=1e-5,
        atol=0,
    )
    torch.testing.assert_close(generator_loss(fake).double(), -judged_fake.log().mean(-1), rtol=1e-5, atol=0)


def test_adversarial_losses_stay_finite_where_the_logarithm_of_a_sigmoid_does_not():
    certain = torch.full((K, N), 1e4)
    assert torch.isfinite(discriminator_loss(-certain, certain)).all()
    assert torch.isfinite(generator_loss(-certain)).all()


def test_cross_entropy_is_minus_the_log_probability_of_the_target(bank, features):
    targets = torch.arange(N) * 7
    probabilities = head64(bank, features).softmax(-1)
    wanted = -probabilities[:, torch.arange(N), targets].log().mean(-1)
    torch.testing.assert_close(cross_entropy_loss(bank, features, targets).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_t_squared_kl_from_the_full_model_to_the_exit(bank, features, final, temperature):
    teacher = (head64(bank, final) / temperature).softmax(-1)
    student = (head64(bank, features) / temperature).softmax(-1)
    wanted = temperature**2 * (teacher * (teacher.log() - student.log())).sum(-1).mean(-1)
    loss = distillation_loss(bank, features, final, temperature)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-6)
    assert (loss > 1e-2).all()


def test_distillation_of_the_full_model_into_itself_is_zero(bank, final):
    assert distillation_loss(bank, final.expand(K, -1, -1), final).abs().max() < 1e-6


def test_reading_the_head_in_parts_changes_neither_value_nor_gradient(bank, features, final):
    results = []
    for parts in (1, 4, N + 3):
        leaf = features.clone().requires_grad_()
        total = cross_entropy_loss(bank, leaf, torch.arange(N), parts=parts)
        total = total + distillation_loss(bank, leaf, final, parts=parts)
        total.sum().backward()
        results.append((total.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
