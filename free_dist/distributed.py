"""Processes: who this one is, how they agree, how they stop.

Works under ``deepspeed``, ``torchrun``, ``srun``, ``mpirun`` and plain ``python`` (one process); who that is in each,
:mod:`free_dist.launchers` reads.  Does not know engines, models or data.
"""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from free_dist.config import UserError
from free_dist.launchers import Place, read_environment
from free_dist.stopping import INTERRUPTED, NOTHING, REQUEUE, Interrupted, StopSignals

__all__ = [
    "INTERRUPTED",
    "REQUEUE",
    "Interrupted",
    "StopFlag",
    "World",
    "all_equal",
    "all_gather",
    "all_reduce_mean",
    "all_reduce_sum",
    "all_true",
    "check_world_size",
    "distributed_session",
    "seed_everything",
    "world_size",
]

T = TypeVar("T")


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

    Raises UserError when fewer processes were started than ``expected_world_size``, the environment is incomplete or
    contradicts itself, or rank 0's port is taken.
    """
    place = _read_environment()
    check_world_size(expected_world_size, place.size)
    world = World(rank=place.rank, size=place.size, local_rank=place.local_rank, device=_start(place, timeout))
    try:
        yield world
    except Interrupted as stopped:
        if stopped.joint:
            stopped.is_told = world.is_main
            _close()
        raise
    # Not in a finally: after an error a collective close would wait for ranks that are still at work, while dying closes
    # the sockets and fails them at once.
    _close()


def _close() -> None:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def settle_accelerator() -> bool:
    """Whether there is a GPU; where not, DeepSpeed, when it is imported after this, does not warn that it found none."""
    found = torch.accelerator.is_available()
    if not found:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return found


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


def all_reduce_max(values: Tensor) -> Tensor:
    """Elementwise largest over ranks, as a new tensor of the same shape."""
    largest = values.clone()
    if world_size() > 1:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest


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


class StopFlag(StopSignals):
    """A request to stop that all ranks read together, so that none is left waiting for another.

    Inside the ``with`` block the first signal to any rank asks for a stop after the current step; see
    :class:`~free_dist.stopping.StopSignals` for which signals, and for a second Ctrl-C.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self._device = device

    def __enter__(self) -> StopFlag:
        super().__enter__()
        return self

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank calls this once per step and gets the same answer."""
        self._exchange(is_busy=True)
        return self._request.agreed != NOTHING

    def agreed_while_others_work(self) -> bool:
        """:meth:`agreed` for a rank whose own steps are done: returns when every rank's are, or when a stop is agreed on.

        Ranks may so have different numbers of steps.
        """
        while self._exchange(is_busy=False) and self._request.agreed == NOTHING:
            continue
        return self._request.agreed != NOTHING

    def _exchange(self, *, is_busy: bool) -> bool:
        """Agree on who asked; returns whether any rank still works."""
        # Read once: a signal may come at any moment, and what this rank answers must be what it told the others.
        asked, busy = self._request.asked, is_busy and world_size() > 1
        if world_size() > 1:
            told = torch.tensor([asked, is_busy], dtype=torch.int32, device=self._device)
            torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
            asked, busy = told.tolist()
        self._request.agreed = asked
        return bool(busy)


def _read_environment() -> Place:
    """This process's place, written where torch and DeepSpeed read it."""
    place = read_environment(os.environ)
    os.environ.update(place.variables())
    return place


def _start(place: Place, timeout: timedelta) -> torch.device:
    # A compiler that was killed leaves a lock in the shared extension cache on which later runs wait in silence; a
    # directory of this launch alone cannot hold one.
    os.environ.setdefault(
        "TORCH_EXTENSIONS_DIR", os.path.join(tempfile.gettempdir(), f"free_dist-{os.getuid()}-{os.getppid()}")
    )
    if not settle_accelerator() and place.size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # As deepspeed and torchrun set it; sums split over more threads differ in their last bits.
        torch.set_num_threads(1)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that torch is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")
    # DeepSpeed compiles this op in C++ whenever gloo starts, minutes of work for nothing that gloo lacks.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    name = get_accelerator().device_name()
    if name == "cuda":
        if place.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {place.local_rank} has no GPU: {torch.cuda.device_count()} visible; start one process per GPU "
                "(under Slurm with --gpus-per-node, which shows every task of a machine all of its GPUs)"
            )
        torch.cuda.set_device(place.local_rank)
    device = torch.device("cuda", place.local_rank) if name == "cuda" else torch.device("cpu")
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if name == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timeout
        )
    except torch.distributed.DistNetworkError as error:
        raise UserError(_network_error(place, str(error))) from error
    return device


def _network_error(place: Place, error: str) -> str:
    where = f"MASTER_PORT={place.master_port} of MASTER_ADDR={place.master_addr}"
    if "EADDRINUSE" in error:
        return (
            f"{where} is in use by another program, perhaps another run: choose another port (`deepspeed --master_port`, "
            "`torchrun --master_port`, or export MASTER_PORT before `srun` and `mpirun`)"
        )
    return f"{where} cannot be reached from rank {place.rank}: {error.splitlines()[0]}"
