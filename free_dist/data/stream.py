"""The visible list of stages from shards to batches.

    shards in epoch order -> tar members -> records -> shuffle buffer -> samples -> global batches -> this rank's rows -> tensors

The order of samples is a function of (seed, epoch) alone; ranks take slices of the same global batches, so N processes
see together exactly what one would.  Rank and world size are arguments: nothing here knows torch.distributed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import webdataset as wds

from free_dist.config import TASKS, DataConfig, UserError
from free_dist.data.records import Record
from free_dist.data.samples import Batch, Sample, SampleEncoder, evaluation_samples, training_samples
from free_dist.data.shards import record_from_fields, shard_paths


def records(root: Path, split: str, *, shuffle: tuple[str, int] | None = None) -> Iterable[Record]:
    """Records of a split, in manifest order, or shuffled by ``(seed, buffer size)``."""
    paths = shard_paths(root, split)
    if not paths:  # webdataset takes no empty list
        return ()
    stages: list[object] = []
    if shuffle is not None:
        random.Random(shuffle[0]).shuffle(paths)
    stages += [wds.SimpleShardList(paths), wds.tarfile_to_samples(), wds.map(record_from_fields)]
    if shuffle is not None:
        seed, size = shuffle
        stages.append(wds.shuffle(size, initial=size, rng=random.Random(seed)))
    return wds.DataPipeline(*stages)


def epoch_samples(config: DataConfig, task: str, *, seed: int, epoch: int) -> Iterator[Sample]:
    """One epoch of training samples of one task, shuffled by (seed, epoch)."""
    name = f"{seed}/{epoch}/{task}"
    for record in records(Path(config.root), "train", shuffle=(name, config.shuffle_buffer)):
        yield from training_samples(record, task, config, random.Random(f"{name}/{record.key}"))


def global_batches(config: DataConfig, *, seed: int, rows: int) -> Iterator[list[Sample]]:
    """Endless batches of ``rows`` samples, each of one task drawn by its weight; the same on every rank."""
    tasks = [task for task, weight in config.tasks.items() if weight > 0]
    weights = [config.tasks[task] for task in tasks]
    streams = {task: _batched(_endless(config, task, seed), rows) for task in tasks}
    choice = random.Random(f"{seed}/tasks")
    while True:
        yield next(streams[choice.choices(tasks, weights)[0]])


def training_batches(
    config: DataConfig,
    encoder: SampleEncoder,
    *,
    seed: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Endless micro-batches of this rank; ``gradient_accumulation_steps`` consecutive ones make its global batch."""
    rows = micro_batch_size * world_size * gradient_accumulation_steps
    for samples in global_batches(config, seed=seed, rows=rows):
        for step in range(gradient_accumulation_steps):
            first = (step * world_size + rank) * micro_batch_size
            yield encoder.collate(samples[first : first + micro_batch_size])


def split_samples(
    config: DataConfig, split: str, task: str, *, max_samples: int = 0, rank: int = 0, world_size: int = 1
) -> list[Sample]:
    """This rank's share of an evaluation; ``max_samples`` (0: all) picks them evenly spaced over the whole split."""
    samples = [s for r in records(Path(config.root), split) for s in evaluation_samples(r, task, config)]
    if 0 < max_samples < len(samples):
        samples = [samples[i * len(samples) // max_samples] for i in range(max_samples)]
    return samples[rank::world_size]


def corpus(config: DataConfig) -> Iterator[str]:
    """Every prompt and answer of the training split as it stands in a row, for training a tokenizer."""
    for record in records(Path(config.root), "train"):
        for task in TASKS[:2]:
            for sample in evaluation_samples(record, task, config):
                for turn in sample.turns:
                    yield turn.prompt
                    yield from (f" {turn.prompt}", f" {turn.answer}")
        yield from (f" {caption}" for caption in record.captions)


def _endless(config: DataConfig, task: str, seed: int) -> Iterator[Sample]:
    for epoch in itertools.count():
        found = False
        for sample in epoch_samples(config, task, seed=seed, epoch=epoch):
            found = True
            yield sample
        if not found:
            raise UserError(f"data.tasks: no record of {config.root}/train has anything for task {task!r}")


def _batched(samples: Iterator[Sample], rows: int) -> Iterator[list[Sample]]:
    while True:
        yield list(itertools.islice(samples, rows))
