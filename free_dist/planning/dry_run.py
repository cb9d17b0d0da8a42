"""Runs real modules on the meta device and counts what they would allocate and compute.

Tensors on the meta device have shapes and lifetimes but no storage, so a step of a 13B model takes a second and no memory,
and every module is counted as it really is written.  Not counted: workspaces inside a kernel and what an allocator loses to
fragments.  Does not know models, engines or steps.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

META = torch.device("meta")

_READ = torch.ops.aten._local_scalar_dense.default
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class DryRun(TorchDispatchMode):
    """Counts bytes alive and floating-point operations, both by part; ``with DryRun() as run: with run.part("vision"): ...``.

    ``known`` tensors (weights) existed before and are not counted, nor are views of them.  A product of an m x k with a
    k x n matrix is 2mkn operations; only matrix products and attention are counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops: dict[str, int] = defaultdict(int)
        """Operations by part."""
        self.peaks: dict[str, int] = defaultdict(int)
        """Most bytes alive at once during a part, whichever part allocated them."""
        self.live = 0
        """Bytes alive now."""
        self._part = ""
        self._sizes: dict[int, int] = {}
        self._seen: dict[Any, tuple[Any, int]] = {}
        for tensor in known:
            self._watch(tensor, counted=False)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to ``name``; parts do not nest, the inner one wins."""
        outer = self._part
        self.enter(name)
        try:
            yield
        finally:
            self.enter(outer)

    def enter(self, name: str) -> None:
        """From here on everything belongs to ``name``; for a part that begins inside a backward pass."""
        self._part = name
        self.peaks[name] = max(self.peaks[name], self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _READ and args[0].dtype == torch.bool:
            # Whether a mask hides nothing, so that it could be left out: rows have padding, so it hides something.
            return False
        result, flops = self._run(func, args, kwargs or {})
        if flops:
            self.flops[self._part] += flops
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor, counted=True)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
        """(result, floating-point operations); shapes of what was run before with such arguments are remembered.

        A meta kernel takes as long as arithmetic on a small tensor, and the blocks of a model are alike.
        """
        try:
            key = (func, _signature(args), _signature(tuple(kwargs.items())))
            hash(key)
        except TypeError:
            key = None
        if key is not None and key in self._seen:
            made, flops = self._seen[key]
            return tree_map_only(_Made, _Made.again, made), flops
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
        if key is not None and not func._schema.is_mutable and _is_new(result, (args, kwargs)):
            self._seen[key] = tree_map_only(Tensor, _Made.of, result), flops
        return result, flops

    def _watch(self, tensor: Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size = storage.nbytes() if counted else 0
        # A storage outlives the tensors that look at it, and autograd keeps some where Python sees none.
        weakref.finalize(storage, self._forget, key).atexit = False
        self.live += size
        self.peaks[self._part] = max(self.peaks[self._part], self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@dataclass(frozen=True)
class _Made:
    """What is to be known of a tensor on the meta device to make another like it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> _Made:
        return _Made(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def again(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=META)


def _signature(value: Any) -> Any:
    """Equal for arguments that give results of equal shapes; raises TypeError where there is a tensor that holds numbers."""
    if isinstance(value, Tensor):
        if value.device != META:
            raise TypeError("the result depends on what the tensor holds")
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(_signature(item) for item in value)
    return type(value), value  # 1, 1.0 and True are equal, and promote types differently


def _is_new(result: Any, arguments: Any) -> bool:
    """Whether all results are on the meta device, and none looks at an argument's memory, whatever the schema says."""
    given = {t.untyped_storage()._cdata for t in tree_iter(arguments) if isinstance(t, Tensor)}
    made = [t for t in tree_iter(result) if isinstance(t, Tensor)]
    return all(t.device == META and t.untyped_storage()._cdata not in given for t in made)


class FusedAttention(TorchFunctionMode):
    """Sends attention to a fused kernel, as any real device does; the meta device would write out the scores instead."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None and attn_mask.dtype != query.dtype:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    key, value = (t.expand(query.shape[0], -1, -1, -1) for t in (key, value))
    return cast(Tensor, _FUSED(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0])


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


FORMULAS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    _FUSED: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Operation -> its floating-point operations, from its arguments and result."""
