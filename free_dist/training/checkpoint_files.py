"""Checkpoints as files: directories that are whole, proven by checksums, or not there.

    checkpoints/step-00000500/rank-00000.safetensors   what rank 0 held; one file per rank
                              manifest.json            written last: size and sha256 of every file, and what belongs to it
    checkpoints/step-00001000.tmp/                     being written
    checkpoints/latest                                 name of the newest one, for people and scripts; never read here

The tensors are in the safetensors format, which runs no code when it is read.  It is written here without the library, which
copies every tensor under Python's lock while training wants it.  All ranks must see the same directory.  Knows files, names and
tensors; does not know engines or ranks' agreement.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from free_dist.atomic import synchronise, write_atomically

MANIFEST = "manifest.json"
LATEST = "latest"
PREFIX = "step-"
UNFINISHED = ".tmp"
DAMAGED = ".damaged"
"""What a checkpoint that failed its test is renamed to, so that its step can be saved again."""
FORMAT = 1
"""Raised when an older program could no longer read the files."""

CHUNK = 16 * 2**20
"""Bytes that are written and hashed at once."""

GAP = 4096
"""Bytes between two tensors of one storage that are copied along rather than made a reason to copy twice."""

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
"""What the format calls a type."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What the manifest says about a file."""

    name: str
    bytes: int
    sha256: str


class Snapshot:
    """Copies of tensors in the host's memory; one buffer, kept from one save to the next.

    Whoever changes the tensors waits for the copy, so what it costs matters: many named tensors are stretches of a few flat
    ones, and memory is copied flat by flat.  What each name gets is cut from the copy while the file is written.  The buffer
    doubles the memory of what is saved, but a fresh one would cost several times the copying at every save.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._chosen: dict[str, tuple[Tensor, int]] = {}  # the tensors that ``_runs`` cover, and where their values lay
        self._runs: list[Tensor] = []
        self._entries: list[_Entry] = []
        self._header = b""

    def choose(self, tensors: Mapping[str, Tensor]) -> None:
        """What the next :meth:`copy` copies: contiguous tensors, on whatever device; the former snapshot is lost.

        The same tensors as the last time, at the same places, cost next to nothing.
        """
        known = self._chosen
        same = len(tensors) == len(known) and all(
            name in known and known[name][0] is tensor and known[name][1] == tensor.data_ptr()
            for name, tensor in tensors.items()
        )
        if not same:
            self._lay_out(tensors)

    @property
    def is_of_host(self) -> bool:
        """Whether all that was chosen lies in the host's memory, so that any thread can copy it without a device's order."""
        return all(run.device.type == "cpu" for run in self._runs)

    def copy(self) -> None:
        """Copy the chosen tensors as they are now."""
        first = 0
        for run in self._runs:
            self._buffer[first : first + run.nbytes].copy_(run, non_blocking=True)
            first += run.nbytes
        if self._buffer.is_pinned():
            torch.cuda.synchronize()

    def _lay_out(self, tensors: Mapping[str, Tensor]) -> None:
        named = {name: tensors[name] for name in sorted(tensors)}
        self._runs, places = _runs(list(named.values()))
        self._chosen = {name: (tensor, tensor.data_ptr()) for name, tensor in named.items()}
        total = sum(run.nbytes for run in self._runs)
        if self._buffer.nbytes != total:
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=any(run.is_cuda for run in self._runs))
        entries = [
            (name, tensor.dtype, tensor.shape, place)
            for (name, tensor), place in zip(named.items(), places, strict=True)
        ]
        # The format wants no holes; with large elements first every tensor is aligned all the same.
        entries.sort(key=lambda entry: (-entry[1].itemsize, entry[3]))
        self._entries, self._header = entries, _header(entries)

    def write(self, path: Path) -> FileRecord:
        """Write and fsync the file; raises OSError, and leaves nothing then.  Holds Python's lock for moments only."""
        digest, size = hashlib.sha256(), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "wb", buffering=0) as file:
                for part in self._parts():
                    digest.update(part)
                    size += len(part)
                    while len(part):
                        part = part[file.write(part) :]
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return FileRecord(name=path.name, bytes=size, sha256=digest.hexdigest())

    def _parts(self) -> Iterator[memoryview]:
        """The file's bytes in order: header and tensors, in few pieces, as each takes Python's lock."""
        yield memoryview(self._header)
        data = self._buffer.numpy().data
        begin = end = 0
        for _, dtype, shape, place in [*self._entries, ("", torch.uint8, torch.Size([0]), -1)]:
            if place != end or end - begin >= CHUNK:
                for first in range(begin, end, CHUNK):
                    yield data[first : min(first + CHUNK, end)]
                begin = end = place
            end += shape.numel() * dtype.itemsize


_Entry = tuple[str, torch.dtype, torch.Size, int]
"""A tensor's name, type and shape, and where its bytes begin in the buffer."""


def _header(entries: list[_Entry]) -> bytes:
    """What stands in a safetensors file before the tensors' bytes, which follow each other in this order."""
    table: dict[str, Any] = {}
    end = 0
    for name, dtype, shape, _ in entries:
        begin, end = end, end + shape.numel() * dtype.itemsize
        table[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so the data is aligned in the file too
    return len(text).to_bytes(8, "little") + text


def _runs(tensors: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Bytes, each a flat view, that hold all ``tensors``, and where in them, one after another, each tensor begins.

    Tensors that lie in one storage, one behind the other but for small gaps (DeepSpeed pads), share a run.  The order of runs is
    that of the first tensor in each.
    """
    spans = []
    for index, tensor in enumerate(tensors):
        if not tensor.is_contiguous():
            raise ValueError(
                f"a snapshot is of contiguous tensors; one has strides {tensor.stride()} for shape {tensor.shape}"
            )
        storage = tensor.untyped_storage()
        first = int(tensor.storage_offset()) * tensor.element_size()
        spans.append((storage.data_ptr(), first, first + tensor.nbytes, index, storage))
    spans.sort(key=lambda span: span[:3])
    groups: list[list[Any]] = []  # of spans that share a run
    behind, lies_in = 0, -1
    for span in spans:
        if span[0] != lies_in or span[1] > behind + GAP:
            groups.append([])
            behind, lies_in = span[2], span[0]
        groups[-1].append(span)
        behind = max(behind, span[2])
    views, places, before = [], [0] * len(tensors), 0
    for group in sorted(groups, key=lambda group: min(span[3] for span in group)):
        begin, end = group[0][1], max(span[2] for span in group)
        for span in group:
            places[span[3]] = before + span[1] - begin
        storage = group[0][4]
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
        views.append(flat.set_(storage, begin, (end - begin,), (1,)))
        before += end - begin
    return views, places


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step stands, or will stand."""
    return directory / f"{PREFIX}{step:08d}"


def unfinished(final: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return final.with_name(final.name + UNFINISHED)


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def publish(final: Path, manifest: dict[str, Any], *, keep_last: int, keep_best: int) -> None:
    """Give a checkpoint whose files are all on disk its manifest and its name, then remove older ones that nobody keeps.

    Kept are the ``keep_last`` newest and the ``keep_best`` with the lowest ``score`` in their manifests.
    """
    written = unfinished(final)
    write_atomically(written / MANIFEST, json.dumps(manifest, indent=1).encode())
    synchronise(written)
    if final.exists():
        shutil.rmtree(final)
    written.rename(final)
    synchronise(final.parent)
    write_atomically(final.parent / LATEST, f"{final.name}\n".encode())
    complete = checkpoints(final.parent)
    kept = set(complete[:keep_last])
    scores = {path: _score(path) for path in complete}
    kept |= set(sorted((p for p in complete if scores[p] is not None), key=lambda p: scores[p])[:keep_best])  # type: ignore[arg-type,return-value]
    for path in set(complete) - kept:
        shutil.rmtree(path)


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints that have their name and a manifest, the newest first; whether they are sound is not looked at."""
    found = [
        path.parent for path in directory.glob(f"{PREFIX}*/{MANIFEST}") if path.parent.name[len(PREFIX) :].isdigit()
    ]
    return sorted(found, reverse=True)


def remove_unfinished(directory: Path) -> None:
    """Remove what processes that died had begun to write."""
    for path in directory.glob(f"{PREFIX}*{UNFINISHED}"):
        shutil.rmtree(path)
    for path in directory.glob(f".{LATEST}.*"):
        path.unlink()


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is not looked at again, and return its new path."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    checkpoint.rename(aside)
    return aside


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest, or None if it is no manifest of this format."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def saved_rows_per_step(directory: Path) -> int | None:
    """Rows per step of the run that saved here, from the newest manifest that can be read; None without any."""
    manifests = (read_manifest(path) for path in checkpoints(directory))
    return next((int(manifest["rows_per_step"]) for manifest in manifests if manifest is not None), None)


def damage(checkpoint: Path, *, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None: every file must have the size and the sha256 that the manifest says.

    Of ``world_size`` callers, each reads its share of the files.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return f"{MANIFEST} cannot be read"
    for record in manifest["files"][rank::world_size]:
        path = checkpoint / record["name"]
        try:
            size = path.stat().st_size
            if size != record["bytes"]:
                return f"{path.name} has {size} bytes instead of {record['bytes']}"
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{path.name}: {error.strerror}"
        if found != record["sha256"]:
            return f"{path.name} has another checksum than when it was written"
    return None


def _score(checkpoint: Path) -> float | None:
    manifest = read_manifest(checkpoint)
    score = None if manifest is None else manifest["score"]
    return None if score is None else float(score)
