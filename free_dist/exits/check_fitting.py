"""Fitting of the cheap checks: tensors in, fitted checks out.

Rows are answer positions under teacher forcing.  They are dealt to three parts by image: one trains gates and discriminators
and gives the screen its covariance, one chooses their thresholds, one is left for measuring (``check_replay``).
Does not know data sets, tokenizers or files; where rows come from is the caller's business, and must be the training split.

Shape letters: K exits, N rows, P answer positions, D model width, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from free_dist.config import ConfigError, UserError
from free_dist.exits.check_files import FittedChecks
from free_dist.exits.classifier import FeatureClassifiers
from free_dist.exits.gate import CheckOptions, LowRankHead, linear_head
from free_dist.exits.transformer import ExitBank

TRAIN, CHOOSE, MEASURE = range(3)
"""Parts of the rows."""
BATCH = 512
"""Rows per step of a classifier's training."""
CHUNK = 1024
"""Rows whose logits are held at once."""
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.01
RIDGE = 1e-6
"""Smallest eigenvalue of the features' covariance that the screen believes in, as a share of the largest."""


@dataclass(frozen=True, kw_only=True)
class CheckRows:
    """What the frozen model and its exits say at N answer positions."""

    hidden: Tensor
    """Un-normed ``h_k``, [K, N, D] float32."""
    features: Tensor
    """Normed exit features, [K, N, D] float32."""
    exit_tokens: Tensor
    """Most likely token of each exit's full head, [K, N]."""
    confidences: Tensor
    """Its softmax probability, [K, N] float32."""
    final_tokens: Tensor
    """Most likely token at full depth, [N]."""
    positions: Tensor
    """Index of the token within its answer, 0-based, [N]."""
    tasks: Tensor
    """Index into ``config.TASKS``, [N]."""
    parts: Tensor
    """TRAIN, CHOOSE or MEASURE, [N]; rows of one image are in one part."""

    def part(self, number: int) -> CheckRows:
        """The rows of one part."""
        kept = self.parts == number
        return CheckRows(
            tasks=self.tasks[kept],
            hidden=self.hidden[:, kept],
            features=self.features[:, kept],
            exit_tokens=self.exit_tokens[:, kept],
            confidences=self.confidences[:, kept],
            final_tokens=self.final_tokens[kept],
            positions=self.positions[kept],
            parts=self.parts[kept],
        )

    def agreeing(self) -> Tensor:
        """Where an exit's token is the full model's, bool [K, N]."""
        return self.exit_tokens == self.final_tokens

    def confident(self, thresholds: Sequence[float]) -> Tensor:
        """Where an exit would emit, bool [K, N]."""
        return self.confidences > torch.tensor(thresholds)[:, None]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How checks are fitted; raises ConfigError for values that cannot run."""

    recall: float = 0.98
    """Share of the right emissions that a gate, and a discriminator, must let through."""
    gate_hidden_size: int | None = None
    """Width of a gate's hidden layer; None: a tenth of the model's, at least 16 (256 at width 2560)."""
    discriminator_hidden_size: int = 256
    """Width of a discriminator's hidden layer."""
    steps: int = 400
    """Optimizer steps of the classifiers."""
    rank: int = 256
    """Largest rank of the screen; at most the model's width is kept."""
    coverage: float = 0.999
    """Share of the training answers' tokens that the default pruned head must hold, and of exit features that the screen of
    the default rank must read as the full head does."""
    n_positions: int = 8
    """Answer positions told apart when asking where a check pays; later ones count as the last."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("recall", self.recall), ("coverage", self.coverage)):
            if not 0 < value <= 1:
                raise ConfigError(f"{name}={value}: want a share above 0 and at most 1")
        for name, size in (("steps", self.steps), ("rank", self.rank), ("n_positions", self.n_positions)):
            if size < 1:
                raise ConfigError(f"{name}={size}: want at least 1")


def fit_checks(
    rows: CheckRows,
    bank: ExitBank,
    *,
    thresholds: Sequence[float],
    token_counts: Tensor,
    eos: int,
    settings: FitSettings,
) -> FittedChecks:
    """Fit every check, on the CPU, but for where asking pays: that is :func:`~free_dist.exits.check_replay.with_positions`.

    ``thresholds`` are the exits' confidence thresholds, ``token_counts`` [V] the training answers' tokens, ``eos`` a token
    that every pruned head keeps.  Raises UserError when a part has no rows.
    """
    train, choose = rows.part(TRAIN), rows.part(CHOOSE)
    if not len(train.parts) or not len(choose.parts):
        raise UserError("too few images to fit checks: give at least 3, or raise the number of samples")
    width = rows.hidden.shape[2]

    # The gate says whether the exit would emit, and rightly: before the exit transformer nothing else is known.
    gates = fit_classifiers(
        F.layer_norm(train.hidden, (width,)),
        train.confident(thresholds) & train.agreeing(),
        hidden_size=settings.gate_hidden_size or max(16, width // 10),
        settings=settings,
    )
    # FREE's discriminators tell exit features from final ones.  That can be decided, or undecidable, on every row alike; what a
    # decoder asks of a feature is whether the head would read the full model's token from it.
    discriminators = fit_classifiers(
        train.features, train.agreeing(), hidden_size=settings.discriminator_hidden_size, settings=settings
    )
    emitting = choose.confident(thresholds) & choose.agreeing()
    head = linear_head(bank)
    order = token_order(token_counts, eos)
    down, lift = fit_screen(head.weight.detach().float(), train.features.flatten(0, 1), settings.rank)
    agreements = screen_agreement(head, down, lift, choose)
    with torch.no_grad():
        gate_scores = gates(F.layer_norm(choose.hidden, (width,)))
        discriminator_scores = discriminators(choose.features)
    return FittedChecks(
        gates=gates,
        gate_thresholds=recall_thresholds(gate_scores, emitting, settings.recall),
        discriminators=discriminators,
        discriminator_thresholds=recall_thresholds(discriminator_scores, emitting, settings.recall),
        token_order=order,
        pruned_size=covering_size(token_counts[order], settings.coverage),
        down=down,
        lift=lift,
        screen_rank=next((rank for rank, share in agreements.items() if share >= settings.coverage), len(down)),
        thresholds=tuple(float(value) for value in thresholds),
        worthwhile={},
    )


def fit_classifiers(inputs: Tensor, targets: Tensor, *, hidden_size: int, settings: FitSettings) -> FeatureClassifiers:
    """[K, N, D] and bool [K, N] -> K classifiers trained with binary cross entropy (AdamW, cosine to zero), frozen."""
    n_exits, n_rows, width = inputs.shape
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        classifiers = FeatureClassifiers(n_exits, width, hidden_size)
    optimizer = torch.optim.AdamW(classifiers.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    wanted = targets.float()
    for _ in range(settings.steps):
        chosen = torch.randint(n_rows, (min(BATCH, n_rows),), generator=generator)
        # Summed over exits, so that each learns as if it were alone.
        loss = F.binary_cross_entropy_with_logits(
            classifiers(inputs[:, chosen]), wanted[:, chosen], reduction="none"
        ).mean(-1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
    return classifiers.eval().requires_grad_(False)


def recall_thresholds(logits: Tensor, positives: Tensor, recall: float) -> tuple[float, ...]:
    """Largest probability per exit that at least ``recall`` of its positives exceed; logits and bool [K, N].

    An exit without positives gets 0: nothing is known of when it emits, so it is never held back.
    """
    thresholds = []
    for scores, wanted in zip(logits.double(), positives, strict=True):
        found = torch.sort(torch.sigmoid(scores[wanted])).values
        if not len(found):
            thresholds.append(0.0)
            continue
        missed = math.floor((1 - recall) * len(found) + 1e-9)
        # A hair below, because a gate opens strictly above its threshold and computes in float32.
        thresholds.append(float(found[missed]) * (1 - 1e-5))
    return tuple(thresholds)


def token_order(counts: Tensor, eos: int) -> Tensor:
    """[V] counts -> [V] every token: ``eos`` first, then by falling count, ties by id; a prefix is a pruned vocabulary."""
    order = torch.argsort(counts, descending=True, stable=True)
    return torch.cat([torch.tensor([eos]), order[order != eos]])


def covering_size(ordered_counts: Tensor, coverage: float) -> int:
    """Length of the shortest prefix that holds ``coverage`` of all tokens counted; at least 1."""
    cumulative = torch.cumsum(ordered_counts.double(), 0)
    wanted = coverage * cumulative[-1]
    return int(torch.searchsorted(cumulative, wanted * (1 - 1e-12)).clamp(max=len(cumulative) - 1)) + 1


def fit_screen(weight: Tensor, features: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Head [V, D] and features [N, D] -> ``down`` [r, D] and ``lift`` [D, r], r = min(rank, D).

    Of all matrices of rank r, ``W lift down`` has the least mean squared error of the *logits* on these features: with
    the features' second moment C, it is the truncated singular value decomposition of ``W C^(1/2)``, taken back by
    ``C^(-1/2)``.  Rank D gives ``W``.
    """
    width = weight.shape[1]
    features = features.double()
    values, vectors = torch.linalg.eigh(features.T @ features / len(features))
    roots = values.clamp(min=RIDGE * float(values[-1])).sqrt()
    root, inverse = vectors * roots @ vectors.T, vectors / roots @ vectors.T
    product = weight.double() @ root
    # Right singular vectors alone: V x V is too large, D x D is not.
    _, right = torch.linalg.eigh(product.T @ product)
    kept = right.flip(-1)[:, : min(rank, width)]
    return (kept.T @ inverse).float(), (root @ kept).float()


@torch.inference_mode()
def screen_agreement(
    lm_head: nn.Linear, down: Tensor, lift: Tensor, rows: CheckRows, *, rescored: int = CheckOptions.rescored
) -> dict[int, float]:
    """Rank of the screen (4, doubled up to the fitted one) -> share of exit features read as the full head reads them."""
    agreement = {}
    wanted = rows.exit_tokens.flatten()
    for rank in doubled(4, len(down)):
        head = LowRankHead(lm_head, down[:rank], lift[:, :rank], rescored)
        found = [head(part).logits.argmax(-1) for part in rows.features.flatten(0, 1).split(CHUNK)]
        agreement[rank] = float((torch.cat(found) == wanted).double().mean())
    return agreement


def doubled(first: int, last: int) -> list[int]:
    """``first``, twice that, and so on, and ``last`` at the end."""
    return [*itertools.takewhile(lambda size: size < last, (first << i for i in range(32))), last]


def worthwhile_positions(
    emits: Tensor,
    visit_costs: Tensor,
    positions: Tensor,
    *,
    exit_layers: Sequence[int],
    n_blocks: int,
    n_positions: int,
) -> Tensor:
    """Where checking an exit pays: bool [K, P], at every answer position the set of exits with the least mean cost.

    ``emits`` bool [K, N]: the exit's checks would emit the row; ``visit_costs`` [K, N]: what they cost, in blocks;
    ``positions`` [N]: answer positions, those from P - 1 on taken together.  One exit alone is in the set where its
    emission rate x blocks saved > cost of a visit.  With several, a deeper exit is asked only about rows that the shallower
    ones of the set left, and saves only what it saves on those; so all 2^K sets are tried on the rows, where an estimate
    from rates alone would have to guess how exits overlap.  A position without rows gets no check.
    """
    place = positions.clamp(max=n_positions - 1)
    best = torch.full((n_positions,), math.inf, dtype=torch.float64)
    chosen = torch.zeros(len(exit_layers), n_positions, dtype=torch.bool)
    for size in range(len(exit_layers) + 1):
        for exits in itertools.combinations(range(len(exit_layers)), size):
            left = torch.ones(len(place), dtype=torch.float64)
            total = torch.zeros(len(place), dtype=torch.float64)
            reached = 0
            for k in exits:
                total += left * (exit_layers[k] - reached + visit_costs[k])
                left = left * ~emits[k]
                reached = exit_layers[k]
            total += left * (n_blocks - reached)
            cost = torch.zeros(n_positions, dtype=torch.float64).index_add(0, place, total)
            better = cost < best - 1e-9  # on a tie the smaller set stays
            best = torch.where(better, cost, best)
            members = torch.tensor([k in exits for k in range(len(exit_layers))])
            chosen = torch.where(better, members[:, None], chosen)
    return chosen
