"""Several prepared data sets as one directory of shards: what a run streams when it learns from all of them.

Shards are copied as they are.  Does not know any data set, nor what its records hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from free_dist.config import UserError
from free_dist.data.leaks import LeakGuard
from free_dist.data.shards import (
    MANIFEST,
    SCHEMA_VERSION,
    SPLITS,
    Manifest,
    copy_shard,
    is_intact,
    read_manifest,
    shard_paths,
    write_manifest,
)
from free_dist.data.stream import records


def prepare(root: Path, sources: Sequence[Path]) -> list[Manifest]:
    """Write the splits that every source has under ``root``; a split that holds just these shards is kept.

    Raises UserError for fewer than two sources, no common split, a damaged source, or an image that stands in two splits.
    """
    if len(sources) < 2:
        raise UserError("--sources: want two or more directories of shards")
    splits = [split for split in SPLITS if all((source / split / MANIFEST).is_file() for source in sources)]
    if not splits:
        raise UserError(f"--sources: no split has a {MANIFEST} in each of {', '.join(map(str, sources))}")
    check_no_leak(sources, splits)
    return [_join(root, sources, split) for split in splits]


def check_no_leak(sources: Sequence[Path], splits: Sequence[str]) -> None:
    """Raise UserError, naming both places, if a key is used twice or the bytes of an image stand in two splits."""
    keys: dict[str, str] = {}
    guard = LeakGuard()
    for split in splits:
        for source in sources:
            for record in records(source, split):
                place = f"{source / split}: {record.key}"
                if record.key in keys:
                    raise UserError(f"{place} is also in {keys[record.key]}: a key must name one record")
                keys[record.key] = str(source / split)
                guard.refuse(hashlib.sha256(record.image).hexdigest(), split, place)


def _join(root: Path, sources: Sequence[Path], split: str) -> Manifest:
    manifests = [read_manifest(source, split) for source in sources]
    paths = [path for source in sources for path in shard_paths(source, split)]
    shards = tuple(
        replace(shard, name=f"{number:06d}.tar")
        for number, shard in enumerate(shard for manifest in manifests for shard in manifest.shards)
    )
    manifest = Manifest(
        dataset="+".join(manifest.dataset for manifest in manifests),
        split=split,
        schema_version=SCHEMA_VERSION,
        shards=shards,
    )
    if is_intact(root, split) and read_manifest(root, split) == manifest:
        return manifest
    directory = root / split
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)  # a split that is being rewritten is not finished
    for path, shard in zip(paths, shards, strict=True):
        copy_shard(Path(path), directory / shard.name, shard)
    write_manifest(root, manifest)
    return manifest
