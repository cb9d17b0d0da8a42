"""How fast the stream reads, against plain webdataset and indexed random access on the same shards, and how fast it seeks.

    python benchmarks/stream.py                        # a few minutes; makes its own shards in a temporary directory
    python benchmarks/stream.py --root data/easyvqa    # on prepared shards with captions

Sides take turns in one process, and every figure is a median of rounds.  The stream checks every byte it gives (CRC, sizes,
types), has its order fixed by (seed, epoch, place) and notices shards that vanish; the others do none of this.  The last
line is JSON:

- ``ratio_to_webdataset``: records a second, from files to parsed records, over those of webdataset's own pipeline (shard
  list, tar reader, parser, shuffle buffer of the same size), from the page cache.
- ``ratio_cold``: the same, every file being dropped from the page cache before a round.
- ``ratio_decoded``: the same with every image decoded, as in training, from the page cache.
- ``ratio_to_random_access``: over a bare table of offsets: shuffle, seek, read, parse.
- ``seek_ratio_99_to_1``: time from opening the stream to its first batch at 99% of an epoch, over that at 1%.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import webdataset as wds
from PIL import Image

from free_dist.config import DataConfig
from free_dist.data.images import decode_image
from free_dist.data.order import StreamState
from free_dist.data.records import Question, Record, record_from_json
from free_dist.data.shards import shard_paths, write_split
from free_dist.data.stream import epoch_samples, global_batches

ROWS = 32
DISTINCT = 64
"""Encoded images; every record has one of them and a comment of its own."""


def made_up(count: int, side: int) -> Iterator[Record]:
    """Records like COCO's: JPEGs of ``side`` x ``side`` pixels, five captions and four questions each."""
    encoded = []
    for i in range(DISTINCT):
        buffer = io.BytesIO()
        noise = Image.effect_noise((side // 4, side // 4), 60 + i % 7).resize((side, side)).convert("RGB")
        noise.save(buffer, format="JPEG", quality=90)
        encoded.append(buffer.getvalue())
    for i in range(count):
        comment = f"{i:08d}".encode()
        image = encoded[i % DISTINCT]
        yield Record(
            key=f"{i:012d}",
            image=image[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2) + comment + image[2:],
            questions=tuple(Question(question=f"is this picture {i}?", answers=("yes",) * 10) for _ in range(4)),
            captions=tuple(f"picture number {i} seen by person {j} on a sunny day" for j in range(5)),
        )


def record_of(sample: dict[str, bytes | str]) -> Record:
    """The record of one sample as webdataset has it."""
    image, text = sample.get("png", sample.get("jpg")), sample["json"]
    assert isinstance(image, bytes)
    assert isinstance(text, bytes)
    return record_from_json(str(sample["__key__"]), image, text)


def of_webdataset(config: DataConfig, *, decoded: bool) -> int:
    """One epoch of plain webdataset; returns the records."""
    stages = [
        wds.SimpleShardList(shard_paths(Path(config.root), "train")),
        wds.tarfile_to_samples(),
        wds.map(record_of),
        wds.shuffle(config.shuffle_buffer, initial=config.shuffle_buffer, rng=random.Random(0)),
    ]
    count = 0
    for record in wds.DataPipeline(*stages):
        if decoded:
            Image.open(io.BytesIO(record.image)).convert("RGB")
        count += bool(record.captions)
    return count


def offsets(config: DataConfig) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """(shard, suffix -> (offset, size)) of every record, as tarfile finds them: an index without any check."""
    found: dict[str, tuple[str, dict[str, tuple[int, int]]]] = {}
    for path in shard_paths(Path(config.root), "train"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, (path, {}))[1][suffix] = (member.offset_data, member.size)
    return list(found.values())


def of_random_access(table: list[tuple[str, dict[str, tuple[int, int]]]]) -> int:
    """One epoch of the least that indexed random access can be: shuffle the table, seek, read, parse; returns the records."""
    files = {path: open(path, "rb") for path, _ in table}
    count = 0
    for path, members in random.Random(0).sample(table, len(table)):
        read = {}
        for suffix, (offset, size) in members.items():
            files[path].seek(offset)
            read[suffix] = files[path].read(size)
        image = read.get("jpg") or read["png"]
        count += bool(record_from_json("key", image, read["json"]).captions)
    for file in files.values():
        file.close()
    return count


def of_stream(config: DataConfig, *, decoded: bool) -> int:
    """One epoch of captions of the stream; returns the samples, one a record."""
    count = 0
    for sample in epoch_samples(config, "caption", seed=0, epoch=0):
        if decoded:
            decode_image(sample.image)
        count += 1
    return count


def seek(config: DataConfig, share: float, samples: int) -> float:
    """Seconds from opening the stream to its first batch at a share of an epoch."""
    batches = int(share * samples) // ROWS
    begun = time.perf_counter()
    start = StreamState.after(batches, weights=config.tasks, seed=0, rows=ROWS)
    next(global_batches(config, seed=0, rows=ROWS, start=start))
    return time.perf_counter() - begun


def drop_from_page_cache(config: DataConfig) -> None:
    """Ask the system to forget the shards, so that a round begins with the disk."""
    for path in shard_paths(Path(config.root), "train"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def take_turns(
    sides: dict[str, Callable[[], int]], rounds: int, before: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Records a second of every side, median of rounds."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            before()
            begun = time.perf_counter()
            count = side()
            speeds[name].append(count / (time.perf_counter() - begun))
    return {name: statistics.median(found) for name, found in speeds.items()}


def measure(config: DataConfig, rounds: int) -> dict[str, float]:
    """Every figure of the last line."""
    begun = time.perf_counter()
    samples = of_stream(config, decoded=False)
    indexing = time.perf_counter() - begun
    table = offsets(config)
    reading = take_turns(
        {
            "stream": lambda: of_stream(config, decoded=False),
            "webdataset": lambda: of_webdataset(config, decoded=False),
            "random_access": lambda: of_random_access(table),
        },
        rounds,
    )
    both = {"stream": of_stream, "webdataset": of_webdataset}
    cold = take_turns(
        {name: (lambda side=side: side(config, decoded=False)) for name, side in both.items()},
        rounds,
        lambda: drop_from_page_cache(config),
    )
    decoding = take_turns({name: (lambda side=side: side(config, decoded=True)) for name, side in both.items()}, rounds)
    seeks = [(seek(config, 0.99, samples), seek(config, 0.01, samples)) for _ in range(4 * rounds + 1)]
    late, early = (statistics.median(found) for found in zip(*seeks, strict=True))
    return {
        "ratio_to_webdataset": round(reading["stream"] / reading["webdataset"], 3),
        "ratio_cold": round(cold["stream"] / cold["webdataset"], 3),
        "ratio_decoded": round(decoding["stream"] / decoding["webdataset"], 3),
        "ratio_to_random_access": round(reading["stream"] / reading["random_access"], 3),
        "seek_ratio_99_to_1": round(late / early, 3),
        "records_per_second": round(reading["stream"]),
        "webdataset_records_per_second": round(reading["webdataset"]),
        "seek_seconds": round(late, 4),
        "first_epoch_with_indexing_seconds": round(indexing, 2),
        "samples": samples,
    }


def main() -> None:
    """Make shards unless there are some, measure, print one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="directory of prepared shards; default: makes some")
    parser.add_argument("--records", type=int, default=2000, help="records to make")
    parser.add_argument("--side", type=int, default=480, help="pixels of a side of their images")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every measurement")
    parser.add_argument("--shuffle_buffer", type=int, default=1000, help="records that are shuffled among each other")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = arguments.root or directory
        if arguments.root is None:
            made = made_up(arguments.records, arguments.side)
            write_split(Path(root), dataset="made-up", split="train", records=made, total=arguments.records)
        config = DataConfig(root=root, tasks={"caption": 1.0}, shuffle_buffer=arguments.shuffle_buffer)
        print(json.dumps(measure(config, arguments.rounds)))


if __name__ == "__main__":
    main()
