"""Converter of Visual Genome: region descriptions as captions and questions with one answer each, for training beside VQAv2.

It publishes no split: every twentieth image is calibration, the others are train, and there is no test split.  About half of its
images are COCO's, and say which: joined with COCO's or VQAv2's shards, the leak guard finds them by their COCO id.  Files are
``image_data.json``, ``region_descriptions.json`` and ``question_answers.json``; boxes, objects and attributes are left out.
Images lie in ``VG_100K`` and ``VG_100K_2``, as the archives unpack.  Does not know prompts, tokens or streams.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from free_dist.config import UserError
from free_dist.data.conversion import Draft, SplitSource
from free_dist.data.published_files import ImageFolders, entries, every_nth, items, key_of, number, text
from free_dist.data.records import Question, Record

IMAGES_FILE, REGIONS_FILE, QUESTIONS_FILE = "image_data.json", "region_descriptions.json", "question_answers.json"
FILES = (QUESTIONS_FILE, REGIONS_FILE, IMAGES_FILE)


def sources(annotations: Path, images: Path, withheld: bool = False) -> list[SplitSource]:
    """Train and calibration; raises UserError for a withheld split, which there is none of."""
    if withheld:
        raise UserError("--withheld: Visual Genome withholds no answers")
    folders = ImageFolders(images)

    @cache  # two splits are made of the same files, which take minutes to read
    def questions() -> dict[int, list[tuple[str, str, str]]]:
        return _questions(annotations / QUESTIONS_FILE)

    def drafts() -> Iterator[Draft]:
        return _drafts(annotations, folders, questions())

    return [
        SplitSource(split="train", drafts=lambda: every_nth(drafts(), kept=False)),
        SplitSource(split="calibration", drafts=lambda: every_nth(drafts(), kept=True)),
    ]


def _drafts(
    annotations: Path, folders: ImageFolders, questions: dict[int, list[tuple[str, str, str]]]
) -> Iterator[Draft]:
    known = {
        number(entry, "image_id", f"{annotations / IMAGES_FILE}, image {place}"): entry.get("coco_id")
        for place, entry in enumerate(items(annotations / IMAGES_FILE, "item"))
    }
    path = annotations / REGIONS_FILE
    for place, entry in enumerate(items(path, "item")):
        where = f"{path}, image {place}"
        image_id = number(entry, "id", where)
        if image_id not in known:
            raise UserError(f"{where}: image {image_id} is not in {IMAGES_FILE}: download both files again")
        phrases = [
            text(_object(region, where), "phrase", where, may_be_blank=True)
            for region in entries(entry, "regions", where)
        ]
        asked = tuple(
            Question(question_id=question_id, question=question, answers=(answer,))
            for question_id, question, answer in questions.get(image_id, ())
            if question and answer
        )
        image = folders.find(f"VG_100K/{image_id}.jpg", f"VG_100K_2/{image_id}.jpg")
        record = Record(
            key=key_of("vg", image),
            image=b"",
            image_id=str(image_id),
            coco_id=None if known[image_id] is None else str(known[image_id]),
            questions=asked,
            captions=tuple(dict.fromkeys(filter(None, phrases))),
        )
        yield Draft(record=record, image=image)


def _questions(path: Path) -> dict[int, list[tuple[str, str, str]]]:
    """Image id -> (question id, question, answer) in the published order."""
    asked = {}
    for place, entry in enumerate(items(path, "item")):
        where = f"{path}, image {place}"
        asked[number(entry, "id", where)] = [
            (
                str(number(_object(said, where), "qa_id", where)),
                text(said, "question", where, may_be_blank=True),
                sys.intern(text(said, "answer", where, may_be_blank=True)),
            )
            for said in entries(entry, "qas", where)
        ]
    return asked


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r:.60}: want an object")
    return value
