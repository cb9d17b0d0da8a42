"""What exits' confidences are worth: calibration error, and whether a threshold chosen on one split or task holds on
another.

Opinions are recorded under teacher forcing: every exit, and the full model behind them, reads every answer token (the
closing one too, which exits decide about like any other).  The unit of intervals and of the choice of thresholds is an
image, as in ``free_dist.evaluation.calibration``; statistics of the choice are ``free_dist.decoding.calibrate``'s.

Does not know corruptions, files or tables.

Shape letters: N tokens, I images, K exits, C candidate thresholds, M bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from free_dist.backbones import Backbone
from free_dist.config import Recipe
from free_dist.data.samples import IGNORE, SampleEncoder, image_numbers
from free_dist.data.stream import required_samples
from free_dist.decoding.calibrate import calibrate
from free_dist.decoding.policy import MaxProbPolicy
from free_dist.evaluation.benchmark import exits_arm, full_arm, mean_with_interval
from free_dist.evaluation.calibration import GRID, OFF, CalibrationSet, harm
from free_dist.evaluation.robustness import TaskAnswers, answer_all
from free_dist.evaluation.tasks import TaskScorer
from free_dist.exits import ExitBank

Floats = NDArray[np.float64]
BINS = 10
RESAMPLES = 500
"""Bootstrap resamples behind an interval of a calibration error."""

CANDIDATE_STEP = 3
"""Of the thresholds that launch/calibrate.py tries, every third is tried for whole answers, each of which must be decoded."""


@dataclass(frozen=True, kw_only=True)
class Opinions:
    """What every exit and the full model said about the answer tokens of one task."""

    task: str
    split: str
    layers: tuple[int, ...]
    """The K exits' blocks, then L for the full model."""
    images: NDArray[np.int64]
    """[N], token -> number of its image."""
    confidences: Floats
    """[N, K + 1], largest softmax probability."""
    right: NDArray[np.bool_]
    """[N, K + 1], whether the token is the label."""
    agreeing: NDArray[np.bool_]
    """[N, K + 1], whether the token is the full model's."""


class Bin(NamedTuple):
    """Tokens of like confidence."""

    low: float
    high: float
    """Smallest and largest confidence."""
    n: int
    confidence: float
    accuracy: float
    """Means."""


@torch.inference_mode()
def record_opinions(
    backbone: Backbone,
    encoder: SampleEncoder,
    bank: ExitBank,
    recipe: Recipe,
    task: str,
    *,
    split: str,
    max_samples: int,
    batch_size: int = 32,
) -> Opinions:
    """Ask every exit about every answer token of at most ``max_samples`` samples; raises ConfigError where there are
    none."""
    samples = required_samples(recipe.data, split, task, max_samples=max_samples)
    numbers = image_numbers(samples)
    device = next(backbone.parameters()).device
    parts: list[tuple[NDArray[np.int64], Floats, NDArray[np.bool_], NDArray[np.bool_]]] = []
    for first in range(0, len(samples), batch_size):
        chunk = samples[first : first + batch_size]
        batch = encoder.collate(chunk).to(device)
        features = backbone(**batch.inputs(), exit_layers=bank.exit_layers)
        kept = batch.targets != IGNORE
        targets = batch.targets[kept]
        exits = bank(features.exits, kept, memory=features.memory, span=features.span)
        said = [MaxProbPolicy.measure(bank.logits_of(i, one).float()) for i, one in enumerate(exits)]
        said.append(MaxProbPolicy.measure(backbone.lm_head(features.final[kept]).float()))
        tokens = torch.stack([columns for columns, _ in said], dim=1)
        rows = kept.nonzero()[:, 0].tolist()
        parts.append(
            (
                np.array([numbers[first + row] for row in rows], dtype=np.int64),
                np.array([confidences for _, confidences in said], dtype=np.float64).T,
                (tokens == targets[:, None]).cpu().numpy(),
                (tokens == tokens[:, -1:]).cpu().numpy(),
            )
        )
    images, confidences, right, agreeing = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Opinions(
        task=task,
        split=split,
        layers=(*bank.exit_layers, backbone.n_blocks),
        images=images,
        confidences=confidences,
        right=right,
        agreeing=agreeing,
    )


def calibration_error(
    confidences: Sequence[float] | Floats, correct: Sequence[bool] | NDArray[np.bool_], *, bins: int = BINS
) -> tuple[float, list[Bin]]:
    """Expected calibration error with bins of equal mass, and the bins (Naeini et al. 2015; equal mass: Nguyen and
    O'Connor 2015).

    ``sum_m n_m / N |accuracy_m - confidence_m|`` over at most ``bins`` bins of N / M tokens each, by confidence.  Equal
    confidences share a bin, so the order of tokens does not matter; a bin may be larger for that, and there may be
    fewer.  float64.  Raises ValueError without tokens."""
    certainty, hits = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if certainty.ndim != 1 or certainty.shape != hits.shape or not len(certainty):
        raise ValueError(f"{certainty.shape} confidences against {hits.shape}: want equal, one-dimensional and above 0")
    order = np.argsort(certainty, kind="stable")
    certainty, hits = certainty[order], hits[order]
    starts = _bin_starts(certainty, bins)
    counts = np.diff(np.append(starts, len(certainty)))
    sure, right = np.add.reduceat(certainty, starts), np.add.reduceat(hits, starts)
    found = [
        Bin(
            low=float(certainty[start]),
            high=float(certainty[start + n - 1]),
            n=int(n),
            confidence=float(s / n),
            accuracy=float(r / n),
        )
        for start, n, s, r in zip(starts, counts, sure, right, strict=True)
    ]
    return float(np.abs(sure - right).sum() / len(certainty)), found


def _bin_starts(ordered: Floats, bins: int) -> NDArray[np.int64]:
    """First places of the bins of sorted confidences; a cut inside a run of equals moves behind it."""
    n = len(ordered)
    cuts = np.arange(1, bins) * n // bins
    cuts = cuts[cuts > 0]
    cuts = np.searchsorted(ordered, ordered[cuts - 1], side="right")
    return np.unique(np.concatenate([[0], cuts[cuts < n]])).astype(np.int64)


def calibration_interval(
    confidences: Floats, correct: NDArray[np.bool_], images: NDArray[np.int64], *, bins: int = BINS, seed: int = 0
) -> tuple[float, float]:
    """A 95% bootstrap interval of :func:`calibration_error` over images, bins drawn anew for each resample.

    The estimate is biased upward and resampling adds the same bias again, so the percentiles are corrected for it
    (Efron 1981, the bias-corrected percentile method); the interval is widened to the estimate where all resamples lie
    above it."""
    estimate, _ = calibration_error(confidences, correct, bins=bins)
    groups = [np.flatnonzero(images == image) for image in np.unique(images)]
    generator = np.random.default_rng(seed)
    found = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        rows = np.concatenate([groups[g] for g in generator.integers(0, len(groups), len(groups))])
        found[i] = calibration_error(confidences[rows], correct[rows], bins=bins)[0]
    normal = NormalDist()
    below = (np.sum(found < estimate) + np.sum(found == estimate) / 2 + 0.5) / (RESAMPLES + 1)
    shift = 2 * normal.inv_cdf(float(np.clip(below, 1e-4, 1 - 1e-4)))
    low, high = np.quantile(found, [normal.cdf(shift + normal.inv_cdf(level)) for level in (0.025, 0.975)])
    return min(float(low), estimate), max(float(high), estimate)


def calibration_rows(opinions: Opinions, method: str) -> list[dict[str, Any]]:
    """Rows of ``ece`` in robustness.json: every exit against labels and against the full model, the full model against
    labels."""
    rows = []
    for i, layer in enumerate(opinions.layers):
        for target, correct in (("labels", opinions.right), ("full model", opinions.agreeing)):
            if target == "full model" and i == len(opinions.layers) - 1:
                continue  # it always agrees with itself
            error, bins = calibration_error(opinions.confidences[:, i], correct[:, i])
            interval = calibration_interval(opinions.confidences[:, i], correct[:, i], opinions.images)
            rows.append(
                {
                    "task": opinions.task,
                    "method": method,
                    "exit": layer,
                    "target": target,
                    "ece": error,
                    "interval": interval,
                    "bins": [one._asdict() for one in bins],
                    "n": len(opinions.images),
                }
            )
    return rows


def transfer_rows(
    chosen_on: Sequence[Opinions], held_on: Sequence[Opinions], method: str, *, epsilon: float, delta: float
) -> list[dict[str, Any]]:
    """Rows of ``transfer``, one exit at a time: its threshold from each set of ``chosen_on``, judged on each of
    ``held_on``.

    The loss of an image is the share of its answer tokens that the exit would emit and the full model would not; a
    threshold is the fastest that Learn-then-Test certifies for ``epsilon`` with probability 1 - ``delta`` (``OFF`` if
    none is).  ``emitted``: share of tokens that the exit would emit."""
    rows = []
    for source in chosen_on:
        for i, layer in enumerate(source.layers[:-1]):
            losses, emitted = _exit_losses(source, i, GRID)
            decision = calibrate(losses, 1 - emitted, 1.0, method="ltt", epsilon=epsilon, delta=delta)
            threshold = OFF if decision.chosen is None else GRID[decision.chosen]
            for target in held_on:
                held, share = _exit_losses(target, i, [threshold])
                got, interval = mean_with_interval(held[:, 0].tolist())
                rows.append(
                    {
                        "task": target.task,
                        "method": method,
                        "exit": layer,
                        "from": f"{source.task}/{source.split}",
                        "to": f"{target.task}/{target.split}",
                        "loss": "tokens emitted that are not the full model's",
                        "threshold": threshold,
                        "wanted": epsilon,
                        "got": got,
                        "interval": interval,
                        "emitted": float(share[0]),
                        "n": len(held),
                    }
                )
    return rows


def _exit_losses(opinions: Opinions, exit_index: int, thresholds: Sequence[float]) -> tuple[Floats, Floats]:
    """(losses [I, C], share of tokens emitted [C], images counting alike)."""
    fires = opinions.confidences[:, exit_index, None] > np.asarray(thresholds)
    wrong = fires & ~opinions.agreeing[:, exit_index, None]
    units = [opinions.images == image for image in np.unique(opinions.images)]
    losses = np.stack([wrong[unit].mean(axis=0) for unit in units])
    return losses, np.mean([fires[unit].mean(axis=0) for unit in units], axis=0)


def answer_transfer_rows(
    backbone: Backbone,
    encoder: SampleEncoder,
    bank: ExitBank,
    recipe: Recipe,
    clean: Sequence[TaskAnswers],
    method: str,
    *,
    calibration_samples: int,
    epsilon: float,
    delta: float,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Rows of ``transfer`` for whole answers: one threshold for all exits (``exit`` is ``all``), really decoded.

    Chosen by Learn-then-Test on the calibration split's mean harm per image (see ``free_dist.evaluation.calibration``),
    judged by the harm on the samples of ``clean``."""
    limited = replace(
        recipe, evaluation=replace(recipe.evaluation, split="calibration", max_samples=calibration_samples)
    )
    thresholds: dict[str, float] = {}
    for task in clean:
        known = CalibrationSet(backbone, encoder, bank, limited, task.task, quiet=quiet)
        table = known.tabulate(known.shared_candidates()[::CANDIDATE_STEP])
        decision = calibrate(
            table.losses, table.costs, table.full_cost, method="ltt", epsilon=epsilon, delta=delta
        )  # fmt: skip
        thresholds[task.task] = OFF if decision.chosen is None else table.candidates[decision.chosen][0]
    limit = recipe.decoding.max_new_tokens
    distinct = sorted({value for value in thresholds.values() if value < 1})
    arms = [full_arm(backbone, max_new_tokens=limit)]
    arms += [exits_arm(backbone, bank, threshold=value, max_new_tokens=limit, method=method) for value in distinct]
    rows = []
    for task in clean:
        results = answer_all(backbone, encoder, arms, task.samples, what=f"{task.task}, transfer", quiet=quiet)
        references = [result.references for result in results]
        scorer = TaskScorer(task.task, recipe.evaluation, only_quality=True)
        scores = [
            np.array(scorer.score([r.texts[i] or "" for r in results], references).per_sample) for i in range(len(arms))
        ]
        images = np.array(image_numbers(task.samples))
        units = [images == number for number in np.unique(images)]
        losses = {
            value: harm(scores[0], scores[1 + i], relative=task.task == "caption") for i, value in enumerate(distinct)
        }
        losses[OFF] = np.zeros(len(results))
        for source, threshold in thresholds.items():
            got, interval = mean_with_interval([float(losses[threshold][unit].mean()) for unit in units])
            rows.append(
                {
                    "task": task.task,
                    "method": method,
                    "exit": "all",
                    "from": f"{source}/calibration",
                    "to": f"{task.task}/{recipe.evaluation.split}",
                    "loss": "harm",
                    "threshold": threshold,
                    "wanted": epsilon,
                    "got": got,
                    "interval": interval,
                    "n": len(units),
                }
            )
    return rows


def confidence_rows(
    backbone: Backbone,
    encoder: SampleEncoder,
    banks: Mapping[str, ExitBank],
    recipe: Recipe,
    *,
    calibration_samples: int,
    epsilon: float,
    delta: float,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of ``ece`` on the recipe's split, rows of ``transfer`` per exit from the calibration split to it), every
    bank's."""
    ece: list[dict[str, Any]] = []
    transfer: list[dict[str, Any]] = []
    settings = recipe.evaluation
    for method, bank in banks.items():
        held, chosen = (
            [
                record_opinions(backbone, encoder, bank, recipe, task, split=split, max_samples=count)
                for task in settings.tasks
            ]
            for split, count in ((settings.split, settings.max_samples), ("calibration", calibration_samples))
        )
        for opinions in held:
            ece += calibration_rows(opinions, method)
        transfer += transfer_rows(chosen, held, method, epsilon=epsilon, delta=delta)
    return ece, transfer
