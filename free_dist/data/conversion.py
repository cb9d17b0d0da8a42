"""Records whose images are still files -> shards: in parallel, resumable, the same bytes whatever the number of workers.

Every shard is a function of its own stretch of the records, and takes its name when it is whole.  Beside the shards of a split
stands ``conversion.jsonl``: a line per shard with a fingerprint of what it was made of.  A conversion that was killed, or is
repeated, keeps every shard whose fingerprint and checksum still hold and writes the others.  Does not know any data set.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from free_dist.atomic import write_atomically
from free_dist.config import MissingFileError, UserError
from free_dist.data.leaks import LeakGuard
from free_dist.data.pictures import read_picture
from free_dist.data.records import Record, record_json
from free_dist.data.shards import (
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    Shard,
    ShardError,
    holds_shard,
    read_manifest,
    write_manifest,
    write_shard,
)

LOG = "conversion.jsonl"

ORDER = ("withheld", "test", "calibration", "train")
"""Splits as they are written: an image that stands in two is left out of the later one, if it is left out."""

PUBLISHED_ORDER = ("train", "calibration", "test", "withheld")


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A record whose image is still a file."""

    record: Record
    """Its ``image`` is empty, unless what is stored is not the file as it is."""
    image: Path
    identity: str | None = None
    """What tells its image from every other one of the conversion, where the image id alone does not."""


@dataclass(frozen=True, kw_only=True)
class SplitSource:
    """Where the records of one split come from."""

    split: str
    drafts: Callable[[], Iterable[Draft]]
    """May be called more than once; the same drafts in the same order."""
    total: int | None = None
    """How many there are, where that is known beforehand."""
    may_be_empty: bool = False
    """Whether it may turn out to have no records, as where a hash chooses the split; otherwise that is an error."""


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """How a conversion runs.  Only ``records_per_shard``, ``drop_leaks`` and ``read`` change what it writes."""

    workers: int = 1
    """Threads: reading, hashing and decoding, most of the work, run side by side in them."""
    records_per_shard: int = 500
    drop_leaks: bool = False
    """Leave an image that stands in two splits out of the one further from the test split, instead of refusing it."""
    read: Callable[[Path], bytes] = read_picture
    """Image file -> what is stored."""

    def __post_init__(self) -> None:
        """Raise UserError for what cannot run."""
        for name in ("workers", "records_per_shard"):
            if vars(self)[name] < 1:
                raise UserError(f"--{name.replace('_', '-')}: want 1 or more")


def convert(
    root: Path, dataset: str, sources: Sequence[SplitSource], options: ConversionOptions | None = None
) -> list[Manifest]:
    """Write every split under ``root``, or keep what is already there, and return their manifests, train first.

    Raises LeakError for an image (its bytes or its id) in two splits, UserError for an image that is missing or does not
    decode, a key used twice or a split without records; what was whole by then is kept by the next call.
    """
    options = options or ConversionOptions()
    guard = LeakGuard()
    keys: dict[str, str] = {}
    manifests = {}
    for source in sorted(sources, key=lambda source: ORDER.index(source.split)):
        manifests[source.split] = _Split(root, dataset, source, options, guard, keys).convert()
    return [manifests[split] for split in PUBLISHED_ORDER if split in manifests]


class _Split:
    """The conversion of one split."""

    def __init__(
        self,
        root: Path,
        dataset: str,
        source: SplitSource,
        options: ConversionOptions,
        guard: LeakGuard,
        keys: dict[str, str],
    ) -> None:
        self.root, self.dataset, self.source, self.options, self.guard = root, dataset, source, options, guard
        self.keys = keys
        """Key -> split."""
        self.directory = root / source.split
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(".*.tmp"):  # what a killed conversion was writing
            left.unlink()
        self.log = self.directory / LOG
        self.made = read_log(self.log)
        self.advice = "" if options.drop_leaks else "; --drop-leaks leaves it out of the split further from the test"
        self.lock = threading.Lock()
        self.stop = threading.Event()

    def convert(self) -> Manifest:
        found: list[tuple[str, Shard]] = []
        pending: deque[Future[tuple[str, Shard]]] = deque()
        where = f"{self.dataset}/{self.source.split}"
        with (
            tqdm(desc=where, total=self.source.total, unit="image", mininterval=0.5) as self.bar,
            ThreadPoolExecutor(self.options.workers) as pool,
        ):
            try:
                for number, drafts in enumerate(self._chunks()):
                    pending.append(pool.submit(self._shard, f"{number:06d}.tar", drafts))
                    if len(pending) > 2 * self.options.workers:  # what waits is held in memory
                        found.append(pending.popleft().result())
                found += [future.result() for future in pending]
            except BaseException:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        if not self.source.may_be_empty and not any(shard.samples for _, shard in found):
            raise UserError(f"{where}: no records; are these the data set's own files?")
        return self._finish(found)

    def _finish(self, found: list[tuple[str, Shard]]) -> Manifest:
        found = [(fingerprint, shard) for fingerprint, shard in found if shard.samples]
        manifest = Manifest(
            dataset=self.dataset,
            split=self.source.split,
            schema_version=SCHEMA_VERSION,
            shards=tuple(shard for _, shard in found),
        )
        wanted = {shard.name for shard in manifest.shards}
        for path in self.directory.glob("[0-9][0-9][0-9][0-9][0-9][0-9].tar"):
            if path.name not in wanted:  # of a former, longer conversion
                path.unlink()
        lines = "".join(log_line(fingerprint, shard) for fingerprint, shard in found).encode()
        if not self.log.is_file() or self.log.read_bytes() != lines:
            write_atomically(self.log, lines)
        try:
            known = read_manifest(self.root, self.source.split)
        except ShardError:
            known = None
        if known != manifest:
            write_manifest(self.root, manifest)
        return manifest

    def _chunks(self) -> Iterator[list[Draft]]:
        drafts = iter(self._checked())
        while chunk := list(itertools.islice(drafts, self.options.records_per_shard)):
            yield chunk

    def _checked(self) -> Iterator[Draft]:
        """The drafts, without those whose id is known to stand in another split."""
        for draft in self.source.drafts():
            key = draft.record.key
            if key in self.keys:
                raise UserError(
                    f"{self._place(key)} is also in {self.root / self.keys[key]}: a key must name one record"
                )
            self.keys[key] = self.source.split
            identity = draft.identity or draft.record.image_id
            if identity is None or not self._leaks(f"id {identity}", key, what=f"image id {identity}"):
                yield draft

    def _leaks(self, mark: str, key: str, what: str = "image") -> bool:
        if not self.options.drop_leaks:
            self.guard.refuse(mark, self.source.split, self._place(key), what=what, advice=self.advice)
            return False
        return self.guard.elsewhere(mark, self.source.split, self._place(key)) is not None

    def _place(self, key: str) -> str:
        return f"{self.directory}: {key}"

    def _shard(self, name: str, drafts: list[Draft]) -> tuple[str, Shard]:
        """Keep or write one shard; runs in a worker."""
        fingerprint = fingerprint_of(drafts)
        shard = self._kept(name, fingerprint, len(drafts))
        if shard is None:
            with self.lock:
                (self.directory / MANIFEST).unlink(missing_ok=True)  # a split that is being rewritten is not finished
            shard = write_shard(self.directory, name, self._records(drafts))
            with self.lock, open(self.log, "a") as file:
                file.write(log_line(fingerprint, shard))
                file.flush()
                os.fsync(file.fileno())
        with self.lock:
            self.bar.update(len(drafts))
        return fingerprint, shard

    def _records(self, drafts: list[Draft]) -> Iterator[Record]:
        for draft in drafts:
            if self.stop.is_set():
                raise InterruptedError("another shard failed")
            image = draft.record.image or self.options.read(draft.image)
            if not self._leaks(hashlib.sha256(image).hexdigest(), draft.record.key):
                yield replace(draft.record, image=image)

    def _kept(self, name: str, fingerprint: str, n_drafts: int) -> Shard | None:
        known = self.made.get(name)
        path = self.directory / name
        if known is None or known[0] != fingerprint or known[1].samples != n_drafts:
            return None  # with fewer samples than drafts, what was left out depends on the other splits
        if not holds_shard(path, known[1]):
            return None
        leaks = [self._leaks(digest, key) for key, digest in image_digests(path)]
        return None if any(leaks) else known[1]


def fingerprint_of(drafts: Iterable[Draft]) -> str:
    """Hash of what a shard is made of: schema, keys, texts, and names and sizes of the image files.

    Raises MissingFileError or UserError naming an image whose size cannot be told.
    """
    digest = hashlib.sha256(f"schema {SCHEMA_VERSION}".encode())
    for draft in drafts:
        try:
            size = draft.image.stat().st_size
        except FileNotFoundError as error:
            raise MissingFileError(f"{draft.image} does not exist") from error
        except OSError as error:
            raise UserError(f"{draft.image} cannot be read: {error.strerror}") from error
        content = record_json(draft.record)
        # Lengths keep two different sequences from looking the same when they are put together.
        digest.update(f"\n{draft.record.key}\n{draft.image.name}\n{size}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def image_digests(path: Path) -> Iterator[tuple[str, str]]:
    """(key, SHA-256 of the image) of every record of a shard that is known to be whole."""
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            if suffix != "json" and file is not None:
                yield key, hashlib.sha256(file.read()).hexdigest()


def log_line(fingerprint: str, shard: Shard) -> str:
    """A finished shard as a line of the log."""
    return json.dumps({"fingerprint": fingerprint, **asdict(shard)}) + "\n"


def read_log(path: Path) -> dict[str, tuple[str, Shard]]:
    """Name -> (fingerprint, shard); a line that was cut off, or is of another form, is passed over."""
    if not path.is_file():
        return {}
    made = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            fields = json.loads(line)
            fingerprint = fields.pop("fingerprint")
            made[fields["name"]] = fingerprint, Shard(**fields)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            continue
    return made
