"""Readers survive any bytes: they give what tarfile gives, or end in one kind of error, and quickly."""

from __future__ import annotations

import io
import json
import random
import tarfile
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import pytest

from free_dist.config import DataConfig, UserError
from free_dist.data.images import decode_image
from free_dist.data.quarantine import BadSample
from free_dist.data.records import Record, record_json
from free_dist.data.shard_index import SUFFIX, build_index, checked_record, load_index, save_index
from free_dist.data.shards import MANIFEST, Shard, ShardError, read_manifest
from free_dist.data.split_index import RecordReader, SplitIndex
from free_dist.data.tar_index import TarSample, tar_samples

pytestmark = pytest.mark.fuzz

ROUNDS = 400


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, a piece removed, doubled or moved, or the end cut off."""
    data = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) or 1)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 1500)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randrange(1, 1500)]
        elif kind == 3:
            del data[max(at, 1) :]
        elif kind == 4:
            data[at : at + 8] = rng.randbytes(8)
        else:
            block = at // 512 * 512  # a header with a right checksum and a wrong field
            if block + 512 <= len(data):
                data[block + rng.choice([0, 100, 124, 135, 156, 257, 345])] = rng.randrange(256)
                data[block + 148 : block + 156] = b" " * 8
                data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
    return bytes(data)


def read_all(content: bytes) -> tuple[list[TarSample], BadSample | None]:
    found = []
    try:
        for sample in tar_samples(lambda at, size: content[at : at + size], len(content)):
            found.append(sample)
    except BadSample as fault:
        return found, fault
    return found, None


def tar_bytes(rows: list[Record], form: int, *, long_names: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for record in rows:
            for suffix, content in (("jpg", record.image), ("json", record_json(record))):
                stem = f"{'ä-long-directory/' * 12 if long_names else ''}{record.key}"
                member = tarfile.TarInfo(f"{stem}.{suffix}")
                member.size = len(content)
                member.mtime = 0.5 if form == tarfile.PAX_FORMAT else 0  # a pax header, as webdataset's writer makes
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def shard_of(path: Path, content: bytes, samples: int) -> Shard:
    path.write_bytes(content)
    return Shard(name=path.name, samples=samples, bytes=len(content), sha256=sha256(content).hexdigest())


@pytest.mark.parametrize("long_names", [False, True])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(some_records, form: int, long_names: bool) -> None:
    if form == tarfile.USTAR_FORMAT and long_names:
        pytest.skip("ustar has no names of this length")
    content = tar_bytes(some_records[:5], form, long_names=long_names)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        wanted = [(member.name, member.offset_data, member.size) for member in tar]
    samples, fault = read_all(content)
    assert fault is None
    assert [(f"{s.key}.{suffix}", *place) for s in samples for suffix, place in s.members.items()] == wanted


def test_shards_of_webdatasets_own_writer_are_read(some_records, tmp_path: Path) -> None:
    import webdataset

    path = tmp_path / "written.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for record in some_records[:9]:
            writer.write({"__key__": record.key, "jpg": record.image, "json": record_json(record), "cls": b"3"})
    index = build_index(path, shard_of(path, path.read_bytes(), 9))
    assert [key.decode() for key in index.keys] == [record.key for record in some_records[:9]]
    assert index.faults == ()


def test_any_bytes_are_read_or_refused(some_records, tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = [tar_bytes(some_records[:4], form) for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT)]
    whole.append(tar_bytes(some_records[:4], tarfile.GNU_FORMAT, long_names=True))
    outcomes = set()
    for round_ in range(ROUNDS):
        content = rng.randbytes(rng.randrange(1, 3000)) if round_ % 10 == 0 else damaged(rng.choice(whole), rng)
        samples, fault = read_all(content)
        for sample in samples:
            assert all(0 <= at <= at + size <= len(content) for at, size in sample.members.values())
        shard = shard_of(tmp_path / "shard.tar", content, 4)
        index = build_index(tmp_path / "shard.tar", shard)
        for key in index.keys:
            name = key.decode()
            assert ".." not in name.split("/") and not name.startswith("/")
        outcomes |= {one.reason for one in index.faults} | ({"sound"} if not index.faults else set())
        assert fault is None or fault.reason in {one.reason for one in index.faults} or len(samples) >= 4
    assert {"damaged tar", "truncated tar", "missing field", "bad json", "sound"} <= outcomes


def test_a_header_cannot_claim_more_than_the_file_has(some_records) -> None:
    content = bytearray(tar_bytes(some_records[:2], tarfile.USTAR_FORMAT))
    for claimed in (b"77777777777\0", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"\xff" * 12):
        content[124:136] = claimed
        content[148:156] = b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:512])
        samples, fault = read_all(bytes(content))
        assert samples == [] and fault is not None and fault.reason in ("truncated tar", "damaged tar")


def test_any_json_is_a_record_or_a_bad_sample(some_records) -> None:
    rng = random.Random(1)
    texts = [record_json(record) for record in some_records[:20]]
    extras = [
        b"[" * 100_000,
        b'{"captions": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe",
        b"null",
        b"{}",
        b'{"questions": {"a": 1}}',
    ]
    extras += [
        json.dumps({"dialogue": [{"question": 1, "answer": 2}]}).encode(),
        b'{"captions": "abc"}',
        b'{"captions": [NaN]}',
    ]
    read = refused = 0
    for content in (*extras, *(damaged(rng.choice(texts), rng) for _ in range(ROUNDS))):
        try:
            record = checked_record("key", b"", content)
        except BadSample:
            refused += 1
        else:
            read += 1
            assert all(isinstance(caption, str) for caption in record.captions)
    assert read and refused


def test_any_image_is_decoded_or_a_bad_sample(some_records) -> None:
    from PIL import Image

    rng = random.Random(2)
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 50).save(buffer, format="PNG")
    images = [buffer.getvalue(), *(record.image for record in some_records[:10])]
    refused = 0
    for _ in range(ROUNDS):
        try:
            assert decode_image(damaged(rng.choice(images), rng)).mode == "RGB"
        except BadSample:
            refused += 1
    assert 0.2 * ROUNDS < refused < ROUNDS


def test_any_index_is_believed_or_made_again(some_records, tmp_path: Path) -> None:
    rng = random.Random(3)
    path = tmp_path / "shard.tar"
    shard = shard_of(path, tar_bytes(some_records[:6], tarfile.USTAR_FORMAT), 6)
    sidecar = tmp_path / f"shard.tar{SUFFIX}"
    save_index(sidecar, build_index(path, shard), shard)
    whole = sidecar.read_bytes()
    assert load_index(sidecar, shard) is not None
    for _ in range(ROUNDS):
        sidecar.write_bytes(damaged(whole, rng))
        index = load_index(sidecar, shard)
        assert index is None or len(index.rows) == len(index.keys) <= 6


def test_a_lying_index_gives_no_other_bytes_than_the_shards(written, some_records) -> None:
    root = written(some_records[:12], records_per_shard=12)
    config = DataConfig(root=str(root), bad_sample_budget=1.0)
    index = SplitIndex.open(config, "train")
    index.rows["image"][3] += 7
    index.rows["json"][4, 1] += 1 << 20
    reader = RecordReader(index)
    for record in (3, 4):
        with pytest.raises(BadSample):
            reader.read(record)
    assert reader.read(5) == some_records[5]
    reader.close()


def test_any_manifest_is_read_or_a_clear_error(written) -> None:
    root = written()
    path = root / "train" / MANIFEST
    manifest = read_manifest(root, "train")
    rng = random.Random(4)
    whole = path.read_bytes()
    for _ in range(ROUNDS):
        path.write_bytes(damaged(whole, rng))
        try:
            read = read_manifest(root, "train")
        except ShardError:
            continue
        assert all("/" not in shard.name for shard in read.shards)
    for name in ("../000000.tar", "/etc/passwd", "a b; rm -rf x", "", "$(id)"):
        shards = (replace(manifest.shards[0], name=name), *manifest.shards[1:])
        path.write_text(json.dumps(asdict(replace(manifest, shards=shards))))
        with pytest.raises(UserError, match="no shard can be"):
            read_manifest(root, "train")
