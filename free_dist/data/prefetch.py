"""Work done ahead in background threads, in order, and given up where it hangs.

Threads and not processes: reading, checksums and image decoders release the interpreter's lock, and results need no copying.
Does not know what the work is.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, TypeVar

Job = TypeVar("Job")
What = tuple[int, str]
"""(number of a record, what is done with it)."""
Result = TypeVar("Result")

LAST_WORK = 5.0
"""Seconds for which the end of the process waits for work that is no longer wanted; a read that hangs goes down with it."""


class Progress:
    """What a piece of work is doing, and since when; the work itself says so before each thing that might hang."""

    def __init__(self) -> None:
        self._now: tuple[float, float, What] | None = None

    def at(self, what: What, *, patience: float = 1.0) -> None:
        """Something new begins, for which this share of the usual time is enough."""
        self._now = (time.monotonic(), patience, what)

    def stalled(self, timeout: float) -> What | None:
        """What has not ended for ``timeout`` seconds, or its share of them; else None."""
        now = self._now
        return now[2] if now is not None and time.monotonic() - now[0] > timeout * now[1] else None


class _Task(Generic[Job, Result]):
    """One job: its progress, and in the end its result or error."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.progress = Progress()
        self.done = threading.Event()
        self.results: list[Result] = []
        self.error: BaseException | None = None

    def run(self, work: Callable[[Job, Progress], Result]) -> None:
        try:
            self.results.append(work(self.job, self.progress))
        except BaseException as error:
            self.error = error
            if not isinstance(error, ValueError):  # what the user can put right is told once, by the consumer
                raise
        finally:
            self.done.set()


def in_background(
    work: Callable[[Job, Progress], Result],
    jobs: Iterator[Job],
    *,
    workers: int,
    ahead: int,
    timeout: float,
    on_stall: Callable[[What], None],
) -> Iterator[Result]:
    """``work(job, progress)`` of every job in order, by ``workers`` threads that are up to ``ahead`` jobs in front.

    Where one step of a job takes more than ``timeout`` seconds, ``on_stall`` is told what it was and the job is done again, by
    another thread; it should then avoid that step.  The thread that hangs is left alone.  An error of a job is raised in its
    place.  ``workers=0``: no threads, and no timeout.
    """
    if workers == 0:
        for job in jobs:
            yield work(job, Progress())
        return
    waiting: queue.SimpleQueue[_Task[Job, Result] | None] = queue.SimpleQueue()
    closed = threading.Event()
    threads: list[threading.Thread] = []

    def serve(first: _Task[Job, Result] | None = None) -> None:
        task = first or waiting.get()
        while task is not None and not closed.is_set():
            task.run(work)
            task = waiting.get()

    def close() -> None:
        closed.set()
        for _ in threads:  # those that hang, too: some come back
            waiting.put(None)

    def start(first: _Task[Job, Result] | None = None) -> None:
        threads.append(threading.Thread(target=serve, args=(first,), daemon=True, name="free_dist-data"))
        threads[-1].start()

    def end() -> None:
        # A thread that is inside a library's code when the interpreter ends would abort the process.
        close()
        until = time.monotonic() + LAST_WORK
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    atexit.register(end)

    for _ in range(workers):
        start()
    tasks: deque[_Task[Job, Result]] = deque()
    try:
        while True:
            for job in islice(jobs, ahead - len(tasks)):
                tasks.append(_Task(job))
                waiting.put(tasks[-1])
            if not tasks:
                return
            task = tasks[0]
            while not task.done.wait(timeout / 40):
                if (what := task.progress.stalled(timeout)) is not None:
                    on_stall(what)
                    task = tasks[0] = _Task(task.job)
                    start(task)
            tasks.popleft()
            if task.error is not None:
                raise task.error
            yield task.results[0]
    finally:
        close()
        # Whoever is still at work when the process ends is waited for then; of others nothing need be remembered.
        if not any(thread.is_alive() for thread in threads):
            atexit.unregister(end)
