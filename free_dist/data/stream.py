"""The visible list of stages from shards to batches.

    (seed, epoch, place) -> record -> its bytes, checked -> Record -> Sample -> decoded image -> this rank's Batch
         order.py      split_index.py, shard_index.py    samples.py   images.py     samples.py

Every stage is a function of a place, so a rank reads its own rows alone, and a run that goes on from a
:class:`~free_dist.data.order.StreamState` seeks there instead of reading what it has read before.  The global batches are the
same for any number of ranks, workers and shards.  A place whose sample cannot be used is filled by another sample, drawn by
(seed, epoch, place) too, and named in the quarantine.  Rank and world size are arguments: nothing here knows torch.distributed.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import webdataset as wds
from torch import Tensor

from free_dist.config import TASKS, ConfigError, DataConfig, UserError
from free_dist.data.images import check_image
from free_dist.data.order import EpochOrder, Integers, StreamState, hashed, key_of, permutation, tasks_of_batches
from free_dist.data.prefetch import Progress, in_background
from free_dist.data.quarantine import BadSample
from free_dist.data.records import Record
from free_dist.data.samples import Batch, Sample, SampleEncoder, evaluation_samples, training_samples
from free_dist.data.shard_index import stand_in
from free_dist.data.split_index import RecordReader, SplitIndex, usable_records

ATTEMPTS = 100
"""Samples that are tried for one place."""

AHEAD = 3
"""Micro-batches that each worker may be in front of training."""

TOGETHER = 64
"""Samples of an epoch that are read together."""

DRAWN = 1024
"""Global batches whose tasks are drawn at once."""


class NothingForTask(UserError):
    """A task with a weight that no record of the training split has anything for."""


class Stream:
    """The training samples of a data set by task and place, 0, 1, ... over all epochs.  Shared by threads."""

    def __init__(self, config: DataConfig, *, seed: int, quarantine: Path | None = None, first: float = 0.0) -> None:
        """``quarantine``: the file that names what cannot be used; ``first``: see :meth:`SplitIndex.open`.

        Raises what that raises, and NothingForTask.
        """
        self.config = config
        self.seed = seed
        self.index = SplitIndex.open(config, "train", quarantine=quarantine, first=first)
        self.tasks = {task: weight for task, weight in config.tasks.items() if weight > 0}
        draw = random.Random(0)
        self._counts = {
            task: sample_counts(self.index, partial(training_samples, task=task, config=config, rng=draw))
            for task in self.tasks
        }
        self._orders: dict[tuple[str, int], EpochOrder] = {}
        self._lock = threading.Lock()
        for task, counts in self._counts.items():
            if not counts.any():
                raise NothingForTask(f"data.tasks: no record of {config.root}/train has anything for task {task!r}")

    def order(self, task: str, epoch: int) -> EpochOrder:
        """The order of one epoch of one task."""
        with self._lock:
            if (task, epoch) not in self._orders:
                # A batch may cross from one epoch into the next; older ones are done.
                self._orders = {place: order for place, order in self._orders.items() if place != (task, epoch - 2)}
                self._orders[task, epoch] = EpochOrder(
                    self._counts[task],
                    key=key_of(self.seed, epoch, task),
                    window=self.config.shuffle_buffer,
                    lengths=self.index.lengths(task) if self.config.bucket else None,
                    bucket=self.config.bucket,
                )
            return self._orders[task, epoch]

    def epoch_length(self, task: str) -> int:
        """Samples of ``task`` in every epoch."""
        return int(self._counts[task].sum())

    def locate(self, task: str, place: int) -> tuple[int, int, int]:
        """(record, which of its samples, epoch) at a place."""
        epoch, within = divmod(place, self.epoch_length(task))
        return (*self.order(task, epoch).locate(within), epoch)

    def instead(self, task: str, place: int, attempt: int) -> int:
        """Another place of the same epoch, the ``attempt``-th that is tried where ``place`` cannot be used."""
        length = self.epoch_length(task)
        drawn = int(hashed(key_of(self.seed, task, "instead", place), np.array(attempt))[0])
        return place // length * length + drawn % length

    def batches(self, rows: int, start: StreamState | None = None) -> Iterator[tuple[str, int]]:
        """(task, first place) of every global batch of ``rows`` samples from a state on."""
        state = start or StreamState(samples={})
        taken = {task: state.samples.get(task, 0) for task in self.tasks}
        first = state.batches
        while True:
            for task in tasks_of_batches(self.tasks, self.seed, first, DRAWN):
                yield task, taken[task]
                taken[task] += rows
            first += DRAWN


def sample_counts(index: SplitIndex, samples: Callable[[Record], Sequence[Sample]]) -> Integers:
    """How many ``samples`` each record gives, [records]; nothing but the index is read."""
    if not len(index.rows):
        return np.zeros(0, np.int64)
    kinds, kind = np.unique(index.rows["said"], axis=0, return_inverse=True)
    given = [len(samples(stand_in(said))) for said in kinds.tolist()]
    return np.array(given, dtype=np.int64)[kind.reshape(-1)]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sample with its image as a tensor, if one was wanted."""

    sample: Sample
    pixels: Tensor | None = None


class RowReader:
    """Places of a stream -> rows.  For one thread."""

    def __init__(self, stream: Stream, encoder: SampleEncoder | None = None) -> None:
        """``encoder``: decodes the images; None: they stay as they are, and damaged ones unseen."""
        self._stream = stream
        self._encoder = encoder
        self._reader = RecordReader(stream.index)
        self._held: tuple[tuple[str, int, int], list[Row] | BadSample] | None = None

    def rows(self, task: str, places: range, progress: Progress) -> list[Row]:
        """The rows at places, whose records are asked of the disk together; raises what :meth:`row` raises."""
        records = dict.fromkeys(self._stream.locate(task, place)[0] for place in places)
        for record in records:
            self._reads(record, progress)
            self._reader.expect(record)
        return [self.row(task, place, progress) for place in places]

    def row(self, task: str, place: int, progress: Progress) -> Row:
        """The row at a place, or what stands in for it; raises UserError when the budget for bad samples is spent."""
        for attempt in range(ATTEMPTS):
            tried = self._stream.instead(task, place, attempt) if attempt else place
            record, number, epoch = self._stream.locate(task, tried)
            rows = self._rows(task, record, epoch, progress)
            if not isinstance(rows, BadSample):
                return rows[number]
            self._stream.index.report(record, rows)
            last = rows
        raise UserError(
            f"data.root: {ATTEMPTS} samples of {self._stream.config.root} cannot be used, the last one for: {last}"
        )

    def close(self) -> None:
        """Close every file."""
        self._reader.close()

    def _rows(self, task: str, record: int, epoch: int, progress: Progress) -> list[Row] | BadSample:
        """All rows that a record gives, kept until another record is wanted: they stand side by side."""
        which = (task, record, epoch)
        if self._held is None or self._held[0] != which:
            try:
                self._held = which, self._made(task, record, epoch, progress)
            except BadSample as fault:
                self._held = which, fault
        return self._held[1]

    def _reads(self, record: int, progress: Progress) -> None:
        progress.at((record, "read"), patience=self._stream.index.patience(record))

    def _made(self, task: str, record: int, epoch: int, progress: Progress) -> list[Row]:
        self._reads(record, progress)
        content = self._reader.read(record)
        progress.at((record, "decode"))
        rng = random.Random(f"{self._stream.seed}/{epoch}/{task}/{content.key}")
        samples = training_samples(content, task, self._stream.config, rng)
        pixels = None if self._encoder is None else self._encoder.encode_image(content.image)
        return [Row(sample=sample, pixels=pixels) for sample in samples]


def records(data: DataConfig | Path | str, split: str, *, shuffle: tuple[str, int] | None = None) -> Iterator[Record]:
    """Records of a split, in manifest order, or shuffled by ``(seed, window)``; those that cannot be used are left out.

    ``data``: a recipe's section, or a directory of shards.  Raises what :meth:`SplitIndex.open` raises.
    """
    index = SplitIndex.open(data if isinstance(data, DataConfig) else DataConfig(root=str(data)), split)
    order = np.arange(len(index.rows))
    if shuffle is not None:
        order = permutation(len(order), key_of(shuffle[0]), window=shuffle[1])
    return usable_records(index, order)


def epoch_samples(config: DataConfig, task: str, *, seed: int, epoch: int) -> Iterator[Sample]:
    """One epoch of training samples of one task, shuffled by (seed, epoch); none if no record has anything for it."""
    try:
        stream = Stream(replace(config, tasks={task: 1.0}), seed=seed)
    except NothingForTask:
        return
    with closing(RowReader(stream)) as reader:
        length = stream.epoch_length(task)
        for first in range(epoch * length, (epoch + 1) * length, TOGETHER):
            places = range(first, min(first + TOGETHER, (epoch + 1) * length))
            yield from (row.sample for row in reader.rows(task, places, Progress()))


def global_batches(
    config: DataConfig, *, seed: int, rows: int, start: StreamState | None = None
) -> Iterator[list[Sample]]:
    """Endless batches of ``rows`` samples, each of one task drawn by its weight, from a state on; images are not decoded."""
    stream = Stream(config, seed=seed)
    with closing(RowReader(stream)) as reader:
        for task, first in stream.batches(rows, start):
            yield [row.sample for row in reader.rows(task, range(first, first + rows), Progress())]


def training_batches(
    config: DataConfig,
    encoder: SampleEncoder,
    *,
    seed: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int = 1,
    rank: int = 0,
    world_size: int = 1,
    start: StreamState | None = None,
    quarantine: Path | None = None,
    agreed: Callable[[int], bool] = lambda fingerprint: True,
) -> Iterator[Batch]:
    """Endless micro-batches of this rank; ``gradient_accumulation_steps`` consecutive ones make its global batch.

    ``start``: go on from there.  ``quarantine``: the file that names samples that cannot be used, shared by all ranks.
    ``agreed``: whether all ranks have the same number, which tells records apart; called once.  Raises what Stream raises, at
    once, and UserError where ranks see other records or more of the data is bad than the recipe lets pass.
    """
    stream = Stream(config, seed=seed, quarantine=quarantine, first=rank / world_size)
    if not agreed(stream.index.fingerprint()):
        raise UserError(
            f"data.root: the ranks do not see the same records under {config.root}: prepare the data on every machine alike, "
            "and start again if one could not read a shard"
        )
    rows = micro_batch_size * world_size * gradient_accumulation_steps

    def jobs() -> Iterator[tuple[str, range]]:
        for task, first in stream.batches(rows, start):
            for step in range(gradient_accumulation_steps):
                mine = first + (step * world_size + rank) * micro_batch_size
                yield task, range(mine, mine + micro_batch_size)

    return iter(wds.DataPipeline(jobs, partial(_read_ahead, stream, encoder), partial(_collated, encoder)))


def _read_ahead(stream: Stream, encoder: SampleEncoder, jobs: Iterator[tuple[str, range]]) -> Iterator[list[Row]]:
    """The rows of every job, read and decoded by threads that are in front of training."""
    readers = threading.local()

    def rows_of(job: tuple[str, range], progress: Progress) -> list[Row]:
        if not hasattr(readers, "reader"):
            readers.reader = RowReader(stream, encoder)
        return readers.reader.rows(*job, progress)

    return in_background(
        rows_of,
        jobs,
        workers=stream.config.workers,
        ahead=AHEAD * stream.config.workers,
        timeout=stream.config.read_timeout,
        on_stall=stream.index.give_up,
    )


def _collated(encoder: SampleEncoder, ready: Iterator[list[Row]]) -> Iterator[Batch]:
    """Texts are encoded here and not ahead, because a tokenizer serves one thread at a time."""
    for rows in ready:
        decoded = {row.sample.image: row.pixels for row in rows if row.pixels is not None}
        yield encoder.collate([row.sample for row in rows], decoded)


def split_samples(
    config: DataConfig, split: str, task: str, *, max_samples: int = 0, rank: int = 0, world_size: int = 1
) -> list[Sample]:
    """This rank's share of an evaluation; ``max_samples`` (0: all) picks them evenly spaced over the whole split.

    Nothing else is read.  Samples that cannot be used are left out, on all ranks alike.  Raises what SplitIndex.open raises.
    """
    index = SplitIndex.open(config, split)
    ends = np.cumsum(sample_counts(index, partial(evaluation_samples, task=task, config=config)))
    count = int(ends[-1]) if len(ends) else 0
    picked = min(max_samples, count) or count
    places = np.arange(picked) * count // max(1, picked)
    numbers = np.searchsorted(ends, places, side="right")
    samples = []
    with closing(RecordReader(index)) as reader:
        for record in np.unique(numbers).tolist():
            try:
                content = reader.read(record)
                check_image(content.image)
            except BadSample as fault:
                index.report(record, fault)
                continue
            made = evaluation_samples(content, task, config)
            begin = int(ends[record]) - len(made)
            samples += [made[place - begin] for place in places[numbers == record].tolist()]
    return samples[rank::world_size]


def required_samples(config: DataConfig, split: str, task: str, *, max_samples: int = 0) -> list[Sample]:
    """What :func:`split_samples` gives, for whoever cannot do without; raises ConfigError where that is nothing."""
    samples = split_samples(config, split, task, max_samples=max_samples)
    if not samples:
        raise nothing_for_task(config, split, task)
    return samples


def nothing_for_task(config: DataConfig, split: str, task: str) -> ConfigError:
    """The error of a split that gives no sample of a task."""
    return ConfigError(f"data.root: {config.root}/{split} has nothing for task {task!r}")


def withheld_samples(config: DataConfig, split: str, task: str, *, max_samples: int = 0) -> list[Sample]:
    """What is published without answers in a split; ``max_samples`` (0: all) picks as :func:`split_samples` does.

    The whole split is read: an index counts what has answers.  Raises what SplitIndex.open raises.
    """
    found = [
        sample
        for record in records(config, split)
        for sample in evaluation_samples(record, task, config, withheld=True)
    ]
    picked = min(max_samples, len(found)) or len(found)
    return [found[place * len(found) // picked] for place in range(picked)]


def corpus(config: DataConfig) -> Iterator[str]:
    """Every prompt and answer of the training split as it stands in a row, for training a tokenizer."""
    for record in records(config, "train"):
        for task in TASKS[:2]:
            for sample in evaluation_samples(record, task, config):
                for turn in sample.turns:
                    yield turn.prompt
                    yield from (f" {turn.prompt}", f" {turn.answer}")
        yield from (f" {caption}" for caption in record.captions)
