"""What trainings before stage 1 share: endless labelled images, and a plain loop in one process.

Does not know what is trained, what a label is, or how a loss is made of them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from free_dist.config import FinetuneConfig, Recipe
from free_dist.data.records import Record
from free_dist.data.samples import SampleEncoder
from free_dist.data.stream import records
from free_dist.training.schedule import warmup_cosine

Label = TypeVar("Label")

POSTFIX_EVERY = 10
"""Steps between two updates of the losses shown beside the progress bar."""


def train_alone(
    parameters: Sequence[nn.Parameter],
    next_losses: Callable[[], dict[str, Tensor]],
    settings: FinetuneConfig,
    *,
    steps: int,
    description: str,
) -> float:
    """Train ``parameters`` for ``steps`` steps on the sum of the named losses that each call returns; returns the last sum."""
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    factor = warmup_cosine(warmup_steps=max(1, steps // 10), max_steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    progress = tqdm(range(steps), desc=description, mininterval=1.0)
    for step in progress:
        losses = next_losses()
        loss = torch.stack([*losses.values()]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % POSTFIX_EVERY == 0:
            progress.set_postfix({name: f"{value.item():.3f}" for name, value in losses.items()}, refresh=False)
    return loss.item()


def labelled_images(
    encoder: SampleEncoder, recipe: Recipe, purpose: str, label: Callable[[Record], Label | None]
) -> Iterator[tuple[Tensor, list[Label]]]:
    """Endless batches of ``finetune.batch_size`` training images, as the encoder has them, each with its label.

    Images whose label is None are left out.  ``purpose`` makes the order differ from that of other streams.
    """
    images: list[Tensor] = []
    labels: list[Label] = []
    for epoch in itertools.count():
        shuffle = (f"{recipe.training.seed}/{purpose}/{epoch}", recipe.data.shuffle_buffer)
        for record in records(recipe.data, "train", shuffle=shuffle):
            found = label(record)
            if found is None:
                continue
            images.append(encoder.encode_image(record.image))
            labels.append(found)
            if len(images) == recipe.finetune.batch_size:
                yield torch.stack(images), labels
                images, labels = [], []


def distinctive(said: Iterable[set[str]]) -> list[str]:
    """Of what is said of each image, what is said of fewer than half of them, sorted: the rest tells nothing about an image."""
    images = 0
    counts: Counter[str] = Counter()
    for words in said:
        images += 1
        counts.update(words)
    return sorted(word for word, count in counts.items() if count < images / 2)
