"""A baseline without a language model: the nearest training image answers the question that was asked of it.

Distance is the cosine between mean feature vectors of the frozen vision network.  What it reaches needs no understanding of
a question beyond its words; a vision-language model should be above it.  Does not know tokens or blocks.

Shape letters: I training images, J asked images, W channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from free_dist.data.samples import Record
from free_dist.evaluation.metrics import vqa_accuracy


@dataclass(frozen=True, kw_only=True)
class BaselineScores:
    """VQA accuracy of answers that never looked through a language model, on the same questions."""

    always_yes: float
    question_only: float
    """The most frequent training answer to the same question."""
    nearest_image: float
    """The answer given of the nearest training image that was asked the same question."""
    questions: int


def answer_baselines(
    training: Sequence[Record], vectors: Tensor, asked: Sequence[Record], asked_vectors: Tensor
) -> BaselineScores:
    """Training records with their mean features [I, W], and asked ones [J, W] -> scores over all questions of these.

    A question that no training image was asked gets the most frequent training answer.
    """
    answers: dict[str, Counter[str]] = {}
    by_image: dict[str, list[tuple[int, str]]] = {}
    for index, record in enumerate(training):
        for question, answer in record.questions:
            answers.setdefault(question, Counter())[answer] += 1
            by_image.setdefault(question, []).append((index, answer))
    overall = sum(answers.values(), Counter()).most_common(1)[0][0]
    likeness = F.normalize(asked_vectors, dim=-1) @ F.normalize(vectors, dim=-1).T  # [J, I]
    totals = torch.zeros(4, dtype=torch.float64)
    for row, record in zip(likeness, asked, strict=True):
        for question, wanted in record.questions:
            known = by_image.get(question, [])
            frequent = answers[question].most_common(1)[0][0] if known else overall
            nearest = max(known, key=lambda pair: row[pair[0]].item())[1] if known else overall
            given = ("yes", frequent, nearest)
            totals += torch.tensor([*(vqa_accuracy(text, [wanted], normalise="always") for text in given), 1.0])
    yes, frequent_score, nearest_score, count = totals.tolist()
    return BaselineScores(
        always_yes=yes / count,
        question_only=frequent_score / count,
        nearest_image=nearest_score / count,
        questions=int(count),
    )


def mean_features(maps: Tensor) -> Tensor:
    """Feature maps [I, W, h, w] -> [I, W]."""
    return maps.mean((-2, -1))
