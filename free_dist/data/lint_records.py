"""What is wrong with one sample's JSON or image, in words.

Knows the form of a record, what its fields must say to be of use, and which images we read; does not know shards or splits.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator

from PIL import Image

from free_dist.data.form import form_faults, read_json
from free_dist.data.images import MAX_PIXELS, UNREADABLE
from free_dist.data.records import DialogueTurn, Record, record_from_json

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG"}
"""Suffix of a member -> what it must hold."""

MIN_SIDE, MAX_SIDE = 2, 20_000
"""Pixels of a side."""


def json_faults(content: bytes) -> list[str]:
    """What is wrong with a sample's JSON member, as bytes."""
    value, faults = read_json(content)
    if value is None:
        return faults or ["is null, want an object"]
    faults += form_faults(value, Record, without=("key", "image"))
    return faults or list(_meaning_faults(record_from_json("", b"", content)))


def image_faults(suffix: str, content: bytes) -> list[str]:
    """What is wrong with an encoded image; decodes all of it unless its size is absurd."""
    if not content:
        return ["is empty"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes are judged here, and metadata is none of our business
            with Image.open(io.BytesIO(content), formats=tuple(IMAGE_FORMATS.values())) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE or min(width, height) < MIN_SIDE:
                    return [f"decodes to {width} x {height} pixels, which is absurd"]
                opened.convert("RGB")
                found = opened.format
    except Image.UnidentifiedImageError:
        return ["is neither a PNG nor a JPEG"]
    except Image.DecompressionBombError as error:
        return [f"decodes to an absurd size ({error})"]
    except UNREADABLE as error:
        return [f"does not decode ({str(error) or type(error).__name__})"]
    return [] if found == IMAGE_FORMATS[suffix] else [f"holds a {found}"]


def _meaning_faults(record: Record) -> Iterator[str]:
    for i, question in enumerate(record.questions):
        yield from _empty(question.question, f"questions[{i}].question")
        if question.answers and not question.given:  # single ones of VQAv2's are blank
            yield f"questions[{i}].answers are all empty"
    named = [question.question_id for question in record.questions if question.question_id is not None]
    for name in sorted({name for name in named if named.count(name) > 1}):
        yield f"question_id {name!r} names {named.count(name)} questions"
    for i, caption in enumerate(record.captions):
        yield from _empty(caption, f"captions[{i}]")
    for i, synthetic in enumerate(record.synthetic_captions):
        yield from _empty(synthetic.text, f"synthetic_captions[{i}].text")
        for name, value in (("score", synthetic.score), ("threshold", synthetic.threshold)):
            if not 0 <= value <= 1:
                yield f"synthetic_captions[{i}].{name} is {value}, want 0 to 1"
        if synthetic.score < synthetic.threshold:
            yield f"synthetic_captions[{i}].score is {synthetic.score}, below its threshold of {synthetic.threshold}"
    for i, turn in enumerate(record.dialogue):
        yield from _turn_faults(turn, f"dialogue[{i}]")


def _turn_faults(turn: DialogueTurn, place: str) -> Iterator[str]:
    yield from _empty(turn.question, f"{place}.question")
    if turn.answer is not None:
        yield from _empty(turn.answer, f"{place}.answer")
    count = len(turn.candidates)
    for i, candidate in enumerate(turn.candidates):
        yield from _empty(candidate, f"{place}.candidates[{i}]")
    if turn.gold is not None and not 0 <= turn.gold < count:
        yield f"{place}.gold is {turn.gold}, there are {count} candidates"
    elif turn.gold is not None and turn.answer is not None and turn.candidates[turn.gold] != turn.answer:
        yield f"{place}.gold names {turn.candidates[turn.gold]!r}, the answer is {turn.answer!r}"
    if turn.relevance and len(turn.relevance) != count:
        yield f"{place}.relevance has {len(turn.relevance)} numbers, there are {count} candidates"
    for i, share in enumerate(turn.relevance):
        if not 0 <= share <= 1:
            yield f"{place}.relevance[{i}] is {share}, want 0 to 1"


def _empty(text: str, place: str) -> Iterator[str]:
    if not text.strip():
        yield f"{place} is empty"
