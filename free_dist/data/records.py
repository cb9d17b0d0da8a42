"""What a shard holds: one image and everything said about it, as JSON beside the encoded image.

Every data set is stored in this one form.  Does not know prompts, tokens or splits.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

ADDED_LATER = ("answer_confidences", "question_type", "answer_type")
"""Fields of a Question that are stored only where they say something, so that older shards keep their bytes."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image and the answers that people gave."""

    question: str
    answers: tuple[str, ...]
    """One or more, in the published order; VQAv2 has ten.  Empty where they are withheld (test splits)."""
    question_id: str | None = None
    """The data set's own."""
    answer_confidences: tuple[str, ...] = ()
    """How sure each person was, in the order of ``answers``: "yes", "maybe" or "no" in VQAv2; empty where nobody was asked."""
    question_type: str | None = None
    """The data set's own, by which accuracies are broken down ("what is this" in VQAv2, "query" in GQA)."""
    answer_type: str | None = None
    """The data set's own ("yes/no", "number" or "other" in VQAv2)."""

    @property
    def given(self) -> tuple[str, ...]:
        """The answers that say something: of VQAv2's ten, single ones are blank."""
        return tuple(answer for answer in self.answers if answer.strip())

    @property
    def answer(self) -> str:
        """The most frequent of those, the first of several such; raises IndexError where there is none."""
        return Counter(self.given).most_common(1)[0][0]


@dataclass(frozen=True, kw_only=True)
class SyntheticCaption:
    """A caption that a model wrote and another one let pass (BLIP's CapFilt, arXiv 2201.12086)."""

    text: str
    model: str
    """What wrote it: a checkpoint's hash or name."""
    score: float
    """Image-text matching probability, 0 to 1."""
    threshold: float
    """Scores below it were thrown away."""


@dataclass(frozen=True, kw_only=True)
class DialogueTurn:
    """A question of a visual dialogue and its answer (VisDial, arXiv 1611.08669)."""

    question: str
    answer: str | None
    """None where it is withheld."""
    candidates: tuple[str, ...] = ()
    """Answers to be ranked, where the data set has them; VisDial has a hundred."""
    gold: int | None = None
    """Place of the true answer among ``candidates``."""
    relevance: tuple[float, ...] = ()
    """Dense annotation: share of people, 0 to 1, who call each candidate right; empty where nobody was asked."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image and everything said about it, as stored in a shard."""

    key: str
    """Unique within the data set; without dots, which tell the members of a sample apart."""
    image: bytes
    """Encoded as published (PNG or JPEG)."""
    image_id: str | None = None
    """The data set's own."""
    coco_id: str | None = None
    """COCO's id of the same picture, where the data set has others; about half of Visual Genome is COCO's."""
    domain: str | None = None
    """Part of the data set that results are told apart by; NoCaps has in-domain, near-domain and out-domain."""
    licence: str | None = None
    """Under which the image was published, as the data set names it (a URL in COCO); None where it does not say."""
    questions: tuple[Question, ...] = ()
    """In the published order."""
    captions: tuple[str, ...] = ()
    """What people wrote."""
    synthetic_captions: tuple[SyntheticCaption, ...] = ()
    dialogue: tuple[DialogueTurn, ...] = ()
    """Turns about the image, in order; a dialogue that opens with a caption has it in ``captions``."""


def record_json(record: Record) -> bytes:
    """Everything but key and image, as UTF-8 JSON; the same record gives the same bytes."""
    content = {
        name: value for name, value in vars(record).items() if name not in ("key", "image") and value not in ((), None)
    }
    return json.dumps(content, ensure_ascii=False, default=_part).encode()


def _part(part: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if name not in ADDED_LATER or value not in ((), None)}


def record_from_json(key: str, image: bytes, content: bytes) -> Record:
    """The inverse of :func:`record_json`; raises ValueError, TypeError or KeyError for what that did not write."""
    fields: dict[str, Any] = json.loads(content)
    return Record(
        key=key,
        image=image,
        image_id=fields.get("image_id"),
        coco_id=fields.get("coco_id"),
        domain=fields.get("domain"),
        licence=fields.get("licence"),
        questions=tuple(_question(item) for item in fields.get("questions", ())),
        captions=tuple(fields.get("captions", ())),
        synthetic_captions=tuple(SyntheticCaption(**item) for item in fields.get("synthetic_captions", ())),
        dialogue=tuple(_turn(item) for item in fields.get("dialogue", ())),
    )


def _question(item: dict[str, Any]) -> Question:
    return Question(
        **item | {"answers": tuple(item["answers"]), "answer_confidences": tuple(item.get("answer_confidences", ()))}
    )


def _turn(item: dict[str, Any]) -> DialogueTurn:
    lists = {name: tuple(item.get(name, ())) for name in ("candidates", "relevance")}
    return DialogueTurn(**item | lists)
