"""Tasks: what a sample's prompt leads to, what the answer is compared with, and which number is its quality.

Prompts come from the sample's own turns (for dialogue: the true history, then the last question).  Does not know
models, decoding or thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from free_dist.config import ConfigError, EvaluationConfig
from free_dist.data.origin import Origin
from free_dist.evaluation.metrics import vqa_accuracy
from free_dist.evaluation.metrics_captions import CaptionSuite

References = Sequence[Sequence[str]]
"""The acceptable texts of every answer."""

FACETS = ("domain", "question_type", "answer_type")
"""Fields of an Origin by which results are told apart."""

GQA_STRUCTURES = frozenset({"verify", "query", "choose", "logical", "compare"})
"""GQA's structural types; "query" questions are its open ones, all others its binary ones."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a list of answers is."""

    per_sample: tuple[float, ...]
    """One score per answer; their mean is the quality.  Empty where answers are withheld."""
    extras: dict[str, Any]
    """Further corpus scores, by the name they carry in a results row."""

    @property
    def quality(self) -> float:
        """The task's headline number; nan without scores."""
        return sum(self.per_sample) / len(self.per_sample) if self.per_sample else float("nan")

    @property
    def tokenizer(self) -> dict[str, Any]:
        """``tokenizer``, for a row with this quality; nothing where a quality depends on none."""
        return {name: value for name, value in self.extras.items() if name == "tokenizer"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One evaluation task."""

    name: str
    quality_name: str
    """What ``quality`` means, for tables and axis labels."""
    score: Callable[[Sequence[str], References], Score]
    """(answers, references of each) -> Score; needs the whole evaluation at once, never one rank's share."""


def score_answers(answers: Sequence[str], references: References) -> Score:
    """VQA soft accuracy by the official rules: normalised where people disagree, exact where they do not or there is one.

    Beside it, ``metrics`` has the accuracy with both sides normalised every time.
    """
    pairs = list(zip(answers, references, strict=True))
    official = tuple(vqa_accuracy(answer, wanted) for answer, wanted in pairs)
    lenient = [vqa_accuracy(answer, wanted, normalise="always") for answer, wanted in pairs]
    metrics = {"accuracy": sum(official) / len(pairs), "accuracy, always normalised": sum(lenient) / len(pairs)}
    return Score(per_sample=official, extras={"metrics": metrics})


def score_last_answers(answers: Sequence[str], references: References) -> Score:
    """Share of answers that equal the recorded one, both normalised as VQA's are."""
    pairs = zip(answers, references, strict=True)
    return Score(
        per_sample=tuple(vqa_accuracy(answer, wanted, normalise="always") for answer, wanted in pairs), extras={}
    )


def score_captions(captions: Sequence[str], references: References, suite: CaptionSuite | None = None) -> Score:
    """CIDEr-D as the quality; the suite's other metrics in ``metrics``, BLEU-4 also as ``bleu4``."""
    scores = (suite or CaptionSuite()).score(captions, references)
    extras: dict[str, Any] = {"metrics": scores.corpus, "tokenizer": scores.tokenizer}
    if "BLEU-4" in scores.corpus:
        extras["bleu4"] = scores.corpus["BLEU-4"]
    if scores.unavailable:
        extras["unavailable"] = scores.unavailable
    return Score(per_sample=scores.cider_d, extras=extras)


TASKS = {
    task.name: task
    for task in (
        Task(name="vqa", quality_name="VQA accuracy", score=score_answers),
        Task(name="caption", quality_name="CIDEr-D", score=score_captions),
        Task(name="dialogue", quality_name="last-answer accuracy", score=score_last_answers),
    )
}
"""Known tasks by name."""


def find_task(name: str) -> Task:
    """The task called ``name``; raises ConfigError naming the known ones."""
    if name not in TASKS:
        raise ConfigError(f"evaluation.tasks: unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


class TaskScorer:
    """Scores the answers of one task as a recipe asks, whole and by part; a list that was scored before is remembered."""

    def __init__(self, task: str, settings: EvaluationConfig | None = None, *, only_quality: bool = False) -> None:
        """``only_quality``: the same quality, without the further metrics that a recipe asks for.

        Raises ConfigError for an unknown task, and UserError or MissingPackageError where its metrics cannot run.
        """
        self.task, self.only_quality = find_task(task), only_quality
        self._score: Callable[[Sequence[str], References], Score] = self.task.score
        if task == "caption" and settings is not None:
            suite = CaptionSuite.of(replace(settings, caption_metrics=[]) if only_quality else settings)
            self._score = lambda captions, references: score_captions(captions, references, suite)
        self.task.score(["a"], [["a"]])  # a missing metrics package is told now, not after minutes of decoding
        self._known: dict[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]], Score] = {}

    def score(self, answers: Sequence[str], references: References) -> Score:
        """All answers together; without any score where they have no references."""
        if not any(references):
            return Score(per_sample=(), extras={})
        key = tuple(answers), tuple(map(tuple, references))
        if key not in self._known:
            self._known[key] = self._score(answers, references)
        return self._known[key]

    def breakdown(
        self, answers: Sequence[str], references: References, origins: Sequence[Origin]
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Facet -> value -> ``quality``, ``n`` and ``metrics`` of the answers with that value.

        Facets that no answer has a value of are left out.  CIDEr-D of a part has the part's own
        document frequencies, as NoCaps' domains are scored.
        """
        values = {facet: [getattr(origin, facet) for origin in origins] for facet in FACETS}
        kinds = values["question_type"]
        if kinds and set(kinds) <= GQA_STRUCTURES:
            values["openness"] = ["open" if kind == "query" else "binary" for kind in kinds]
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for facet, column in values.items():
            for value in sorted({value for value in column if value is not None}):
                part = [i for i, own in enumerate(column) if own == value]
                score = self.score([answers[i] for i in part], [references[i] for i in part])
                entry = {"quality": score.quality, "n": len(part), "metrics": score.extras.get("metrics", {})}
                found.setdefault(facet, {})[value] = entry
        return found
