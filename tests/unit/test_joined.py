"""Several data sets joined: every record once, the same bytes, and nothing that stands in two splits."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from free_dist.config import DataConfig, UserError
from free_dist.data.joined import prepare
from free_dist.data.records import Record
from free_dist.data.shards import read_manifest, write_split
from free_dist.data.stream import records, split_samples


def picture(shade: int) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(written, "PNG")
    return written.getvalue()


def captioned(root: Path, shades: dict[str, range]) -> Path:
    """A data set of captions alone: split -> shades of its pictures."""
    for split, present in shades.items():
        made = [Record(key=f"red-{n}", image=picture(n), captions=(f"shade {n}",)) for n in present]
        write_split(root, dataset="shades", split=split, records=made, total=len(made), records_per_shard=3)
    return root


SHADES = {"train": range(8), "calibration": range(8, 10), "test": range(10, 12)}


def test_every_record_of_every_source_stands_in_its_split(tiny_root: Path, tmp_path: Path) -> None:
    sources = [tiny_root, captioned(tmp_path / "shades", SHADES)]
    manifests = prepare(tmp_path / "both", sources)
    assert [manifest.dataset for manifest in manifests] == ["easyvqa+shades"] * 3
    for split in SHADES:
        wanted = [record for source in sources for record in records(source, split)]
        assert list(records(tmp_path / "both", split)) == wanted
        assert read_manifest(tmp_path / "both", split).samples == len(wanted)
    data = DataConfig(root=str(tmp_path / "both"))
    asked, described = (split_samples(data, "train", task) for task in ("vqa", "caption"))
    assert not any(sample.key.startswith("red") for sample in asked)
    assert sum(sample.key.startswith("red") for sample in described) == 8


def test_a_finished_join_is_kept_and_a_damaged_or_changed_one_made_again(tiny_root: Path, tmp_path: Path) -> None:
    sources = [tiny_root, captioned(tmp_path / "shades", SHADES)]
    first = prepare(tmp_path / "both", sources)
    shard = tmp_path / "both" / "train" / first[0].shards[0].name
    made = shard.stat().st_mtime_ns
    prepare(tmp_path / "both", sources)
    assert shard.stat().st_mtime_ns == made
    shard.write_bytes(b"no shard")
    assert prepare(tmp_path / "both", sources) == first
    assert next(iter(records(tmp_path / "both", "train"))).key == next(iter(records(tiny_root, "train"))).key
    captioned(sources[1], SHADES | {"train": range(20, 22)})
    assert prepare(tmp_path / "both", sources)[0].samples == first[0].samples - 6


def test_an_image_in_two_splits_is_an_error(tiny_root: Path, tmp_path: Path) -> None:
    root = captioned(tmp_path / "shades", SHADES)
    made = [Record(key="blue", image=picture(3), captions=("blue",))]
    write_split(root, dataset="shades", split="test", records=made, total=1)
    with pytest.raises(UserError, match=r"shades/train: red-3 is that of .*shades/test: blue: a split leaks"):
        prepare(tmp_path / "both", [tiny_root, root])
    assert not (tmp_path / "both").exists()


def test_images_of_another_split_are_dropped_by_their_bytes_and_by_their_coco_id(tmp_path: Path) -> None:
    coco, genome = tmp_path / "coco", tmp_path / "genome"
    for split, shades in SHADES.items():
        made = [Record(key=f"coco-{n}", image=picture(n), image_id=str(n), captions=("red",)) for n in shades]
        write_split(coco, dataset="coco", split=split, records=made, total=len(made))
    # Another encoding of COCO's test image 10, the very file of its test image 11, an image of its train split, and a new one.
    made = [
        Record(key="vg-0", image=picture(100), image_id="7", coco_id="10", captions=("red",)),
        Record(key="vg-1", image=picture(11), image_id="8", captions=("red",)),
        Record(key="vg-2", image=picture(101), image_id="9", coco_id="3", captions=("red",)),
        Record(key="vg-3", image=picture(102), image_id="10", captions=("red",)),
    ]
    write_split(genome, dataset="vg", split="train", records=made, total=4)
    with pytest.raises(UserError, match=r"COCO image of .*vg-0 is that of .*coco-10: .*--drop-leaks"):
        prepare(tmp_path / "both", [coco, genome])
    manifests = prepare(tmp_path / "both", [coco, genome], drop_leaks=True)
    assert {manifest.split: manifest.samples for manifest in manifests} == {"train": 10, "calibration": 2, "test": 2}
    assert [record.key for record in records(tmp_path / "both", "train")][-2:] == ["vg-2", "vg-3"]


def test_a_key_that_names_two_records_is_an_error(tmp_path: Path) -> None:
    roots = [captioned(tmp_path / name, SHADES) for name in ("one", "two")]
    with pytest.raises(UserError, match=r"two/test: red-10 is also in .*one/test"):
        prepare(tmp_path / "both", roots)


def test_a_shard_that_is_not_what_its_manifest_says_is_not_copied(tiny_root: Path, tmp_path: Path) -> None:
    root = captioned(tmp_path / "shades", SHADES)
    shard = root / "test" / "000000.tar"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # padding behind the last record, which no reader looks at
    shard.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"shades test .* 000000\.tar .* wrong checksum"):
        prepare(tmp_path / "both", [tiny_root, root])
    assert not (tmp_path / "both" / "test" / "manifest.json").exists()


@pytest.mark.parametrize("count", [0, 1])
def test_one_source_is_nothing_to_join(tiny_root: Path, tmp_path: Path, count: int) -> None:
    with pytest.raises(UserError, match="--sources: want two"):
        prepare(tmp_path / "both", [tiny_root] * count)
