"""The COCO caption suite: BLEU-1 to 4, METEOR, ROUGE-L, CIDEr-D and SPICE, all by pycocoevalcap's scorers.

What cannot run here is left out with its reason, and never takes the others with it.  The tokenisation is part of the
result: ``ptb`` is the Java tokenizer that the COCO caption evaluation uses, ``ptb-like`` our stand-in for machines without
Java.  Works on strings: does not know models, tasks or data sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from free_dist.config import CAPTION_METRICS, EvaluationConfig, UserError
from free_dist.evaluation.metrics import bleu, cider_d, ptb_like, rouge_l, tokenized
from free_dist.evaluation.metrics_java import Meteor, TokenTable, Unavailable, find_java, ptb_tokens, spice

Scorer = Callable[[TokenTable, TokenTable], tuple[float, list[float]]]
"""(references, captions), tokenised -> (corpus score, score of each)."""


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """What a list of captions is worth."""

    corpus: dict[str, float]
    """Metric -> corpus score; BLEU, METEOR, ROUGE-L and SPICE in 0..1, CIDEr-D in 0..10 (1.0 being "100")."""
    cider_d: tuple[float, ...]
    """CIDEr-D of each caption; their mean is the corpus score."""
    tokenizer: str
    """``ptb`` or ``ptb-like``."""
    unavailable: dict[str, str]
    """Metric that was asked for and could not run -> why."""


class CaptionSuite:
    """Chosen metrics and a tokenizer; remembers what it has tokenised, for references come again with every decoder."""

    def __init__(self, metrics: Sequence[str] = ("BLEU",), *, tokenizer: str = "ptb-like") -> None:
        """``metrics``: of ``CAPTION_METRICS``; CIDEr-D is always there.  ``tokenizer``: of ``CAPTION_TOKENIZERS``.

        Raises UserError where ``ptb`` is asked for and cannot run.
        """
        self.metrics = tuple(name for name in CAPTION_METRICS if name in metrics)
        self.tokenizer = "ptb-like"
        self._known: dict[str, str] = {}
        self._java_scorers: dict[str, Scorer] = {"METEOR": Meteor().score, "SPICE": spice}
        if tokenizer == "ptb" or (tokenizer == "auto" and find_java() is not None):
            try:
                ptb_tokens(["a"])
                self.tokenizer = "ptb"
            except Unavailable as error:
                if tokenizer == "ptb":
                    raise UserError(f"evaluation.caption_tokenizer=ptb: {error}; or use ptb-like") from error

    @classmethod
    def of(cls, settings: EvaluationConfig) -> CaptionSuite:
        """The one that a recipe asks for; raises what the constructor raises."""
        return cls(settings.caption_metrics, tokenizer=settings.caption_tokenizer)

    def tokenize(self, captions: Sequence[str]) -> list[str]:
        """Captions -> their tokens, space-joined."""
        new = list(dict.fromkeys(caption for caption in captions if caption not in self._known))
        if new:
            tokens = ptb_tokens(new) if self.tokenizer == "ptb" else ptb_like(new)
            self._known |= zip(new, tokens, strict=True)
        return [self._known[caption] for caption in captions]

    def score(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
        """Scores of one caption per image against all of its references.

        Raises ValueError for captions without references, and MissingPackageError without pycocoevalcap.
        """
        each = tuple(cider_d(captions, references, tokenize=self.tokenize))
        corpus: dict[str, float] = {}
        unavailable: dict[str, str] = {}
        if "BLEU" in self.metrics:
            values = bleu(captions, references, tokenize=self.tokenize)
            corpus |= {f"BLEU-{n}": value for n, value in enumerate(values, start=1)}
        if "ROUGE-L" in self.metrics:
            values = rouge_l(captions, references, tokenize=self.tokenize)
            corpus["ROUGE-L"] = sum(values) / len(values)
        tables = tokenized(captions, references, self.tokenize)
        for name, scorer in self._java_scorers.items():
            if name in self.metrics:
                try:
                    corpus[name] = scorer(*tables)[0]
                except Unavailable as error:
                    unavailable[name] = str(error)
        corpus["CIDEr-D"] = sum(each) / len(each)
        return CaptionScores(corpus=corpus, cider_d=each, tokenizer=self.tokenizer, unavailable=unavailable)
