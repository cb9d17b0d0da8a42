"""Robustness: the same answers asked again of noisy and of blurred pictures, and whether exits make answers shorter.

A corruption changes the decoded picture, before the backbone's image processor, and stores it as PNG, which loses
nothing; what follows sees an ordinary sample and is the path of the evaluation itself.  Noise is drawn from a seed and
the sample's key alone: the same for every level (times its size), every decoder, any order.  Level 0 leaves the
sample's own bytes, so its numbers are those of the evaluation.

Does not know confidences, how thresholds are chosen, or tables.

Shape letters: N samples, A arms.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from free_dist.atomic import write_atomically
from free_dist.backbones import Backbone
from free_dist.config import Recipe, UserError
from free_dist.data.images import decode_image
from free_dist.data.samples import Sample, SampleEncoder, image_numbers
from free_dist.data.stream import required_samples
from free_dist.evaluation.benchmark import Answer, Arm, exits_arm, full_arm, ratio_with_interval
from free_dist.evaluation.evaluate import SampleResult, answer_samples, task_rows
from free_dist.evaluation.tasks import TaskScorer
from free_dist.exits import ExitBank

KINDS = ("noise", "blur")
"""``noise``: Gaussian, added to every channel of every pixel; ``blur``: Gaussian, by Pillow's ``GaussianBlur``."""
NOISE_LEVELS = (0.05, 0.1, 0.2)
"""Standard deviations, of a full range of 1."""
BLUR_LEVELS = (0.01, 0.02, 0.04)
"""Standard deviations, of a shorter side of 1."""

ROBUSTNESS = "robustness.json"


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """One way of spoiling a picture, at one level."""

    kind: str
    """One of ``KINDS``."""
    level: float
    """Standard deviation: of the noise, where black is 0 and white 1; of the blur, where the shorter side is 1.  0:
    nothing."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"corruption {self.kind!r}: want one of {', '.join(KINDS)}")
        if not 0 <= self.level <= 1:
            raise UserError(f"{self.kind} of {self.level}: want a level from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class TaskAnswers:
    """Every decoder's answers to the uncorrupted samples of one task."""

    task: str
    samples: tuple[Sample, ...]
    """N of them."""
    arms: tuple[Arm, ...]
    """A decoders, the full-depth one first."""
    results: tuple[SampleResult, ...]
    """N of them, each with A answers."""

    def answers(self, arm: int) -> list[Answer]:
        """The N answers of one decoder."""
        found = [result.answers[arm] for result in self.results]
        return [answer for answer in found if answer is not None]


def corrupted(sample: Sample, corruption: Corruption, *, seed: int = 0) -> Sample:
    """The sample with its picture spoilt; itself at level 0.  Raises BadSample for a picture that does not decode."""
    if corruption.level == 0:
        return sample
    picture = decode_image(sample.image)
    if corruption.kind == "noise":
        picture = _noisy(picture, corruption.level, f"{seed}/{sample.key}")
    else:
        picture = picture.filter(ImageFilter.GaussianBlur(corruption.level * min(picture.size)))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return replace(sample, image=buffer.getvalue())


def _noisy(picture: Image.Image, level: float, seed: str) -> Image.Image:
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]))
    pixels = np.asarray(picture, dtype=np.float64)
    spoilt = pixels + 255 * level * generator.standard_normal(pixels.shape)
    return Image.fromarray(np.rint(spoilt.clip(0, 255)).astype(np.uint8))


def measure_corruptions(
    backbone: Backbone,
    encoder: SampleEncoder,
    banks: Mapping[str, ExitBank],
    recipe: Recipe,
    *,
    corruptions: Sequence[Corruption],
    thresholds: Sequence[float],
    seed: int = 0,
    quiet: bool = False,
) -> tuple[list[dict[str, Any]], list[TaskAnswers]]:
    """(rows of ``corruptions`` in robustness.json, the clean answers per task), for the recipe's split, tasks and
    samples.

    Every decoder (full depth, and each bank at each threshold) answers each sample under the paired clock, per
    corruption;  ``speed`` is against our own full depth on the same spoilt pictures, ``quality_full`` that decoder's
    quality on them.  Every kind of corruption starts at level 0, which is decoded once.  Raises ConfigError for a task
    without samples."""
    rows: list[dict[str, Any]] = []
    clean = []
    limit = recipe.decoding.max_new_tokens
    arms = [full_arm(backbone, max_new_tokens=limit)]
    arms += [
        exits_arm(backbone, bank, threshold=threshold, max_new_tokens=limit, method=method)
        for method, bank in banks.items()
        for threshold in thresholds
    ]
    settings = recipe.evaluation
    for task in settings.tasks:
        samples = required_samples(recipe.data, settings.split, task, max_samples=settings.max_samples)
        scorer = TaskScorer(task, settings, only_quality=True)
        untouched = answer_all(backbone, encoder, arms, samples, what=f"{task}, clean", quiet=quiet)
        clean.append(TaskAnswers(task=task, samples=tuple(samples), arms=tuple(arms), results=tuple(untouched)))
        kinds = dict.fromkeys(corruption.kind for corruption in corruptions)
        for kind in kinds:
            rows += _rows(scorer, Corruption(kind=kind, level=0.0), arms, untouched, samples, backbone.n_blocks)
            for corruption in corruptions:
                if corruption.kind == kind and corruption.level > 0:
                    spoilt = [corrupted(sample, corruption, seed=seed) for sample in samples]
                    what = f"{task}, {kind} {corruption.level:g}"
                    results = answer_all(backbone, encoder, arms, spoilt, what=what, quiet=quiet)
                    rows += _rows(scorer, corruption, arms, results, samples, backbone.n_blocks)
    return rows, clean


def answer_all(
    backbone: Backbone,
    encoder: SampleEncoder,
    arms: Sequence[Arm],
    samples: Sequence[Sample],
    *,
    what: str,
    quiet: bool = False,
) -> list[SampleResult]:
    """Every sample answered by every arm, in one process."""
    running = answer_samples(backbone, encoder, arms, samples, rank=0, world_size=1)
    return list(tqdm(running, total=len(samples), desc=what, unit="sample", disable=quiet, mininterval=1.0))


def _rows(
    scorer: TaskScorer,
    corruption: Corruption,
    arms: Sequence[Arm],
    results: Sequence[SampleResult],
    samples: Sequence[Sample],
    n_blocks: int,
) -> Iterable[dict[str, Any]]:
    for row in task_rows(scorer.task.name, arms, results, n_blocks=n_blocks, samples=samples, scorer=scorer):
        yield {
            "task": scorer.task.name,
            "kind": corruption.kind,
            "level": corruption.level,
            "method": row.method,
            "threshold": row.threshold,
            "quality_name": row.extras["quality_name"],
            "quality": row.quality,
            "quality_interval": row.extras["quality_interval"],
            "quality_full": row.quality_full,
            "agreement": row.agreement,
            "speed": row.wall_ratio,
            "speed_interval": row.extras["wall_ratio_interval"],
            "mean_blocks": row.mean_blocks,
            "n": row.n,
        } | {name: value for name, value in row.extras.items() if name == "tokenizer"}


def length_rows(clean: Sequence[TaskAnswers], *, eos_token_id: int) -> list[dict[str, Any]]:
    """Rows of ``length`` in robustness.json: generated tokens against full depth, the closing token counted.

    ``eos_by_exit``: of the closing tokens, the share that left after each block;  ``eos_rate_by_exit``: of the tokens
    that left after a block, the share that closed an answer.  An exit that ends texts early has a rate above that of
    full depth and a ``ratio`` below 1."""
    rows = []
    for task in clean:
        full, images = task.answers(0), image_numbers(task.samples)
        for i, arm in enumerate(task.arms):
            own = task.answers(i)
            lengths, lengths_full = [[float(len(a.tokens)) for a in answers] for answers in (own, full)]
            ratio, interval = ratio_with_interval(lengths, lengths_full, images)
            left = [
                (layer, token == eos_token_id)
                for a in own
                for layer, token in zip(a.exits, a.tokens, strict=True)
            ]  # fmt: skip
            layers = sorted({layer for layer, _ in left})
            ends = [layer for layer, closes in left if closes]
            rows.append(
                {
                    "task": task.task,
                    "method": arm.method,
                    "threshold": arm.threshold,
                    "mean_tokens": sum(lengths) / len(lengths),
                    "mean_tokens_full": sum(lengths_full) / len(lengths_full),
                    "ratio": ratio,
                    "ratio_interval": interval,
                    "shorter": float(np.mean(np.array(lengths) < np.array(lengths_full))),
                    "longer": float(np.mean(np.array(lengths) > np.array(lengths_full))),
                    "eos_by_exit": {str(k): ends.count(k) / len(ends) for k in layers} if ends else {},
                    "eos_rate_by_exit": {
                        str(k): float(np.mean([closes for layer, closes in left if layer == k])) for k in layers
                    },
                    "n": len(own),
                }
            )
    return rows


def write_robustness(run_dir: Path, content: Mapping[str, Any]) -> Path:
    """Write ``robustness.json`` into the run directory, whole or not at all."""
    path = run_dir / ROBUSTNESS
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return path
