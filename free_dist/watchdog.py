"""Names the process that was killed, stopped or got stuck, and ends the others instead of letting them wait for it.

Every process has two threads that go on while its main thread is inside a collective.  One exchanges signs of life through a
small TCP store of its own, kept by rank 0, where each rank watches the next one; the other never waits for anything, and so
notices when rank 0 itself does not answer.  Does not know what the processes compute.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

import torch

from free_dist.config import Recipe
from free_dist.distributed import World, all_gather

EXIT_LOST_RANK = 86
"""What a process ends with because another one was lost or stuck."""

STACKS = "stacks"
"""Directory in a run's directory for one file per process that ended so: ``rank-N.txt``, every thread's stack."""

COLLECTIVES = ("torch.distributed.distributed_c10d", "deepspeed.comm")
"""Modules in which a process waits for others."""

OURS = ("free_dist.", "launch.")
VERDICT = "verdict"
LOST_STORE = 3.0
"""Seconds after which a broken connection to rank 0 counts as its death: it may also be about to end as this process is."""


@dataclass(kw_only=True)
class Life:
    """A sign of life of one process."""

    beats: int
    step: int
    """Step that its main thread is in."""
    seconds: float
    """How long it has been there."""
    where: str
    """What its main thread does."""
    waits: bool
    """Whether that is waiting for other processes."""
    name: str
    """Process id and machine."""
    failed: str = ""
    """The error that ends this process, if one does."""


class Watchdog:
    """Runs for the duration of a ``with`` block that all ranks enter together."""

    def __init__(self, world: World, run_dir: Path, *, hang_timeout: float, stall_timeout: float) -> None:
        """``hang_timeout``: seconds without a sign of life after which a rank is lost, 0 for no watch at all;
        ``stall_timeout``: seconds in which no step ends before all ranks end."""
        self._world, self._run_dir = world, run_dir
        self._hang, self._stall = hang_timeout, stall_timeout
        self._interval = min(1.0, max(0.1, hang_timeout / 8))
        self._main = threading.get_ident()
        self._step, self._since, self._beats = 0, time.monotonic(), 0
        self._heard = time.monotonic()
        self._broken: float | None = None
        self._failed = self._trace = ""
        self._end = threading.Event()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._store: torch.distributed.TCPStore | None = None

    @classmethod
    def of(cls, recipe: Recipe, world: World) -> Watchdog:
        """As the recipe has it."""
        training = recipe.training
        return cls(
            world, Path(recipe.run_dir), hang_timeout=training.hang_timeout, stall_timeout=training.stall_timeout
        )

    def __enter__(self) -> Watchdog:
        if self._hang == 0:
            return self
        if self._world.size > 1:
            self._store = _new_store(self._world)
            self._say(self._store)
            torch.distributed.barrier()  # from here on everybody's sign of life can be read
            self._threads.append(threading.Thread(target=self._exchange, args=(self._store,), daemon=True))
        self._since = self._heard = time.monotonic()
        self._threads.append(threading.Thread(target=self._watch, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is not None and self._store is not None:
            self._explain(error)
        self._end.set()
        for thread in self._threads:
            thread.join(self._interval + 1)
        if error is None and self._store is not None:
            torch.distributed.barrier()  # rank 0 keeps the store until nobody reads it
        self._store = None

    def beat(self, step: int) -> None:
        """The main thread has finished ``step``."""
        self._step, self._since = step + 1, time.monotonic()

    def _life(self) -> Life:
        where, waits = _place(sys._current_frames().get(self._main))
        self._beats += 1
        return Life(
            beats=self._beats,
            step=self._step,
            seconds=time.monotonic() - self._since,
            where=where,
            waits=waits,
            name=f"pid {os.getpid()} on {socket.gethostname()}",
            failed=self._failed,
        )

    def _say(self, store: torch.distributed.TCPStore) -> None:
        store.set(f"life/{self._world.rank}", json.dumps(asdict(self._life())))

    def _lives(self, store: torch.distributed.TCPStore) -> list[Life]:
        keys = [f"life/{rank}" for rank in range(self._world.size)]
        return [Life(**json.loads(value)) for value in store.multi_get(keys)]

    def _exchange(self, store: torch.distributed.TCPStore) -> None:
        neighbour = (self._world.rank + 1) % self._world.size
        seen, when = -1, time.monotonic()
        try:
            while not self._end.wait(self._interval):
                self._say(store)
                if store.check([VERDICT]):
                    self._die(store.get(VERDICT).decode(), found_here=False)
                life = Life(**json.loads(store.get(f"life/{neighbour}")))
                self._heard = time.monotonic()
                if life.beats != seen:
                    seen, when = life.beats, self._heard
                elif self._heard - when > self._hang:
                    self._condemn(store, _lost_message(self._silent(store), self._hang))
                if self._heard - self._since > self._stall:
                    self._condemn(store, _stalled_message(self._lives(store), self._stall))
        except RuntimeError:  # the connection is gone, and rank 0 with it
            self._broken = time.monotonic()

    def _watch(self) -> None:
        while not self._end.wait(self._interval):
            now = time.monotonic()
            if self._store is None:
                if now - self._since > self._stall:
                    self._die(_stalled_message([self._life()], self._stall), found_here=True)
            elif self._broken is not None and now - self._broken > min(LOST_STORE, self._hang):
                self._die("rank 0 is gone: its connection is closed", found_here=self._world.rank == 1)
            elif self._broken is None and now - self._heard > self._hang + 2 * self._interval:
                self._die(
                    f"rank 0 has given no sign of life for {self._hang:g} s: it hangs or its machine is lost", True
                )

    def _silent(self, store: torch.distributed.TCPStore, rounds: int = 3) -> dict[int, Life]:
        """Ranks that say nothing during a few intervals, with the last they said."""
        before = self._lives(store)
        for _ in range(rounds):
            time.sleep(self._interval)
            self._say(store)
        after = self._lives(store)
        pairs = enumerate(zip(before, after, strict=True))
        return {rank: new for rank, (old, new) in pairs if old.beats == new.beats and rank != self._world.rank}

    def _condemn(self, store: torch.distributed.TCPStore, message: str) -> None:
        if not message:
            return
        # Whoever writes first is right; all read the same.
        verdict = store.compare_set(VERDICT, "", message).decode()
        if verdict == message:  # before the wait, in which this process's other thread may read it and end both
            self._log(message)
        time.sleep(2 * self._interval)  # the others read it before rank 0, if this is rank 0, takes the store away
        self._die(verdict, found_here=False)

    def _explain(self, error: BaseException) -> None:
        """Before an error ends this process: tell the others, or find out whose end caused it."""
        own = not _is_of_others(error)
        store = self._store
        assert store is not None
        # The stack that a collective failed in is gone from the thread by now.
        self._trace = "\nraised in the main thread:\n" + "".join(traceback.format_exception(error))
        if own:
            self._failed = f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):
            self._say(store)
            if own:
                if self._world.is_main:  # the others read it before rank 0 takes the store away
                    time.sleep(2 * self._interval)
                return
            failed = {r: life for r, life in enumerate(self._lives(store)) if life.failed}
            message = "; ".join(f"rank {r} ({life.name}) ended with {life.failed}" for r, life in failed.items())
            message = message or _lost_message(self._silent(store), 3 * self._interval)
            if message:
                self._condemn(store, message)
            return  # nobody is missing: the error speaks for itself
        if not own:
            self._die("rank 0 is gone: its connection is closed", found_here=True)

    def _log(self, message: str) -> None:
        event = {"step": self._step, "time": time.time(), "event": "lost_rank", "message": message}
        with contextlib.suppress(OSError), (self._run_dir / "log.jsonl").open("a") as log:
            log.write(json.dumps(event) + "\n")

    def _die(self, message: str, found_here: bool) -> NoReturn:
        self._ending.acquire()  # two threads may know; one speaks, and the process ends with it
        line = f"rank {self._world.rank}: {message}"
        stacks = self._run_dir / STACKS / f"rank-{self._world.rank}.txt"
        try:
            stacks.parent.mkdir(parents=True, exist_ok=True)
            with stacks.open("w") as file:
                file.write(line + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write(self._trace)
            line += f"; stacks of this process in {stacks}"
            if found_here:
                self._log(message)
        except OSError:  # a disk that is full or gone must not keep the process alive
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
        # The main thread may be inside a collective that never ends, so nothing but this ends the process.
        os._exit(EXIT_LOST_RANK)


def _is_of_others(error: BaseException) -> bool:
    """Whether an error came out of a collective: another process caused it."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__", "").startswith(COLLECTIVES):
            return isinstance(error, RuntimeError)
        frame = frame.tb_next
    return isinstance(error, torch.distributed.DistError)


def _new_store(world: World) -> torch.distributed.TCPStore:
    host, patience = os.environ["MASTER_ADDR"], timedelta(minutes=5)
    port = 0
    store = None
    if world.is_main:
        store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
        port = store.port
    port = all_gather([port])[0][0]
    if store is None:
        store = torch.distributed.TCPStore(host, port, is_master=False, timeout=patience)
    return store


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """(what a thread does, whether it waits for other processes), from its innermost frame of this project."""
    waits, innermost, ours = False, "", ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        waits |= name.startswith(COLLECTIVES)
        here = f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
        innermost = innermost or here
        if name != __name__ and name.startswith(OURS):
            ours = ours or here
        frame = frame.f_back
    return ours or innermost, waits


def _described(rank: int, life: Life) -> str:
    return f"rank {rank} ({life.name}, step {life.step}, last seen in {life.where})"


def _lost_message(silent: dict[int, Life], seconds: float) -> str:
    if not silent:
        return ""
    names = " and ".join(_described(rank, life) for rank, life in silent.items())
    return f"{names} gave no sign of life for {seconds:.3g} s: killed, stopped, or its machine is lost"


def _stalled_message(lives: list[Life], seconds: float) -> str:
    behind = min(life.step for life in lives)
    stuck = {rank: life for rank, life in enumerate(lives) if life.step == behind and not life.waits}
    stuck = stuck or {rank: life for rank, life in enumerate(lives) if life.step == behind}
    names = " and ".join(_described(rank, life) for rank, life in stuck.items())
    return f"no step ended in {seconds:g} s (training.stall_timeout): {names} keeps the others waiting"
