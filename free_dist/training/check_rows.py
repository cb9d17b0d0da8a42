"""Rows for fitting cheap checks: what the frozen model and its exits say on answers of the *training* split.

One batched forward per batch of samples, teacher-forced on the labels.  No other split can be named here.  Does not know what
is fitted to the rows.

Shape letters: K exits, B batch, T positions, N rows (answer positions), D model width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from torch import Tensor
from tqdm import tqdm

from free_dist.backbones import Backbone
from free_dist.config import TASKS, DataConfig, UserError
from free_dist.data.samples import IGNORE, Sample, SampleEncoder, Turn, evaluation_samples
from free_dist.data.stream import epoch_samples, records
from free_dist.exits import ExitBank
from free_dist.exits.check_fitting import CHOOSE, MEASURE, TRAIN, CheckRows

DEAL = (TRAIN, TRAIN, TRAIN, CHOOSE, TRAIN, TRAIN, MEASURE, TRAIN, CHOOSE, TRAIN)
"""Part of every image in turn."""


@torch.inference_mode()
def collect_rows(
    backbone: Backbone,
    encoder: SampleEncoder,
    bank: ExitBank,
    config: DataConfig,
    *,
    samples_per_task: int,
    batch_size: int = 32,
    seed: int = 0,
    quiet: bool = False,
) -> CheckRows:
    """Rows of up to ``samples_per_task`` training samples of every task in ``config``, on the CPU in float32.

    The end-of-answer token is a row too: exits emit it like any other.  Needs 8 K D bytes a row.  Raises UserError for
    a task without samples.
    """
    device = next(bank.transformers.parameters()).device
    images: dict[bytes, int] = {}
    parts = []
    for task in (name for name, weight in config.tasks.items() if weight > 0):
        stream = epoch_samples(config, task, seed=seed, epoch=0)
        samples = list(itertools.islice(stream, samples_per_task))
        if not samples:
            raise UserError(f"data.tasks: no record of {config.root}/train has anything for task {task!r}")
        starts = range(0, len(samples), batch_size)
        for first in tqdm(starts, desc=f"rows {task}", unit="batch", disable=quiet, mininterval=1.0):
            chosen = samples[first : first + batch_size]
            dealt = [DEAL[images.setdefault(sample.image, len(images)) % len(DEAL)] for sample in chosen]
            parts.append(_rows_of_batch(backbone, encoder, bank, chosen, torch.tensor(dealt), device))
    return _joined(parts)


def training_token_counts(config: DataConfig, encoder: SampleEncoder, vocab_size: int) -> Tensor:
    """How often every token stands in an answer of the training split, [V] int64, over all tasks with a weight above 0.

    Every reference of a sample counts, because any of them may be drawn in training.
    """
    answers: Counter[str] = Counter()
    for record in records(config, "train"):
        for task in (name for name, weight in config.tasks.items() if weight > 0):
            for sample in evaluation_samples(record, task, config):
                answers.update(turn.answer for turn in sample.turns[:-1])
                answers.update(sample.references)
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for answer, times in answers.items():  # each distinct text is tokenised once
        targets = encoder.encode_text([Turn(prompt="", answer=answer)])[1]
        counts += times * torch.bincount(torch.tensor([t for t in targets if t != IGNORE]), minlength=vocab_size)
    return counts


def answer_positions(answers: Tensor) -> Tensor:
    """Bool [B, T], true where an answer token is predicted -> its index within its answer, [B, T] int64 (0 elsewhere)."""
    count = answers.long().cumsum(1)
    before = torch.where(answers, 0, count).cummax(1).values
    return torch.where(answers, count - before - 1, 0)


def _rows_of_batch(
    backbone: Backbone,
    encoder: SampleEncoder,
    bank: ExitBank,
    samples: list[Sample],
    dealt: Tensor,
    device: torch.device,
) -> CheckRows:
    batch = encoder.collate(samples).to(device)
    answers = batch.targets != IGNORE
    output = backbone(**batch.inputs(), exit_layers=bank.exit_layers)
    features = bank(output.exits, answers, memory=output.memory, span=output.span)  # [K, N, D]
    logits = (bank.logits_of(index, one) for index, one in enumerate(features))
    read = [torch.softmax(one, dim=-1, dtype=torch.float32).max(-1) for one in logits]
    return CheckRows(
        hidden=torch.stack([tap[answers] for tap in output.exits]).float().cpu(),
        features=features.float().cpu(),
        exit_tokens=torch.stack([tokens for _, tokens in read]).cpu(),
        confidences=torch.stack([confidence for confidence, _ in read]).cpu(),
        final_tokens=backbone.lm_head(output.final[answers]).argmax(-1).cpu(),
        positions=answer_positions(answers)[answers].cpu(),
        tasks=torch.full((int(answers.sum()),), TASKS.index(samples[0].task)),
        parts=dealt[:, None].expand(answers.shape)[answers.cpu()],
    )


def _joined(parts: list[CheckRows]) -> CheckRows:
    return CheckRows(
        hidden=torch.cat([part.hidden for part in parts], dim=1),
        features=torch.cat([part.features for part in parts], dim=1),
        exit_tokens=torch.cat([part.exit_tokens for part in parts], dim=1),
        confidences=torch.cat([part.confidences for part in parts], dim=1),
        final_tokens=torch.cat([part.final_tokens for part in parts]),
        positions=torch.cat([part.positions for part in parts]),
        tasks=torch.cat([part.tasks for part in parts]),
        parts=torch.cat([part.parts for part in parts]),
    )
