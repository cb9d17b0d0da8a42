"""How much of a device's peak a training run uses: floating-point operations counted once, a peak given or measured.

Operations are those of one real micro-batch of each kind, forward and backward, by PyTorch's own formulas: matrix products,
convolutions and attention, recomputation included.  Later micro-batches of the kind are taken to cost the same per
position.  Does not know what is trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

SIDE = {"cuda": 8192, "cpu": 768}
"""Rows and columns of the matrices whose product measures a peak."""

ROUNDS = 5


class CountedOperations(TorchDispatchMode):
    """Sums the floating-point operations of everything that is computed inside a ``with`` block, backward passes too.

    ``FlopCounterMode`` of PyTorch also follows the tree of modules, which fails inside the backward pass of others' hooks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        """Operations so far; a multiplication and an addition are two."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute ``func`` and count it."""
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # PyTorch's table lacks the CPU's own
            self.total += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


class FlopMeter:
    """Operations of micro-batches, by kind, on this rank."""

    def __init__(self) -> None:
        self._per_position: dict[str, float] = {}
        self._total = 0.0

    def knows(self, kind: str) -> bool:
        """Whether a micro-batch of this kind was counted."""
        return kind in self._per_position

    @contextmanager
    def counting(self, kind: str, positions: int) -> Iterator[None]:
        """Count the operations of the one micro-batch inside, of so many positions, padding included."""
        with CountedOperations() as counted:
            yield
        self._per_position[kind] = counted.total / positions

    def add(self, kind: str, positions: int) -> None:
        """One more micro-batch; a kind that was never counted adds nothing."""
        self._total += self._per_position.get(kind, 0.0) * positions

    def take(self) -> float:
        """Operations added since the last call."""
        total, self._total = self._total, 0.0
        return total


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of a few products of two square matrices on this device."""
    side = SIDE["cuda" if device.type == "cuda" else "cpu"]
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(ROUNDS):
        _finish(device)
        start = time.perf_counter()
        left @ right
        _finish(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest


def peak_source(device: torch.device, dtype: torch.dtype, given: float | None) -> str:
    """Where a peak comes from, in words."""
    if given is not None:
        return "training.peak_tflops of the recipe"
    side = SIDE["cuda" if device.type == "cuda" else "cpu"]
    return f"measured by a product of two {side} x {side} matrices, {str(dtype).removeprefix('torch.')}, at the start"


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
