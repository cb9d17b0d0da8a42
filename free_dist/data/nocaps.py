"""Converter of NoCaps: ``nocaps_val_4500_captions.json`` and ``nocaps_test_image_info.json``.

NoCaps has nothing to train on.  Its validation images, with ten captions and a domain each, are our test split; of its test
images only the files are published, and they are the withheld split.  Images lie in ``val`` (or ``validation``) and ``test``.
Does not know prompts, tokens or streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from free_dist.config import UserError
from free_dist.data.coco import captions_by_image, licences
from free_dist.data.conversion import Draft, SplitSource
from free_dist.data.published_files import ImageFolders, items, key_of, number, text
from free_dist.data.records import Record

VALIDATION_FILE = "nocaps_val_4500_captions.json"
TEST_FILE = "nocaps_test_image_info.json"
DOMAINS = ("in-domain", "near-domain", "out-domain")
"""By whether COCO names what the images show."""


def sources(annotations: Path, images: Path, withheld: bool = False) -> list[SplitSource]:
    """The test split, and the withheld one where it is asked for."""
    folders = ImageFolders(images)
    found = [
        SplitSource(
            split="test", drafts=partial(_drafts, annotations / VALIDATION_FILE, folders, ("val", "validation"), True)
        )
    ]
    if withheld:
        found.append(
            SplitSource(split="withheld", drafts=partial(_drafts, annotations / TEST_FILE, folders, ("test",), False))
        )
    return found


def _drafts(path: Path, folders: ImageFolders, places: tuple[str, ...], captioned: bool) -> Iterator[Draft]:
    captions = captions_by_image(path) if captioned else {}
    known = licences(path)
    for place, entry in enumerate(items(path, "images.item")):
        where = f"{path}, image {place}"
        image_id = number(entry, "id", where)
        name = text(entry, "file_name", where)
        if captioned and image_id not in captions:
            raise UserError(f"{path}: image {image_id} has no caption: download the file again")
        domain = text(entry, "domain", where) if "domain" in entry else None
        if domain is not None and domain not in DOMAINS:
            raise UserError(f"{where}: domain={domain!r}: want one of {', '.join(DOMAINS)}")
        image = folders.find(*(f"{folder}/{name}" for folder in places))
        record = Record(
            key=key_of("nocaps", image),
            image=b"",
            image_id=str(image_id),
            domain=domain,
            licence=known.get(entry.get("license", -1)),
            captions=tuple(captions.get(image_id, ())),
        )
        # Ids are counted from 0 in each of the two files.
        yield Draft(record=record, image=image, identity=name)
