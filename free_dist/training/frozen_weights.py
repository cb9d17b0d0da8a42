"""Whether weights that must not change did, found by fingerprints taken a little at a time.

A fingerprint is a sum of the bit patterns of a tensor, each times an odd number of its place, modulo 2^64: another value of
one element always gives another fingerprint.  Each rank looks at what it holds itself: its shard of a sharded weight.  Does not
know engines, nor what becomes of a change.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

CHUNK = 1 << 20
"""Elements that are converted at once."""

SHARE = 0.005
"""Share of a run's time that looking may take."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FrozenWeights:
    """Remembers the parameters of modules that require no gradient, and the buffers of those that train nothing, as they are."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """``modules``: name -> module; a tensor that several hold is looked at once."""
        self._tensors: dict[str, nn.Parameter | Tensor] = {}
        seen: set[int] = set()
        for prefix, module in modules.items():
            frozen: list[tuple[str, Tensor]] = [(n, p) for n, p in module.named_parameters() if not p.requires_grad]
            if len(frozen) == sum(1 for _ in module.parameters()):  # else running means may move
                frozen += module.named_buffers()
            for name, tensor in frozen:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    self._tensors[f"{prefix}: {name}"] = tensor
        self._expected = {name: fingerprint(_local(tensor)) for name, tensor in self._tensors.items()}
        self._order = list(self._tensors)
        self._found: dict[str, None] = {}
        self._next = 0
        self._since = time.perf_counter()

    def look(self) -> list[str]:
        """Names that changed among the next few weights, and what was found before; takes about SHARE of the time since the
        last call."""
        now = time.perf_counter()
        allowed, self._since = SHARE * (now - self._since), now
        for _ in self._order:
            name = self._order[self._next]
            self._next = (self._next + 1) % len(self._order)
            self._note([name])
            if time.perf_counter() - now > allowed:
                break
        return list(self._found)

    def look_at_all(self) -> list[str]:
        """Names of all weights that changed."""
        self._note(self._order)
        return list(self._found)

    def _note(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._found and fingerprint(_local(self._tensors[name])) != self._expected[name]:
                self._found[name] = None


@torch.no_grad()
def fingerprint(tensor: Tensor) -> int:
    """A number of a tensor's bits and their places, on whatever device it lies."""
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    # Multiplying by 2i + 1 keeps what overflows beyond 64 bits out of the sum and no single change unseen.
    places = torch.arange(1, 2 * min(CHUNK, max(1, len(bits))), 2, dtype=torch.int64, device=bits.device)
    for number, part in enumerate(bits.split(CHUNK)):
        total += (part.long() * (places[: len(part)] + 2 * number * CHUNK)).sum()
    return int(total)


def _local(tensor: Tensor) -> Tensor:
    # A ZeRO-3 parameter is empty between forward passes; its shard is what this rank keeps.
    return tensor.ds_tensor if hasattr(tensor, "ds_tensor") else tensor
