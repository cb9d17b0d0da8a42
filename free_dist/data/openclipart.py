"""Converter of Debian's ``openclipart-png`` and ``openclipart-svg`` (public domain): pictures, and titles as captions.

Titles stand in the SVG files, pictures in the PNG files of the same path.  Pictures of one title go to one split, because
artists drew series; the same picture under several paths is one record with all its titles.  Does not know prompts, tokens or
streams.

A picture with transparency is put on white and re-encoded: drawn in black on nothing, it would otherwise turn black all over
when colours are read without transparency.
"""

from __future__ import annotations

import hashlib
import html
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from free_dist.config import MissingFileError
from free_dist.data.conversion import ConversionOptions, Draft, SplitSource, convert
from free_dist.data.pictures import on_white
from free_dist.data.records import Record
from free_dist.data.shards import SPLITS, Manifest, is_intact, read_manifest

PARTS = 20
"""Titles are spread over so many parts by their hash: one is the calibration split, one the test split."""

MOST_PIXELS = 16_000_000
"""Of a picture that is used; the few larger ones are posters, and cost seconds each time they are decoded."""

PNG_SIZE = struct.Struct(">16xII")
"""Where a PNG file says its width and height."""

MAX_WORDS = 10

SHARED = 8
"""A title of more pictures than this names a collection or an artist."""

CREDIT = re.compile(r"^clip ?art by nicu buculei\b")
"""What the most productive artist wrote before his titles."""

TITLE = re.compile(r"<dc:title[^>]*>([^<]*)</dc:title>")
USELESS = frozenset(
    {"untitled", "unnamed", "title", "image", "picture", "drawing", "clipart", "clip", "art", "svg", "icon"}
)
"""Words that describe no picture; a title of nothing else is none."""


@dataclass(frozen=True)
class Picture:
    """One PNG file and its cleaned title."""

    path: Path
    title: str


@dataclass(frozen=True)
class Drawn:
    """One picture as it is kept."""

    path: Path
    """The first file that looks like this."""
    titles: tuple[str, ...]
    image: bytes


def prepare(
    root: Path, *, installed: Path = Path("/usr/share/openclipart"), options: ConversionOptions | None = None
) -> list[Manifest]:
    """Write the three splits under ``root`` from the packages' files; an intact split is kept, a damaged one made again."""
    if not (installed / "png").is_dir() or not (installed / "svg").is_dir():
        raise MissingFileError(f"{installed} has no png and svg: apt-get install openclipart-png openclipart-svg")
    if options is None and all(is_intact(root, split) for split in SPLITS):  # drawing them all takes minutes
        return [read_manifest(root, split) for split in SPLITS]
    groups = grouped(titled_pictures(installed))
    sources = [
        SplitSource(split=split, drafts=partial(_drafts, groups[split]), total=len(groups[split]), may_be_empty=True)
        for split in SPLITS
    ]
    return convert(root, "openclipart", sources, options)


def clean_title(raw: str) -> str | None:
    """A published title as a caption in lower case; None if it says nothing of the picture."""
    text = html.unescape(raw).replace("_", " ").lower()
    text = re.sub(r"\.(svg|png)\b", " ", text)
    text = re.sub(r"[^a-z' -]", " ", text)  # numbers of a series, brackets, other alphabets
    text = CREDIT.sub(" ", " ".join(text.split()))
    words = [word.strip("-'") for word in text.split()]
    words = [word for word in words if word]
    telling = [word for word in words if len(word) >= 3 and word not in USELESS]
    if not telling or len(words) > MAX_WORDS or "by" in words:
        return None
    while words and (len(words[-1]) == 1 or words[-1] in USELESS):
        words.pop()
    return " ".join(words)


def titled_pictures(installed: Path) -> Iterator[Picture]:
    """Every picture with a usable title, in the order of their paths."""
    found = list(_titled(installed))
    shared = Counter(picture.title for picture in found)
    return (picture for picture in found if shared[picture.title] <= SHARED)


def _titled(installed: Path) -> Iterator[Picture]:
    for path in sorted((installed / "png").rglob("*.png")):
        svg = (installed / "svg" / path.relative_to(installed / "png")).with_suffix(".svg")
        if not svg.is_file():
            continue
        with path.open("rb") as file:
            header = file.read(PNG_SIZE.size)
        if len(header) == PNG_SIZE.size and math.prod(PNG_SIZE.unpack(header)) > MOST_PIXELS:
            continue
        # The first title is the picture's; others are of publisher and artist.
        found = TITLE.search(svg.read_text(encoding="utf-8", errors="replace"))
        title = clean_title(found[1]) if found else None
        if title is not None:
            yield Picture(path, title)


def grouped(pictures: Iterator[Picture]) -> dict[str, list[Drawn]]:
    """Split -> its pictures in the order of first paths; titles that share a picture share a split.

    Holds all pictures as they are kept, some hundred MB.
    """
    # By what is kept: files that differ in what lies under transparent pixels are one picture.
    by_image: dict[bytes, list[Picture]] = {}
    for picture in pictures:
        by_image.setdefault(on_white(picture.path), []).append(picture)
    leader: dict[str, str] = {}

    def find(title: str) -> str:
        while leader.setdefault(title, title) != title:
            title = leader[title]
        return title

    for same in by_image.values():
        for picture in same:
            first, other = sorted((find(same[0].title), find(picture.title)))
            leader[other] = first
    groups: dict[str, list[Drawn]] = {split: [] for split in SPLITS}
    for image, same in by_image.items():
        titles = tuple(dict.fromkeys(picture.title for picture in same))
        groups[split_of(find(titles[0]))].append(Drawn(same[0].path, titles, image))
    return groups


def split_of(title: str) -> str:
    """The split of a title and all its pictures."""
    part = int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") % PARTS
    return {0: "test", 1: "calibration"}.get(part, "train")


def _drafts(drawings: list[Drawn]) -> Iterator[Draft]:
    for drawn in drawings:
        key = f"openclipart-{hashlib.sha256(drawn.path.read_bytes()).hexdigest()[:16]}"
        yield Draft(record=Record(key=key, image=drawn.image, captions=drawn.titles), image=drawn.path)
