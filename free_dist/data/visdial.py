"""Converter of VisDial 1.0: ``visdial_1.0_{train,val,test}.json`` and the dense annotations.

The train dialogues are our train split but for every twentieth, which is calibration; val, on which papers report because the
test answers are withheld, is our test split, and test the withheld one.  Questions and answers stand once in lists of their
own, to which dialogues point; a record spells them out.  The caption that opens a dialogue is the record's caption.  Dense
annotations judge the candidates of one round a dialogue; ``round_id`` counts from 1.

Images lie in ``train2014`` and ``val2014`` (COCO's, for train), ``VisualDialog_val2018`` and ``VisualDialog_test2018``.
Does not know prompts, tokens or streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from free_dist.config import UserError
from free_dist.data.conversion import Draft, SplitSource
from free_dist.data.published_files import (
    ImageFolders,
    entries,
    every_nth,
    items,
    key_of,
    number,
    text,
    values,
)
from free_dist.data.records import DialogueTurn, Record

FILE = "visdial_1.0_{}.json"
DENSE_FILES = {
    "train": ("visdial_1.0_train_dense_sample.json", "visdial_1.0_train_dense_annotations.json"),
    "val": ("visdial_1.0_val_dense_annotations.json",),
    "test": (),
}
"""By part; the first that exists is read."""

IMAGES = {
    "train": ("train2014/COCO_train2014_{:012d}.jpg", "val2014/COCO_val2014_{:012d}.jpg"),
    "val": ("VisualDialog_val2018/VisualDialog_val2018_{:012d}.jpg",),
    "test": ("VisualDialog_test2018/VisualDialog_test2018_{:012d}.jpg",),
}


def sources(annotations: Path, images: Path, withheld: bool = False) -> list[SplitSource]:
    """The three splits, and the withheld one where it is asked for; dense annotations where their files are."""
    folders = ImageFolders(images)
    texts = cache(_texts)  # two splits are made of the train file, which takes minutes to read
    drafts = partial(_drafts, annotations, folders, texts)
    found = [
        SplitSource(split="train", drafts=lambda: every_nth(drafts("train"), kept=False)),
        SplitSource(split="calibration", drafts=lambda: every_nth(drafts("train"), kept=True)),
        SplitSource(split="test", drafts=lambda: drafts("val")),
    ]
    if withheld:
        found.append(SplitSource(split="withheld", drafts=lambda: drafts("test")))
    return found


def dense_annotations(annotations: Path, part: str) -> dict[int, tuple[int, tuple[float, ...]]]:
    """Image id -> (place of the round, from 0; relevance of its candidates); empty where ``part`` has no such file."""
    path = next((path for name in DENSE_FILES[part] if (path := annotations / name).is_file()), None)
    if path is None:
        return {}
    known = {}
    for place, entry in enumerate(items(path, "item")):
        where = f"{path}, entry {place}"
        # The file of val says gt_relevance, that of train relevance.
        relevance = entries(entry, "gt_relevance" if "gt_relevance" in entry else "relevance", where)
        if not all(isinstance(share, int | float) and 0 <= share <= 1 for share in relevance):
            raise UserError(f"{where}: relevance: want shares of people, 0 to 1")
        known[number(entry, "image_id", where)] = number(entry, "round_id", where) - 1, tuple(map(float, relevance))
    return known


def _drafts(
    annotations: Path, folders: ImageFolders, texts: Callable[[Path, str], list[str]], part: str
) -> Iterator[Draft]:
    path = annotations / FILE.format(part)
    questions, answers = (texts(path, name) for name in ("questions", "answers"))
    dense = dense_annotations(annotations, part)
    for place, entry in enumerate(items(path, "data.dialogs.item")):
        where = f"{path}, dialogue {place}"
        image_id = number(entry, "image_id", where)
        image = folders.find(*(name.format(image_id) for name in IMAGES[part]))
        judged, relevance = dense.pop(image_id, (None, ()))
        turns = [
            _turn(turn, questions, answers, relevance if round_ == judged else (), f"{where}, round {round_ + 1}")
            for round_, turn in enumerate(entries(entry, "dialog", where))
        ]
        if judged is not None and not 0 <= judged < len(turns):
            raise UserError(f"{where}: the dense annotation is of round {judged + 1}, of {len(turns)}")
        record = Record(
            key=key_of("visdial", image),
            image=b"",
            image_id=str(image_id),
            coco_id=str(image_id) if part == "train" else None,
            captions=tuple(filter(None, [text(entry, "caption", where, may_be_blank=True)])),
            dialogue=tuple(turns),
        )
        # Images of val and test are not COCO's: their ids are told apart by the names of the files.
        yield Draft(record=record, image=image, identity=image.stem)
    if dense:
        raise UserError(f"{annotations}: a dense annotation is of image {next(iter(dense))}, which {path.name} has not")


def _texts(path: Path, name: str) -> list[str]:
    found = list(values(path, f"data.{name}.item"))
    if not found or not all(isinstance(said, str) for said in found):
        raise UserError(f"{path}: data.{name}: want a list of texts, as in the official file")
    return [said.strip() for said in found]


def _turn(
    turn: Any, questions: list[str], answers: list[str], relevance: tuple[float, ...], where: str
) -> DialogueTurn:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: {turn!r:.60}: want an object")
    options = entries(turn, "answer_options", where) if "answer_options" in turn else []
    candidates = tuple(_said(option, answers, f"{where}: answer_options") for option in options)
    gold = number(turn, "gt_index", where) if "gt_index" in turn else None
    if gold is not None and not 0 <= gold < len(candidates):
        raise UserError(f"{where}: gt_index={gold}: there are {len(candidates)} candidates")
    if relevance and len(relevance) != len(candidates):
        raise UserError(f"{where}: {len(relevance)} dense annotations of {len(candidates)} candidates")
    return DialogueTurn(
        question=_said(turn.get("question"), questions, f"{where}: question"),
        answer=_said(turn["answer"], answers, f"{where}: answer") if "answer" in turn else None,
        candidates=candidates,
        gold=gold,
        relevance=relevance,
    )


def _said(place: Any, texts: list[str], where: str) -> str:
    if not isinstance(place, int) or not 0 <= place < len(texts):
        raise UserError(f"{where}={place!r:.60}: want a place in the list of {len(texts)}")
    return texts[place]
