"""Reads every block of a backbone in several ways on the same tokens, under teacher forcing, token by token.

The counts alone are :mod:`free_dist.evaluation.probe`'s; here every token is kept, for intervals over images and for asking
whether any shallower block had been right.  Does not know statistics or files.

Shape letters: B batch, T positions, N scored positions, L blocks, K exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from free_dist.backbones import Backbone
from free_dist.config import Recipe
from free_dist.data.samples import Batch, Sample, SampleEncoder, image_numbers
from free_dist.data.stream import required_samples, split_samples
from free_dist.evaluation.depth import DepthReading, Hits, joined_readings
from free_dist.evaluation.depth_lens import TunedLens
from free_dist.evaluation.probe import all_blocks, bank_tokens, lens_tokens, scored_positions
from free_dist.exits import ExitBank

LOGIT_LENS = "logit lens"
TUNED_LENS = "tuned lens"
BATCH = 32
"""Rows of a forward."""


@torch.inference_mode()
def read_batch(
    backbone: Backbone,
    batch: Batch,
    images: Sequence[int],
    *,
    banks: Mapping[str, ExitBank],
    lens: TunedLens | None = None,
) -> DepthReading:
    """All readings of one batch, of whose rows ``images`` numbers the images [B]: logit lens, tuned lens if there is one, and a
    curve per bank, by its name."""
    features, kept = all_blocks(backbone, batch), scored_positions(backbone, batch)
    targets = batch.targets[kept]
    final = backbone.lm_head(features.final[kept]).argmax(-1)
    every = tuple(range(1, backbone.n_blocks + 1))

    def hits(layers: tuple[int, ...], named: Tensor) -> Hits:
        return Hits(layers, (named == targets).cpu().numpy(), (named == final).cpu().numpy())

    curves = {LOGIT_LENS: hits(every, lens_tokens(backbone, features, kept))}
    if lens is not None:
        curves[TUNED_LENS] = hits(every, lens.tokens(backbone, (h[kept] for h in features.exits)))
    for name, bank in banks.items():
        curves[name] = hits(bank.exit_layers, bank_tokens(bank, features, kept))
    rows = kept.nonzero()[:, 0].cpu().numpy().astype(np.int64)
    return DepthReading(
        task=batch.task,
        samples=rows,
        images=np.array(images)[rows],
        full_right=(final == targets).cpu().numpy(),
        curves=curves,
    )


def read_depth(
    backbone: Backbone,
    encoder: SampleEncoder,
    recipe: Recipe,
    *,
    banks: Mapping[str, ExitBank],
    lens: TunedLens | None = None,
) -> list[DepthReading]:
    """One reading per task of ``recipe.evaluation`` on its split; raises ConfigError for a task without samples."""
    settings = recipe.evaluation
    found = []
    for task in settings.tasks:
        samples = required_samples(recipe.data, settings.split, task, max_samples=settings.max_samples)
        batches = in_batches(encoder, samples, next(backbone.parameters()).device)
        images = image_numbers(samples)
        parts = [
            read_batch(backbone, batch, images[first : first + BATCH], banks=banks, lens=lens)
            for first, batch in zip(range(0, len(samples), BATCH), batches, strict=True)
        ]
        found.append(joined_readings(parts))
    return found


def training_batches_for_lens(
    encoder: SampleEncoder, recipe: Recipe, count: int, device: torch.device
) -> Iterator[Batch]:
    """Batches of the training split, the tasks of ``recipe.evaluation`` in turn, ``count`` samples of each at most."""
    tasks = recipe.evaluation.tasks
    streams = [
        in_batches(encoder, split_samples(recipe.data, "train", task, max_samples=count), device) for task in tasks
    ]
    while streams:
        for stream in list(streams):
            batch = next(stream, None)
            if batch is None:
                streams.remove(stream)
            else:
                yield batch


def in_batches(encoder: SampleEncoder, samples: Sequence[Sample], device: torch.device) -> Iterator[Batch]:
    """Samples of one task, ``BATCH`` rows at a time."""
    for first in range(0, len(samples), BATCH):
        yield encoder.collate(samples[first : first + BATCH]).to(device)
