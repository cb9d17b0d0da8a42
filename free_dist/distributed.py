"""Processes: who this one is, how they agree, how they stop.

The only reader of the launcher's environment variables; works under the ``deepspeed`` launcher, ``torchrun`` and plain
``python`` (one process).  Does not know engines, models or data.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from free_dist.config import UserError

T = TypeVar("T")

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets in every process it starts."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all of them."""

    rank: int
    """0 .. size - 1; rank 0 writes logs."""
    size: int
    """Number of processes."""
    local_rank: int
    """Number of this process on its machine; picks the GPU."""
    device: torch.device
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


@contextmanager
def distributed_session(
    *, expected_world_size: int | None = None, timeout: timedelta = timedelta(minutes=30)
) -> Iterator[World]:
    """Join the process group for the duration of a ``with`` block: gloo on CPU, NCCL on GPU.

    Raises UserError when fewer processes were started than ``expected_world_size``, or the environment is incomplete.
    """
    rank, size, local_rank = _read_environment()
    check_world_size(expected_world_size, size)
    world = World(rank=rank, size=size, local_rank=local_rank, device=_start(local_rank, timeout))
    yield world
    # Not in a finally: after an error a collective close would wait for ranks that are still at work, while dying closes
    # the sockets and fails them at once.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def check_world_size(expected: int | None, actual: int) -> None:
    """Raise UserError when ``actual`` processes are fewer than ``expected``; None expects nothing."""
    if expected is None or actual >= expected:
        return
    raise UserError(
        f"training.expected_world_size={expected}, but this launch started {actual} process{'' if actual == 1 else 'es'}. "
        f"Start with `deepspeed --num_gpus {expected} launch/train.py ...` (also without GPUs: there the launcher starts "
        "one process unless told otherwise), or `torchrun --nproc_per_node`, or unset training.expected_world_size"
    )


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every rank, so that replicas start equal."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def all_true(flag: Tensor | bool, device: torch.device | str = "cpu") -> bool:
    """Whether ``flag`` (a scalar) holds on every rank; the same answer everywhere, and one synchronisation."""
    value = flag if isinstance(flag, Tensor) else torch.tensor(flag, device=device)
    if world_size() == 1:
        return bool(value)
    agreed = value.to(torch.int32).reshape(1)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN)
    return bool(agreed)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Elementwise sum over ranks, as a new tensor of the same shape."""
    summed = values.clone()
    if world_size() > 1:
        torch.distributed.all_reduce(summed)
    return summed


def all_reduce_mean(values: Tensor) -> Tensor:
    """Elementwise mean over ranks, as a new tensor of the same shape; give it floating-point values."""
    return all_reduce_sum(values) / world_size()


def all_gather(values: list[T]) -> list[list[T]]:
    """This rank's list of picklable values -> every rank's lists, in rank order, on every rank."""
    if world_size() == 1:
        return [values]
    parts: list[list[T]] = [[] for _ in range(world_size())]
    torch.distributed.all_gather_object(parts, values)
    return parts


def all_equal(value: T) -> bool:
    """Whether every rank has the same value."""
    return all(part == [value] for part in all_gather([value]))


class StopFlag:
    """Turns SIGINT and SIGTERM into a flag that all ranks read together, so that none is left waiting for another.

    Inside the ``with`` block the first signal asks for a stop after the current step; a second SIGINT ends the process at
    once.  (A launcher passes Ctrl-C on as SIGTERM after the terminal has sent SIGINT, which is still the first request.)
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._interrupts = 0
        self._asked = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(128 + signal.SIGINT)
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank calls this once per step and gets the same answer."""
        return not all_true(not self._asked, self._device)


def _read_environment() -> tuple[int, int, int]:
    """(rank, size, local rank); a process without a launcher becomes a world of one, which DeepSpeed reads back."""
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if len(missing) == len(LAUNCHER_VARIABLES):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(zip(LAUNCHER_VARIABLES, ("0", "1", "0", "127.0.0.1", str(port)), strict=True))
    elif missing:
        raise UserError(
            f"the environment lacks {', '.join(missing)} but has other launcher variables: start with `deepspeed`, with "
            "`torchrun`, or with plain `python` and none of " + ", ".join(LAUNCHER_VARIABLES)
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def _start(local_rank: int, timeout: timedelta) -> torch.device:
    # A compiler that was killed leaves a lock in the shared extension cache on which later runs wait in silence; a
    # directory of this launch alone cannot hold one.
    os.environ.setdefault(
        "TORCH_EXTENSIONS_DIR", os.path.join(tempfile.gettempdir(), f"free_dist-{os.getuid()}-{os.getppid()}")
    )
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saves a warning about the search for others
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that torch is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")
    # DeepSpeed compiles this op in C++ whenever gloo starts, minutes of work for nothing that gloo lacks.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    name = get_accelerator().device_name()
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; start one process per GPU"
            )
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if name == "cuda" else torch.device("cpu")
    backend = "nccl" if name == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        port = os.environ["MASTER_PORT"]
        taken = "EADDRINUSE" in str(error) or "address already in use" in str(error)
        raise UserError(
            f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={port}: "
            + ("the port is in use: start with another --master_port" if taken else f"no connection: {error}")
        ) from error
    return device
