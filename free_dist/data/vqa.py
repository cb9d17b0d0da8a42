"""Converter of VQAv2 and OK-VQA, which share a form: a file of questions and a file of ten answers to each.

The train images are our train split but for every twentieth, which is calibration; the answers to VQAv2's test questions are
withheld, so the val images are our test split.  VQAv2's test questions make the withheld split.  Images are COCO's, in
``train2014``, ``val2014`` and ``test2015``.  Does not know prompts, tokens or streams.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from free_dist.config import UserError
from free_dist.data.conversion import Draft, SplitSource
from free_dist.data.published_files import ImageFolders, entries, every_nth, items, key_of, number, text
from free_dist.data.records import Question, Record


@dataclass(frozen=True, kw_only=True)
class VqaFiles:
    """The names of a data set's files; ``{}`` stands for the part, as ``train2014``."""

    questions: str
    answers: str
    withheld: str | None = None
    """The part whose answers are not published."""


FILES = {
    "vqav2": VqaFiles(
        questions="v2_OpenEnded_mscoco_{}_questions.json",
        answers="v2_mscoco_{}_annotations.json",
        withheld="test2015",
    ),
    "okvqa": VqaFiles(questions="OpenEnded_mscoco_{}_questions.json", answers="mscoco_{}_annotations.json"),
}


def sources(dataset: str, annotations: Path, images: Path, withheld: bool = False) -> list[SplitSource]:
    """The splits of ``dataset``, a name in ``FILES``; raises UserError for a withheld split that is not published."""
    files, folders = FILES[dataset], ImageFolders(images)

    @cache  # two splits are made of the train files, which take a minute to read
    def read(part: str) -> dict[int, list[Question]]:
        answers = annotations / files.answers.format(part) if part != files.withheld else None
        return questions_by_image(annotations / files.questions.format(part), answers)

    def drafts(part: str) -> Iterator[Draft]:
        for image_id, questions in read(part).items():
            image = folders.find(f"{part}/COCO_{part}_{image_id:012d}.jpg")
            record = Record(key=key_of(dataset, image), image=b"", image_id=str(image_id), questions=tuple(questions))
            yield Draft(record=record, image=image)

    found = [
        SplitSource(split="train", drafts=lambda: every_nth(drafts("train2014"), kept=False)),
        SplitSource(split="calibration", drafts=lambda: every_nth(drafts("train2014"), kept=True)),
        SplitSource(split="test", drafts=lambda: drafts("val2014")),
    ]
    if withheld:
        part = files.withheld
        if part is None:
            raise UserError(f"--withheld: {dataset} withholds no answers")
        found.append(SplitSource(split="withheld", drafts=lambda: drafts(part)))
    return found


def questions_by_image(questions: Path, answers: Path | None) -> dict[int, list[Question]]:
    """Image id -> its questions, both in the published order; without a file of answers they have none.

    Raises UserError for a question without answers, answers without a question, or a pair that disagrees on its image.
    """
    known = {} if answers is None else _answers(answers)
    by_image: dict[int, list[Question]] = {}
    for place, entry in enumerate(items(questions, "questions.item")):
        where = f"{questions}, question {place}"
        question_id, image_id = number(entry, "question_id", where), number(entry, "image_id", where)
        said: dict[str, Any] = {"answers": ()}
        if answers is not None:
            about, said = known.pop(question_id, (None, said))
            if about != image_id:
                raise UserError(
                    f"{where}: question {question_id} is about image {image_id}, and in {answers} about {about}: "
                    "download both files again"
                )
        by_image.setdefault(image_id, []).append(
            Question(question=text(entry, "question", where), question_id=str(question_id), **said)
        )
    if known:
        raise UserError(f"{answers}: question {next(iter(known))} is not in {questions}: download both files again")
    return by_image


def _answers(path: Path) -> dict[int, tuple[int, dict[str, Any]]]:
    """Question id -> (image id, what the answers say of a Question)."""
    known = {}
    for place, entry in enumerate(items(path, "annotations.item")):
        where = f"{path}, annotation {place}"
        given = entries(entry, "answers", where)
        if not given or not all(isinstance(answer, dict) and isinstance(answer.get("answer"), str) for answer in given):
            raise UserError(f"{where}: answers={given!r:.60}: want a list of answers")
        known[number(entry, "question_id", where)] = (
            number(entry, "image_id", where),
            {
                # Millions of answers say the same few thousand things: each is held once.  People may have said nothing.
                "answers": tuple(sys.intern(answer["answer"].strip()) for answer in given),
                "answer_confidences": tuple(sys.intern(text(answer, "answer_confidence", where)) for answer in given),
                "question_type": sys.intern(text(entry, "question_type", where)),
                "answer_type": sys.intern(text(entry, "answer_type", where)),
            },
        )
    return known
