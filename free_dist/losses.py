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
"""Positions, counted for every exit, whose logits are held at once unless a recipe says otherwise."""


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """L_D = -log FC(z) - log(1 - FC(h_k)), from logits [K, N] each; mean over positions, [K]."""
    return F.softplus(-real).mean(-1) + F.softplus(fake).mean(-1)


def generator_loss(fake: Tensor) -> Tensor:
    """L_G = -log FC(h_k), non-saturating, from logits [K, N]; mean over positions, [K]."""
    return F.softplus(-fake).mean(-1)


def cross_entropy_loss(bank: ExitBank, features: Tensor, targets: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """CE(head(h_k), y): features [K, N, D], targets [N] -> [K]."""

    def summed(part: Tensor, wanted: Tensor) -> Tensor:
        logits = wide(bank.logits(part)).flatten(0, 1)  # [K * n, V]: rows of a softmax must be contiguous to be fast
        losses = F.cross_entropy(logits, wanted.repeat(len(part)), reduction="none")
        return losses.view(len(part), -1).sum(-1)

    return _summed_over_chunks(summed, features, targets, chunk) / targets.shape[0]


def distillation_loss(
    bank: ExitBank, features: Tensor, final: Tensor, temperature: float = 1.0, *, chunk: int = CHUNK
) -> Tensor:
    """T^2 KL(p_L || p_k) (eq. 3), p from the frozen head at temperature T: features [K, N, D], final [N, D] -> [K]."""

    def summed(part: Tensor, teacher: Tensor) -> Tensor:
        target = F.log_softmax(wide(bank.logits(teacher)) / temperature, dim=-1)
        student = F.log_softmax(wide(bank.logits(part)) / temperature, dim=-1)
        return F.kl_div(student, target.expand_as(student), log_target=True, reduction="none").sum((1, 2))

    return temperature**2 * _summed_over_chunks(summed, features, final, chunk) / final.shape[0]


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, or as they are where they are wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _summed_over_chunks(
    summed: Callable[[Tensor, Tensor], Tensor], features: Tensor, other: Tensor, chunk: int
) -> Tensor:
    # Logits are the largest tensor of a step; recomputing them in the backward pass keeps one chunk alive at a time.
    positions = max(1, chunk // len(features))
    if other.shape[0] <= positions:
        return summed(features, other)
    parts = zip(features.split(positions, dim=1), other.split(positions), strict=True)
    sums: list[Tensor] = [checkpoint(summed, part, rest, use_reentrant=False) for part, rest in parts]
    return torch.stack(sums).sum(0)
