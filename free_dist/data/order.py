"""The order of an epoch, and how far a run has come in it: arithmetic on integers, nothing is read.

Where a sample stands follows from (seed, epoch, its place in the data set) alone, so it is the same for any number of ranks
and workers and for any cut of the records into shards.  Two ways to shuffle, one formula:

- A data set of up to ``window`` records is permuted as a whole.
- A larger one is cut into *runs* of consecutive records; the runs are permuted, then the records inside every window of
  ``window`` places.  A window mixes at least ``RUNS_PER_WINDOW`` distant parts of the data set, and yet reads records that
  stand side by side in their file, which disks, page caches and object stores answer many times faster than single ones.

Needs about 16 bytes a record.  Random keys come from a hash written out here, because the streams of ``random`` and numpy
may change with their versions.  Does not know files, records or batches' contents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from free_dist.config import UserError

Integers = NDArray[np.int64]

RUNS_PER_WINDOW = 64
"""Distant parts of a data set that a window mixes."""

MAX_RUN = 64
"""Most consecutive records that stay in one window; 64 COCO images are 10 MB, enough for any disk's full speed."""


def key_of(*parts: object) -> int:
    """A 64-bit key from anything that can be printed."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def hashed(key: int, numbers: NDArray[Any]) -> NDArray[np.uint64]:
    """A 64-bit hash of every number under ``key``: the mixing function of SplitMix64 (Steele, Lea, Flood 2014)."""
    mixed = np.atleast_1d(numbers).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def permutation(count: int, key: int, *, window: int, lengths: Integers | None = None, bucket: int = 0) -> Integers:
    """The numbers below ``count`` in the order of ``key``, [count].

    With ``bucket``, blocks of so many places hold numbers of similar ``lengths`` [count]; blocks stand in random order.
    """
    places = np.arange(count)
    if count == 0:
        return places
    window = min(window, count)
    if window < count:
        run = places // max(1, min(MAX_RUN, window // RUNS_PER_WINDOW))
        places = np.argsort(hashed(key_of(key, "runs"), run), kind="stable")
    windows = np.arange(count) // window
    places = places[np.lexsort((hashed(key_of(key, "records"), places), windows))]
    if bucket and lengths is not None:
        places = places[np.lexsort((lengths[places], windows))]
        blocks = (np.arange(count) % window) // bucket + windows * (window // bucket + 1)
        places = places[np.lexsort((hashed(key_of(key, "blocks"), blocks), windows))]
    return places


class EpochOrder:
    """The samples of one task and epoch: place 0, 1, ... -> (record, which of its samples).

    Samples of one record stand side by side, so that a batch decodes its image once.
    """

    def __init__(
        self, counts: Integers, *, key: int, window: int, lengths: Integers | None = None, bucket: int = 0
    ) -> None:
        """``counts`` [records]: samples that each gives to an epoch; ``lengths`` [records]: of its text, for ``bucket``."""
        useful = np.flatnonzero(counts)
        chosen = None if lengths is None else lengths[useful]
        self.records = useful[permutation(len(useful), key, window=window, lengths=chosen, bucket=bucket)]
        """Records that have something for the task, in order."""
        self._ends = np.cumsum(counts[self.records])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, place: int) -> tuple[int, int]:
        """(record, which of its samples) at a place of the epoch, found by bisection."""
        if not 0 <= place < len(self):
            raise IndexError(f"place {place} of an epoch of {len(self)} samples")
        row = int(np.searchsorted(self._ends, place, side="right"))
        return int(self.records[row]), place - (int(self._ends[row - 1]) if row else 0)


def tasks_of_batches(weights: Mapping[str, float], seed: int, first: int, count: int) -> list[str]:
    """The task of each of ``count`` global batches from ``first`` on, drawn by weight."""
    names = [name for name, weight in weights.items() if weight > 0]
    return [names[i] for i in _drawn(names, weights, seed, first, count)]


def _drawn(names: Sequence[str], weights: Mapping[str, float], seed: int, first: int, count: int) -> Integers:
    bounds = np.cumsum([weights[name] for name in names])
    uniform = (hashed(key_of(seed, "tasks"), np.arange(first, first + count)) >> np.uint64(11)) * 2.0**-53
    return np.minimum(np.searchsorted(bounds, uniform * bounds[-1], side="right"), len(names) - 1)


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """How far a run has come: all that is needed to go on, with other numbers of ranks, workers or rows."""

    batches: int = 0
    """Global batches that were taken."""
    samples: Mapping[str, int]
    """Task -> samples that were taken of it, over all epochs."""

    @classmethod
    def after(cls, batches: int, *, weights: Mapping[str, float], seed: int, rows: int) -> StreamState:
        """The state after ``batches`` global batches of ``rows`` samples, from the start; 10 ms for a million."""
        names = [name for name, weight in weights.items() if weight > 0]
        taken = np.bincount(_drawn(names, weights, seed, 0, batches), minlength=len(names))
        return cls(batches=batches, samples={name: int(n) * rows for name, n in zip(names, taken, strict=True)})

    def to_dict(self) -> dict[str, Any]:
        """As plain integers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StreamState:
        """The inverse of :meth:`to_dict`; raises UserError for anything else."""
        samples = content.get("samples")
        whole = [content.get("batches"), *(samples.values() if isinstance(samples, dict) else [None])]
        if any(type(number) is not int or number < 0 for number in whole) or set(content) != {"batches", "samples"}:
            raise UserError(f"the state of a data stream cannot be {dict(content)!r}: the checkpoint is damaged")
        return cls(batches=content["batches"], samples=dict(content["samples"]))
