"""Thresholds for one task from the calibration split: decodes it at every candidate, tabulates the losses, keeps the outcome.

The loss of an answer, in [0, 1], compares it with the full model's answer to the same sample:

* ``harm`` for vqa and dialogue: how much VQA accuracy is lost, ``max(0, full - exits)``.  Gains are not counted, so the mean
  harm is never below the loss of mean accuracy: epsilon bounds accuracy points (0.01 is one point of a hundred);
* ``harm`` for captions: the share of the caption's own CIDEr-D that is lost, ``1 - exits / full`` cut to 0..1, and 0 where the
  full model scores 0.  Epsilon bounds the mean of these shares, which is not the lost share of the mean CIDEr-D;
* ``agreement``: 1 unless the generated tokens are those of the full model.  Epsilon bounds the share of changed answers.

The unit of the guarantee is an image: answers about one image are averaged first, because they are not independent draws, and
every image counts alike, however many of its questions are answered.  Qualities here are averaged in the same way.
CIDEr-D takes its document frequencies from the references of the images it is computed on, so caption losses are independent
only up to the weight that one image in N has in them.

Does not know p-values or bounds (``free_dist.decoding.calibrate``), and prints nothing.

Shape letters: S samples, N images, C candidates, K exits, T tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from free_dist.atomic import write_atomically
from free_dist.backbones import Backbone
from free_dist.config import ConfigError, MissingFileError, Recipe, UserError
from free_dist.data.samples import SampleEncoder, image_numbers
from free_dist.data.stream import required_samples
from free_dist.decoding.calibrate import Floats, descent_path, replay, undominated
from free_dist.decoding.generate import generate
from free_dist.decoding.policy import Decision, MaxProbPolicy, Scores
from free_dist.evaluation.tasks import TaskScorer
from free_dist.exits import ExitBank
from free_dist.exits.export import ExportError, read_exits_manifest

FORMAT_VERSION = 1
LOSSES = ("harm", "agreement")
OFF = 1.1
"""A threshold that no confidence exceeds: the exit is not even computed."""
GRID = tuple(float(1 - gap) for gap in np.geomspace(1e-4, 0.8, 25))
"""Thresholds shared by all exits, safe to fast; dense near 1, where trained exits are."""
EXIT_GRID = tuple(float(1 - gap) for gap in np.geomspace(1e-3, 0.8, 12))
"""Thresholds of an exit where each has its own."""

Thresholds = tuple[float, ...]


class Check(NamedTuple):
    """One exit's opinion on one token."""

    position: int
    """Of the token in its answer, 0-based."""
    exit_index: int
    confidence: float
    token: int


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One decoded answer, what it cost, and every opinion on the way to it."""

    tokens: tuple[int, ...]
    blocks: int
    """Block calls, prefill included."""
    exit_calls: int
    head_calls: int
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True)
class LossTable:
    """What C candidates did to N images."""

    candidates: tuple[Thresholds, ...]
    """Per candidate K thresholds; safe to fast."""
    losses: Floats
    """[N, C], mean over the samples of an image."""
    costs: Floats
    """[C], weights read per token in units of one block: block calls, exit transformers, and heads by their size."""
    full_cost: float
    """The same for the full model."""
    blocks: Floats
    """[C], block calls per token with an exit transformer counted as one, as in results rows."""
    quality: Floats
    """[C], the task's score, averaged as the losses are."""
    full_quality: float
    n_samples: int


class RecordingPolicy:
    """Confidence thresholds that note what every exit said; with ``emit=False`` all exits are asked and none emits."""

    def __init__(self, thresholds: Sequence[float], *, emit: bool = True) -> None:
        self.checks: list[Check] = []
        self._inner = MaxProbPolicy(thresholds, len(thresholds))
        self._emit = emit

    def is_active(self, exit_index: int) -> bool:
        """Whether the exit is asked."""
        return not self._emit or self._inner.is_active(exit_index)

    def is_active_at(self, exit_index: int, position: int) -> bool:
        """The same at every answer position."""
        return self.is_active(exit_index)

    def decide(
        self, exit_index: int, scores: Scores, positions: Sequence[int], earlier: Sequence[Sequence[int]]
    ) -> Decision:
        """What the thresholds decide about one row; noted in ``checks``."""
        decision = self._inner.decide(exit_index, scores, positions, earlier)
        ((position,), (confidence,), (token,)) = positions, decision.confidences, decision.tokens.tolist()
        self.checks.append(Check(position, exit_index, confidence, token))
        return decision if self._emit else decision._replace(emit=[False])


class CalibrationSet:
    """The calibration samples of one task on one model; each is decoded once for every course that its decisions can take.

    Thresholds that lead to the same decision at every check lead to the same answer.  So an answer is kept together
    with the box of thresholds it stands for, and a candidate inside a known box is not decoded again.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: SampleEncoder,
        bank: ExitBank,
        recipe: Recipe,
        task: str,
        *,
        loss: str = "harm",
        quiet: bool = False,
    ) -> None:
        """Reads ``evaluation.max_samples`` samples; raises ConfigError for another split or a task without samples."""
        if recipe.evaluation.split != "calibration":
            raise ConfigError(
                f"evaluation.split={recipe.evaluation.split!r}: a split that chose thresholds cannot test them any more; "
                "use evaluation.split=calibration"
            )
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r}: want one of {', '.join(LOSSES)}")
        self._scorer = TaskScorer(task, recipe.evaluation, only_quality=True)
        self.samples = required_samples(recipe.data, "calibration", task, max_samples=recipe.evaluation.max_samples)
        self.images = np.array(image_numbers(self.samples))
        """[S], sample -> number of its image."""
        self.n_images = int(self.images.max()) + 1
        self.n_exits = len(bank.exit_layers)
        self.decodes = 0
        """Answers decoded so far."""
        self._backbone, self._encoder, self._bank = backbone, encoder, bank
        self._limit, self._loss, self._quiet = recipe.decoding.max_new_tokens, loss, quiet
        self._known: list[list[tuple[Floats, Floats, Trace]]] = [[] for _ in self.samples]
        self._encoded: tuple[int, Tensor] | None = None
        """The sample decoded last and its visual prefix [1, Q, D]."""
        head, block = backbone.shared_modules()[1], backbone.block(1)
        self._head_cost = sum(p.numel() for p in head.parameters()) / sum(p.numel() for p in block.parameters())

    def shared_candidates(self) -> list[Thresholds]:
        """One threshold for all exits, safe to fast."""
        return [(value,) * self.n_exits for value in GRID]

    def halves(self, seed: int = 0) -> tuple[list[int], list[int]]:
        """The images in two random halves, to look for candidates and to test them; raises UserError for one image."""
        if self.n_images < 2:
            raise UserError("evaluation.max_samples: thresholds per exit take two images at least, one to test on")
        order = np.random.default_rng(seed).permutation(self.n_images).tolist()
        return order[: self.n_images // 2], order[self.n_images // 2 :]

    def candidates_per_exit(self, images: Iterable[int]) -> list[Thresholds]:
        """A path of candidates with a threshold for every exit, safe to fast, found on ``images`` alone.

        A sample is decoded once at full depth while all exits are asked.  On these opinions a greedy descent proposes
        candidates; they are then really decoded on the same images, and those that a cheaper one beats are dropped.
        """
        images = list(images)
        confidences: list[Floats] = []
        wrong: list[NDArray[np.bool_]] = []
        weights: list[float] = []
        for s in self._progress(self._rows(images), "ask the exits"):
            trace = self._decode(s, (OFF,) * self.n_exits, emit=False)
            shape = (len(trace.tokens), self.n_exits)
            confidences.append(np.zeros(shape))
            wrong.append(np.zeros(shape, dtype=bool))
            for position, exit_index, confidence, token in trace.checks:
                confidences[-1][position, exit_index] = confidence
                wrong[-1][position, exit_index] = token != trace.tokens[position]
            weights += [1 / len(trace.tokens)] * len(trace.tokens)
        levels = np.array([OFF, *EXIT_GRID])
        recorded = np.concatenate(confidences), np.concatenate(wrong), np.array(weights) / math.fsum(weights)

        @cache
        def measure(candidate: tuple[int, ...]) -> tuple[float, float]:
            return replay(
                *recorded,
                levels[list(candidate)],
                self._bank.exit_layers,
                n_blocks=self._backbone.n_blocks,
                head_cost=self._head_cost,
            )

        path = descent_path(len(EXIT_GRID), self.n_exits, measure)
        candidates = [tuple(float(levels[level]) for level in candidate) for candidate in path]
        if not candidates:
            return []
        table = self.tabulate(candidates, images)
        return [candidates[c] for c in undominated(table.losses.mean(axis=0), table.costs)]

    def tabulate(self, candidates: Sequence[Thresholds], images: Iterable[int] | None = None) -> LossTable:
        """The losses of the candidates on ``images`` (None: all), against the full model on the same samples."""
        rows = self._rows(range(self.n_images) if images is None else images)
        courses = [(OFF,) * self.n_exits, *candidates]
        traces = [[self._trace(s, course) for course in courses] for s in self._progress(rows, "decode candidates")]
        references = [self.samples[s].references for s in rows]
        texts = [[self._encoder.decode(row[c].tokens) for row in traces] for c in range(len(courses))]
        scores = np.array([self._scorer.score(answers, references).per_sample for answers in texts]).T  # [S, 1 + C]
        if self._loss == "agreement":
            losses = np.array([[float(trace.tokens != row[0].tokens) for trace in row] for row in traces])
        else:
            losses = harm(scores[:, :1], scores, relative=self._scorer.task.name == "caption")
        units = self.images[rows]

        def per_image(values: Floats) -> Floats:
            return np.stack([values[units == unit].mean(axis=0) for unit in sorted(set(units.tolist()))])

        per_exit = self._bank.blocks_per_exit
        work = np.array(
            [[(len(t.tokens), t.blocks + per_exit * t.exit_calls, t.head_calls) for t in row] for row in traces]
        )
        tokens, blocks, heads = work.sum(axis=0).T.astype(np.float64)
        costs = (blocks + self._head_cost * heads) / tokens
        quality = per_image(scores).mean(axis=0)
        return LossTable(
            candidates=tuple(candidates),
            losses=per_image(losses[:, 1:]),
            costs=costs[1:],
            full_cost=float(costs[0]),
            blocks=(blocks / tokens)[1:],
            quality=quality[1:],
            full_quality=float(quality[0]),
            n_samples=len(rows),
        )

    def _rows(self, images: Iterable[int]) -> list[int]:
        return np.flatnonzero(np.isin(self.images, list(images))).tolist()

    def _progress(self, rows: list[int], what: str) -> Iterable[int]:
        return tqdm(
            rows, desc=f"{what} ({self._scorer.task.name})", unit="sample", disable=self._quiet, mininterval=1.0
        )

    def _trace(self, s: int, thresholds: Thresholds) -> Trace:
        # Whatever switches an exit off is the same to the decoder.
        wanted = np.where(np.array(thresholds) < 1, thresholds, np.inf)
        for low, high, trace in self._known[s]:
            if np.all((low <= wanted) & ((wanted < high) | np.isinf(low))):
                return trace
        trace = self._decode(s, thresholds)
        low, high = np.where(np.isinf(wanted), np.inf, 0.0), np.ones(self.n_exits)
        for _, exit_index, confidence, _ in trace.checks:
            if confidence > wanted[exit_index]:
                high[exit_index] = min(high[exit_index], confidence)
            else:
                low[exit_index] = max(low[exit_index], confidence)
        self._known[s].append((low, high, trace))
        return trace

    def _decode(self, s: int, thresholds: Thresholds, *, emit: bool = True) -> Trace:
        self.decodes += 1
        sample = self.samples[s]
        if self._encoded is None or self._encoded[0] != s:
            device = next(self._backbone.parameters()).device
            pixels = self._encoder.encode_image(sample.image)[None].to(device)
            instruction = self._encoder.encode_instruction(sample.turns, device)
            with torch.inference_mode():
                self._encoded = s, self._backbone.encode_prefix(pixels, None, instruction)
        policy = RecordingPolicy(thresholds, emit=emit)
        (answer,) = generate(
            self._backbone,
            self._bank,
            None,
            self._encoder.encode_prompt(sample.turns),
            prefix=self._encoded[1],
            thresholds=policy,
            max_new_tokens=self._limit,
        )
        return Trace(
            tokens=tuple(answer.tokens),
            blocks=sum(answer.blocks_executed),
            exit_calls=answer.exit_calls,
            head_calls=answer.head_calls,
            checks=tuple(policy.checks),
        )


def harm(full: Floats, exits: Floats, *, relative: bool) -> Floats:
    """Scores of the full model and with exits, shapes that broadcast -> losses in [0, 1]; see the head of this file."""
    if not relative:
        return np.clip(full - exits, 0.0, 1.0)
    share = np.divide(exits, full, out=np.ones(np.broadcast_shapes(full.shape, exits.shape)), where=full > 0)
    return np.clip(1.0 - share, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What ``calibration-TASK.json`` says."""

    format_version: int
    task: str
    method: str
    """``ltt`` or ``crc``."""
    loss: str
    epsilon: float
    delta: float | None
    """None for ``crc``, which holds in expectation."""
    guarantee: str
    """The promise in words."""
    thresholds: Thresholds
    """Per exit; above 1 where nothing cheaper than the full model could be certified."""
    n_images: int
    """Images tested on."""
    n_samples: int
    exit_layers: tuple[int, ...]
    backbone_hash: str
    weights_sha256: str
    """Of the ``exits.safetensors`` that was calibrated."""
    settings: dict[str, Any]
    """Recipe fields that shape the answers: the promise holds for these."""
    full_quality: float
    full_cost_per_token: float
    candidates: tuple[dict[str, Any], ...]
    """Per candidate: thresholds, mean loss, p-value or bound, blocks per token, cost, quality, whether it is certified."""


def calibration_path(directory: str | Path, task: str) -> Path:
    """Where the calibration of an export for ``task`` lies."""
    return Path(directory) / f"calibration-{task}.json"


def write_calibration(calibration: Calibration, directory: str | Path) -> Path:
    """Write it beside the exits, whole or not at all; an older one of the same task is replaced."""
    path = calibration_path(directory, calibration.task)
    write_atomically(path, (json.dumps(asdict(calibration), indent=1, allow_nan=False) + "\n").encode())
    return path


def read_calibration(directory: str | Path, task: str) -> Calibration:
    """The calibration of an export for ``task``; raises MissingFileError, or ExportError where it belongs to other exits."""
    path = calibration_path(directory, task)
    again = f"run launch/calibrate.py --exits {directory} --task {task}"
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: {again}")
    try:
        content = json.loads(path.read_text())
        calibration = Calibration(**content)
    except (json.JSONDecodeError, TypeError) as error:
        raise ExportError(f"{path} is not a calibration ({error}); {again}") from error
    if calibration.format_version != FORMAT_VERSION or calibration.task != task:
        raise ExportError(f"{path}: format {calibration.format_version}, task {calibration.task!r}; {again}")
    manifest = read_exits_manifest(directory)
    found = (calibration.backbone_hash, calibration.weights_sha256, tuple(calibration.exit_layers))
    if found != (manifest.backbone_hash, manifest.weights_sha256, manifest.exit_layers):
        raise ExportError(f"{path} belongs to other exits than those in {directory}; {again}")
    if len(calibration.thresholds) != len(manifest.exit_layers):
        raise ExportError(
            f"{path}: {len(calibration.thresholds)} thresholds for {len(manifest.exit_layers)} exits; {again}"
        )
    lists = {name: tuple(content[name]) for name in ("thresholds", "exit_layers", "candidates")}
    return Calibration(**content | lists)


def load_calibration(directory: str | Path, task: str) -> Thresholds:
    """The calibrated thresholds, one per exit, for ``generate(..., thresholds=...)``; raises as :func:`read_calibration`."""
    return read_calibration(directory, task).thresholds
