"""Converter of easy-VQA (PyPI package ``easy-vqa``): official questions, plus captions made of its own answers.

The official test split stays the test split; calibration images are taken from the official training images.  Does not
know prompts, tokens or streams.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from free_dist.data.conversion import ConversionOptions, Draft, SplitSource, convert
from free_dist.data.records import Question, Record
from free_dist.data.shards import SPLITS, Manifest, is_intact, read_manifest

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
CALIBRATION_EVERY = 10
"""Every tenth official training image goes to the calibration split."""

_NEGATED = re.compile(r"\b(not|no)\b")


def prepare(root: Path, *, options: ConversionOptions | None = None) -> list[Manifest]:
    """Write the train, calibration and test splits under ``root``; an intact split is kept, a damaged one made again."""
    if options is None and all(is_intact(root, split) for split in SPLITS):
        return [read_manifest(root, split) for split in SPLITS]
    return convert(
        root, "easyvqa", [SplitSource(split=split, drafts=partial(_drafts, split)) for split in SPLITS], options
    )


def known_facts(questions: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """(colour, shape) of the one object, as far as the published answers settle them; None where they do not."""
    candidates = {"colour": set(COLOURS), "shape": set(SHAPES)}
    for question, answer in questions:
        words = re.findall(r"[a-z]+", question)
        for kind, values in (("colour", COLOURS), ("shape", SHAPES)):
            named = {word for word in words if word in values}
            if answer in values:
                candidates[kind] &= {answer}
            elif named and answer in ("yes", "no"):
                present = (answer == "yes") != bool(_NEGATED.search(question))
                candidates[kind] = candidates[kind] & named if present else candidates[kind] - named
            elif named:  # "what is the blue shape?", "what color is the circle?"
                candidates[kind] &= named
    colour, shape = (next(iter(found)) if len(found) == 1 else None for found in candidates.values())
    return colour, shape


def captions_from_answers(questions: list[tuple[str, str]]) -> tuple[str, ...]:
    """Five reference captions of what the answers say; none unless they settle both colour and shape."""
    colour, shape = known_facts(questions)
    if colour is None or shape is None:
        return ()
    first, second = (other for other in SHAPES if other != shape)
    thing = f"{colour} {shape}"
    return (
        f"a {thing} and no {first} or {second} in the image.",
        f"a {thing} and no {first} or {second} can be seen.",
        f"a {thing} is in the image but no {first} and no {second}.",
        f"there is a {thing} in the image, no {first} and no {second}.",
        f"the image shows a {thing}, not a {first} or {second}.",
    )


def _published(split: str) -> tuple[list[int], dict[int, str], dict[int, list[tuple[str, str]]]]:
    import easy_vqa

    official = easy_vqa.get_test_questions() if split == "test" else easy_vqa.get_train_questions()
    paths = easy_vqa.get_test_image_paths() if split == "test" else easy_vqa.get_train_image_paths()
    questions: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image_id in zip(*official, strict=True):
        questions[image_id].append((question, answer))
    image_ids = sorted(questions)
    if split != "test":
        image_ids = [i for i in image_ids if (i % CALIBRATION_EVERY == 0) == (split == "calibration")]
    return image_ids, paths, questions


def _drafts(split: str) -> Iterator[Draft]:
    image_ids, paths, questions = _published(split)
    official_split = "test" if split == "test" else "train"
    for image_id in image_ids:
        record = Record(
            key=f"{official_split}-{image_id:05d}",
            image=b"",
            questions=tuple(Question(question=question, answers=(answer,)) for question, answer in questions[image_id]),
            captions=captions_from_answers(questions[image_id]),
        )
        yield Draft(record=record, image=Path(paths[image_id]))
