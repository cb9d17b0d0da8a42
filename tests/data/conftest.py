"""Splits of small real images for the tests of the stream."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from free_dist.data.records import Question, Record
from free_dist.data.shards import Manifest, write_split

RECORDS = 240


def picture(number: int, side: int = 24) -> bytes:
    """A JPEG that is like no other number's."""
    buffer = io.BytesIO()
    image = Image.effect_noise((side, side), 20 + number % 50).convert("RGB")
    image.putpixel((0, 0), (number % 256, number // 256, 7))
    image.save(buffer, format="JPEG")
    return buffer.getvalue()


def made_up(count: int) -> list[Record]:
    """Records with nothing to six questions; every fifth has no caption."""
    rng = random.Random(count)
    return [
        Record(
            key=f"picture-{i:05d}",
            image=picture(i),
            questions=tuple(
                Question(question=f"is it {'very ' * rng.randrange(9)}number {i}?", answers=("yes",))
                for _ in range(rng.randrange(7))
            ),
            captions=() if i % 5 == 0 else (f"picture {i} {'of noise ' * rng.randrange(12)}", "noise"),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def some_records() -> list[Record]:
    return made_up(RECORDS)


@pytest.fixture
def written(tmp_path: Path, some_records: list[Record]) -> Callable[..., Path]:
    """``written(records_per_shard=..., name=...)`` -> the root of a training split with those records, 20 to a shard."""

    def write(rows: list[Record] | None = None, *, records_per_shard: int = 20, name: str = "root") -> Path:
        chosen = some_records if rows is None else rows
        write_split(
            tmp_path / name,
            dataset="made-up",
            split="train",
            records=chosen,
            total=len(chosen),
            records_per_shard=records_per_shard,
        )
        return tmp_path / name

    return write


def manifest_of(root: Path) -> Manifest:
    from free_dist.data.shards import read_manifest

    return read_manifest(root, "train")
