"""Titles become captions or nothing, and no picture or title stands in two splits."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from free_dist.config import MissingFileError
from free_dist.data.openclipart import SHARED, clean_title, prepare, split_of
from free_dist.data.shards import SPLITS, read_manifest
from free_dist.data.stream import records

SVG = "<svg><metadata><dc:title>{title}</dc:title><dc:publisher><dc:title>Library</dc:title></dc:publisher></metadata></svg>"


def draw(root: Path, name: str, title: str, colour: tuple[int, ...], size: int = 8) -> None:
    mode = "RGBA" if len(colour) == 4 else "RGB"
    for kind in ("png", "svg"):
        (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), colour).save(root / "png" / f"{name}.png")
    (root / "svg" / f"{name}.svg").write_text(SVG.format(title=title))


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("Baseball Cap", "baseball cap"),
        ("red_apple_02.svg", "red apple"),
        ("Cat &amp; Dog", "cat dog"),
        ("Clipart by Nicu Buculei - antenna", "antenna"),
        ("tree 3 b", "tree"),
        ("Untitled", None),
        ("icon 17", None),
        ("画像", None),
        ("photo by someone", None),
        ("a very long title that tells a whole story about how it was once drawn", None),
    ],
)
def test_a_title_becomes_a_caption_or_nothing(raw: str, wanted: str | None) -> None:
    assert clean_title(raw) == wanted


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    root = tmp_path / "openclipart"
    for index in range(120):
        draw(
            root,
            f"things/thing_{index}",
            f"thing {'abcdefghij'[index % 10]}{'klmnopqrstuv'[index // 10]}x",
            (index, 2, 3),
        )
    return root


def test_no_title_and_no_picture_stands_in_two_splits(installed: Path, tmp_path: Path) -> None:
    titles = sorted({f"thing {a}{b}x" for a in "abcdefghij" for b in "klmnopqrstuv"}, key=split_of)
    first, last = titles[0], titles[-1]
    assert split_of(first) != split_of(last)
    draw(installed, "same/one", first, (250, 250, 250))
    draw(installed, "same/two", last, (250, 250, 250))
    prepare(tmp_path / "shards", installed=installed)
    found = {split: list(records(tmp_path / "shards", split)) for split in SPLITS}
    for kind in ("image", "captions"):
        values = {split: {str(getattr(record, kind)) for record in found[split]} for split in SPLITS}
        assert not values["train"] & values["test"]
        assert not values["train"] & values["calibration"]
        assert not values["test"] & values["calibration"]
    together = [record for split in SPLITS for record in found[split] if set(record.captions) >= {first, last}]
    assert len(together) == 1
    captions = {split: {caption for record in found[split] for caption in record.captions} for split in SPLITS}
    assert sum(first in captions[split] for split in SPLITS) == 1
    assert all(captions[split] for split in SPLITS)


def test_a_title_of_many_pictures_names_none(tmp_path: Path) -> None:
    for index in range(SHARED + 1):
        draw(tmp_path / "openclipart", f"a{index}", "my collection", (index, 0, 0))
    draw(tmp_path / "openclipart", "b", "green apple", (0, 200, 0))
    manifests = prepare(tmp_path / "shards", installed=tmp_path / "openclipart")
    assert sum(manifest.samples for manifest in manifests) == 1


def test_transparency_becomes_white_and_other_pictures_stay_as_encoded(tmp_path: Path) -> None:
    root = tmp_path / "openclipart"
    draw(root, "clear", "clear glass", (0, 0, 0, 0), size=1000)
    draw(root, "solid", "solid brick", (9, 9, 9))
    assert split_of("clear glass") == split_of("solid brick") == "train"
    prepare(tmp_path / "shards", installed=root)
    found = {r.captions[0]: r.image for r in records(tmp_path / "shards", "train")}
    assert found["solid brick"] == (root / "png" / "solid.png").read_bytes()
    with Image.open(io.BytesIO(found["clear glass"])) as picture:
        assert (picture.mode, max(picture.size), picture.getpixel((5, 5))) == ("RGB", 448, (255, 255, 255))


def test_pictures_that_look_the_same_on_white_are_one(tmp_path: Path) -> None:
    root = tmp_path / "openclipart"
    draw(root, "a", "clear glass", (0, 0, 0, 0))
    draw(root, "b", "broken window", (7, 0, 0, 0))  # other bytes under what is transparent
    prepare(tmp_path / "shards", installed=root)
    found = [record for split in SPLITS for record in records(tmp_path / "shards", split)]
    assert [set(record.captions) for record in found] == [{"clear glass", "broken window"}]


def test_a_poster_is_left_out_without_being_decoded(tmp_path: Path) -> None:
    root = tmp_path / "openclipart"
    draw(root, "a", "green apple", (0, 200, 0))
    draw(root, "b", "great poster", (0, 0, 200))
    content = bytearray((root / "png" / "b.png").read_bytes())
    content[16:24] = (20_000).to_bytes(4, "big") * 2  # what the header says is all that is read
    (root / "png" / "b.png").write_bytes(bytes(content))
    manifests = prepare(tmp_path / "shards", installed=root)
    assert sum(manifest.samples for manifest in manifests) == 1


def test_shards_are_the_same_bytes_every_time(installed: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "one", installed=installed)
    prepare(tmp_path / "two", installed=installed)
    for split in SPLITS:
        assert read_manifest(tmp_path / "one", split) == read_manifest(tmp_path / "two", split)


def test_missing_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="apt-get install openclipart-png"):
        prepare(tmp_path / "shards", installed=tmp_path / "nothing")
