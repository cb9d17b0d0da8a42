"""All shards of a split as one table of records: what is there, how many samples each record gives, and reading any of them.

Records keep the numbers that the manifest's order gives them, whatever the shards are.  Faults that the files themselves show
are found here, before the first sample, and so alike in every process.  Does not know order, batches or ranks.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from free_dist.config import TASKS, DataConfig
from free_dist.data.order import Integers
from free_dist.data.quarantine import BadSample, Fault, Quarantine
from free_dist.data.records import Record
from free_dist.data.shard_index import (
    ROW,
    SUFFIX,
    ShardIndex,
    build_index,
    checked_record,
    load_index,
    read_row,
    row_span,
    save_index,
)
from free_dist.data.shards import Manifest, Shard, holds_shard, read_manifest
from free_dist.data.sources import cache_directory, fetch, is_local

MAX_OPEN = 64
"""Shards that a reader keeps open."""

IMPATIENCE = 0.1
"""Share of ``read_timeout`` for what has hung before."""


@dataclass(kw_only=True)
class SplitIndex:
    """The usable records of a split, 0, 1, ... in manifest order."""

    config: DataConfig
    split: str
    manifest: Manifest
    quarantine: Quarantine
    rows: NDArray[np.void]
    """[records] of :data:`~free_dist.data.shard_index.ROW`."""
    keys: NDArray[np.bytes_]
    shard_of: Integers
    """[records], number of the shard in the manifest."""
    stalled: set[int] = field(default_factory=set)
    """Records on which a reader or a decoder hung: none touches them again."""
    slow_shards: set[int] = field(default_factory=set)
    """Shards on which a reader hung: see :meth:`patience`."""

    def __post_init__(self) -> None:
        self._directory = Path(self.config.root) / self.split

    @classmethod
    def open(cls, config: DataConfig, split: str, *, quarantine: Path | None = None, first: float = 0.0) -> SplitIndex:
        """Index every shard that is not indexed yet, and leave out what cannot be used.

        ``quarantine``: the file that names it.  ``first``: share of the shards before the one to begin with; ranks that begin at
        different ones find what others have indexed.  Raises ShardError for a split without a sound manifest, UserError when
        more is bad than ``config.bad_sample_budget``.
        """
        manifest = read_manifest(config.root, split, timeout=config.read_timeout)
        place = f"{config.root} {split}"
        faults = Quarantine(quarantine, place=place, total=manifest.samples, budget=config.bad_sample_budget)
        index = cls(
            config=config,
            split=split,
            manifest=manifest,
            quarantine=faults,
            rows=np.zeros(0, ROW),
            keys=np.zeros(0, "S1"),
            shard_of=np.zeros(0, np.int64),
        )
        shards = len(manifest.shards)
        parts: dict[int, ShardIndex] = {}
        for number in tqdm(range(shards), desc=f"indexing {place}", unit="shard", delay=5.0):
            turned = (number + int(first * shards)) % shards
            parts[turned] = index._of_shard(turned)
        index._join([parts[number] for number in range(shards)])
        return index

    def path(self, shard: int) -> Path:
        """A local file with a shard's content; raises BadSample if it is remote and does not come."""
        entry = self.manifest.shards[shard]
        if is_local(self.config.root):
            return self._directory / entry.name
        path = cache_directory(self.config.cache) / f"{entry.sha256}.tar"
        if not path.exists():
            relative = f"{self.split}/{entry.name}"
            fetch(self.config.root, relative, path, limit=entry.bytes, timeout=self.config.read_timeout)
            if not holds_shard(path, entry):
                path.unlink(missing_ok=True)  # it may be put right
                raise BadSample("wrong checksum", f"{self.config.root} {relative} is not what the manifest says")
        return path

    def lengths(self, task: str) -> Integers:
        """Characters of text of a sample of ``task``, about, [records]."""
        return self.rows["length"][:, TASKS.index(task)].astype(np.int64)

    def fingerprint(self) -> int:
        """63 bits that differ when records do, for comparing processes."""
        digest = hashlib.blake2b(self.rows["key_hash"].tobytes() + self.rows["said"].tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def report(self, record: int, fault: BadSample) -> None:
        """Name a record in the quarantine; raises UserError when the budget is spent."""
        self.quarantine.add(self._fault(record, fault))

    def give_up(self, what: tuple[int, str]) -> None:
        """Never again do what hung: (record, "read" or "decode").

        Only that record, so that what is skipped does not depend on which process reads which records.
        """
        record, doing = what
        self.stalled.add(record)
        if doing == "read":
            self.slow_shards.add(int(self.shard_of[record]))

    def patience(self, record: int) -> float:
        """Share of ``read_timeout`` that a reader gets: less once its shard has hung, or a lost one would hang for hours."""
        return IMPATIENCE if int(self.shard_of[record]) in self.slow_shards else 1.0

    def key(self, record: int) -> str:
        """The key of a record."""
        return self.keys[record].decode()

    def _fault(self, record: int, fault: BadSample) -> Fault:
        shard = self.manifest.shards[int(self.shard_of[record])].name
        return Fault(shard=shard, key=self.key(record), reason=fault.reason, detail=fault.detail)

    def _of_shard(self, number: int) -> ShardIndex:
        shard = self.manifest.shards[number]
        kept = self._index_paths(shard)
        for path in kept:
            index = load_index(path, shard)
            if index is not None:
                return index
        try:
            index = build_index(self.path(number), shard)
        except BadSample as fault:  # not kept: the shard may be put right
            whole = Fault(shard=shard.name, key=None, reason=fault.reason, detail=fault.detail, samples=shard.samples)
            return ShardIndex(rows=np.zeros(0, ROW), keys=np.zeros(0, "S1"), faults=(whole,))
        for path in kept:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_index(path, index, shard)
            except OSError:  # a directory that only others may write: the cache is next
                continue
            break
        return index

    def _index_paths(self, shard: Shard) -> list[Path]:
        cached = cache_directory(self.config.cache) / f"{shard.sha256}{SUFFIX}"
        if not is_local(self.config.root):
            return [cached]
        return [self._directory / f"{shard.name}{SUFFIX}", cached]

    def _join(self, parts: list[ShardIndex]) -> None:
        if parts:
            self.rows = np.concatenate([part.rows for part in parts])
            self.keys = np.concatenate([part.keys for part in parts])
            self.shard_of = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
        faults = [fault for part in parts for fault in part.faults if fault.samples]
        first = np.zeros(len(self.rows), dtype=bool)
        first[np.unique(self.rows["key_hash"], return_index=True)[1]] = True
        again = BadSample("duplicate key", "the first record of this key is kept")
        self.quarantine.add(*faults, *(self._fault(record, again) for record in np.flatnonzero(~first).tolist()))
        self.rows, self.keys, self.shard_of = self.rows[first], self.keys[first], self.shard_of[first]


def usable_records(index: SplitIndex, numbers: Integers) -> Iterator[Record]:
    """Records by their numbers; those that cannot be used are reported and left out."""
    with closing(RecordReader(index)) as reader:
        for record in numbers.tolist():
            try:
                content = reader.read(record)
            except BadSample as fault:
                index.report(record, fault)
                continue
            yield content


class RecordReader:
    """Random access to the records of a split.  Keeps files open; for one thread."""

    def __init__(self, index: SplitIndex) -> None:
        self._index = index
        self._open: OrderedDict[int, tuple[int, tuple[int, ...]]] = OrderedDict()

    def read(self, record: int) -> Record:
        """A record by its number, its bytes checked; raises BadSample."""
        if record in self._index.stalled:
            raise BadSample("stalled reader", f"no answer within {self._index.config.read_timeout} s")
        image, content = read_row(self._index.rows[record], self._descriptor(int(self._index.shard_of[record])))
        return checked_record(self._index.key(record), image, content)

    def expect(self, record: int) -> None:
        """Have the system start to read a record that is wanted soon: a disk answers many requests at once, and faster."""
        if not hasattr(os, "posix_fadvise") or record in self._index.stalled:  # macOS has none
            return
        with suppress(BadSample):  # told when it is read
            first, size = row_span(self._index.rows[record])
            descriptor = self._descriptor(int(self._index.shard_of[record]))
            os.posix_fadvise(descriptor, first, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()  # a worker's reader ends with its thread

    def _descriptor(self, shard: int) -> int:
        """An open file of the shard as it is now: one that was removed is gone for all ranks alike, open or not."""
        path = self._index.path(shard)
        try:
            identity = _identity(os.stat(path))
            if shard in self._open:
                descriptor, opened = self._open[shard]
                if opened == identity:
                    self._open.move_to_end(shard)
                    return descriptor
                os.close(self._open.pop(shard)[0])
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise BadSample("missing shard", str(error)) from error
        about = os.fstat(descriptor)
        self._open[shard] = descriptor, _identity(about)
        if len(self._open) > MAX_OPEN:
            os.close(self._open.popitem(last=False)[1][0])
        if not stat.S_ISREG(about.st_mode):
            raise BadSample("missing shard", f"{path} is not a plain file")
        return descriptor


def _identity(about: os.stat_result) -> tuple[int, ...]:
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
