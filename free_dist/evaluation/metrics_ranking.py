"""Ranks of candidate answers and what they are worth: VisDial's recall, mean rank, reciprocal rank and NDCG.

Written after the definitions of the Visual Dialog challenge (arXiv 1611.08669; visualdialog.org/challenge).  Works on arrays:
does not know models, texts or files.

Shape letters: C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

RECALLS = (1, 5, 10)
"""k of recall@k."""

SPARSE = ("mrr", *(f"r@{k}" for k in RECALLS), "mean_rank")
"""Metrics that ask for the true answer's rank."""


def ranks_of(scores: Sequence[float] | NDArray[np.floating]) -> NDArray[np.int64]:
    """Scores [C] -> ranks [C], 1 being the best; of equal scores the earlier candidate is better.

    Raises ValueError for a score that is no number.
    """
    array = np.asarray(scores, dtype=np.float64)
    if np.isnan(array).any():
        raise ValueError(f"candidate {int(np.isnan(array).argmax())} has no score (NaN)")
    ranks = np.empty(len(array), dtype=np.int64)
    ranks[np.argsort(-array, kind="stable")] = np.arange(1, len(array) + 1)
    return ranks


def ndcg(ranks: Sequence[int] | NDArray[np.integer], relevance: Sequence[float]) -> float:
    """Normalised discounted cumulative gain, 0..1, of the K best-ranked candidates, K being how many have any relevance.

    ``DCG = sum_i relevance_i / log2(i + 1)`` over ranks i = 1..K, over that of the best order.  Raises ValueError where no
    candidate is relevant, for which it is not defined, or the numbers of ranks and relevances differ.
    """
    wanted = np.asarray(relevance, dtype=np.float64)
    if len(ranks) != len(wanted):
        raise ValueError(f"{len(ranks)} ranks of {len(wanted)} judged candidates")
    k = int((wanted != 0).sum())
    if k == 0:
        raise ValueError("no candidate is relevant: NDCG is not defined")
    discounts = np.log2(np.arange(2, k + 2))
    found = wanted[np.argsort(np.asarray(ranks), kind="stable")][:k]
    best = np.sort(wanted)[::-1][:k]
    return float((found / discounts).sum() / (best / discounts).sum())


def gold_metrics(gold_ranks: Sequence[int]) -> dict[str, float]:
    """Ranks of true answers -> MRR, R@1, R@5, R@10, mean rank; shares in 0..1.  Raises ValueError for none."""
    if not len(gold_ranks):
        raise ValueError("no ranks: want at least one")
    ranks = np.asarray(gold_ranks, dtype=np.float64)
    found = {"mrr": float((1 / ranks).mean())}
    found |= {f"r@{k}": float((ranks <= k).mean()) for k in RECALLS}
    return found | {"mean_rank": float(ranks.mean())}


def ranking_metrics(
    ranks: Sequence[NDArray[np.integer]], gold: Sequence[int | None], relevance: Sequence[Sequence[float]]
) -> dict[str, float | int | None]:
    """All metrics of S samples, each with the ranks of its candidates, the place of the true one, and dense annotations.

    A metric is None where no sample has what it asks for; ``n`` and ``n_ndcg`` count those that have.
    """
    golden = [int(own[place]) for own, place in zip(ranks, gold, strict=True) if place is not None]
    judged = [(own, wanted) for own, wanted in zip(ranks, relevance, strict=True) if any(wanted)]
    found: Mapping[str, float | None] = gold_metrics(golden) if golden else dict.fromkeys(SPARSE)
    dense = float(np.mean([ndcg(own, wanted) for own, wanted in judged])) if judged else None
    return {"ndcg": dense, **found, "n": len(golden), "n_ndcg": len(judged)}
