"""Whether a directory of shards is sound: every fault, each as one line.

Reads every byte with Python's own tarfile, never through the code that streams shards, and believes no manifest.  Knows the
layout of split directories and shards; what a sample must hold is :mod:`free_dist.data.lint_records`.  Does not know tasks,
prompts or tokens, and mends nothing.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from free_dist.config import MissingFileError
from free_dist.data.form import form_faults, read_json
from free_dist.data.lint_records import IMAGE_FORMATS, image_faults, json_faults
from free_dist.data.shard_index import MAX_IMAGE_BYTES, MAX_JSON_BYTES
from free_dist.data.shards import MANIFEST, SCHEMA_VERSION, Manifest, Shard
from free_dist.data.tar_index import MAX_NAME
from free_dist.hashing import file_sha256

FOREIGN = "schema_version"
"""How the fault of a manifest of another schema begins."""

SAMPLE_MEMBER = re.compile(r"([^./][^./]*)\.([^/]*)")
"""Key and suffix of a member, as webdataset tells them apart."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, and where."""

    place: str
    """Path below the linted directory, and the member of a shard."""
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}".replace("\n", " ")


@dataclass(kw_only=True)
class LintReport:
    """What was looked at, and what is wrong with it."""

    splits: int = 0
    shards: int = 0
    samples: int = 0
    faults: list[Fault] = field(default_factory=list)


class _Work(NamedTuple):
    """A shard to be looked through."""

    path: Path
    expected: Shard | None
    is_foreign: bool
    """Of a schema that we do not know, so that nothing can be said of its JSON."""


@dataclass(kw_only=True)
class _Scan:
    """One shard, looked through."""

    name: str
    is_foreign: bool
    faults: list[Fault] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Of all samples, whole or not."""
    seen: set[str] = field(default_factory=set)
    """The same, for asking."""
    images: list[tuple[str, str]] = field(default_factory=list)
    """(sha256, key)."""


def lint(root: Path, *, workers: int = 1, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> LintReport:
    """Look through all splits below ``root``, or ``root`` alone if it is one.

    ``workers`` processes read shards; ``progress`` wraps the list of shards, for a bar.  Raises MissingFileError if there
    is no such directory.
    """
    if not root.is_dir():
        raise MissingFileError(f"{root} is no directory")
    is_split = _is_split(root)
    base = root.absolute().parent if is_split else root
    splits = (
        [root.absolute()] if is_split else sorted(path for path in root.iterdir() if path.is_dir() and _is_split(path))
    )
    report = LintReport(splits=len(splits))
    if not splits:
        report.faults.append(Fault(str(root), f"holds no split: no directory with a {MANIFEST} or shards"))
    work: list[_Work] = []
    for split in splits:
        expected, faults = _manifest(split, base)
        report.faults += faults
        is_foreign = any(fault.what.startswith(FOREIGN) for fault in faults)
        report.faults += _files(split, base, expected)
        listed = expected or {}
        present = sorted({path.name for path in split.glob("*.tar")} | {n for n in listed if (split / n).is_file()})
        work += [_Work(split / name, listed.get(name), is_foreign) for name in present]
    _gather(report, base, work, workers, progress)
    return report


def _is_split(directory: Path) -> bool:
    return (directory / MANIFEST).is_file() or any(directory.glob("*.tar"))


def _manifest(split: Path, base: Path) -> tuple[dict[str, Shard] | None, list[Fault]]:
    """(shards by name, faults) of a split's manifest; None where it cannot be used."""
    path = split / MANIFEST
    place = str(path.relative_to(base))
    if not path.is_file():
        return None, [Fault(place, "is missing: the split was never finished")]
    raw, found = read_json(path.read_bytes())
    if not found and isinstance(raw, dict) and raw.get("schema_version") != SCHEMA_VERSION:
        found = [f"{FOREIGN} is {raw.get('schema_version')!r}, this program knows {SCHEMA_VERSION}"]
    found = found or list(form_faults(raw, Manifest))
    if found:
        return None, [Fault(place, what) for what in found]
    shards = [Shard(**shard) for shard in raw["shards"]]
    if raw["split"] != split.name:
        found.append(f"split is {raw['split']!r}, the directory is {split.name!r}")
    if not shards:
        found.append("names no shards")
    for shard in shards:
        name = f"shard {shard.name!r}"
        if PurePosixPath(shard.name).name != shard.name or not shard.name.endswith(".tar"):
            found.append(f"{name} is not the name of a tar file beside it")
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            found.append(f"{name} has a sha256 that is none")
        if shard.samples < 1:
            found.append(f"{name} has {shard.samples} samples")
    names = [shard.name for shard in shards]
    found += [f"shard {name!r} is named twice" for name in sorted({n for n in names if names.count(n) > 1})]
    beside = {shard.name: shard for shard in shards if PurePosixPath(shard.name).name == shard.name}
    return beside, [Fault(place, what) for what in found]


def _files(split: Path, base: Path, expected: dict[str, Shard] | None) -> Iterator[Fault]:
    """Shards that are missing or too many, and what interrupted programs left."""
    here = split.relative_to(base)
    for name in sorted(expected or {}):
        if not (split / name).is_file():
            yield Fault(str(here / name), "is missing")
    for path in sorted(split.iterdir()):
        if path.name.startswith(".") and path.name.endswith((".tmp", ".old")):
            yield Fault(str(here / path.name), "was left by an interrupted program: remove it")
        elif expected is not None and path.suffix == ".tar" and path.name not in expected:
            yield Fault(str(here / path.name), "is not in the manifest")


def _gather(
    report: LintReport,
    base: Path,
    work: list[_Work],
    workers: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> None:
    """Look through the shards and compare them with each other."""
    keys: dict[str, str] = {}
    images: dict[str, tuple[str, str]] = {}
    for scan, (path, *_) in zip(progress(_scans(base, work, workers)), work, strict=True):
        report.shards += 1
        report.samples += len(scan.keys)
        report.faults += scan.faults
        for key in scan.keys:
            first = keys.setdefault(key, scan.name)
            if first != scan.name:
                report.faults.append(Fault(f"{scan.name}: {key}", f"duplicate key, also in {first}"))
        for digest, key in scan.images:
            split, place = images.setdefault(digest, (path.parent.name, f"{scan.name}: {key}"))
            if split != path.parent.name:
                report.faults.append(
                    Fault(f"{scan.name}: {key}", f"has the image of {place}: a split leaks into another")
                )


def _scans(base: Path, work: list[_Work], workers: int) -> Iterator[_Scan]:
    if workers <= 1:
        yield from (_scan(base, entry) for entry in work)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(partial(_scan, base), work)


def _scan(base: Path, entry: _Work) -> _Scan:
    path, expected = entry.path, entry.expected
    scan = _Scan(name=str(path.relative_to(base)), is_foreign=entry.is_foreign)
    _read_shard(path, scan)
    if not scan.keys:
        scan.faults.append(Fault(scan.name, "holds no sample"))
    if expected is not None:
        digest = file_sha256(path)
        for name, found, wanted in (
            ("bytes", path.stat().st_size, expected.bytes),
            ("sha256", digest, expected.sha256),
            ("samples", len(scan.keys), expected.samples),
        ):
            if found != wanted:
                scan.faults.append(Fault(scan.name, f"has {name} {found}, the manifest says {wanted}"))
    return scan


def _read_shard(path: Path, scan: _Scan) -> None:
    members: dict[str, bytes | None] = {}
    key, end = None, 0
    try:
        with tarfile.open(path, "r:") as tar:  # never a compressed one
            for member in tar:
                # A header that opens the member may be longer than one block.
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                found = _member(tar, member, scan)
                if found is None:
                    continue
                if found[0] != key:
                    _finish_sample(key, members, scan)
                    key, members = found[0], {}
                if found[1] in members:
                    scan.faults.append(Fault(f"{scan.name}: {member.name}", "stands twice in its sample"))
                members[found[1]] = found[2]
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        scan.faults.append(Fault(scan.name, f"is truncated or no tar: {error}"))
    else:
        with path.open("rb") as file:
            file.seek(end)
            rest = file.read(2**22)
        if len(rest) < 2 * tarfile.BLOCKSIZE or rest.strip(b"\0"):
            scan.faults.append(
                Fault(scan.name, f"is truncated or damaged: what follows byte {end:,} is not a tar's end")
            )
    _finish_sample(key, members, scan)


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, scan: _Scan) -> tuple[str, str, bytes | None] | None:
    """(key, suffix, content) of a member of a sample; the content is None if it is too large to read."""
    place = f"{scan.name}: {member.name}"
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts or "\\" in member.name or "\0" in member.name:
        scan.faults.append(Fault(place, "its name leads out of the shard"))
        return None
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        kind = "a link" if member.islnk() or member.issym() else "a directory" if member.isdir() else "no plain file"
        scan.faults.append(Fault(place, f"is {kind}, which no shard holds"))
        return None
    named = SAMPLE_MEMBER.fullmatch(member.name)
    if named is None or named[2] not in (*IMAGE_FORMATS, "json"):
        wanted = ", ".join(f"KEY.{suffix}" for suffix in (*IMAGE_FORMATS, "json"))
        scan.faults.append(Fault(place, f"belongs to no sample; members are {wanted}"))
        return None
    if len(member.name) > MAX_NAME or not member.name.isprintable():
        scan.faults.append(Fault(repr(place), f"its name is longer than {MAX_NAME} characters, or cannot be printed"))
        return None
    if member.size > (MAX_JSON_BYTES if named[2] == "json" else MAX_IMAGE_BYTES):
        scan.faults.append(Fault(place, f"has {member.size:,} bytes, which is absurd"))
        return named[1], named[2], None
    file = tar.extractfile(member)
    assert file is not None  # a plain file
    content = file.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return named[1], named[2], content


def _finish_sample(key: str | None, members: dict[str, bytes | None], scan: _Scan) -> None:
    if key is None:
        return
    place = f"{scan.name}: {key}"
    if key in scan.seen:
        scan.faults.append(Fault(place, "duplicate key in one shard"))
    scan.seen.add(key)
    scan.keys.append(key)
    images = [suffix for suffix in members if suffix in IMAGE_FORMATS]
    if len(images) != 1:
        scan.faults.append(Fault(place, "lacks its image" if not images else "has more than one image"))
    if "json" not in members:
        scan.faults.append(Fault(place, "lacks its json"))
    for suffix, content in members.items():
        if content is None or (suffix == "json" and scan.is_foreign):
            continue
        found = json_faults(content) if suffix == "json" else image_faults(suffix, content)
        scan.faults += [Fault(f"{place}.{suffix}", what) for what in found]
        if suffix != "json":
            scan.images.append((hashlib.sha256(content).hexdigest(), key))
