"""Converter of COCO captions: Karpathy's ``dataset_coco.json``, or the official ``captions_{train,val}{2014,2017}.json``.

Karpathy's split is the one that papers report: his train and restval are our train split, his val our calibration, his test our
test split.  Officially the test captions are withheld: val becomes the test split, and calibration images come from train.
Images lie in ``train2014``, ``val2014``, ``train2017`` and ``val2017``, as the archives unpack.
Does not know prompts, tokens or streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from free_dist.data.conversion import Draft, SplitSource
from free_dist.data.published_files import ImageFolders, entries, every_nth, items, key_of, number, text, values
from free_dist.data.records import Record

KARPATHY_FILE = "dataset_coco.json"
KARPATHY = {"train": ("train", "restval"), "calibration": ("val",), "test": ("test",)}
"""Our splits by his."""


def karpathy_sources(annotations: Path, images: Path, withheld: bool = False) -> list[SplitSource]:
    """Karpathy's split; it withholds nothing."""
    folders = ImageFolders(images)
    path = annotations / KARPATHY_FILE
    return [SplitSource(split=split, drafts=partial(_karpathy, path, folders, his)) for split, his in KARPATHY.items()]


def official_sources(year: int, annotations: Path, images: Path, withheld: bool = False) -> list[SplitSource]:
    """The official captions of a year, 2014 or 2017; nothing is published of its test images."""
    folders = ImageFolders(images)

    def drafts(part: str) -> Iterator[Draft]:
        return _official(annotations / f"captions_{part}{year}.json", f"{part}{year}", folders)

    return [
        SplitSource(split="train", drafts=lambda: every_nth(drafts("train"), kept=False)),
        SplitSource(split="calibration", drafts=lambda: every_nth(drafts("train"), kept=True)),
        SplitSource(split="test", drafts=lambda: drafts("val")),
    ]


def captions_by_image(path: Path) -> dict[int, list[str]]:
    """Image id -> its captions in the published order, of a file in COCO's form."""
    captions: dict[int, list[str]] = {}
    for place, entry in enumerate(items(path, "annotations.item")):
        where = f"{path}, annotation {place}"
        of_image = captions.setdefault(number(entry, "image_id", where), [])
        if said := text(entry, "caption", where, may_be_blank=True):  # a blank caption is none
            of_image.append(said)
    return captions


def licences(path: Path) -> dict[int, str]:
    """Licence number -> URL or name, of a file in COCO's form; some name none."""
    known: dict[int, str] = {}
    for entry in values(path, "licenses.item"):
        if isinstance(entry, dict) and (told := entry.get("url") or entry.get("name")):
            known[number(entry, "id", f"{path}, licenses")] = str(told)
    return known


def _karpathy(path: Path, folders: ImageFolders, his: tuple[str, ...]) -> Iterator[Draft]:
    for place, entry in enumerate(items(path, "images.item")):
        where = f"{path}, image {place}"
        if text(entry, "split", where) not in his:
            continue
        image = folders.find(f"{text(entry, 'filepath', where)}/{text(entry, 'filename', where)}")
        sentences = entries(entry, "sentences", where)
        yield _draft(
            image,
            number(entry, "cocoid", where),
            [text(sentence if isinstance(sentence, dict) else {}, "raw", where) for sentence in sentences],
        )


def _official(path: Path, folder: str, folders: ImageFolders) -> Iterator[Draft]:
    captions, known = captions_by_image(path), licences(path)
    for place, entry in enumerate(items(path, "images.item")):
        where = f"{path}, image {place}"
        image_id = number(entry, "id", where)
        image = folders.find(f"{folder}/{text(entry, 'file_name', where)}")
        if image_id in captions:
            yield _draft(image, image_id, captions[image_id], licence=known.get(entry.get("license", -1)))


def _draft(image: Path, image_id: int, captions: list[str], **more: Any) -> Draft:
    record = Record(key=key_of("coco", image), image=b"", image_id=str(image_id), captions=tuple(captions), **more)
    return Draft(record=record, image=image)
