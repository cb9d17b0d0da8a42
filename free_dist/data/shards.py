"""WebDataset tar shards with a manifest: written atomically, read back as Records.

A split is a directory ``ROOT/SPLIT`` of ``NNNNNN.tar`` files and one ``manifest.json``, written last, so a split without a
manifest was never finished.  Does not know any data set, and nothing about order, ranks or tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from free_dist.atomic import replaced_file, write_atomically
from free_dist.config import UserError
from free_dist.data.quarantine import BadSample
from free_dist.data.records import Record, record_json
from free_dist.data.sources import is_local, read_remote
from free_dist.hashing import file_sha256

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "calibration", "test")
"""Splits of a data set, in the order in which they are made."""
MAX_MANIFEST_BYTES = 1 << 28


class ShardError(UserError):
    """A split directory that cannot be read as it stands; the message names the file and what to do."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file of a split."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished split holds."""

    dataset: str
    split: str
    schema_version: int
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        """Records in the split."""
        return sum(shard.samples for shard in self.shards)


def write_split(
    root: Path, *, dataset: str, split: str, records: Iterable[Record], total: int, records_per_shard: int = 500
) -> Manifest:
    """Write records to tar shards; the same records give the same bytes.

    Every file appears under its final name only when complete, the manifest last.
    """
    directory = root / split
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)  # a split that is being rewritten is not finished
    shards: list[Shard] = []
    pending: list[Record] = []

    def flush() -> None:
        if pending:
            shards.append(write_shard(directory, f"{len(shards):06d}.tar", pending))
            pending.clear()

    for record in tqdm(records, desc=f"writing {dataset}/{split}", total=total, unit="image", mininterval=0.5):
        pending.append(record)
        if len(pending) == records_per_shard:
            flush()
    flush()
    manifest = Manifest(dataset=dataset, split=split, schema_version=SCHEMA_VERSION, shards=tuple(shards))
    write_manifest(root, manifest)
    return manifest


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest of a split under ``root``, which says that it is finished."""
    write_atomically(root / manifest.split / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())


def read_manifest(root: Path | str, split: str, *, timeout: float = 60.0) -> Manifest:
    """The manifest of a split; raises ShardError if the split is missing, unfinished or of another schema.

    ``root`` may be remote (``free_dist.data.sources``); then nothing may arrive for ``timeout`` seconds at most.
    """
    if is_local(str(root)):
        path = str(Path(root) / split / MANIFEST)
        if not Path(path).is_file():
            raise ShardError(
                f"data.root: {path} does not exist; make the shards with: python launch/prepare_data.py easyvqa"
            )
        content = Path(path).read_bytes()
    else:
        path = f"{root} {split}/{MANIFEST}"
        try:
            content = read_remote(str(root), f"{split}/{MANIFEST}", limit=MAX_MANIFEST_BYTES, timeout=timeout)
        except BadSample as error:
            raise ShardError(f"data.root: {path} cannot be read ({error})") from error
    try:
        raw = json.loads(content)
        version = raw.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ShardError(
                f"{path}: schema version {version!r}, this code reads {SCHEMA_VERSION}; prepare the data again"
            )
        raw["shards"] = tuple(Shard(**shard) for shard in raw["shards"])
        manifest = Manifest(**raw)
    except json.JSONDecodeError as error:
        raise ShardError(f"{path} is not JSON ({error}); remove the split and prepare the data again") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path} is no manifest ({error!r}); remove the split and prepare the data again") from error
    for shard in manifest.shards:
        _check_shard(path, shard)
    return manifest


def _check_shard(path: str, shard: Shard) -> None:
    """Names and hashes stand in paths and commands, so they are looked at before they are believed."""
    numbers = (shard.samples, shard.bytes)
    is_named = isinstance(shard.name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", shard.name)
    is_hashed = isinstance(shard.sha256, str) and re.fullmatch(r"[0-9a-f]{64}", shard.sha256)
    if not is_named or not is_hashed or any(type(number) is not int or number < 0 for number in numbers):
        raise ShardError(f"{path}: no shard can be {shard!r}; remove the split and prepare the data again")


def shard_paths(root: Path | str, split: str) -> list[str]:
    """Paths of a split's shards in manifest order; raises ShardError when a local one is missing or has another size."""
    paths = []
    for shard in read_manifest(root, split).shards:
        if not is_local(str(root)):
            paths.append(f"{root}/{split}/{shard.name}")
            continue
        path = Path(root) / split / shard.name
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise ShardError(
                f"{path} is missing or not of the {shard.bytes} bytes in its manifest; prepare the data again"
            )
        paths.append(str(path))
    return paths


def is_intact(root: Path, split: str) -> bool:
    """Whether a split is finished and every shard has the bytes its manifest promises; reads all of them."""
    try:
        paths, manifest = shard_paths(root, split), read_manifest(root, split)
    except ShardError:
        return False
    return all(holds_shard(Path(path), shard) for path, shard in zip(paths, manifest.shards, strict=True))


def holds_shard(path: Path, shard: Shard) -> bool:
    """Whether a file is there and has the size and sha256 of ``shard``; reads all of it."""
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return False
    return file_sha256(path) == shard.sha256


def copy_shard(source: Path, target: Path, shard: Shard) -> None:
    """Copy a shard as it is; raises UserError if ``source`` is not the file that its manifest names."""
    if not holds_shard(source, shard):
        raise UserError(f"{source} is not what its manifest says: prepare that data set again")
    with source.open("rb") as file, replaced_file(target) as copy:
        shutil.copyfileobj(file, copy)


def write_shard(directory: Path, name: str, records: Iterable[Record]) -> Shard:
    """Write one tar file as its records come, of which one is held at a time; it takes its name when it is whole."""
    samples = 0
    with replaced_file(directory / name) as file:
        hashed = _Hashed(file)
        # As a stream, tarfile only ever writes on; default owner, mode and time make the bytes deterministic.
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for record in records:
                samples += 1
                for suffix, content in _members(record):
                    member = tarfile.TarInfo(f"{record.key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    return Shard(name=name, samples=samples, bytes=hashed.bytes, sha256=hashed.digest.hexdigest())


class _Hashed(RawIOBase):
    """A file that hashes and counts what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, content: Any) -> int:
        """Every byte of it."""
        self.digest.update(content)
        self.bytes += len(content)
        return self.file.write(content)


def _members(record: Record) -> Iterator[tuple[str, bytes]]:
    yield ("png" if record.image.startswith(b"\x89PNG") else "jpg"), record.image
    yield "json", record_json(record)
