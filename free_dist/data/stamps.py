"""Converter of Debian's ``tuxpaint-stamps-default`` (GPL-2): photographs and drawings, each with a sentence about it.

The sentence is the first line of the .txt file beside a .png; the lines that follow are translations.  Pictures of one sentence
go to one split, by the hash of the sentence; the same picture under several names is one record.  A cut-out is put on white and
re-encoded, as in :mod:`free_dist.data.openclipart`: what lies under its transparency is not part of the picture.
Does not know prompts, tokens or streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from free_dist.config import MissingFileError, UserError
from free_dist.data.conversion import ConversionOptions, Draft, SplitSource, convert
from free_dist.data.openclipart import Drawn, Picture, grouped
from free_dist.data.records import Record
from free_dist.data.shards import SPLITS, Manifest

INSTALLED = Path("/usr/share/tuxpaint/stamps")


def prepare(root: Path, *, installed: Path = INSTALLED, options: ConversionOptions | None = None) -> list[Manifest]:
    """Write the three splits under ``root`` from the package's files, or keep the shards that are there.

    Raises MissingFileError where the package is not installed.
    """
    if not installed.is_dir():
        raise MissingFileError(f"{installed} does not exist: apt-get install tuxpaint-stamps-default")
    groups = grouped(described(installed))
    sources = [
        SplitSource(
            split=split, drafts=partial(_drafts, installed, groups[split]), total=len(groups[split]), may_be_empty=True
        )
        for split in SPLITS
    ]
    return convert(root, "stamps", sources, options)


def described(installed: Path) -> Iterator[Picture]:
    """Every picture with its sentence, in the order of their paths."""
    for path in sorted(installed.rglob("*.png")):
        told = path.with_suffix(".txt")
        if not told.is_file():
            continue
        try:
            lines = told.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{told} is not UTF-8 ({error}): install the package again") from error
        sentence = lines[0].strip() if lines else ""
        if sentence:
            yield Picture(path, sentence)


def _drafts(installed: Path, drawings: list[Drawn]) -> Iterator[Draft]:
    for drawn in drawings:
        name = drawn.path.relative_to(installed).with_suffix("").as_posix()
        key = f"stamps-{name.replace('/', '-').replace('.', '_')}"
        yield Draft(record=Record(key=key, image=drawn.image, image_id=name, captions=drawn.titles), image=drawn.path)
