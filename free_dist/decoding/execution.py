"""Three ways to run the same fixed code again and again: as it is, compiled, or captured as a CUDA graph.

A body takes no arguments and has fixed shapes: it reads buffers that stay where they are, writes buffers, and returns
tensors.  Does not know what a body computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from free_dist.config import UserError

OutputT = TypeVar("OutputT")


class Execution(Protocol):
    """Makes a body fast to repeat."""

    def __call__(
        self, body: Callable[[], OutputT], *, kept: Sequence[Tensor], changed: Sequence[Tensor]
    ) -> Callable[[], OutputT]:
        """The body, ready to be called.  What a call returns is valid until the next call of any body.

        ``kept``: all buffers it uses.  ``changed``: those that it reads *and* changes, so that twice is not once.
        """


def eagerly(body: Callable[[], OutputT], *, kept: Sequence[Tensor], changed: Sequence[Tensor]) -> Callable[[], OutputT]:
    """Operator by operator, on any device."""
    del kept, changed
    return body


class Compiled:
    """``torch.compile``, one compilation per body, on any device; the first call takes seconds to minutes."""

    def __init__(self, mode: str = "default", *, backend: str = "inductor") -> None:
        """``mode`` "reduce-overhead" lets the compiler use CUDA graphs of its own.

        Raises UserError for an unknown mode, for that one without CUDA, and for a torch older than 2.13.
        """
        if mode not in ("default", "reduce-overhead"):
            raise UserError(f"compile mode {mode!r}: want default or reduce-overhead")
        if mode == "reduce-overhead" and not torch.cuda.is_available():
            raise UserError(
                "compile mode 'reduce-overhead' works by CUDA graphs, and there is no CUDA: use mode default"
            )
        if TorchVersion(torch.__version__) < "2.13":
            raise UserError(f"compiling segments needs torch 2.13 or newer, this is {torch.__version__}")
        self._backend = backend
        self._mode = mode
        # Guards check that the code still fits its inputs, at a cost like that of a small block.  A body's inputs never change.
        self._options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}

    def __call__(
        self, body: Callable[[], OutputT], *, kept: Sequence[Tensor], changed: Sequence[Tensor]
    ) -> Callable[[], OutputT]:
        """The compiled body; compilation happens in its first call."""
        del changed
        options = dict(self._options)
        if self._mode == "reduce-overhead":
            options["triton.cudagraphs"] = True
            for buffer in kept:
                # Otherwise the compiler makes no graph of code that writes to its inputs.
                torch._dynamo.mark_static_address(buffer)
        elif self._backend == "inductor" and not any(buffer.is_cuda for buffer in kept):
            # Operators called from C++ save a quarter of a small model's time.  On a GPU, graphs save that and more.
            options["cpp_wrapper"] = True
        # Bodies share their source; without isolation one body would be handed the code compiled for another.
        return torch.compile(  # type: ignore[call-overload]
            body,
            fullgraph=True,
            dynamic=False,
            isolate_recompiles=True,
            backend=self._backend,
            options=options,
        )


class Captured:
    """CUDA graphs: a body is run a few times, recorded once, and from then on replayed with one launch.

    All graphs share one pool of memory.  That is safe because they run one after another, on one stream, and what one leaves
    for another lies in buffers outside the pool.
    """

    WARM_UPS = 3
    """Calls before the capture: libraries choose kernels and allocate their workspaces in the first ones."""

    def __init__(self, before: Execution = eagerly) -> None:
        """``before`` prepares the body that is captured, such as ``Compiled()``.  Raises UserError without CUDA."""
        if not torch.cuda.is_available():
            raise UserError("CUDA graphs need a CUDA device, and torch sees none: decode without them")
        self._before = before
        self._stream: torch.cuda.Stream | None = None
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, body: Callable[[], OutputT], *, kept: Sequence[Tensor], changed: Sequence[Tensor]
    ) -> Callable[[], OutputT]:
        """The recorded body.  Recording happens here, leaves ``changed`` as it was, and waits for the device.

        Raises UserError for a model that is not on a GPU.
        """
        device = kept[0].device
        if device.type != "cuda":
            raise UserError(f"CUDA graphs need the model on a GPU, it is on {device}: move it with .cuda()")
        with torch.cuda.device(device):
            return self._recorded(body, kept=kept, changed=changed)

    def _recorded(
        self, body: Callable[[], OutputT], *, kept: Sequence[Tensor], changed: Sequence[Tensor]
    ) -> Callable[[], OutputT]:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        prepared = self._before(body, kept=kept, changed=changed)
        before = [buffer.clone() for buffer in changed]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(self.WARM_UPS):
                prepared()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            outputs = prepared()
        # Recording runs nothing, so only the warm-up has to be undone.
        for buffer, value in zip(changed, before, strict=True):
            buffer.copy_(value)

        def replay() -> OutputT:
            graph.replay()
            return outputs

        return replay
