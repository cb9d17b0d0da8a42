"""One optimizer step of stage 2: its micro-batches, one after the other, as if they were one batch.

Every mean is over the answer tokens of the whole step, however its rows are spread over micro-batches and ranks.  Knows that a
step has several micro-batches; does not know losses or engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from free_dist.config import CostConfig, LossConfig
from free_dist.data.samples import IGNORE, Batch
from free_dist.distributed import all_reduce_mean
from free_dist.engines import Engines
from free_dist.training.step import adversarial_step

SUMMED = ("answer_tokens",)
"""What is counted over the micro-batches of a step."""


def train_step(
    engines: Engines,
    batches: Sequence[Batch],
    config: LossConfig,
    around: Callable[..., dict[str, Tensor]] = lambda step, *arguments, **options: step(*arguments, **options),
    *,
    cost: CostConfig,
    measure: bool,
) -> dict[str, Tensor]:
    """Train on this rank's micro-batches of one step; returns what ``adversarial_step`` does, for the whole step.

    ``around`` calls it with its arguments for each of them, and may look on.  The mean over ranks of a returned value is the mean
    over the step's answer tokens.
    """
    counts = torch.stack([(batch.targets != IGNORE).sum().float() for batch in batches])
    mean_tokens = all_reduce_mean(counts.mean().to(engines.device))
    options = {"measure": measure, "cost": cost, "mean_tokens": mean_tokens}
    reports = [around(adversarial_step, engines, batch.to(engines.device), config, **options) for batch in batches]
    report = dict(reports[-1])  # whether it stepped, and norms, stand in the last one alone
    for name in reports[0]:
        total = torch.stack([part[name] for part in reports]).sum(0)
        report[name] = total if name in SUMMED else total / len(reports)
    return report
