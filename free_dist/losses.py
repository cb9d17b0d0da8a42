"""The losses of FREE, each per exit and with its equation.

All take features or logits of answer positions only, and return one value per exit, [K].  Does not know exits, engines or
weights between terms.

Shape letters: K exits, N answer positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from free_dist.exits import ExitBank

CHUNK = 4096
"""Positions, counted for every exit, whose logits are held at once unless a recipe says otherwise."""


def head_parts(positions: int, chunk: int = CHUNK) -> int:
    """In how many parts the head reads ``positions`` (K * N), ``chunk`` of them at once; at least 1."""
    return max(1, -(-positions // chunk))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """L_D = -log FC(z) - log(1 - FC(h_k)), from logits [K, N] each; mean over positions, [K]."""
    return F.softplus(-real).mean(-1) + F.softplus(fake).mean(-1)


def generator_loss(fake: Tensor) -> Tensor:
    """L_G = -log FC(h_k), non-saturating, from logits [K, N]; mean over positions, [K]."""
    return F.softplus(-fake).mean(-1)


def cross_entropy_loss(bank: ExitBank, features: Tensor, targets: Tensor, *, parts: int | None = None) -> Tensor:
    """CE(head(h_k), y): features [K, N, D], targets [N] -> [K]; the head is the frozen one, or the exit's own.

    ``parts``: the head reads the positions in so many parts, one after the other; None: :func:`head_parts` of them.
    """

    def summed(part: Tensor, wanted: Tensor) -> Tensor:
        # [K * n, V]: rows of a softmax must be contiguous to be fast.
        logits = wide(bank.exit_logits(part)).flatten(0, 1)
        losses = F.cross_entropy(logits, wanted.repeat(len(part)), reduction="none")
        return losses.view(part.shape[:2]).sum(-1)

    return _summed_over_parts(summed, bank, features, targets, parts) / targets.shape[0]


def distillation_loss(
    bank: ExitBank, features: Tensor, final: Tensor, temperature: float = 1.0, *, parts: int | None = None
) -> Tensor:
    """T^2 KL(p_L || p_k) (eq. 3), p_L from the frozen head at temperature T: features [K, N, D], final [N, D] -> [K].

    Head and ``parts``: as in :func:`cross_entropy_loss`.
    """

    def summed(part: Tensor, teacher: Tensor) -> Tensor:
        target = F.log_softmax(wide(bank.logits(teacher)) / temperature, dim=-1)
        student = F.log_softmax(wide(bank.exit_logits(part)) / temperature, dim=-1)
        return F.kl_div(student, target.expand_as(student), log_target=True, reduction="none").sum((1, 2))

    return temperature**2 * _summed_over_parts(summed, bank, features, final, parts) / final.shape[0]


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, or as they are where they are wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


Summed = Callable[[Tensor, Tensor], Tensor]
"""(features [K, n, D], something of these n positions) -> losses summed over them, [K]."""


def _summed_over_parts(summed: Summed, bank: ExitBank, features: Tensor, other: Tensor, parts: int | None) -> Tensor:
    # Logits are the largest tensor of a step: those of one part are alive at a time.
    parts = head_parts(features.shape[0] * features.shape[1]) if parts is None else parts
    if parts == 1:
        return summed(features, other)
    # Heads that are trained need their part of the gradient too, so their logits are kept until the backward pass.
    if torch.is_grad_enabled() and features.requires_grad and not bank.has_own_heads:
        total: Tensor = _InParts.apply(features, other, summed, parts)
        return total
    return torch.stack([summed(*pair) for pair in in_parts(features, other, parts)]).sum(0)


def in_parts(features: Tensor, other: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """[K, N, D] and [N, ...] cut alike along N; some parts may be empty, so that all ranks can have as many."""
    return zip(features.tensor_split(parts, dim=1), other.tensor_split(parts), strict=True)


class _InParts(torch.autograd.Function):
    """The sum over parts, whose gradient is taken while a part's logits are there: nothing is computed twice.

    Recomputing in the backward pass would meet a head that a sharding engine has taken apart again.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, other: Tensor, summed: Summed, parts: int) -> Tensor:
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        for part, rest in in_parts(features, other, parts):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                sums.append(summed(leaf, rest))
                # An exit's sum depends on its own features alone, so one backward pass serves all exits.
                gradients += torch.autograd.grad(sums[-1].sum(), leaf)
        ctx.save_for_backward(torch.cat(gradients, dim=1))
        return torch.stack([value.detach() for value in sums]).sum(0)

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (outward[0][:, None, None] * gradient).to(gradient.dtype), None, None, None
