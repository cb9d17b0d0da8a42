"""Several prepared data sets as one directory of shards: what a run streams when it learns from all of them.

Shards are copied as they are.  Does not know any data set, nor what its records hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from free_dist.config import DataConfig, UserError
from free_dist.data.leaks import LeakGuard
from free_dist.data.shards import (
    MANIFEST,
    SCHEMA_VERSION,
    SPLITS,
    Manifest,
    Shard,
    copy_shard,
    is_intact,
    read_manifest,
    write_manifest,
    write_shard,
)
from free_dist.data.split_index import SplitIndex, usable_records
from free_dist.data.stream import records

OF_COCO = ("coco", "vqav2", "okvqa")
"""Data sets whose image ids are COCO's."""


def prepare(root: Path, sources: Sequence[Path], *, drop_leaks: bool = False) -> list[Manifest]:
    """Write every split that a source has under ``root``; a split that holds just these shards is kept.

    ``drop_leaks``: leave a record whose image stands in two splits out of the one further from test.  Raises UserError for fewer
    than two sources, none with a split, a damaged source, or, without ``drop_leaks``, an image that stands in two splits.
    """
    if len(sources) < 2:
        raise UserError("--sources: want two or more directories of shards")
    holders = {split: [source for source in sources if (source / split / MANIFEST).is_file()] for split in SPLITS}
    if not any(holders.values()):
        raise UserError(f"--sources: none of {', '.join(map(str, sources))} has a split with a {MANIFEST}")
    # The split that was further from test loses its record, so test is looked through first.
    guard, keys = LeakGuard(), dict[str, str]()
    dropped = {split: _leaks(holders[split], split, guard, keys, drop_leaks) for split in reversed(SPLITS)}
    return [_join(root, holders[split], split, dropped[split]) for split in SPLITS if holders[split]]


def _leaks(
    sources: Sequence[Path], split: str, guard: LeakGuard, keys: dict[str, str], drop_leaks: bool
) -> dict[Path, set[str]]:
    """Source -> keys of its records in ``split`` whose image (its bytes or its COCO id) stands in one looked through before."""
    advice = "" if drop_leaks else "; --drop-leaks leaves it out of the split further from the test"
    found: dict[Path, set[str]] = {source: set() for source in sources}
    for source in sources:
        is_coco = read_manifest(source, split).dataset in OF_COCO
        for record in records(source, split):
            place = f"{source / split}: {record.key}"
            if record.key in keys:
                raise UserError(f"{place} is also in {keys[record.key]}: a key must name one record")
            keys[record.key] = str(source / split)
            marks = {"image": hashlib.sha256(record.image).hexdigest()}
            coco_id = record.image_id if is_coco else record.coco_id
            if coco_id is not None:
                marks["COCO image"] = f"coco {coco_id}"
            for what, mark in marks.items():
                if not drop_leaks:
                    guard.refuse(mark, split, place, what=what, advice=advice)
                elif guard.elsewhere(mark, split, place) is not None:
                    found[source].add(record.key)
    return found


def _join(root: Path, sources: Sequence[Path], split: str, dropped: Mapping[Path, set[str]]) -> Manifest:
    directory = root / split
    made: list[tuple[Path, int, Shard]] = [
        (source, number, shard)
        for source in sources
        for number, shard in enumerate(read_manifest(source, split).shards)
    ]
    manifest = Manifest(
        dataset="+".join(read_manifest(source, split).dataset for source in sources),
        split=split,
        schema_version=SCHEMA_VERSION,
        shards=tuple(replace(shard, name=f"{place:06d}.tar") for place, (_, _, shard) in enumerate(made)),
    )
    if not any(dropped.values()) and is_intact(root, split) and read_manifest(root, split) == manifest:
        return manifest
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)  # a split that is being rewritten is not finished
    indices = {source: SplitIndex.open(DataConfig(root=str(source)), split) for source in sources}
    shards = []
    for place, (source, number, shard) in enumerate(made):
        name = f"{place:06d}.tar"
        index = indices[source]
        kept = [n for n in np.flatnonzero(index.shard_of == number) if index.key(int(n)) not in dropped[source]]
        if len(kept) == shard.samples:
            copy_shard(source / split / shard.name, directory / name, shard)
            shards.append(replace(shard, name=name))
        elif kept:
            shards.append(write_shard(directory, name, usable_records(index, np.array(kept))))
    manifest = replace(manifest, shards=tuple(shards))
    write_manifest(root, manifest)
    return manifest
