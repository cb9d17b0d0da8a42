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
import io
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from free_dist.config import MissingFileError, UserError
from free_dist.data.records import Record
from free_dist.data.shards import SPLITS, Manifest, is_intact, read_manifest, write_split

PARTS = 20
"""Titles are spread over so many parts by their hash: one is the calibration split, one the test split."""

MOST_PIXELS = 16_000_000
"""Of a picture that is used; the few larger ones are posters, and cost seconds each time they are decoded."""

PNG_SIZE = struct.Struct(">16xII")
"""Where a PNG file says its width and height."""

LARGEST = 448
"""Pixels of the longer side of a re-encoded picture; vision networks read no more."""

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


def prepare(root: Path, *, installed: Path = Path("/usr/share/openclipart")) -> list[Manifest]:
    """Write the three splits under ``root`` from the packages' files; an intact split is kept, a damaged one made again."""
    if not (installed / "png").is_dir() or not (installed / "svg").is_dir():
        raise MissingFileError(f"{installed} has no png and svg: apt-get install openclipart-png openclipart-svg")
    if all(is_intact(root, split) for split in SPLITS):
        return [read_manifest(root, split) for split in SPLITS]
    groups = grouped(titled_pictures(installed))
    manifests = []
    for split in SPLITS:
        made = groups[split]
        manifests.append(write_split(root, dataset="openclipart", split=split, records=made, total=len(made)))
    return manifests


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


def grouped(pictures: Iterator[Picture]) -> dict[str, list[Record]]:
    """Split -> one record a picture in the order of first paths; titles that share a picture share a split.

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
    groups: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for image, same in by_image.items():
        titles = tuple(dict.fromkeys(picture.title for picture in same))
        digest = hashlib.sha256(same[0].path.read_bytes()).hexdigest()
        groups[split_of(find(titles[0]))].append(Record(key=f"openclipart-{digest[:16]}", image=image, captions=titles))
    return groups


def split_of(title: str) -> str:
    """The split of a title and all its pictures."""
    part = int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") % PARTS
    return {0: "test", 1: "calibration"}.get(part, "train")


def on_white(path: Path) -> bytes:
    """The picture as encoded, or on white, and no larger than ``LARGEST``, where it has transparency."""
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.mode in ("RGB", "L"):
                return content
            drawn = picture.convert("RGBA")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a PNG picture ({error}): install the package again") from error
    drawn.thumbnail((LARGEST, LARGEST))
    page = Image.new("RGBA", drawn.size, "white")
    page.alpha_composite(drawn)
    written = io.BytesIO()
    page.convert("RGB").save(written, "PNG")
    return written.getvalue()
