"""A folder of pictures as drafts, for the tests of conversion itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from official_files import jpeg, place

from free_dist.data.conversion import Draft
from free_dist.data.records import Record


def pictures(folder: Path, count: int = 10, first: int = 0) -> Path:
    """``picture-000.jpg`` and so on, no two alike."""
    for n in range(first, first + count):
        place(folder / f"picture-{n:03d}.jpg", jpeg(n))
    return folder


def drafts_of(folder: Path, *, caption: str = "picture") -> Iterator[Draft]:
    """A draft per picture, in the order of names."""
    for path in sorted(folder.glob("*.jpg")):
        number = path.stem.removeprefix("picture-")
        record = Record(key=path.stem, image=b"", image_id=number, captions=(f"{caption} {number}",))
        yield Draft(record=record, image=path)
