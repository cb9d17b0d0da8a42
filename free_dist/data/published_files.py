"""Published annotation files, read as a stream, and the image folders beside them.

The largest of these files (VisDial's dialogues, GQA's questions) are near a gigabyte, many times that once they are objects.
Knows JSON, field checks and folders; does not know any data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ijson

from free_dist.config import MissingFileError, UserError
from free_dist.data.conversion import Draft

CALIBRATION_EVERY = 20
"""Where a data set publishes no split to calibrate on, every so-many-th training image is that split."""


def items(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    """The objects of the list at ``prefix`` (``"images.item"``), one at a time.

    Raises MissingFileError, or UserError if the file is no JSON, the list holds something else, or there is no such list.
    """
    found = False
    for entry in values(path, prefix):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {prefix}: {entry!r:.60}: want an object")
        found = True
        yield entry
    if not found:
        raise UserError(
            f"{path} has no list {prefix.removesuffix('.item')!r}, or an empty one: is this the official file?"
        )


def values(path: Path, prefix: str) -> Iterator[Any]:
    """Whatever stands at ``prefix``, one at a time; raises as :func:`items` does for a file that cannot be read."""
    with _opened(path) as file:
        try:
            yield from ijson.items(file, prefix, use_float=True)
        except ijson.JSONError as error:
            raise UserError(f"{path}: not whole JSON ({' '.join(str(error).split())}): download it again") from error


def members(path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of the object at ``prefix``, the whole file by default; raises as :func:`values` does."""
    with _opened(path) as file:
        try:
            yield from ijson.kvitems(file, prefix, use_float=True)
        except ijson.JSONError as error:
            raise UserError(f"{path}: not whole JSON ({' '.join(str(error).split())}): download it again") from error


def opens_with(path: Path) -> str:
    """The first character that is not white space: "[" or "{" in JSON files of data sets."""
    with _opened(path) as file:
        return str(file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1].decode(errors="replace"))


def text(entry: dict[str, Any], name: str, where: str, *, may_be_blank: bool = False) -> str:
    """A field that must be text, without white space around it, and say something unless ``may_be_blank``.

    ``where`` begins the complaint.
    """
    value = entry.get(name)
    if not isinstance(value, str) or not (may_be_blank or value.strip()):
        raise UserError(f"{where}: {name}={value!r:.60}: want text")
    return value.strip()


def number(entry: dict[str, Any], name: str, where: str) -> int:
    """A field that must be a whole number; ``where`` begins the complaint."""
    value = entry.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where}: {name}={value!r:.60}: want a whole number")
    return value


def entries(entry: dict[str, Any], name: str, where: str) -> list[Any]:
    """A field that must be a list; ``where`` begins the complaint."""
    value = entry.get(name)
    if not isinstance(value, list):
        raise UserError(f"{where}: {name}={value!r:.60}: want a list")
    return value


class ImageFolders:
    """Looks images up in the folders as their archives unpack, or flat; every folder is listed once."""

    def __init__(self, root: Path) -> None:
        """``root``: what ``--images`` names."""
        if not root.is_dir():
            raise MissingFileError(f"--images: {root} is no directory")
        self.root = root
        self._listed: dict[Path, frozenset[str]] = {}

    def find(self, *places: str) -> Path:
        """The first of ``places`` ("train2014/COCO_train2014_000000000009.jpg") that exists, with or without its folder.

        Raises MissingFileError naming the first.
        """
        for place in places:
            folder, _, name = place.rpartition("/")
            for directory in (self.root / folder, self.root):
                if name in self._names(directory):
                    return directory / name
        raise MissingFileError(
            f"{self.root / places[0]} does not exist"
            + "".join(f", nor does {place}" for place in places[1:])
            + "; --images names the folder that it lies under"
        )

    def _names(self, directory: Path) -> frozenset[str]:
        if directory not in self._listed:
            self._listed[directory] = frozenset(os.listdir(directory)) if directory.is_dir() else frozenset()
        return self._listed[directory]


def key_of(dataset: str, image: Path) -> str:
    """The key of a record: data set and name of its image file, without dots, which separate the members of a sample."""
    return f"{dataset}-{image.stem.replace('.', '_')}"


def every_nth(drafts: Iterable[Draft], *, kept: bool, n: int = CALIBRATION_EVERY) -> Iterator[Draft]:
    """Every n-th draft, the first of all among them (``kept``), or all the others."""
    return (draft for place, draft in enumerate(drafts) if (place % n == 0) == kept)


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; --annotations names the folder of the published JSON files")
    return path.open("rb")
