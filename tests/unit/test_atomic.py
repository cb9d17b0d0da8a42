"""Directories that are replaced are whole, on disk before they are in place, and leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from free_dist.atomic import replaced_directory


def content(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_a_new_directory_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "place"
    for name in ("first", "second"):
        with replaced_directory(place) as written:
            (written / "below").mkdir()
            (written / "below" / name).write_text(name)
            assert content(place) == ({} if name == "first" else {"below/first": "first"})
        assert content(place) == {f"below/{name}": name}
        assert os.listdir(place.parent) == ["place"]


def test_an_error_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with replaced_directory(place) as written:
        (written / "old").write_text("old")

    def fail() -> None:
        with replaced_directory(place) as written:
            (written / "half").write_text("ha")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert os.listdir(tmp_path) == ["place"]
    assert content(place) == {"old": "old"}


def test_everything_is_on_disk_before_the_directory_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, synchronised = tmp_path / "place", []
    fsync = os.fsync

    def observed(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synchronised.append((path.name, place.exists()))

    monkeypatch.setattr(os, "fsync", observed)
    with replaced_directory(place) as written:
        (written / "below").mkdir()
        (written / "below" / "file").write_text("content")
        temporary = written.name
    assert {("file", False), ("below", False), (temporary, False)} == set(synchronised[:-1])
    assert synchronised[-1] == (tmp_path.name, True)
