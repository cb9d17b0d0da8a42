"""Tasks: what a sample's prompt leads to, what the answer is compared with, and which number is its quality.

Prompts come from the sample's own turns (for dialogue: the true history, then the last question).  Does not know
models, decoding or thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from free_dist.config import ConfigError
from free_dist.evaluation.metrics import bleu, cider_d, vqa_accuracy


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a list of answers is."""

    per_sample: tuple[float, ...]
    """One score per answer; their mean is the quality."""
    extras: dict[str, float]
    """Further corpus scores, by the name they carry in a results row."""

    @property
    def quality(self) -> float:
        """The task's headline number."""
        return sum(self.per_sample) / len(self.per_sample)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One evaluation task."""

    name: str
    quality_name: str
    """What ``quality`` means, for tables and axis labels."""
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], Score]
    """(answers, references of each) -> Score; needs the whole evaluation at once, never one rank's share."""


def score_answers(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """VQA soft accuracy; exact match after normalisation where there is one reference."""
    pairs = zip(answers, references, strict=True)
    return Score(
        per_sample=tuple(vqa_accuracy(answer, wanted, normalise="always") for answer, wanted in pairs), extras={}
    )


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """CIDEr-D as the quality, BLEU-4 beside it."""
    return Score(per_sample=tuple(cider_d(captions, references)), extras={"bleu4": bleu(captions, references)[3]})


TASKS = {
    task.name: task
    for task in (
        Task(name="vqa", quality_name="VQA accuracy", score=score_answers),
        Task(name="caption", quality_name="CIDEr-D", score=score_captions),
        Task(name="dialogue", quality_name="last-answer accuracy", score=score_answers),
    )
}
"""Known tasks by name."""


def find_task(name: str) -> Task:
    """The task called ``name``; raises ConfigError naming the known ones."""
    if name not in TASKS:
        raise ConfigError(f"evaluation.tasks: unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]
