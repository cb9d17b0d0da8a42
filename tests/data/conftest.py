"""Splits of small real images for the tests of the stream."""

from __future__ import annotations

import io
import multiprocessing
import random
from collections.abc import Callable
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from free_dist.config import DataConfig
from free_dist.data.records import Question, Record
from free_dist.data.samples import SampleEncoder
from free_dist.data.shards import write_split
from free_dist.data.stream import training_batches

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


ROWS = 12
"""Rows of a global batch: as many for one, two, three and four processes."""

Row = tuple[str, str, int]
"""(task, key, sum of pixels)."""


def config_for(root: Path | str, **changes: object) -> DataConfig:
    settings: dict[str, Any] = {"tasks": {"vqa": 1.0, "caption": 1.0}, "shuffle_buffer": 64, "read_timeout": 20.0}
    return DataConfig(root=str(root), **(settings | changes))


def of_rank(
    config: DataConfig, encoder: SampleEncoder, batches: int, rank: int, world: int, **options: Any
) -> list[list[Row]]:
    """This rank's rows of each global batch."""
    micro = training_batches(
        config, encoder, seed=3, micro_batch_size=ROWS // world, rank=rank, world_size=world, **options
    )
    found = []
    for batch in islice(micro, batches):
        sums = batch.pixel_values.flatten(1).double().sum(1)[batch.image_index].tolist()
        found.append([(batch.task, key, round(1000 * total)) for key, total in zip(batch.keys, sums, strict=True)])
    return found


def _answer(connection: Connection, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    connection.send(of_rank(*arguments, **options))


def read_in_processes(
    config: DataConfig, encoder: SampleEncoder, batches: int, world: int, **options: Any
) -> list[list[Row]]:
    """Global batches that ``world`` real processes read together, each its own rows."""
    context = multiprocessing.get_context("fork")
    ends = []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        arguments = (config, encoder, batches, rank, world)
        process = context.Process(target=_answer, args=(there, arguments, options))
        process.start()
        there.close()
        ends.append((process, here))
    shares = []
    for process, here in ends:
        assert here.poll(60)
        shares.append(here.recv())
        process.join(10)
    return [[row for share in shares for row in share[batch]] for batch in range(batches)]


@pytest.fixture(scope="session")
def stream_config() -> Callable[..., DataConfig]:
    """``stream_config(root, field=value, ...)``."""
    return config_for


@pytest.fixture(scope="session")
def in_processes() -> Callable[..., list[list[Row]]]:
    """``in_processes(config, encoder, batches, world, **options of training_batches)`` -> global batches of rows."""
    return read_in_processes


@pytest.fixture(scope="session")
def rank_rows() -> Callable[..., list[list[Row]]]:
    """``rank_rows(config, encoder, batches, rank, world, **options of training_batches)`` -> one rank's share of them."""
    return of_rank
