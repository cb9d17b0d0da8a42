"""The same global batches for any number of processes, before and after a restart; and a restart seeks."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise

import numpy as np
import pytest

from free_dist.config import DataConfig, UserError
from free_dist.data.order import EpochOrder, StreamState, key_of, permutation, tasks_of_batches
from free_dist.data.samples import training_samples
from free_dist.data.shard_index import said, stand_in
from free_dist.data.split_index import RecordReader
from free_dist.data.stream import Stream, global_batches, training_batches

pytestmark = pytest.mark.elastic

ROWS = 12
"""Rows of a global batch: as many for one, two, three and four processes."""


def test_ranks_come_and_go_in_the_middle_of_an_epoch_and_nothing_changes(
    written, stream_config, in_processes, tiny_encoder
) -> None:
    config = stream_config(written())
    length = Stream(config, seed=3).epoch_length("vqa")
    needed = 2 * (length // ROWS) + 20  # more than one epoch of each task
    whole = in_processes(config, tiny_encoder, needed, world=1)
    pieces, start, done = [], None, 0
    for world, count in ((4, 7), (2, 9), (3, needed - 30), (1, 14)):
        pieces += in_processes(config, tiny_encoder, count, world, start=start)
        done += count
        state = StreamState.after(done, weights=config.tasks, seed=3, rows=ROWS)
        start = StreamState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert done == needed
    assert pieces == whole
    asked = [row for batch in whole for row in batch if row[0] == "vqa"][:length]
    assert len(asked) == length == len({key for _, key, _ in asked})


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_an_epoch_shows_every_sample_once_and_the_next_one_does_so_in_another_order(
    written, stream_config, some_records, task
) -> None:
    config = stream_config(written(), tasks={task: 1.0})
    length = Stream(config, seed=1).epoch_length(task)
    shown = [s.key for batch in islice(global_batches(config, seed=1, rows=length), 3) for s in batch]
    epochs = [shown[i * length : (i + 1) * length] for i in range(3)]
    wanted = Counter(
        f"{record.key}-q{i}" if task == "vqa" else record.key
        for record in some_records
        for i in range(min(len(record.questions), 4) if task == "vqa" else bool(record.captions))
    )
    assert all(Counter(epoch) == wanted for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_cut_into_shards_the_workers_and_the_rows_of_a_batch_do_not_change_the_order(
    written, stream_config, tiny_encoder
) -> None:
    def keys(config: DataConfig, rows: int) -> list[str]:
        batches = training_batches(config, tiny_encoder, seed=5, micro_batch_size=rows)
        return [key for batch in islice(batches, 120 // rows) for key in batch.keys]

    one = keys(stream_config(written(), tasks={"caption": 1.0}), 12)
    other = written(records_per_shard=7, name="other")
    assert keys(stream_config(other, tasks={"caption": 1.0}), 12) == one
    assert keys(stream_config(other, tasks={"caption": 1.0}, workers=3), 12) == one
    assert keys(stream_config(other, tasks={"caption": 1.0}, workers=0), 6) == one


class Counted:
    """Counts what a reader reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records: list[int] = []
        read = RecordReader.read
        monkeypatch.setattr(RecordReader, "read", lambda reader, n: self.records.append(n) or read(reader, n))


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_restart_reads_no_record_but_those_it_gives(written, stream_config, monkeypatch, share: float) -> None:
    config = stream_config(written(), tasks={"caption": 1.0})
    stream = Stream(config, seed=0)
    done = int(share * stream.epoch_length("caption")) // 4
    state = StreamState.after(done, weights=config.tasks, seed=0, rows=4)
    counted = Counted(monkeypatch)
    batch = next(global_batches(config, seed=0, rows=4, start=state))
    whole = [s.key for b in islice(global_batches(config, seed=0, rows=4), done + 1) for s in b]
    assert [s.key for s in batch] == whole[4 * done :]
    assert len(counted.records) == 4 + len(whole)


@pytest.mark.parametrize("done", [0, 1, 5, 2000])
def test_a_state_is_what_counting_gives(done: int) -> None:
    weights = {"vqa": 3.0, "caption": 1.0, "dialogue": 0.0}
    drawn = Counter(tasks_of_batches(weights, 9, 0, done))
    state = StreamState.after(done, weights=weights, seed=9, rows=8)
    assert state.samples == {"vqa": 8 * drawn["vqa"], "caption": 8 * drawn["caption"]}
    assert StreamState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    assert tasks_of_batches(weights, 9, done, 50) == tasks_of_batches(weights, 9, 0, done + 50)[done:]


@pytest.mark.parametrize("content", [{}, {"batches": -1, "samples": {}}, {"batches": 1, "samples": {"vqa": "2"}}])
def test_a_damaged_state_is_a_clear_error(content: dict[str, object]) -> None:
    with pytest.raises(UserError, match="state of a data stream"):
        StreamState.from_dict(content)


# --- the permutation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "window", "bucket"), [(0, 5, 0), (1, 5, 3), (1000, 64, 0), (1000, 64, 7), (999, 5000, 16)]
)
def test_every_number_stands_once(count: int, window: int, bucket: int) -> None:
    order = permutation(count, 7, window=window, lengths=np.arange(count) % 13, bucket=bucket)
    assert sorted(order.tolist()) == list(range(count))


def test_a_window_mixes_distant_parts_and_reads_neighbours() -> None:
    order = permutation(100_000, 7, window=4096)
    window = np.sort(order[4096:8192])
    assert len(np.unique(window // 1000)) > 45  # of a hundred parts, 64 runs touch 47 +- 3
    assert (np.diff(window) == 1).mean() > 0.95  # 64 consecutive records at a time
    moved = np.corrcoef(np.arange(100_000), permutation(100_000, 7, window=100_000))[0, 1]
    assert abs(moved) < 0.02


def test_all_orders_of_three_are_equally_likely() -> None:
    seen = Counter(tuple(permutation(3, key_of("fair", i), window=3).tolist()) for i in range(3000))
    assert len(seen) == 6 and all(400 < times < 600 for times in seen.values())  # mean 500, standard deviation 20


def test_a_bucket_holds_similar_lengths_and_buckets_are_shuffled() -> None:
    lengths = np.random.default_rng(0).integers(0, 1000, 4096)
    order = permutation(4096, 1, window=4096, lengths=lengths, bucket=16)
    spread = np.ptp(lengths[order].reshape(-1, 16), axis=1)
    plain = np.ptp(lengths[permutation(4096, 1, window=4096)].reshape(-1, 16), axis=1)
    assert spread.max() < 20 < plain.min()
    means = lengths[order].reshape(-1, 16).mean(1)
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.2


def test_places_of_one_record_stand_side_by_side() -> None:
    counts = np.array([2, 0, 3, 1])
    order = EpochOrder(counts, key=4, window=2)
    places = [order.locate(place) for place in range(len(order))]
    assert sorted(places) == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2), (3, 0)]
    assert all(a == b or nb == 0 for (a, _), (b, nb) in pairwise(places))
    with pytest.raises(IndexError):
        order.locate(6)


def test_what_is_said_of_a_record_tells_how_many_samples_it_gives(some_records, tiny_data) -> None:
    def numbers() -> Iterator[tuple[int, int]]:
        for record in some_records:
            for task in ("vqa", "caption", "dialogue"):
                make: Callable = lambda r, t=task: len(training_samples(r, t, tiny_data, random.Random(1)))  # noqa: E731
                yield make(record), make(stand_in(said(record)))

    assert all(real == predicted for real, predicted in numbers())


def test_bucketing_saves_padding_and_keeps_every_sample(written, stream_config, tiny_encoder) -> None:
    root = written()

    def epoch(bucket: int) -> tuple[list[str], int]:
        config = stream_config(root, tasks={"caption": 1.0}, shuffle_buffer=1000, bucket=bucket)
        batches = list(islice(training_batches(config, tiny_encoder, seed=0, micro_batch_size=12), 16))
        padding = sum(int((batch.input_ids == tiny_encoder.layout.pad_token_id).sum()) for batch in batches)
        return [key for batch in batches for key in batch.keys], padding

    plain, bucketed = epoch(0), epoch(12)
    assert sorted(plain[0]) == sorted(bucketed[0])
    assert bucketed[1] < 0.7 * plain[1]


def test_ranks_that_see_other_records_do_not_start(written, some_records, stream_config, tiny_encoder) -> None:
    seen: list[int] = []

    def agreed(fingerprint: int) -> bool:
        seen.append(fingerprint)
        return len(set(seen)) == 1

    for name, rows in (("one", some_records), ("same", some_records), ("less", some_records[1:])):
        config = stream_config(written(rows, records_per_shard=20 + len(seen), name=name))
        if name == "less":
            with pytest.raises(UserError, match="do not see the same records"):
                training_batches(config, tiny_encoder, seed=0, micro_batch_size=2, agreed=agreed)
        else:
            training_batches(config, tiny_encoder, seed=0, micro_batch_size=2, agreed=agreed)
