"""CapFilt over the shards of a split: dealt to processes, resumed after a kill, put together.

The unit of work is one source shard, which one process does whole, in batches that never reach into the next: so the output
is the same whatever the number of processes, and what is whole when a run is killed is kept.  Takes rank and world size as
arguments; knows no models.

Beside the finished shards stands ``OUT/capfilt-SPLIT.json``: the settings, both models, and what was kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from free_dist.atomic import write_atomically
from free_dist.config import DataConfig, UserError
from free_dist.data.capfilt import CapFiltSettings, Captioner, Counts, Matcher, bootstrap
from free_dist.data.quarantine import QUARANTINE
from free_dist.data.records import Record
from free_dist.data.shards import (
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    Shard,
    copy_shard,
    holds_shard,
    is_intact,
    read_manifest,
    shard_paths,
    write_manifest,
    write_shard,
)
from free_dist.data.split_index import SplitIndex, usable_records
from free_dist.stopping import Interrupted


@dataclass(frozen=True, kw_only=True)
class CapFilt:
    """Two models and how they are used."""

    captioner: Captioner
    matcher: Matcher
    settings: CapFiltSettings

    def fingerprint(self) -> dict[str, Any]:
        """What two runs must have in common to share shards."""
        return {"captioner": self.captioner.name, "filter": self.matcher.name, "settings": asdict(self.settings)}

    def improve(
        self, records: Iterable[Record], batch_size: int, counts: list[Counts], must_stop: Callable[[], bool]
    ) -> Iterator[Record]:
        """:func:`~free_dist.data.capfilt.bootstrap` in batches; their counts are appended to ``counts``.

        Raises Interrupted before the first batch that ``must_stop`` forbids.
        """
        waiting = iter(records)
        while batch := list(islice(waiting, batch_size)):
            if must_stop():
                raise Interrupted("stopped: the same command goes on with the shards that are not whole")
            result, found = bootstrap(batch, self.captioner, self.matcher, self.settings)
            counts.append(found)
            yield from result


def unfinished(source: Path, out: Path, split: str, capfilt: CapFilt) -> list[int]:
    """Numbers of the shards that no earlier run left whole; raises UserError if one had other settings or models."""
    shards = read_manifest(source, split).shards
    return [n for n, shard in enumerate(shards) if _whole_shard(out, split, n, shard, capfilt) is None]


def run_rank(
    source: Path,
    out: Path,
    split: str,
    capfilt: CapFilt,
    *,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
    remaining: Sequence[int] | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Do this rank's part of the shards of a split that are not done.

    ``remaining``: which these are, the same on all ranks; None: what :func:`unfinished` says, for one process.  ``must_stop`` is
    asked before every batch; then Interrupted is raised, and only the shard in hand is lost.  Raises UserError if an earlier
    run had other settings or models, and what reading shards raises.
    """
    index = SplitIndex.open(DataConfig(root=str(source)), split, quarantine=out / QUARANTINE, first=rank / world_size)
    work = _work(out, split)
    work.mkdir(parents=True, exist_ok=True)
    for number in (unfinished(source, out, split, capfilt) if remaining is None else remaining)[rank::world_size]:
        shard = index.manifest.shards[number]
        name, counts = _name(number), list[Counts]()
        given = usable_records(index, np.flatnonzero(index.shard_of == number))
        bar = tqdm(given, desc=f"captioning {split}/{name}", total=shard.samples, unit="image", mininterval=0.5)
        made = write_shard(work, f"{name}.tar", capfilt.improve(bar, batch_size, counts, must_stop))
        done = {
            **capfilt.fingerprint(),
            "source": shard.sha256,
            "shard": asdict(made),
            "counts": asdict(sum(counts, Counts())),
        }
        write_atomically(work / f"{name}.json", json.dumps(done, indent=1).encode())


def finish(source: Path, out: Path, split: str, capfilt: CapFilt) -> Counts:
    """Put the shards of all ranks together, once every one is done: shards, report, manifest; returns what was kept.

    The manifest is written last.  Raises UserError if a shard is missing.
    """
    given, work, directory = read_manifest(source, split), _work(out, split), out / split
    directory.mkdir(parents=True, exist_ok=True)
    shards, total = [], Counts()
    for number, shard in enumerate(given.shards):
        done = _whole_shard(out, split, number, shard, capfilt)
        if done is None:
            raise UserError(f"{work / _name(number)}.tar is not whole: start the same command again")
        made = Shard(**done["shard"])
        if (work / made.name).is_file():
            (work / made.name).replace(directory / made.name)
        shards.append(made)
        total += Counts.from_json(done["counts"])
    report = {
        **capfilt.fingerprint(),
        "source": {"dataset": given.dataset, "sha256": [shard.sha256 for shard in given.shards]},
        "counts": asdict(total),
        "kept_share": total.kept_share,
    }
    write_atomically(_report(out, split), json.dumps(report, indent=1).encode())
    write_manifest(out, replace(given, schema_version=SCHEMA_VERSION, shards=tuple(shards)))
    shutil.rmtree(work, ignore_errors=True)
    return total


def finished(source: Path, out: Path, split: str, capfilt: CapFilt) -> Counts | None:
    """What a finished run kept; None if there is none.

    Raises UserError for one of other settings, models or source, and for one whose shards do not match their checksums.
    """
    if not (out / split / MANIFEST).is_file():
        return None
    if not _report(out, split).is_file():
        raise UserError(f"--out {out}: {out / split} was not made by this program; choose another directory")
    report = json.loads(_report(out, split).read_text())
    _require_same(report, capfilt.fingerprint(), out)
    given = read_manifest(source, split)
    if report["source"]["sha256"] != [shard.sha256 for shard in given.shards]:
        raise UserError(
            f"--out {out}: {split} was made from other shards than those of {source}; remove it, or choose another"
        )
    if not is_intact(out, split):
        raise UserError(f"--out {out}: the shards of {split} do not match their manifest; remove {out / split}")
    return Counts.from_json(report["counts"])


def copy_split(source: Path, out: Path, split: str) -> Manifest:
    """A split passed on byte by byte, so that ``out`` is a whole data set; the manifest last."""
    manifest = read_manifest(source, split)
    if not (is_intact(out, split) and read_manifest(out, split) == manifest):
        (out / split).mkdir(parents=True, exist_ok=True)
        for path, shard in zip(shard_paths(source, split), manifest.shards, strict=True):
            copy_shard(Path(path), out / split / shard.name, shard)
        write_manifest(out, manifest)
    return manifest


def _whole_shard(out: Path, split: str, number: int, source: Shard, capfilt: CapFilt) -> dict[str, Any] | None:
    """What is written beside shard ``number`` if it was made whole from ``source``; raises UserError for other settings."""
    path = _work(out, split) / f"{_name(number)}.json"
    if not path.is_file():
        return None
    done: dict[str, Any] = json.loads(path.read_text())
    _require_same(done, capfilt.fingerprint(), out)
    made = Shard(**done["shard"])
    # Where a run is killed while its shards are put together, some have moved already.
    is_whole = any(holds_shard(directory / made.name, made) for directory in (path.parent, out / split))
    return done if is_whole and done["source"] == source.sha256 else None


def _require_same(made: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    before = {**made["settings"], "captioner": made["captioner"], "filter": made["filter"]}
    now = {**wanted["settings"], "captioner": wanted["captioner"], "filter": wanted["filter"]}
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"--out {out} holds captions made with {name} {before.get(name)!r}, not {value!r}: choose another directory, or "
                "remove this one"
            )


def _name(number: int) -> str:
    return f"{number:06d}"


def _work(out: Path, split: str) -> Path:
    return out / f".{split}.capfilt"


def _report(out: Path, split: str) -> Path:
    return out / f"capfilt-{split}.json"
