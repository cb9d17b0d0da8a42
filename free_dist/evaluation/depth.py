"""Mid-crisis and overthinking: what per-block readings of the same tokens say about the depth of a model.

*Mid-crisis*: accuracy that falls with depth before it rises again (FREE, arXiv 2506.06884, figure 3).  *Overthinking*: tokens
that a shallower exit got right and the last layer wrong (Kaya et al. 2019, arXiv 1810.07052).  Works on arrays of hits; does not
know models or how a block is read.  Intervals are bootstraps over images, because tokens of one answer, and answers about one
image, are not independent draws; that of a dip allows for the dip's having been looked for.

Shape letters: K blocks read, N tokens, I images, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from free_dist.evaluation.benchmark import RESAMPLES

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Hits(NamedTuple):
    """One way of reading blocks."""

    layers: tuple[int, ...]
    """Blocks read, 1-based, increasing."""
    right: Flags
    """[K, N], the token is the label's."""
    agreeing: Flags
    """[K, N], the token is the full model's."""


@dataclass(frozen=True, kw_only=True)
class DepthReading:
    """All readings of the scored tokens of one task."""

    task: str
    samples: Integers
    """[N], which sample a token belongs to."""
    images: Integers
    """[N], which image that sample is about."""
    full_right: Flags
    """[N], whether the full model's token is the label's."""
    curves: dict[str, Hits]

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.samples)


class Dip(NamedTuple):
    """The largest fall of a curve below what a shallower block had reached."""

    block: int
    """Where it is deepest."""
    depth: float
    """Highest accuracy of a shallower block, less the accuracy there; 0 where accuracy never falls."""
    interval: tuple[float, float]


def largest_fall(accuracy: Floats) -> tuple[NDArray[np.intp], Floats]:
    """Accuracies [..., K] from shallow to deep -> (place of the largest fall below the running maximum, its depth) [...]."""
    falls = np.maximum.accumulate(accuracy, axis=-1) - accuracy
    place = falls.argmax(axis=-1)
    return place, np.take_along_axis(falls, place[..., None], axis=-1)[..., 0]


def resampled(images: Integers, *, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """Bootstrap weights of tokens' images [R, I]: how often each image was drawn."""
    n = int(images.max()) + 1
    generator = np.random.default_rng(seed)
    return generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def resampled_means(hits: Flags, images: Integers, weights: Floats) -> Floats:
    """Hits [K, N] and weights [R, I] -> the mean over tokens in every resample [R, K]."""
    n = weights.shape[1]
    sums = np.stack([np.bincount(images, weights=row.astype(np.float64), minlength=n) for row in np.atleast_2d(hits)])
    counts = np.bincount(images, minlength=n).astype(np.float64)
    drawn = weights @ counts
    # A resample may hold no token at all where few images have any.
    return (weights @ sums.T) / np.maximum(drawn, 1.0)[:, None]


def dip(hits: Hits, images: Integers, weights: Floats, *, level: float = 0.95) -> Dip:
    """Depth and place of a curve's largest fall, with an interval of the depth that allows for its being the largest.

    Block and rival are picked on the data that the interval comes from, so a bootstrap of that pair alone would call the largest
    fall of noise a dip.  The interval is simultaneous over all pairs of blocks: the fall, plus and minus its bootstrap standard
    error times the ``level`` quantile of the largest standardised deviation of any pair in a resample (max-t; Romano and Wolf
    2005).  It covers the true fall of whichever pair is picked, so that it lies above 0 on a curve without a dip in at most a
    share ``1 - level`` of repeats.  Where accuracy never falls it is (0, 0).
    """
    accuracy = hits.right.mean(axis=1)
    place, depth = (int(largest_fall(accuracy)[0]), float(largest_fall(accuracy)[1]))
    if depth == 0:
        return Dip(hits.layers[place], 0.0, (0.0, 0.0))
    top = int(accuracy[: place + 1].argmax())
    shallow, deep = np.triu_indices(len(accuracy), 1)
    means = resampled_means(hits.right, images, weights)
    moved = means[:, shallow] - means[:, deep] - (accuracy[shallow] - accuracy[deep])
    errors = moved.std(axis=0)
    # Blocks that hit the same tokens never differ, in no resample.
    live = errors > 1e-9
    largest = (np.abs(moved[:, live]) / errors[live]).max(axis=1)
    margin = float(np.quantile(largest, level) * errors[(shallow == top) & (deep == place)][0])
    return Dip(hits.layers[place], depth, (depth - margin, depth + margin))


def overthinking(hits: Hits, full_right: Flags, n_blocks: int) -> dict[str, float]:
    """Per block before the last, and for any of them: share of tokens that it gets right and the last layer wrong."""
    early = [i for i, layer in enumerate(hits.layers) if layer < n_blocks]
    wasted = hits.right[early] & ~full_right
    shares = {str(hits.layers[i]): float(row.mean()) for i, row in zip(early, wasted, strict=True)}
    return shares | {"any": float(wasted.any(axis=0).mean()) if early else 0.0}


def depth_summary(reading: DepthReading, n_blocks: int, *, seed: int = 0, level: float = 0.95) -> dict[str, Any]:
    """One task of ``mid_crisis.json``."""
    weights = resampled(reading.images, seed=seed)
    curves: dict[str, Any] = {}
    for name, hits in reading.curves.items():
        means = resampled_means(hits.right, reading.images, weights)
        lows, highs = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
        curves[name] = {
            str(layer): {"accuracy": float(right), "interval": [float(low), float(high)], "agreement": float(agreeing)}
            for layer, right, agreeing, low, high in zip(
                hits.layers, hits.right.mean(axis=1), hits.agreeing.mean(axis=1), lows, highs, strict=True
            )
        }
    dips = {name: dip(hits, reading.images, weights) for name, hits in reading.curves.items()}
    return {
        "tokens": reading.tokens,
        "samples": int(reading.samples.max()) + 1,
        "images": len(np.unique(reading.images)),
        "full_accuracy": float(reading.full_right.mean()),
        "curves": curves,
        "dips": {
            name: {"block": one.block, "depth": one.depth, "interval": list(one.interval)} for name, one in dips.items()
        },
        "overthinking": {
            name: overthinking(hits, reading.full_right, n_blocks) for name, hits in reading.curves.items()
        },
    }


def joined_readings(parts: Sequence[DepthReading]) -> DepthReading:
    """Readings of batches -> one; samples are numbered on, images have one numbering already."""
    first = parts[0]
    offsets = np.cumsum([0, *(int(part.samples.max(initial=-1)) + 1 for part in parts[:-1])])
    curves: Mapping[str, Hits] = {
        name: Hits(
            hits.layers,
            np.concatenate([part.curves[name].right for part in parts], axis=1),
            np.concatenate([part.curves[name].agreeing for part in parts], axis=1),
        )
        for name, hits in first.curves.items()
    }
    return DepthReading(
        task=first.task,
        samples=np.concatenate([part.samples + offset for part, offset in zip(parts, offsets, strict=True)]),
        images=np.concatenate([part.images for part in parts]),
        full_right=np.concatenate([part.full_right for part in parts]),
        curves=dict(curves),
    )
