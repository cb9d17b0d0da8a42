"""What becomes of samples that cannot be used: each is named with its reason, and too many end the run.

The file is JSON lines, appended to by every rank with one write a line.  Does not know how a fault was found, nor what
takes the place of a bad sample.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from free_dist.config import UserError

QUARANTINE = "quarantine.jsonl"
"""Name of the file in a run's directory."""


class BadSample(UserError):
    """A sample, or a whole shard, that cannot be used; ``reason`` is a few fixed words, ``detail`` what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One line of the file."""

    shard: str
    """File name within the split; may be empty where no shard is at fault."""
    key: str | None
    """Of the sample; None: everything in the shard that is not named by itself."""
    reason: str
    detail: str = ""
    samples: int = 1
    """Records that are lost."""


class Quarantine:
    """The faults that this run has found in one split, in this process and, where ``path`` is shared, in the others.

    What an earlier run wrote to the file is not counted: a fault that is still there is found again, and not written twice.
    """

    def __init__(self, path: Path | None, *, place: str, total: int, budget: float) -> None:
        """``place`` names the split in messages; ``total``: its records; ``budget``: the share of them that may be bad."""
        self._path = path
        self._place = place
        self._total = total
        self._budget = budget
        self._lock = threading.Lock()
        self._faults: dict[tuple[str, str | None], Fault] = {}
        self.lost = 0
        """Records that cannot be used."""
        self._earlier = {(fault.shard, fault.key) for fault in self._lines()}

    @property
    def faults(self) -> list[Fault]:
        """All that are known, each once, in the order in which they were found."""
        return list(self._faults.values())

    def add(self, *faults: Fault) -> None:
        """Note faults, each once; raises UserError when the bad share of the split then exceeds its budget."""
        with self._lock:
            if any((fault.shard, fault.key) not in self._faults for fault in faults):
                self._read()  # faults are rare, and other ranks find some
            for fault in faults:
                if (fault.shard, fault.key) not in self._faults:
                    if (fault.shard, fault.key) not in self._earlier:
                        self._write(fault)
                    self._note(fault)
            if faults and self.lost > self._budget * self._total:
                where = "Prepare the data again"
                if self._path is not None:
                    where = f"Every one is named in {self._path}: prepare the data again and start again"
                example = faults[-1]
                raise UserError(
                    f"data.bad_sample_budget={self._budget}: {self.lost} of {self._total} records of {self._place} cannot be "
                    f"used, as in {example.shard} {example.key or '(whole shard)'}: {example.reason} {example.detail}. "
                    f"{where}, or raise the budget"
                )

    def _note(self, fault: Fault) -> None:
        self._faults[fault.shard, fault.key] = fault
        self.lost += fault.samples

    def _read(self) -> None:
        """Note what other processes of this run have found."""
        for fault in self._lines():
            if (fault.shard, fault.key) not in self._faults.keys() | self._earlier:
                self._note(fault)

    def _lines(self) -> Iterator[Fault]:
        if self._path is not None:
            yield from (fault for place, fault in read_faults(self._path) if place == self._place)

    def _write(self, fault: Fault) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"split": self._place} | asdict(fault), ensure_ascii=True) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def read_faults(path: Path) -> Iterator[tuple[str, Fault]]:
    """(split, fault) of every whole line of the file; nothing if there is none."""
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").split("\n"):
        try:
            content = json.loads(line)
            yield content.pop("split"), Fault(**content)
        except (ValueError, TypeError, KeyError, AttributeError):  # torn by a crash: the fault is found again
            continue


def lost_records(path: Path) -> int:
    """Records that the file names as unusable, over all splits and runs."""
    return sum({(split, fault.shard, fault.key): fault.samples for split, fault in read_faults(path)}.values())
