"""Int8 weight-only copy of a full model: the strongest cheap rival of early exits where weight traffic is the limit.

Weights are int8 with one scale per output row, activations bfloat16, by torch's own kernel.  Only linear maps of the decoder
blocks and the head change; vision tower, Q-Former, embeddings and norms are shared with the model copied from.
Does not know exits, and is not exact: its tokens may differ from the full model's.

Shape letters: N outputs, D inputs of a linear map.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from free_dist.backbones import Blip2Backbone
from free_dist.config import UserError

LEVELS = 127
"""Largest int8 magnitude used; the range is symmetric."""


class Int8Linear(nn.Module):
    """A linear map with int8 weights, for inference."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        """Rounds ``linear``'s weight [N, D] to the nearest of 255 levels per row; the bias is kept by reference."""
        super().__init__()
        weight = linear.weight.detach()
        scales = (weight.abs().amax(dim=1).float() / LEVELS).clamp_(min=torch.finfo(torch.float32).tiny)
        # The kernel reads the scales as bfloat16: rounding against the rounded scales keeps the product closest.
        scales = scales.to(torch.bfloat16)
        levels = (weight.float() / scales.float()[:, None]).round_().clamp_(-LEVELS, LEVELS)
        self.register_buffer("weight", levels.to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., N], in the type of ``hidden``."""
        rows = hidden.reshape(-1, hidden.shape[-1]).to(torch.bfloat16)
        product = torch._weight_int8pack_mm(rows, self.weight, self.scales)
        product = product.to(hidden.dtype).view(*hidden.shape[:-1], -1)
        return product if self.bias is None else product.add_(self.bias)


def int8_copy(backbone: Blip2Backbone) -> Blip2Backbone:
    """A backbone whose decoder blocks and head read int8 weights; everything else is shared with ``backbone``.

    Its blocks run in this project's decoder only.  Raises UserError where the head is not one linear map.
    """
    _, head = backbone.shared_modules()
    if type(head) is not nn.Linear:
        raise UserError(f"int8: the head is a {type(head).__name__}, want one nn.Linear")
    linears = [head]
    for k in range(1, backbone.n_blocks + 1):
        linears += [module for module in backbone.block(k).modules() if type(module) is nn.Linear]
    # deepcopy takes what the memo holds instead of copying: new linear maps here, all other tensors as they are.
    memo: dict[int, object] = {id(linear): Int8Linear(linear) for linear in linears}
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        memo.setdefault(id(tensor), tensor)
    return copy.deepcopy(backbone, memo)
