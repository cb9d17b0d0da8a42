"""How long each rank takes for its own work, so that a slow one is found although all wait for it.

A step takes equally long on every rank, because they meet in it.  What a rank does without the others is its own: waiting for
data, and the forward pass of a module that it has whole.  Of a module that ranks share (ZeRO-3), whose forward pass waits for
all of them again and again, single layers are timed: what happens between a layer's weights having come and its output.  Does
not know what the module computes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median_low
from typing import TypeVar

import torch
from torch import nn

from free_dist.distributed import World, all_reduce_sum

T = TypeVar("T")

TIMED_LAYERS = 64
"""Layers of a shared module that are timed, evenly spaced."""


class RankClock:
    """Times this rank's waits for data and its own work in the forward passes of ``module``, from construction on."""

    def __init__(self, module: nn.Module, world: World) -> None:
        self._world = world
        self._on_gpu = world.device.type == "cuda"
        self._waited = 0.0
        self._computed = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._began: float = 0.0
        self._since = time.perf_counter()
        for part in _own_parts(module):
            # DeepSpeed's hook, which waits for a layer's weights, was registered before this one and runs before it.
            part.register_forward_pre_hook(self._begin)
            part.register_forward_hook(self._end)

    def next(self, iterator: Iterator[T]) -> T:
        """The next value of an iterator, whose making counts as waiting for data."""
        began = time.perf_counter()
        value = next(iterator)
        self._waited += time.perf_counter() - began
        return value

    def read(self) -> dict[str, float]:
        """Values to log since the last call, the same on every rank; all ranks call it.

        ``throughput/data_wait_share`` is the mean share of time spent waiting for data; ``ranks/slowest`` the rank whose own
        work took longest and ``ranks/slowest_over_median`` how much longer than the (lower) median rank's.
        """
        for begin, end in self._events:
            end.synchronize()
            self._computed += begin.elapsed_time(end) / 1e3
        self._events.clear()
        now = time.perf_counter()
        mine = torch.zeros(2, self._world.size, dtype=torch.float64, device=self._world.device)
        mine[0, self._world.rank] = self._waited / (now - self._since)
        mine[1, self._world.rank] = self._waited + self._computed
        shares, own = all_reduce_sum(mine).tolist()
        self._waited = self._computed = 0.0
        self._since = now
        values = {"throughput/data_wait_share": sum(shares) / len(shares)}
        if self._world.size > 1:
            slowest = max(range(len(own)), key=own.__getitem__)
            values["ranks/slowest"] = float(slowest)
            values["ranks/slowest_over_median"] = own[slowest] / max(median_low(own), 1e-9)
        return values

    def _begin(self, *_arguments: object) -> None:
        if self._on_gpu:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events.append(events)
            events[0].record()
        self._began = time.perf_counter()

    def _end(self, *_arguments: object) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._computed += time.perf_counter() - self._began


def _own_parts(module: nn.Module) -> list[nn.Module]:
    """What a rank computes without waiting for others: the module itself, or layers of one that is shared."""
    if not any(hasattr(parameter, "ds_tensor") for parameter in module.parameters()):
        return [module]
    layers = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
    layers = [layer for layer in layers if not any(layer.children())]
    return layers[:: max(1, len(layers) // TIMED_LAYERS)]
