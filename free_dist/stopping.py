"""Being asked to stop: signals become a request, the request becomes an exit code.

SIGTERM and SIGUSR1 come from a scheduler that will take the machine away and start the same command again: exit code
``REQUEUE``, once what was learnt is saved.  SIGINT is a person at the keyboard: exit code ``INTERRUPTED``.  Imports no torch, so
that a signal that arrives while torch is being imported is heard too.  Does not know other processes
(:mod:`free_dist.distributed` agrees with them), nor what there is to save.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, MethodType

REQUEUE = 85
"""Exit code that asks for the same command to be started again: SIGTERM or SIGUSR1 came, and what was learnt is saved."""

INTERRUPTED = 130
"""Exit code after SIGINT, as shells have it."""

SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SIGNALS = (signal.SIGINT, *SCHEDULER_SIGNALS)

NOTHING, BY_SCHEDULER, BY_PERSON = 0, 1, 2
"""Who asked, ordered by who wins: Ctrl-C reaches a launcher too, which then sends SIGTERM."""


AGAIN = 1.0
"""Seconds after which a program that stops where the signal finds it is asked again.

Python drops what is raised while it calls back for a weak reference or destroys an object, and a library may catch everything.
"""


class Interrupted(BaseException):
    """The program was asked to stop before its end; whatever it keeps is saved.

    No Exception, as KeyboardInterrupt is none: whoever catches all errors of a piece of work must not catch this one.
    """

    def __init__(self, message: str = "", *, joint: bool = True) -> None:
        """``joint``: whether every rank raises it at the same place."""
        super().__init__(message)
        self.joint = joint
        self.is_told = True
        """Whether this process tells the message; one of many does."""


@dataclass
class _Request:
    interrupts: int = 0
    first: int = 0
    asked: int = NOTHING
    agreed: int = NOTHING
    handlers: dict[int, object] = field(default_factory=dict)


class StopSignals:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request that the program reads when it suits it.

    A second SIGINT ends the process at once.  Such blocks may be nested; they share one request, so what arrived before the
    inner one began is not lost.  Works in the main thread only, where Python runs handlers.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        """``at_once``: raise Interrupted where the signal finds the program, which has nothing to save.

        It is raised once more every ``AGAIN`` seconds, by SIGALRM, until :meth:`hear` is called or the block is left.
        """
        self._at_once = at_once
        self._request = _Request()
        self._is_inner = False

    def __enter__(self) -> StopSignals:
        owner = signal.getsignal(signal.SIGTERM)
        if isinstance(owner, MethodType) and isinstance(owner.__self__, StopSignals):
            self._request, self._is_inner = owner.__self__._request, True
            return self
        for number in SIGNALS:
            self._request.handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_exception: object) -> None:
        if not self._is_inner:
            self.hear()
            for number, handler in self._request.handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._request.interrupts += number == signal.SIGINT
        if self._request.interrupts > 1:
            os._exit(INTERRUPTED)
        is_first = self._request.asked == NOTHING
        self._request.asked = max(self._request.asked, BY_PERSON if number == signal.SIGINT else BY_SCHEDULER)
        if self._at_once and is_first:
            self._request.first = number
            self._request.handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._raise)
            signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
            self._raise()

    def _raise(self, *_signal: object) -> None:
        name = signal.Signals(self._request.first).name
        raise Interrupted(f"stopped by {name}; the same command starts over", joint=False)

    def hear(self) -> None:
        """Interrupted has arrived: raise it no more."""
        if self._request.first:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def stay_deaf(self) -> None:
        """Let the scheduler's signals do nothing after the block, where it is the outermost one.

        Not by ignoring them, which programs started from here would inherit.
        """
        if not self._is_inner:
            self._request.handlers |= dict.fromkeys(SCHEDULER_SIGNALS, _do_nothing)

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop, by itself."""
        return self._request.asked != NOTHING

    @property
    def exit_code(self) -> int:
        """The code to end with, the same on all ranks that agreed; 0 where nobody asked."""
        return {NOTHING: 0, BY_SCHEDULER: REQUEUE, BY_PERSON: INTERRUPTED}[self._request.agreed or self._request.asked]


@contextmanager
def stop_clearly(*, at_once: bool = False) -> Iterator[StopSignals]:
    """Around the whole of a program: Interrupted becomes one line and the exit code of whoever asked.

    From then on the scheduler's signals are ignored: a second one must not turn the code into its own.  The process ends
    without the interpreter's own closing, which takes seconds after torch was imported, while the first process to go makes
    a scheduler kill those that are still closing.
    """
    with StopSignals(at_once=at_once) as stop:
        try:
            yield stop
        except Interrupted as reached:
            stop.hear()
            _ignore_scheduler()
            if reached.is_told:
                sys.stdout.write(f"\n{reached}\n")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.exit_code)
        finally:
            # What is done is done: a signal from here on, or while the interpreter closes, must not look like a failure.
            stop.stay_deaf()
            atexit.register(_ignore_scheduler)


def _do_nothing(_number: int, _frame: FrameType | None) -> None: ...


def _ignore_scheduler() -> None:
    for number in SCHEDULER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
