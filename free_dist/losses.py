"""The losses of FREE, each per exit and with its equation.

All take features or logits of answer positions only, and return one value per exit, [K].  Does not know exits, engines or
weights between terms.

Shape letters: K exits, N answer positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from free_dist.exits import ExitBank

CHUNK = 4096
"""Positions whose logits are held at once."""


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """L_D = -log FC(z) - log(1 - FC(h_k)), from logits [K, N] each; mean over positions, [K]."""
    return F.softplus(-real).mean(-1) + F.softplus(fake).mean(-1)


def generator_loss(fake: Tensor) -> Tensor:
    """L_G = -log FC(h_k), non-saturating, from logits [K, N]; mean over positions, [K]."""
    return F.softplus(-fake).mean(-1)


def cross_entropy_loss(bank: ExitBank, features: Tensor, targets: Tensor) -> Tensor:
    """CE(head(h_k), y): features [K, N, D], targets [N] -> [K]."""

    def chunk(part: Tensor, wanted: Tensor) -> Tensor:
        logits = bank.logits(part).float()
        return F.cross_entropy(logits.transpose(1, 2), wanted.expand(len(part), -1), reduction="none").sum(-1)

    return _summed_over_chunks(chunk, features, targets) / targets.shape[0]


def distillation_loss(bank: ExitBank, features: Tensor, final: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p_L || p_k) (eq. 3), p from the frozen head at temperature T: features [K, N, D], final [N, D] -> [K]."""

    def chunk(part: Tensor, teacher: Tensor) -> Tensor:
        target = F.log_softmax(bank.logits(teacher).float() / temperature, dim=-1)
        student = F.log_softmax(bank.logits(part).float() / temperature, dim=-1)
        return F.kl_div(student, target.expand_as(student), log_target=True, reduction="none").sum((1, 2))

    return temperature**2 * _summed_over_chunks(chunk, features, final) / final.shape[0]


def _summed_over_chunks(chunk: Callable[[Tensor, Tensor], Tensor], features: Tensor, other: Tensor) -> Tensor:
    # Logits are the largest tensor of a step; recomputing them in the backward pass keeps one chunk alive at a time.
    if other.shape[0] <= CHUNK:
        return chunk(features, other)
    parts = zip(features.split(CHUNK, dim=1), other.split(CHUNK), strict=True)
    sums: list[Tensor] = [checkpoint(chunk, part, rest, use_reentrant=False) for part, rest in parts]
    return torch.stack(sums).sum(0)
