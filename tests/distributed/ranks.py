"""Runs a function on several gloo ranks, for tests.

Ranks are forked from a server that has imported everything and computed nothing: imports are paid once, and no rank inherits
threads or DeepSpeed's global state from the test process.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from free_dist.launchers import free_port

os.environ.setdefault("DS_ACCELERATOR", "cpu")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "free_dist.training.step",
        "free_dist.training.finetune",
        "free_dist.backbones.embedded",
        # DeepSpeed imports it with the first optimizer, and it brings torch's compiler along: seconds for every rank.
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "peft",
    ]
)

TIMEOUT = 300
"""Seconds after which a rank counts as hung."""


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(*arguments)`` on ``size`` ranks inside a session; return their results by rank.

    Raises AssertionError with the rank's traceback if one fails.
    """
    port = free_port()
    pipes = [_context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _context.Process(target=_rank, args=(rank, size, port, pipes[rank][1], function, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        results = []
        for rank, (receiver, sender) in enumerate(pipes):
            sender.close()
            assert receiver.poll(TIMEOUT), f"rank {rank} hangs"
            ok, value = torch.load(io.BytesIO(receiver.recv_bytes()))
            assert ok, f"rank {rank} failed:\n{value}"
            results.append(value)
        return results
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _rank(rank: int, size: int, port: int, pipe: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    from free_dist.distributed import distributed_session

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        with distributed_session():
            message = (True, function(*arguments))
    except BaseException:  # noqa: BLE001 - whatever ended this rank is reported to the test
        message = (False, traceback.format_exc())
    # As bytes: a tensor sent as such stays in the memory of a process that is about to end.
    buffer = io.BytesIO()
    torch.save(message, buffer)
    pipe.send_bytes(buffer.getvalue())
