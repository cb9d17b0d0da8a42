"""Conversion: the same bytes however it is run, nothing whole is written twice, nothing broken or leaking is written at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import drafts_of, pictures
from official_files import jpeg

from free_dist.config import MissingFileError, UserError
from free_dist.data.conversion import LOG, ConversionOptions, Draft, SplitSource, convert
from free_dist.data.leaks import LeakError
from free_dist.data.pictures import read_picture
from free_dist.data.shards import MANIFEST, is_intact, read_manifest, write_split
from free_dist.data.stream import records

HERE = Path(__file__).parent


def source(folder: Path, split: str = "train", **how) -> SplitSource:
    return SplitSource(split=split, drafts=lambda: drafts_of(folder, **how))


def options(**changed) -> ConversionOptions:
    return replace(ConversionOptions(records_per_shard=3), **changed)


def content(root: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def times(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 20)
    made = [convert(tmp_path / str(n), "made-up", [source(folder)], options(workers=n)) for n in (1, 2, 5)]
    assert made[0] == made[1] == made[2] and len(made[0][0].shards) == 7
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "5")


def test_shards_are_those_of_the_same_records_written_one_after_another(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    (made,) = convert(tmp_path / "converted", "made-up", [source(folder)], options(workers=3))
    read = [replace(draft.record, image=draft.image.read_bytes()) for draft in drafts_of(folder)]
    assert list(records(tmp_path / "converted", "train")) == read
    written = write_split(
        tmp_path / "written", dataset="made-up", split="train", records=read, total=len(read), records_per_shard=3
    )
    assert made == written and is_intact(tmp_path / "converted", "train")


def test_workers_really_run_side_by_side(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 6)
    meeting = threading.Barrier(2, timeout=20)  # never opens for one worker

    def read(path: Path) -> bytes:
        if path.stem in ("picture-000", "picture-003"):  # the first of two shards
            meeting.wait()
        return path.read_bytes()

    convert(tmp_path / "data", "made-up", [source(folder)], options(workers=2, read=read))
    assert not meeting.broken


def test_drafts_are_not_held_all_at_once(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 60)
    asked, done = [], []

    def drafts():
        for draft in drafts_of(folder):
            asked.append(draft.record.key)
            assert len(asked) - len(done) <= 3 * (2 * 2 + 2)  # shards that wait, and the one in the making
            yield draft

    def read(path: Path) -> bytes:
        done.append(path)
        return path.read_bytes()

    convert(tmp_path / "data", "made-up", [SplitSource(split="train", drafts=drafts)], options(workers=2, read=read))
    assert len(done) == 60


def test_a_killed_conversion_goes_on_with_the_shards_that_are_whole(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    root = tmp_path / "data"
    command = [sys.executable, str(HERE / "killed.py"), str(folder), str(root), "picture-007.jpg"]
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    died = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    left = sorted(path.name for path in (root / "train").iterdir())
    assert left[0].startswith(".000002.tar") and left[1:] == ["000000.tar", "000001.tar", LOG]
    before = times(root)
    convert(root, "made-up", [source(folder)], options())
    convert(tmp_path / "fresh", "made-up", [source(folder)], options())
    assert content(root) == content(tmp_path / "fresh")
    assert all(times(root)[name] == before[name] for name in ("000000.tar", "000001.tar"))


def test_a_finished_conversion_is_left_alone(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    made = convert(tmp_path / "data", "made-up", [source(folder)], options())
    before = times(tmp_path / "data")
    assert convert(tmp_path / "data", "made-up", [source(folder)], options(workers=3)) == made
    assert times(tmp_path / "data") == before


@pytest.mark.parametrize("damage", ["a shard", "a line of the log", "the manifest", "a shard is gone"])
def test_only_what_is_damaged_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = pictures(tmp_path / "pictures")
    root = tmp_path / "data"
    convert(root, "made-up", [source(folder)], options())
    whole, before = content(root), times(root)
    shard, log = root / "train" / "000001.tar", root / "train" / LOG
    if damage == "a shard":
        shard.write_bytes(shard.read_bytes()[:600] + b"?" + shard.read_bytes()[601:])
    elif damage == "a line of the log":
        lines = log.read_text().splitlines(keepends=True)
        log.write_text(lines[0] + lines[1][:40] + "\n" + "".join(lines[2:]))
    elif damage == "the manifest":
        (root / "train" / MANIFEST).write_text("{")
    else:
        shard.unlink()
    convert(root, "made-up", [source(folder)], options())
    assert content(root) == whole
    assert {name for name in before if times(root)[name] == before[name]} >= {"000000.tar", "000002.tar", "000003.tar"}


def test_what_is_said_anew_is_written_anew_and_nothing_else(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    root = tmp_path / "data"
    convert(root, "made-up", [source(folder)], options())
    before = times(root)
    (folder / "picture-004.jpg").write_bytes(jpeg(999) + b" ")
    convert(root, "made-up", [source(folder)], options())
    assert [name for name in sorted(before) if times(root)[name] == before[name]] == [
        "000000.tar",
        "000002.tar",
        "000003.tar",
    ]
    (changed,) = convert(root, "made-up", [source(folder, caption="image")], options())
    assert [record.captions for record in records(root, "train")][:1] == [("image 000",)]
    for path in sorted(folder.iterdir())[4:]:
        path.unlink()
    (shorter,) = convert(root, "made-up", [source(folder, caption="image")], options())
    assert shorter.shards[0] == changed.shards[0] and shorter.samples == 4
    assert sorted(path.name for path in (root / "train").glob("*.tar")) == ["000000.tar", "000001.tar"]


def test_a_split_that_is_being_rewritten_has_no_manifest(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    root = tmp_path / "data"
    convert(root, "made-up", [source(folder)], options())
    (folder / "picture-009.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match="picture-009"):
        convert(root, "made-up", [source(folder)], options())
    assert not (root / "train" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (None, r"picture-004\.jpg does not exist"),
        (b"", r"picture-004\.jpg is no whole PNG or JPEG picture"),
        (b"<html>404</html>", r"picture-004\.jpg is no whole PNG or JPEG picture"),
        (jpeg(4)[:-300], r"picture-004\.jpg is no whole PNG or JPEG picture .*truncated"),
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", r"picture-004\.jpg is no whole PNG or JPEG picture"),
    ],
)
@pytest.mark.parametrize("workers", [1, 4])
def test_an_image_that_cannot_be_read_is_named_and_the_rest_is_kept(
    tmp_path: Path, broken: bytes | None, complaint: str, workers: int
) -> None:
    folder = pictures(tmp_path / "pictures")
    wanted = list(drafts_of(folder))
    bad = folder / "picture-004.jpg"
    if broken is None:
        bad.unlink()
    else:
        bad.write_bytes(broken)
    listed = SplitSource(split="train", drafts=lambda: wanted)
    with pytest.raises(MissingFileError if broken is None else UserError, match=complaint):
        convert(tmp_path / "data", "made-up", [listed], options(workers=workers))
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "data" / "train" / MANIFEST).exists()
    first = (tmp_path / "data" / "train" / "000000.tar").stat().st_mtime_ns
    bad.write_bytes(jpeg(4))
    (made,) = convert(tmp_path / "data", "made-up", [listed], options(workers=workers))
    assert made.samples == 10
    assert (tmp_path / "data" / "train" / "000000.tar").stat().st_mtime_ns == first


def test_a_directory_in_the_place_of_an_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture.jpg").mkdir()
    with pytest.raises(UserError, match=r"picture\.jpg cannot be read: Is a directory"):
        read_picture(tmp_path / "picture.jpg")


# --- leaks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def leaking(tmp_path: Path) -> list[SplitSource]:
    """Image 2 of train is, under another name, image 101 of test."""
    train, test = pictures(tmp_path / "train"), pictures(tmp_path / "test", 4, first=100)
    (test / "picture-101.jpg").write_bytes((train / "picture-002.jpg").read_bytes())
    return [source(train, "train"), source(test, "test")]


@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_bytes_in_two_splits_are_an_error_naming_both(
    leaking: list[SplitSource], tmp_path: Path, workers: int
) -> None:
    complaint = r"data/train: picture-002 is that of .*data/test: picture-101: a split leaks .*--drop-leaks"
    for _ in range(2):  # what was written before it was found does not hide it
        with pytest.raises(LeakError, match=complaint):
            convert(tmp_path / "data", "made-up", leaking, options(workers=workers))
        assert not (tmp_path / "data" / "train" / MANIFEST).exists()


@pytest.mark.parametrize("workers", [1, 4])
def test_a_leaking_image_can_be_left_out_of_train(leaking: list[SplitSource], tmp_path: Path, workers: int) -> None:
    root = tmp_path / "data"
    for _ in range(2):
        train, test = convert(root, "made-up", leaking, options(workers=workers, drop_leaks=True))
        assert (train.samples, test.samples) == (9, 4)
        assert "picture-002" not in {record.key for record in records(root, "train")}
        assert [shard.samples for shard in train.shards] == [2, 3, 3, 1]
    with pytest.raises(LeakError, match="picture-002"):
        convert(root, "made-up", leaking, options(workers=workers))


def test_the_same_id_in_two_splits_is_an_error_naming_both(tmp_path: Path) -> None:
    train, test = pictures(tmp_path / "train"), pictures(tmp_path / "test", 4, first=100)

    def renumbered() -> list[Draft]:
        return [replace(d, record=replace(d.record, image_id="007")) for d in drafts_of(test)]

    both = [source(train), SplitSource(split="test", drafts=renumbered)]
    with pytest.raises(LeakError, match=r"image id 007 of .*train: picture-007 is that of .*test: picture-100"):
        convert(tmp_path / "data", "made-up", both, options())
    kept, _ = convert(tmp_path / "data", "made-up", both, options(drop_leaks=True))
    assert kept.samples == 9
    apart = [replace(draft, identity=f"test {draft.image.name}") for draft in renumbered()]
    whole, _ = convert(
        tmp_path / "apart", "made-up", [source(train), SplitSource(split="test", drafts=lambda: apart)], options()
    )
    assert whole.samples == 10


def test_a_leak_into_shards_that_are_kept_is_found_or_left_out(leaking: list[SplitSource], tmp_path: Path) -> None:
    train, test = leaking
    root = tmp_path / "data"
    convert(root, "made-up", [train], options())
    assert read_manifest(root, "train").samples == 10
    with pytest.raises(LeakError, match="picture-002"):
        convert(root, "made-up", [train, test], options())
    convert(root, "made-up", [train], options())
    kept, _ = convert(root, "made-up", [train, test], options(drop_leaks=True))
    assert kept.samples == len(list(records(root, "train"))) == 9


def test_a_key_used_twice_an_empty_split_and_no_workers_are_errors(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 2)
    twice = SplitSource(split="train", drafts=lambda: [*drafts_of(folder), *drafts_of(folder)])
    with pytest.raises(UserError, match=r"picture-000 is also in .*train: a key must name one record"):
        convert(tmp_path / "data", "made-up", [twice], options())
    nothing = SplitSource(split="train", drafts=lambda: [])
    with pytest.raises(UserError, match="made-up/train: no records"):
        convert(tmp_path / "data", "made-up", [nothing], options())
    (made,) = convert(tmp_path / "data", "made-up", [replace(nothing, may_be_empty=True)], options())
    assert made.samples == 0 and json.loads((tmp_path / "data" / "train" / MANIFEST).read_text())["shards"] == []
    for name in ("workers", "records_per_shard"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: want 1 or more"):
            options(**{name: 0})
