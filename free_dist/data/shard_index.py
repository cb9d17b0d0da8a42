"""What one shard holds, as arrays: where every usable sample lies, its checksum, and how much is said about its image.

Made once from a shard whose sha256 is that of its manifest, with every JSON member parsed, and kept beside the shard or in a
cache; afterwards a sample is found without reading any other.  Does not know splits, tasks, prompts or order.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from free_dist.atomic import write_atomically
from free_dist.data.quarantine import BadSample, Fault
from free_dist.data.records import DialogueTurn, Question, Record, SyntheticCaption, record_from_json
from free_dist.data.shards import Shard
from free_dist.data.tar_index import ReadAt, tar_samples

FORMAT = 2
"""Changes when what is stored does; older files are made again."""

SUFFIX = ".index"
IMAGES = ("png", "jpg", "jpeg")
MAX_IMAGE_BYTES = 1 << 26
MAX_JSON_BYTES = 1 << 24
MAX_SPAN = 1 << 28
"""Most bytes from the first to the last member of a sample that are read for it."""

ROW = np.dtype(
    [
        ("image", "<i8", 2),  # offset, size
        ("json", "<i8", 2),
        ("crc", "<u4"),  # of the image, then the JSON
        ("key_hash", "<u8"),
        ("said", "<u2", 5),  # answered questions, captions, synthetic captions, turns, answered turns
        ("length", "<u2", 3),  # characters of a mean question, of a mean caption, of the dialogue
    ]
)
"""One usable sample."""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The usable samples of a shard in order, and the others."""

    rows: NDArray[np.void]
    """[samples] of ROW."""
    keys: NDArray[np.bytes_]
    """[samples], UTF-8."""
    faults: tuple[Fault, ...]


def build_index(path: Path, shard: Shard) -> ShardIndex:
    """Read a shard through and index it; raises BadSample if it is not the file of its manifest."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO in its place must not stall us
    except OSError as error:
        raise BadSample("missing shard", str(error)) from error
    try:
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if size != shard.bytes:
                words = "truncated shard" if size < shard.bytes else "wrong size"
                raise BadSample(words, f"{size} bytes instead of the {shard.bytes} of its manifest")
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise BadSample("wrong checksum", "its sha256 is not that of its manifest")
            return _scan(descriptor, shard)
    except OSError as error:
        raise BadSample("unreadable shard", str(error)) from error


def _scan(descriptor: int, shard: Shard) -> ShardIndex:
    rows, keys, faults = [], [], []

    def read_at(offset: int, size: int) -> bytes:
        return os.pread(descriptor, size, offset)

    found = 0
    try:
        for sample in tar_samples(read_at, shard.bytes):
            found += 1
            try:
                if sample.fault is not None:
                    raise sample.fault
                rows.append(_row(sample.key, sample.members, read_at))
                keys.append(sample.key.encode())
            except BadSample as fault:
                faults.append(Fault(shard=shard.name, key=sample.key, reason=fault.reason, detail=fault.detail))
    except BadSample as fault:
        lost = max(shard.samples - found, 0)
        faults.append(Fault(shard=shard.name, key=None, reason=fault.reason, detail=fault.detail, samples=lost))
    else:
        if found < shard.samples:
            words = "missing samples" if found else "empty shard"
            detail = f"{found} instead of the {shard.samples} of its manifest"
            faults.append(Fault(shard=shard.name, key=None, reason=words, detail=detail, samples=shard.samples - found))
    return ShardIndex(
        rows=np.array(rows, dtype=ROW),
        keys=np.array(keys or [b"-"], dtype=np.bytes_)[: len(keys)],
        faults=tuple(faults),
    )


def _row(key: str, members: dict[str, tuple[int, int]], read_at: ReadAt) -> tuple[object, ...]:
    image = next((members[suffix] for suffix in IMAGES if suffix in members), None)
    text = members.get("json")
    if image is None or text is None or not image[1] or not text[1]:
        missing = "image (png, jpg)" if image is None or not image[1] else "json"
        raise BadSample("missing field", f"no {missing} member, or an empty one")
    if image[1] > MAX_IMAGE_BYTES or text[1] > MAX_JSON_BYTES or _span(image, text)[1] > MAX_SPAN:
        raise BadSample("absurd size", f"image of {image[1]} bytes, json of {text[1]} bytes")
    encoded, content = read_at(*image), read_at(*text)
    record = checked_record(key, encoded, content)
    key_hash = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return image, text, zlib.crc32(content, zlib.crc32(encoded)), key_hash, said(record), lengths(record)


def _span(image: Sequence[int], text: Sequence[int]) -> tuple[int, int]:
    """(offset, size) that covers both members."""
    first = min(image[0], text[0])
    return first, max(image[0] + image[1], text[0] + text[1]) - first


def row_span(row: np.void) -> tuple[int, int]:
    """(offset, size) of what :func:`read_row` reads."""
    return _span(row["image"].tolist(), row["json"].tolist())


def read_row(row: np.void, descriptor: int) -> tuple[bytes, bytes]:
    """(image, JSON) of a sample in one read; raises BadSample when the bytes are not those that were indexed."""
    image, text = row["image"].tolist(), row["json"].tolist()
    first, size = _span(image, text)
    try:
        content = os.pread(descriptor, size, first)
    except OSError as error:
        raise BadSample("unreadable shard", str(error)) from error
    if len(content) != size:
        raise BadSample("truncated shard", f"{len(content)} of {size} bytes at {first}")
    encoded, said_of_it = (content[at - first : at - first + n] for at, n in (image, text))
    if zlib.crc32(said_of_it, zlib.crc32(encoded)) != int(row["crc"]):
        raise BadSample("wrong checksum", "the bytes changed since the shard was indexed")
    return encoded, said_of_it


def checked_record(key: str, image: bytes, content: bytes) -> Record:
    """The record of a sample's bytes; raises BadSample unless every field has the type that it should have."""
    try:
        record = record_from_json(key, image, content)
    except KeyError as error:
        raise BadSample("missing field", f"json has no {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadSample("bad json", str(error)[:200]) from error
    texts: list[object] = [*record.captions, *(caption.text for caption in record.synthetic_captions)]
    texts += [name for name in (record.image_id, record.coco_id, record.domain, record.licence) if name is not None]
    for question in record.questions:
        texts += [question.question, *question.answers, *question.answer_confidences]
    for turn in record.dialogue:
        texts += [turn.question, *turn.candidates, *([] if turn.answer is None else [turn.answer])]
    if not all(isinstance(text, str) for text in texts):
        raise BadSample("bad json", "a text is not a string")
    return record


def said(record: Record) -> tuple[int, ...]:
    """How much is said about an image: what the number of training samples depends on; see :func:`stand_in`."""
    counts = (
        sum(bool(question.given) for question in record.questions),
        len(record.captions),
        len(record.synthetic_captions),
        len(record.dialogue),
        sum(turn.answer is not None for turn in record.dialogue),
    )
    return tuple(min(count, 65535) for count in counts)


def stand_in(counts: Sequence[int]) -> Record:
    """A record with as much said about its image as in ``counts``, :func:`said` of another one."""
    answered, captions, synthetic, turns, answered_turns = counts
    return Record(
        key="",
        image=b"",
        questions=(Question(question="", answers=("-",)),) * answered,
        captions=("",) * captions,
        synthetic_captions=(SyntheticCaption(text="", model="", score=1.0, threshold=0.0),) * synthetic,
        dialogue=(DialogueTurn(question="", answer=""),) * answered_turns
        + (DialogueTurn(question="", answer=None),) * (turns - answered_turns),
    )


def lengths(record: Record) -> tuple[int, ...]:
    """Characters of (a mean question, a mean caption, the whole dialogue): what bucketing by length goes by."""
    questions = [len(question.question) for question in record.questions]
    captions = [len(caption) for caption in record.captions]
    dialogue = [len(turn.question) + len(turn.answer or "") for turn in record.dialogue] or questions
    means = (sum(questions) // (len(questions) or 1), sum(captions) // (len(captions) or 1), sum(dialogue))
    return tuple(min(length, 65535) for length in means)


def save_index(path: Path, index: ShardIndex, shard: Shard) -> None:
    """Write an index atomically: its sha256, a line of JSON, the arrays.  Raises OSError where that is not possible."""
    about = {
        "format": FORMAT,
        "sha256": shard.sha256,
        "rows": len(index.rows),
        "key_width": index.keys.dtype.itemsize,
        "faults": [vars(fault) for fault in index.faults],
    }
    content = json.dumps(about).encode() + b"\n" + index.rows.tobytes() + index.keys.tobytes()
    write_atomically(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def load_index(path: Path, shard: Shard) -> ShardIndex | None:
    """The index in a file; None if there is none, or it is damaged, of another format or of another shard."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest != hashlib.sha256(content).hexdigest().encode():
        return None
    first, _, arrays = content.partition(b"\n")
    about = json.loads(first)
    if about["format"] != FORMAT or about["sha256"] != shard.sha256:
        return None
    rows = np.frombuffer(arrays, ROW, count=about["rows"])
    keys = np.frombuffer(arrays, f"S{about['key_width']}", count=about["rows"], offset=rows.nbytes)
    return ShardIndex(rows=rows, keys=keys, faults=tuple(Fault(**fault) for fault in about["faults"]))
