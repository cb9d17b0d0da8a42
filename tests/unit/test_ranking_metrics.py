"""Ranks, NDCG, MRR and recall against numbers worked out by hand and a second, plain implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from free_dist.evaluation.metrics_ranking import gold_metrics, ndcg, ranking_metrics, ranks_of


def test_the_best_score_has_rank_one_and_equal_ones_keep_their_order() -> None:
    assert ranks_of([-3.0, -1.0, -2.0, -1.0]).tolist() == [4, 1, 3, 2]
    with pytest.raises(ValueError, match="candidate 1 has no score"):
        ranks_of([0.0, float("nan")])


def test_ndcg_by_hand() -> None:
    # Three candidates are relevant, so the three best-ranked count: relevance 0, 1 and 0.5 at ranks 1, 2 and 3.
    relevance = [0.5, 0.0, 1.0, 0.2]
    got = 0.0 / 1 + 1.0 / math.log2(3) + 0.5 / 2
    best = 1.0 / 1 + 0.5 / math.log2(3) + 0.2 / 2
    assert ndcg([3, 1, 2, 4], relevance) == pytest.approx(got / best, rel=1e-12)
    assert ndcg([2, 4, 1, 3], relevance) == pytest.approx(1.0)
    assert ndcg([1, 2], [0.0, 1.0]) == 0.0  # one is relevant, so only the first place counts
    with pytest.raises(ValueError, match="not defined"):
        ndcg([1, 2], [0.0, 0.0])
    with pytest.raises(ValueError, match="2 ranks of 3"):
        ndcg([1, 2], [0.0, 0.0, 1.0])


def plain_ndcg(scores: list[float], relevance: list[float]) -> float:
    """The challenge's definition without arrays."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    ideal = sorted(relevance, reverse=True)
    k = sum(share != 0 for share in relevance)

    def gain(values: list[float]) -> float:
        return math.fsum(value / math.log2(i + 2) for i, value in enumerate(values))

    return gain([relevance[i] for i in order[:k]]) / gain(ideal[:k])


def test_ndcg_of_random_rankings_equals_a_plain_implementation() -> None:
    generator = np.random.default_rng(11)
    for _ in range(50):
        scores = generator.normal(size=100)
        relevance = np.where(generator.random(100) < 0.2, generator.integers(1, 6, 100) / 5, 0.0)
        relevance[0] = 0.4
        found = ndcg(ranks_of(scores), relevance.tolist())
        assert found == pytest.approx(plain_ndcg(scores.tolist(), relevance.tolist()), rel=1e-12)


def test_gold_metrics_by_hand() -> None:
    found = gold_metrics([1, 2, 5, 6, 100])
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 6 + 1 / 100) / 5)
    assert (found["r@1"], found["r@5"], found["r@10"], found["mean_rank"]) == (0.2, 0.6, 0.8, 22.8)
    with pytest.raises(ValueError, match="no ranks"):
        gold_metrics([])


def test_each_metric_counts_the_samples_that_have_what_it_asks_for() -> None:
    ranks = [np.array([1, 2, 3]), np.array([3, 1, 2]), np.array([2, 3, 1])]
    found = ranking_metrics(ranks, [0, None, 2], [(), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)])
    assert (found["n"], found["mrr"], found["n_ndcg"], found["ndcg"]) == (2, 1.0, 1, 1.0)
    nobody = ranking_metrics(ranks, [None] * 3, [()] * 3)
    assert (nobody["n"], nobody["n_ndcg"], nobody["mrr"], nobody["ndcg"]) == (0, 0, None, None)
