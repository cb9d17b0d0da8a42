"""Converter of LAVIS's annotation files (COCO captions, VQAv2, NoCaps) and the image folders beside them.

LAVIS lists one caption or question an entry; a Record holds an image once with everything said about it.  Two layouts exist
for captions: a text per entry (training files) and a list of texts (evaluation files).  Knows those JSON files; does not know
prompts, tokens or streams, and does not read LAVIS's dialogue files, whose reader mixes up turns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from free_dist.config import MissingFileError, UserError
from free_dist.data.conversion import ConversionOptions, Draft, SplitSource, convert
from free_dist.data.published_files import every_nth
from free_dist.data.records import Question, Record
from free_dist.data.shards import SPLITS, Manifest


@dataclass(frozen=True, kw_only=True)
class AnnotationFiles:
    """Which of LAVIS's files make which of our splits."""

    train: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    calibration_every: int = 0
    """Without files for the calibration split: every so-many-th training image goes there instead; 0 for none."""


DATASETS = {
    "coco": AnnotationFiles(
        train=("coco_karpathy_train.json",),
        calibration=("coco_karpathy_val.json",),
        test=("coco_karpathy_test.json",),
    ),
    # LAVIS's vqa_test.json has no answers, so the validation images, on which LAVIS trains too, are kept for measuring.
    "vqav2": AnnotationFiles(train=("vqa_train.json",), test=("vqa_val.json",), calibration_every=20),
    "nocaps": AnnotationFiles(test=("nocaps_val.json",)),
}
"""By the names of our data directories; file names are those that LAVIS downloads."""


@dataclass(kw_only=True)
class _Said:
    """Everything said about one image so far."""

    questions: list[Question] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)


def prepare(
    dataset: str, annotations: Path, images: Path, root: Path, options: ConversionOptions | None = None
) -> list[Manifest]:
    """Write the splits of ``dataset`` (a name in ``DATASETS``) under ``root``, or keep the shards that are there.

    ``annotations`` holds LAVIS's JSON files; the image paths in them are relative to ``images``.  Raises MissingFileError or
    UserError for files that are missing or not as LAVIS writes them, and for a missing image.
    """
    return convert(root, dataset, sources(dataset, annotations, images), options)


def sources(dataset: str, annotations: Path, images: Path, withheld: bool = False) -> list[SplitSource]:
    """The splits of ``dataset``, a name in ``DATASETS``; its withheld answers are not among LAVIS's files."""
    if withheld:
        raise UserError(f"--withheld: LAVIS's files of {dataset} have no split without answers; use the official files")
    files = DATASETS[dataset]
    every = files.calibration_every
    for name in (*files.train, *files.calibration, *files.test):
        _check_exists(annotations / name)

    @cache
    def read(names: tuple[str, ...]) -> dict[str, _Said]:
        return _gather(annotations / name for name in names)

    def drafts(split: str) -> Iterator[Draft]:
        found = _drafts(read(_names(files, split)), images)
        return found if split == "test" or not every else every_nth(found, kept=split == "calibration", n=every)

    return [SplitSource(split=split, drafts=partial(drafts, split)) for split in SPLITS if _names(files, split)]


def lavis_records(annotations: Sequence[Path], images: Path) -> Iterator[Record]:
    """One Record per image of LAVIS annotation files, in the order of first appearance.

    Raises MissingFileError and UserError as :func:`prepare` does.
    """
    for draft in _drafts(_gather(annotations), images):
        yield replace(draft.record, image=draft.image.read_bytes())


def _names(files: AnnotationFiles, split: str) -> tuple[str, ...]:
    by_split = {"train": files.train, "calibration": files.calibration, "test": files.test}
    if split == "calibration" and files.calibration_every:
        return files.train
    return by_split[split]


def _gather(paths: Iterable[Path]) -> dict[str, _Said]:
    said: dict[str, _Said] = {}
    for path in paths:
        for number, entry in enumerate(_read(path)):
            where = f"{path}, entry {number}"
            about = said.setdefault(_text(entry, "image", where), _Said())
            if "question" in entry:
                about.questions.append(_question(entry, where))
            else:
                about.captions += _captions(entry, where)
    return said


def _read(path: Path) -> list[dict[str, Any]]:
    _check_exists(path)
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: want a list of entries, as in LAVIS's annotation files")
    return entries


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; LAVIS downloads it into its annotations folder")


def _text(entry: dict[str, Any], name: str, where: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name}={value!r}: want text")
    return value.strip()


def _question(entry: dict[str, Any], where: str) -> Question:
    given = entry.get("answer")
    answers = [given] if isinstance(given, str) else given
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: answer={given!r}: want answers; LAVIS's test questions have none and cannot be used")
    number = entry.get("question_id")
    return Question(
        question=_text(entry, "question", where),
        answers=tuple(answer.strip() for answer in answers),
        question_id=None if number is None else str(number),
    )


def _captions(entry: dict[str, Any], where: str) -> list[str]:
    given = entry.get("caption")
    captions = [given] if isinstance(given, str) else given
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: caption={given!r}: want a text, or a list of texts")
    return [caption.strip() for caption in captions if caption.strip()]  # a blank caption is none


def _drafts(said: dict[str, _Said], images: Path) -> Iterator[Draft]:
    for image, about in said.items():
        path = images / image
        if not path.is_file():
            raise MissingFileError(f"{path} does not exist; name the folder that {image} lies under")
        record = Record(key=_key(image), image=b"", questions=tuple(about.questions), captions=tuple(about.captions))
        yield Draft(record=record, image=path)


def _key(image: str) -> str:
    # In a tar of samples, what follows the first dot tells the members of one sample apart.
    return image.rpartition(".")[0].replace("/", "-").replace(".", "_")
