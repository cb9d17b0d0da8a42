"""How large the gradient of every trained parameter was on this rank since the last optimizer step, by name.

One number a parameter, taken when its gradient is computed: before any engine reduces, partitions or clips it.  It tells
whether all were finite, and which parameter got none.  Does not know engines, ranks or what a step is.

Shape letters: P trained parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class GradientNorms:
    """Watches the trained parameters of modules from construction on."""

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device | str) -> None:
        """``modules``: name -> module; parameters that require a gradient now are watched, as ``NAME: PARAMETER``."""
        found = [
            (f"{name}: {own}", parameter)
            for name, module in modules.items()
            for own, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        self.names = tuple(name for name, _ in found)
        """P names."""
        self._sums = torch.zeros(len(found), dtype=torch.float32, device=device)
        self._slots = list(self._sums.unbind())
        self.last = torch.zeros_like(self._sums)
        """[P], the sums as they were when the last step was closed; 0 where no gradient came, or nothing but zeros."""
        for slot, (_, parameter) in zip(self._slots, found, strict=True):
            parameter.register_hook(lambda gradient, slot=slot: self._note(gradient, slot))

    def finite(self) -> Tensor:
        """Whether every gradient since the last closed step was finite; bool scalar."""
        return torch.isfinite(self._sums).all()

    def close_step(self) -> None:
        """Keep what was seen as ``last`` and begin anew."""
        self.last.copy_(self._sums)
        self._sums.zero_()

    def not_finite(self) -> list[str]:
        """Names of the parameters whose gradient was not finite in the last closed step."""
        return [name for name, value in zip(self.names, self.last.tolist(), strict=True) if not math.isfinite(value)]

    @staticmethod
    def _note(gradient: Tensor, slot: Tensor) -> None:
        slot.add_(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))
