"""Converter of GQA's balanced questions: ``{train,val,testdev,test}_balanced_questions.json``, objects by question id.

Train is our train split, val our calibration, testdev, on which papers report, our test split; the answers of test are withheld.
The full answer, the functional program and the scene graph are left out.  Images lie in ``images``, as the archive unpacks.
Does not know prompts, tokens or streams.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from free_dist.config import UserError
from free_dist.data.conversion import Draft, SplitSource
from free_dist.data.published_files import ImageFolders, key_of, members, text
from free_dist.data.records import Question, Record

FILE = "{}_balanced_questions.json"
PARTS = {"train": "train", "calibration": "val", "test": "testdev", "withheld": "test"}
"""GQA's parts by our splits."""


def sources(annotations: Path, images: Path, withheld: bool = False) -> list[SplitSource]:
    """The three splits, and the withheld one where it is asked for."""
    folders = ImageFolders(images)
    return [
        SplitSource(split=split, drafts=partial(_drafts, annotations / FILE.format(part), folders, split != "withheld"))
        for split, part in PARTS.items()
        if withheld or split != "withheld"
    ]


def questions_by_image(path: Path, *, answered: bool = True) -> dict[str, list[Question]]:
    """Image id -> its questions, both in the published order.

    A question's type is GQA's structural one ("query", "verify", ...), its answer type the semantic one ("attr", "rel", ...).
    """
    by_image: dict[str, list[Question]] = {}
    for question_id, entry in members(path):
        where = f"{path}, question {question_id}"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {entry!r:.60}: want an object")
        types = entry.get("types")
        types = types if isinstance(types, dict) else {}
        by_image.setdefault(text(entry, "imageId", where), []).append(
            Question(
                question=text(entry, "question", where),
                answers=(sys.intern(text(entry, "answer", where)),) if answered else (),
                question_id=question_id,
                question_type=types.get("structural"),
                answer_type=types.get("semantic"),
            )
        )
    return by_image


def _drafts(path: Path, folders: ImageFolders, answered: bool) -> Iterator[Draft]:
    for image_id, questions in questions_by_image(path, answered=answered).items():
        image = folders.find(f"images/{image_id}.jpg")
        record = Record(key=key_of("gqa", image), image=b"", image_id=image_id, questions=tuple(questions))
        yield Draft(record=record, image=image)
