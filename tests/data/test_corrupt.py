"""Damaged shards and samples: the run goes on, the same samples are skipped by any number of processes, and each is named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice, zip_longest
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from free_dist.config import DataConfig, UserError
from free_dist.data.images import check_image
from free_dist.data.quarantine import BadSample, Fault, Quarantine
from free_dist.data.records import record_json
from free_dist.data.samples import SampleEncoder
from free_dist.data.shard_index import SUFFIX
from free_dist.data.shards import MANIFEST, read_manifest
from free_dist.data.sources import fetch
from free_dist.data.split_index import RecordReader, SplitIndex
from free_dist.data.stream import records, split_samples, training_batches

pytestmark = pytest.mark.corrupt

Members = list[tuple[str, bytes]]


def members_of(shard: Path) -> Members:
    with tarfile.open(shard) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def write_members(shard: Path, members: Members) -> None:
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def accept(root: Path, number: int) -> None:
    """Make the manifest say what the shard is now: damage that was there when the shard was made."""
    manifest = read_manifest(root, "train")
    content = (root / "train" / manifest.shards[number].name).read_bytes()
    shards = list(manifest.shards)
    shards[number] = replace(shards[number], bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (root / "train" / MANIFEST).write_text(json.dumps(asdict(replace(manifest, shards=tuple(shards)))))


def edit(change: Callable[[Members], Members]) -> Callable[[Path, int], None]:
    def damage(root: Path, number: int) -> None:
        shard = root / "train" / f"{number:06d}.tar"
        write_members(shard, change(members_of(shard)))
        accept(root, number)

    return damage


def cut_image(members: Members) -> Members:
    return [*members[:2], (members[2][0], members[2][1][:300]), *members[3:]]


def cut_file(root: Path, number: int, *, known: bool) -> None:
    shard = root / "train" / f"{number:06d}.tar"
    content = shard.read_bytes()
    middle = content.index(b"picture-", len(content) // 2) + 600
    shard.write_bytes(content[:middle])
    if known:
        accept(root, number)


def flip_a_bit(root: Path, number: int) -> None:
    shard = root / "train" / f"{number:06d}.tar"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)


def emptied(root: Path, number: int) -> None:
    (root / "train" / f"{number:06d}.tar").write_bytes(bytes(10240))
    accept(root, number)


DAMAGES: dict[str, Callable[[Path, int], None]] = {
    "corrupt image": edit(cut_image),
    "missing field": edit(lambda members: [*members[:3], *members[4:]]),
    "bad json": edit(lambda members: [*members[:3], (members[3][0], b'{"captions": [{}]}'), *members[4:]]),
    "duplicate key": edit(lambda members: [*members[2:4], *members]),
    "empty shard": emptied,
    "truncated tar": lambda root, number: cut_file(root, number, known=True),
    "truncated shard": lambda root, number: cut_file(root, number, known=False),
    "wrong checksum": flip_a_bit,
    "missing shard": lambda root, number: (root / "train" / f"{number:06d}.tar").unlink(),
}
"""Reason in the quarantine -> how to bring it about in one shard."""


def named(quarantine: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in quarantine.read_text().splitlines()]


def usable_keys(root: Path, bad: set[str]) -> set[str]:
    """Keys of the records that ``tarfile`` finds in the undamaged part of the shards, by its own reading."""
    return {record.key for record in records(root, "train")} - bad


@pytest.fixture
def damaged(written) -> Path:
    """Nine shards of twelve with one fault each, the first three sound."""
    root = written()
    for number, damage in enumerate(DAMAGES.values(), start=3):
        damage(root, number)
    return root


def test_all_worlds_skip_the_same_samples_and_name_them(
    damaged, stream_config, in_processes, tiny_encoder, some_records, tmp_path
) -> None:
    config = stream_config(damaged, tasks={"caption": 1.0}, bad_sample_budget=0.6)
    runs, lines = [], []
    for world in (1, 2, 3, 4):
        path = tmp_path / str(world) / "quarantine.jsonl"
        runs.append(in_processes(config, tiny_encoder, 14, world, quarantine=path))
        lines.append({(line["shard"], line["key"], line["reason"], line["samples"]) for line in named(path)})
    assert runs[1:] == runs[:1] * 3
    assert lines[1:] == lines[:1] * 3
    assert {reason for _, _, reason, _ in lines[0]} == set(DAMAGES)
    for number, reason in enumerate(DAMAGES, start=3):
        assert {why for shard, _, why, _ in lines[0] if shard == f"{number:06d}.tar"} <= {reason, "missing field"}
    # What is left, each at least once: 60 sound records, 4 x 19 or 20, half of a shard; less those without a caption.
    shown = {key for batch in runs[0] for _, key, _ in batch}
    lost_shards = {shard for shard, key, _, _ in lines[0] if key is None and shard != "000008.tar"}
    lost_keys = {key for _, key, reason, _ in lines[0] if reason != "duplicate key"}
    wanted = {
        record.key
        for i, record in enumerate(some_records)
        if record.captions and f"{i // 20:06d}.tar" not in lost_shards and record.key not in lost_keys and i // 20 != 8
    }
    assert shown - {record.key for record in some_records[160:180]} == wanted
    assert 5 <= len(shown - wanted) <= 10  # of the truncated tar


@pytest.mark.parametrize("reason", DAMAGES)
def test_one_fault_is_over_a_budget_of_nothing_and_the_message_says_which(
    written, stream_config, tiny_encoder, tmp_path, reason: str
) -> None:
    root = written()
    DAMAGES[reason](root, 4)
    config = stream_config(root, tasks={"caption": 1.0}, bad_sample_budget=0.0, shuffle_buffer=1)
    with pytest.raises(UserError, match=r"data\.bad_sample_budget=0\.0: \d+ of 240 .* 000004\.tar .*quarantine\.jsonl"):
        for _ in islice(
            training_batches(
                config, tiny_encoder, seed=0, micro_batch_size=12, quarantine=tmp_path / "quarantine.jsonl"
            ),
            16,
        ):
            pass
    assert reason in {line["reason"] for line in named(tmp_path / "quarantine.jsonl")}


def test_a_shard_that_disappears_is_skipped_by_ranks_that_had_it_open_too(
    written, stream_config, tiny_encoder, some_records, tmp_path
) -> None:
    config = stream_config(written(), tasks={"caption": 1.0}, bad_sample_budget=0.5, workers=0, shuffle_buffer=1000)

    def keys_after_loss(world: int) -> list[list[str]]:
        root = written(name=f"of{world}")
        lost = root / "train" / "000003.tar"
        ranks = [
            training_batches(
                replace(config, root=str(root)),
                tiny_encoder,
                seed=0,
                micro_batch_size=12 // world,
                rank=rank,
                world_size=world,
                quarantine=tmp_path / f"{world}.jsonl",
            )
            for rank in range(world)
        ]
        found = []
        for step in range(16):
            if step == 6:
                lost.unlink()
            found.append([key for rank in ranks for key in next(rank).keys])
        return found

    one, *others = [keys_after_loss(world) for world in (1, 2, 3, 4)]
    assert others == [one] * 3
    gone = {record.key for record in some_records[60:80]}
    before, after = ({key for batch in part for key in batch} for part in (one[:6], one[6:]))
    assert gone & before and not gone & after
    kept = {record.key for record in some_records if record.captions} - gone
    assert kept <= before | after
    lines = [named(tmp_path / f"{world}.jsonl") for world in (1, 2, 3, 4)]
    assert all({line["key"] for line in found} == {line["key"] for line in lines[0]} <= gone for found in lines)
    assert {line["reason"] for found in lines for line in found} == {"missing shard"}


def test_a_shard_replaced_by_another_while_it_is_read_is_noticed(
    written, stream_config, tiny_encoder, tmp_path
) -> None:
    root = written()
    config = stream_config(root, tasks={"caption": 1.0}, bad_sample_budget=0.5, shuffle_buffer=1)
    batches = training_batches(config, tiny_encoder, seed=0, micro_batch_size=12, quarantine=tmp_path / "q.jsonl")
    next(batches)
    for number in range(12):
        shard = root / "train" / f"{number:06d}.tar"
        shard.write_bytes(shard.read_bytes().replace(b"noise", b"voice"))
    with pytest.raises(UserError, match="wrong checksum"):
        for _ in batches:
            pass


class Stalling(SampleEncoder):
    """Never comes back from some images."""

    def __init__(self, encoder: SampleEncoder, images: set[bytes]) -> None:
        super().__init__(encoder.tokenizer, encoder.image_processor, encoder.layout, encoder.max_length)
        self.images = images

    def encode_image(self, image: bytes):
        if image in self.images:
            threading.Event().wait()
        return super().encode_image(image)


def test_a_decoder_that_hangs_is_given_up_alike_by_all_worlds(
    written, stream_config, in_processes, tiny_encoder, some_records, tmp_path
) -> None:
    config = stream_config(written(), tasks={"caption": 1.0}, bad_sample_budget=0.5, read_timeout=2.0, workers=2)
    hanging = some_records[101:103]
    encoder = Stalling(tiny_encoder, {record.image for record in hanging})
    runs = [in_processes(config, encoder, 16, world, quarantine=tmp_path / f"{world}.jsonl") for world in (1, 3)]
    assert runs[0] == runs[1]
    shown = {key for batch in runs[0] for _, key, _ in batch}
    assert shown == {record.key for record in some_records if record.captions} - {record.key for record in hanging}
    for world in (1, 3):
        lines = named(tmp_path / f"{world}.jsonl")
        assert {line["key"] for line in lines} == {record.key for record in hanging}
        assert {line["reason"] for line in lines} == {"stalled reader"}


@pytest.mark.parametrize("worlds", [(1, 3), (2, 4)])
def test_a_shard_on_which_readers_hang_is_given_up_alike_by_all_worlds(
    written, stream_config, in_processes, tiny_encoder, some_records, tmp_path, monkeypatch, worlds
) -> None:
    config = stream_config(written(), tasks={"caption": 1.0}, bad_sample_budget=0.5, read_timeout=2.0)
    read = os.pread

    def hung(descriptor: int, size: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("000005.tar"):
            threading.Event().wait()
        return read(descriptor, size, offset)

    list(records(config.root, "train"))  # indexed
    monkeypatch.setattr(os, "pread", hung)
    lost = {record.key for record in some_records[100:120] if record.captions}
    runs = []
    for world in worlds:
        begun = time.monotonic()
        runs.append(in_processes(config, tiny_encoder, 16, world, quarantine=tmp_path / f"{world}.jsonl"))
        # The first read of the shard waits 2 s in each process, the others a tenth of that.
        assert time.monotonic() - begun < 2.0 * len(lost)
        assert {line["key"] for line in named(tmp_path / f"{world}.jsonl")} == lost
    assert runs[0] == runs[1]
    assert {key for batch in runs[0] for _, key, _ in batch} == {r.key for r in some_records if r.captions} - lost


def test_damaged_indices_are_made_again(written, some_records) -> None:
    root = written()
    keys = [record.key for record in records(root, "train")]
    for number, content in enumerate((b"", b"PK\3\4nonsense", None)):
        index = root / "train" / f"{number:06d}.tar{SUFFIX}"
        index.write_bytes(index.read_bytes()[:-40] if content is None else content)
    assert [record.key for record in records(root, "train")] == keys == [record.key for record in some_records]


def test_an_index_of_another_shard_is_not_believed(written, some_records) -> None:
    root = written()
    list(records(root, "train"))
    first, second = (root / "train" / f"{number:06d}.tar{SUFFIX}" for number in (0, 1))
    second.write_bytes(first.read_bytes())
    assert [record.key for record in records(root, "train")] == [record.key for record in some_records]


def test_the_quarantine_is_shared_and_outlives_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    one, other = (Quarantine(path, place="here train", total=100, budget=0.02) for _ in range(2))
    one.add(Fault(shard="a.tar", key="x", reason="corrupt image"))
    with path.open("a") as file:
        file.write('{"split": "here tr\n[1]\n')
    other.add(Fault(shard="a.tar", key="x", reason="corrupt image"))
    other.add(Fault(shard="a.tar", key="y", reason="corrupt image"))
    assert other.lost == 2
    with pytest.raises(UserError, match=r"3 of 100 records of here train .* a\.tar z: bad json .* raise the budget"):
        one.add(Fault(shard="a.tar", key="z", reason="bad json"))
    assert len([line for line in path.read_text().splitlines() if '"key"' in line]) == 3
    assert Quarantine(path, place="there train", total=100, budget=0.0).lost == 0


def test_a_run_that_starts_again_counts_what_it_finds_and_not_what_was_repaired(
    written, some_records, tmp_path
) -> None:
    root, path = written(), tmp_path / "quarantine.jsonl"
    shard = root / "train" / "000003.tar"
    whole = shard.read_bytes()
    flip_a_bit(root, 3)
    config = DataConfig(root=str(root))
    for _ in range(2):  # found again, and written once
        with pytest.raises(UserError, match=r"20 of \d+ records .* wrong checksum"):
            SplitIndex.open(config, "train", quarantine=path)
        assert len(named(path)) == 1
    shard.write_bytes(whole)
    assert len(SplitIndex.open(config, "train", quarantine=path).rows) == len(some_records)


# --- remote shards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "file", "pipe"])
def test_remote_shards_give_the_rows_of_local_ones(
    written, stream_config, rank_rows, tiny_encoder, tmp_path, kind
) -> None:
    import fsspec

    root = written()
    if kind == "memory":
        fsspec.filesystem("memory").put(str(root), "/bucket", recursive=True)
    url = {"memory": "memory://bucket", "file": f"file://{root}", "pipe": f"pipe:cat '{root}/{{}}'"}[kind]
    config = stream_config(url, cache=str(tmp_path / "cache"))
    assert rank_rows(config, tiny_encoder, 9, 0, 1) == rank_rows(stream_config(root), tiny_encoder, 9, 0, 1)
    if kind == "pipe":  # the copies are used, not the source
        for shard in (root / "train").glob("*.tar"):
            shard.unlink()
        assert len(rank_rows(config, tiny_encoder, 9, 0, 1)) == 9


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_remote_shard_that_came_damaged_is_fetched_again_once_it_is_put_right(written, tmp_path: Path, kind) -> None:
    root, cache = written(), str(tmp_path / "cache")
    shard = root / "train" / "000002.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2000])
    remote = f"pipe:cat {root}/{{}}" if kind == "pipe" else f"file://{root}"
    config = DataConfig(root=remote, cache=cache, bad_sample_budget=0.5)
    keys = [record.key for record in records(config, "train")]
    shard.write_bytes(whole)
    assert len(list(records(config, "train"))) == len(keys) + 20


def test_a_url_that_stalls_or_whose_backend_fails_is_a_fault(tmp_path: Path) -> None:
    class Hanging(MemoryFileSystem):
        protocol = "hanging"

        def open(self, path, mode="rb", **_options):
            if path.endswith("fails"):
                raise RuntimeError("credentials expired")
            threading.Event().wait()

    fsspec.register_implementation("hanging", Hanging, clobber=True)
    begun = time.monotonic()
    with pytest.raises(BadSample, match="stalled reader: 0 bytes came from hanging://x/shard"):
        fetch("hanging://x", "shard", tmp_path / "shard", limit=100, timeout=1.0)
    assert time.monotonic() - begun < 5
    with pytest.raises(BadSample, match=r"missing shard: hanging://x/fails: RuntimeError\('credentials expired'\)"):
        fetch("hanging://x", "fails", tmp_path / "shard", limit=100, timeout=5.0)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_that_stalls_fails_or_never_ends_is_a_fault_and_leaves_no_process(
    written, stream_config, tiny_encoder, tmp_path
) -> None:
    root = written()
    script = tmp_path / "source.sh"
    script.write_text(
        'case "$1" in */000001.tar) head -c 3000 "$2/$1"; sleep 987;; */000002.tar) exit 3;; '
        '*/000003.tar) cat /dev/zero;; *) cat "$2/$1";; esac\n'
    )
    config = stream_config(
        f"pipe:sh {script} {{}} {root}",
        tasks={"caption": 1.0},
        cache=str(tmp_path / "cache"),
        read_timeout=3.0,
        bad_sample_budget=0.5,
    )
    batches = training_batches(config, tiny_encoder, seed=0, micro_batch_size=12, quarantine=tmp_path / "q.jsonl")
    next(batches)
    found = {line["shard"]: line["reason"] for line in named(tmp_path / "q.jsonl")}
    assert found == {"000001.tar": "stalled reader", "000002.tar": "missing shard", "000003.tar": "absurd size"}
    assert subprocess.run(["pgrep", "-f", "sleep 987"], stdout=subprocess.DEVNULL, check=False).returncode == 1


# --- what is not a sample -------------------------------------------------------------------------------------------


def test_images_that_are_no_picture_are_refused(tiny_encoder: SampleEncoder) -> None:
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, format="PNG")
    assert len(buffer.getvalue()) < 100_000
    with pytest.raises(BadSample, match="absurd size"):
        tiny_encoder.encode_image(buffer.getvalue())
    for content in (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a" + bytes(40)):
        with pytest.raises(BadSample, match="corrupt image"):
            tiny_encoder.encode_image(content)


HOSTILE: dict[str, tuple[str, bytes]] = {
    "../escape.jpg": ("unsafe name", tarfile.REGTYPE),
    "/etc/absolute.jpg": ("unsafe name", tarfile.REGTYPE),
    "a\\b.jpg": ("unsafe name", tarfile.REGTYPE),
    "link.jpg": ("not a plain file", tarfile.SYMTYPE),
    "hard.jpg": ("not a plain file", tarfile.LNKTYPE),
    "device.jpg": ("not a plain file", tarfile.CHRTYPE),
    "pipe.jpg": ("not a plain file", tarfile.FIFOTYPE),
    "picture-x.pkl": ("pickled member", tarfile.REGTYPE),
    "picture-x.pth": ("pickled member", tarfile.REGTYPE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_refused_and_the_others_read(written, some_records, name: str) -> None:
    root = written(some_records[:6], records_per_shard=3)
    reason, kind = HOSTILE[name]
    shard = root / "train" / "000001.tar"
    members = members_of(shard)
    text = (name.rpartition(".")[0] + ".json", record_json(some_records[0]))
    with tarfile.open(shard, "w") as tar:
        for other, content in (*members[:2], (name, some_records[0].image), text, *members[2:]):
            member = tarfile.TarInfo(other)
            if other == name:
                member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    accept(root, 1)
    with pytest.raises(UserError, match=reason):
        list(records(root, "train"))
    index = SplitIndex.open(DataConfig(root=str(root), bad_sample_budget=1.0), "train")
    assert [index.key(i) for i in range(len(index.rows))] == [record.key for record in some_records[:6]]
    assert reason in {fault.reason for fault in index.quarantine.faults}


def test_an_evaluation_leaves_out_what_cannot_be_used_and_reads_no_more_than_it_shows(
    damaged, stream_config, some_records, monkeypatch
) -> None:
    config = stream_config(damaged, bad_sample_budget=0.6)
    whole = split_samples(config, "train", "caption")
    bad = {record.key for record in some_records} - {sample.key for sample in whole}
    assert bad and all(check_image(sample.image) is None for sample in whole)
    shares = [split_samples(config, "train", "caption", rank=rank, world_size=3) for rank in range(3)]
    assert [sample for row in zip_longest(*shares) for sample in row if sample is not None] == whole
    looked_at: list[int] = []
    read = RecordReader.read
    monkeypatch.setattr(RecordReader, "read", lambda self, record: (looked_at.append(record), read(self, record))[1])
    assert 0 < len(split_samples(config, "train", "vqa", max_samples=4)) <= 4
    assert len(looked_at) <= 4
