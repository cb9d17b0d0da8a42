"""What a data set says about a sample besides prompt and answer: ids, kinds of questions, candidates to be ranked.

Metrics are broken down by it and submissions name it; no model sees it.  Does not know prompts, tokens or metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

from free_dist.data.records import Question, Record


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a sample comes from, in the data set's own terms."""

    image_id: str | None = None
    """The data set's own, as ``question_id``."""
    question_id: str | None = None
    round_id: int | None = None
    """Turn of a dialogue, from 1, as VisDial counts."""
    domain: str | None = None
    question_type: str | None = None
    answer_type: str | None = None
    candidates: tuple[str, ...] = ()
    """Answers to be ranked; VisDial has a hundred."""
    gold: int | None = None
    """Place of the true answer among ``candidates``; None where it is withheld."""
    relevance: tuple[float, ...] = ()
    """Dense annotation of each candidate, 0 to 1; empty where nobody was asked."""


def question_origin(record: Record, question: Question) -> Origin:
    """The origin of a question about a record's image."""
    return Origin(
        image_id=record.image_id,
        question_id=question.question_id,
        domain=record.domain,
        question_type=question.question_type,
        answer_type=question.answer_type,
    )


def turn_origin(record: Record, place: int) -> Origin:
    """The origin of turn ``place``, from 0, of a record's dialogue."""
    turn = record.dialogue[place]
    return Origin(
        image_id=record.image_id,
        round_id=place + 1,
        domain=record.domain,
        candidates=turn.candidates,
        gold=turn.gold,
        relevance=turn.relevance,
    )
