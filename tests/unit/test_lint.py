"""A sound directory of shards has no faults; everything that can be wrong with one is found, and nothing besides."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from free_dist.config import MissingFileError
from free_dist.data.lint import lint
from free_dist.data.lint_records import image_faults, json_faults
from free_dist.data.records import DialogueTurn, Question, Record, SyntheticCaption, record_json
from free_dist.data.shards import MANIFEST, write_split
from launch import inspect_data

Member = tuple[str, bytes]


def picture(number: int, file_format: str = "PNG", size: tuple[int, int] = (16, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 2 * number, 90)).save(buffer, format=file_format)
    return buffer.getvalue()


def record(number: int) -> Record:
    """With every field, and both kinds of images."""
    return Record(
        key=f"made-{number:03d}",
        image=picture(number, "JPEG" if number % 2 else "PNG"),
        image_id=str(number),
        questions=(
            Question(question="is it naïve?", answers=("yes", "no"), question_id=f"{number}0"),
            Question(question="what is it?", answers=()),
        ),
        captions=("a thing", f"number {number}"),
        synthetic_captions=(SyntheticCaption(text="a shape", model="m", score=0.75, threshold=0.5),),
        dialogue=(
            DialogueTurn(question="is it red?", answer="yes", candidates=("no", "yes"), gold=1, relevance=(0.0, 0.9)),
            DialogueTurn(question="is it big?", answer=None, candidates=("no", "yes")),
        ),
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two splits of two shards of two records each."""
    for first, split in ((0, "train"), (4, "test")):
        rows = [record(first + i) for i in range(4)]
        write_split(tmp_path / "data", dataset="made", split=split, records=rows, total=4, records_per_shard=2)
    return tmp_path / "data"


def lines(root: Path) -> list[str]:
    return [str(fault) for fault in lint(root).faults]


def members_of(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def rewrite(path: Path, members: list[Member | tarfile.TarInfo]) -> None:
    """Other members in a shard, and a manifest that agrees."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    agree(path)


def agree(path: Path) -> None:
    """Bytes and checksum of a shard as they are, in the manifest."""
    content = path.read_bytes()
    with_manifest(
        path.parent,
        lambda raw: [
            shard.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for shard in raw["shards"]
            if shard["name"] == path.name
        ],
    )


def with_manifest(split: Path, change: Callable[[dict], object]) -> None:
    raw = json.loads((split / MANIFEST).read_text())
    change(raw)
    (split / MANIFEST).write_text(json.dumps(raw))


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


# --- sound ------------------------------------------------------------------------------------------------------------


def test_a_sound_directory_has_no_faults_and_one_split_can_be_looked_at_alone(root: Path, tiny_root: Path) -> None:
    for path, counts in ((root, (2, 4, 8)), (root / "test", (1, 2, 4)), (tiny_root, (3, 5, 40))):
        report = lint(path)
        assert report.faults == []
        assert (report.splits, report.shards, report.samples) == counts


def test_directories_that_hold_no_shards_are_none_of_its_business(root: Path) -> None:
    (root / "features").mkdir()
    (root / "features" / "index.json").write_text("{}")
    assert lines(root) == []


def test_faults_are_the_same_whatever_the_number_of_processes(root: Path) -> None:
    rewrite(root / "train/000001.tar", members_of(root / "train/000001.tar")[1:])
    (root / "test/000000.tar").write_bytes(b"")
    alone = lines(root)
    assert len(alone) > 2
    assert [str(fault) for fault in lint(root, workers=2).faults] == alone


# --- files and manifests ----------------------------------------------------------------------------------------------


FILE_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda split: (split / "000001.tar").unlink(), r"train/000001\.tar: is missing"),
    "extra shard": (
        lambda split: (split / "000009.tar").write_bytes((split / "000000.tar").read_bytes()),
        r"train/000009\.tar: is not in the manifest",
    ),
    "leftover": (lambda split: (split / ".000002.tar.7.tmp").write_bytes(b"x"), r"\.7\.tmp: was left by"),
    "no manifest": (lambda split: (split / MANIFEST).unlink(), r"train/manifest\.json: is missing"),
    "manifest is no JSON": (lambda split: (split / MANIFEST).write_text("{"), r"manifest\.json: is not JSON"),
    "manifest is a list": (
        lambda split: (split / MANIFEST).write_text("[]"),
        r"manifest\.json: it is a list, want an obj",
    ),
    "unknown schema": (
        lambda split: with_manifest(split, lambda raw: raw.update(schema_version=99)),
        r"manifest\.json: schema_version is 99, this program knows",
    ),
    "no schema": (
        lambda split: with_manifest(split, lambda raw: raw.pop("schema_version")),
        r"manifest\.json: schema_version is None",
    ),
    "unknown field": (
        lambda split: with_manifest(split, lambda raw: raw.update(colour="red")),
        r"manifest\.json: colour is no field we know",
    ),
    "missing field": (
        lambda split: with_manifest(split, lambda raw: raw["shards"][1].pop("bytes")),
        r"manifest\.json: shards\[1\]\.bytes is missing",
    ),
    "wrong type": (
        lambda split: with_manifest(split, lambda raw: raw["shards"][0].update(samples="2")),
        r"manifest\.json: shards\[0\]\.samples is text, want an integer",
    ),
    "another split's manifest": (
        lambda split: with_manifest(split, lambda raw: raw.update(split="test")),
        r"manifest\.json: split is 'test', the directory is 'train'",
    ),
    "no checksum": (
        lambda split: with_manifest(split, lambda raw: raw["shards"][0].update(sha256="abc")),
        r"manifest\.json: shard '000000\.tar' has a sha256 that is none",
    ),
    "shard outside": (
        lambda split: with_manifest(split, lambda raw: raw["shards"][0].update(name="../test/000000.tar")),
        r"manifest\.json: shard '\.\./test/000000\.tar' is not the name of a tar file beside it",
    ),
    "shard named twice": (
        lambda split: with_manifest(split, lambda raw: raw["shards"].append(raw["shards"][0])),
        r"manifest\.json: shard '000000\.tar' is named twice",
    ),
    "no shards": (
        lambda split: with_manifest(split, lambda raw: raw.update(shards=[])),
        r"manifest\.json: names no shards",
    ),
    "wrong count": (
        lambda split: with_manifest(split, lambda raw: raw["shards"][1].update(samples=3)),
        r"train/000001\.tar: has samples 2, the manifest says 3",
    ),
    "wrong size": (
        lambda split: with_manifest(split, lambda raw: raw["shards"][1].update(bytes=3)),
        r"train/000001\.tar: has bytes \d+, the manifest says 3",
    ),
    "wrong checksum": (
        lambda split: with_manifest(split, lambda raw: raw["shards"][1].update(sha256="0" * 64)),
        r"train/000001\.tar: has sha256 \w+, the manifest says 0000",
    ),
}


@pytest.mark.parametrize("name", FILE_DAMAGES)
def test_a_fault_of_files_or_manifest_is_found(root: Path, name: str) -> None:
    damage, pattern = FILE_DAMAGES[name]
    damage(root / "train")
    found = lines(root)
    matching = [line for line in found if re.search(pattern, line)]
    assert len(matching) == 1, found
    # Some damages are more than one fault: a shard under a wrong name is also missing from the manifest.
    if name not in ("shard outside", "no shards", "extra shard", "no checksum"):
        assert found == matching


def test_a_directory_without_splits_is_a_fault_and_none_an_error(tmp_path: Path) -> None:
    assert "holds no split" in lines(tmp_path)[0]
    with pytest.raises(MissingFileError, match="is no directory"):
        lint(tmp_path / "absent")


# --- inside a shard ---------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of a few bytes whose header promises 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


SAID = record_json(record(2))
MEMBER_DAMAGES: dict[str, tuple[Callable[[list[Member]], list], list[str]]] = {
    "image missing": (lambda m: m[1:], [r"000001\.tar: made-002: lacks its image"]),
    "json missing": (lambda m: [m[0], *m[2:]], [r"made-002: lacks its json"]),
    "two images": (
        lambda m: [m[0], ("made-002.jpg", picture(70, "JPEG")), *m[1:]],
        [r"made-002: has more than one image"],
    ),
    "member twice": (lambda m: [m[0], m[1], m[1], *m[2:]], [r"made-002\.json: stands twice in its sample"]),
    "key twice": (
        lambda m: [*m, ("made-002.png", picture(71)), ("made-002.json", SAID)],
        [r"made-002: duplicate key in one shard", r"has samples 3, the manifest says 2"],
    ),
    "unknown member": (lambda m: [*m, ("made-003.pkl", b"x")], [r"made-003\.pkl: belongs to no sample"]),
    "no suffix": (lambda m: [*m, ("readme", b"x")], [r"readme: belongs to no sample"]),
    "hidden": (lambda m: [*m, (".json", b"{}")], [r"\.json: belongs to no sample"]),
    "folder": (lambda m: [*m, ("a/made-009.json", b"{}")], [r"a/made-009\.json: belongs to no sample"]),
    "above": (lambda m: [*m, ("../made-009.json", b"{}")], [r"\.\./made-009\.json: its name leads out"]),
    "absolute": (lambda m: [*m, ("/tmp/made-009.json", b"{}")], [r"/tmp/made-009\.json: its name leads out"]),
    "symbolic link": (lambda m: [*m, link("made-009.json", "/etc/passwd")], [r"made-009\.json: is a link"]),
    "hard link": (
        lambda m: [*m, link("made-009.json", "made-002.json", tarfile.LNKTYPE)],
        [r"made-009\.json: is a link"],
    ),
    "device": (lambda m: [*m, link("made-009.json", "", tarfile.CHRTYPE)], [r"made-009\.json: is no plain file"]),
    "directory": (lambda m: [*m, link("made-009.json", "", tarfile.DIRTYPE)], [r"made-009\.json/?: is a directory"]),
    "image of train": (
        lambda m: [("made-002.png", picture(4)), *m[1:]],
        [r"made-002: has the image of test/000000\.tar: made-004: a split leaks"],
    ),
    "no image": (lambda m: [("made-002.png", b"hello"), *m[1:]], [r"made-002\.png: is neither a PNG nor a JPEG"]),
    "wrong kind of image": (
        lambda m: [("made-002.png", picture(73, "JPEG")), *m[1:]],
        [r"made-002\.png: holds a JPEG"],
    ),
    "cut image": (lambda m: [("made-002.png", picture(73)[:-30]), *m[1:]], [r"made-002\.png: does not decode"]),
    "bomb": (lambda m: [("made-002.png", bomb()), *m[1:]], [r"made-002\.png: decodes to an absurd size"]),
    "broken json": (lambda m: [m[0], ("made-002.json", b"{"), *m[2:]], [r"made-002\.json: is not JSON"]),
}


@pytest.mark.parametrize("name", MEMBER_DAMAGES)
def test_a_fault_inside_a_shard_is_found_and_nothing_else(root: Path, name: str) -> None:

    damage, patterns = MEMBER_DAMAGES[name]
    path = root / "train/000001.tar"
    rewrite(path, damage(members_of(path)))
    found = lines(root)
    assert len(found) == len(patterns), found
    for pattern in patterns:
        assert any(re.search(pattern, line) for line in found), (pattern, found)


def test_a_key_in_two_shards_or_splits_is_found(root: Path) -> None:
    path = root / "test/000001.tar"
    rewrite(path, [("made-000.png", picture(99)), ("made-000.json", SAID), *members_of(path)[2:]])
    with_manifest(root / "test", lambda raw: None)
    assert [line for line in lines(root) if "duplicate key, also in" in line] == [
        # Splits are read in the order of their names.
        "train/000000.tar: made-000: duplicate key, also in test/000001.tar"
    ]


def test_one_image_under_two_keys_of_one_split_is_no_leak(root: Path) -> None:
    path = root / "train/000001.tar"
    members = members_of(path)
    rewrite(path, [("made-002.png", picture(0)), *members[1:]])
    assert lines(root) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5])
def test_a_truncated_shard_is_found_wherever_it_ends(root: Path, share: float) -> None:
    path = root / "train/000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    agree(path)
    assert any("000001.tar: is truncated" in line for line in lines(root))


def test_a_shard_cut_between_two_members_or_filled_with_something_else_is_found(root: Path) -> None:
    path = root / "train/000001.tar"
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[2].offset
    content = path.read_bytes()
    for damaged in (
        content[:boundary],
        content[:boundary] + b"x" * (len(content) - boundary),
        content.rstrip(b"\0") + b"\0" * 100,
    ):
        path.write_bytes(damaged)
        agree(path)
        assert any("000001.tar: is truncated" in line for line in lines(root))


def test_a_compressed_tar_is_no_shard(root: Path) -> None:
    path = root / "train/000001.tar"
    members = members_of(path)
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(members[0][0])
        info.size = len(members[0][1])
        tar.addfile(info, io.BytesIO(members[0][1]))
    assert any("is truncated or no tar" in line for line in lines(root))


def test_a_shard_without_samples_is_found(root: Path) -> None:
    rewrite(root / "train/000001.tar", [])
    assert "train/000001.tar: holds no sample" in lines(root)


@pytest.mark.parametrize("seed", range(20))
def test_any_damage_of_bytes_ends_in_faults_and_never_in_an_error(root: Path, seed: int) -> None:

    rng = random.Random(seed)
    path = root / "train/000000.tar"
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 30)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)
    assert any(line.startswith("train/000000.tar: has sha256") for line in lines(root))


# --- JSON and images --------------------------------------------------------------------------------------------------


JSON_DAMAGES: dict[str, tuple[Callable[[dict], object], str]] = {
    "unknown field": (lambda r: r.update(caption="a"), "caption is no field we know"),
    "unknown inner field": (lambda r: r["questions"][0].update(answer="a"), "questions[0].answer is no field we know"),
    "text for a list": (lambda r: r.update(captions="a"), "captions is text, want a list"),
    "number for a text": (lambda r: r.update(captions=[1]), "captions[0] is 1, want text"),
    "null for a text": (lambda r: r["questions"][1].update(question=None), "questions[1].question is null, want text"),
    "answers missing": (lambda r: r["questions"][0].pop("answers"), "questions[0].answers is missing"),
    "text for a number": (
        lambda r: r["synthetic_captions"][0].update(score="high"),
        "synthetic_captions[0].score is text, want a number",
    ),
    "true for a number": (lambda r: r["dialogue"][0].update(gold=True), "dialogue[0].gold is true, want an integer"),
    "NaN": (
        lambda r: r["dialogue"][0].update(relevance=[0.0, float("nan")]),
        "dialogue[0].relevance[1] is nan, want a number",
    ),
    "list for an object": (lambda r: r["dialogue"].append([]), "dialogue[2] is a list, want an object"),
    "empty caption": (lambda r: r.update(captions=["a", " "]), "captions[1] is empty"),
    "empty question": (lambda r: r["questions"][0].update(question=""), "questions[0].question is empty"),
    "empty answer": (lambda r: r["questions"][0].update(answers=["", "\t"]), "questions[0].answers are all empty"),
    "empty synthetic caption": (
        lambda r: r["synthetic_captions"][0].update(text=""),
        "synthetic_captions[0].text is empty",
    ),
    "empty turn": (lambda r: r["dialogue"][1].update(question=""), "dialogue[1].question is empty"),
    "empty candidate": (
        lambda r: r["dialogue"][0].update(candidates=["", "yes"]),
        "dialogue[0].candidates[0] is empty",
    ),
    "gold beyond": (lambda r: r["dialogue"][0].update(gold=2), "dialogue[0].gold is 2, there are 2 candidates"),
    "gold below": (lambda r: r["dialogue"][0].update(gold=-1), "dialogue[0].gold is -1, there are 2 candidates"),
    "gold of another answer": (
        lambda r: r["dialogue"][0].update(gold=0),
        "dialogue[0].gold names 'no', the answer is 'yes'",
    ),
    "relevance too short": (
        lambda r: r["dialogue"][0].update(relevance=[0.5]),
        "dialogue[0].relevance has 1 numbers, there are 2 candidates",
    ),
    "relevance too high": (
        lambda r: r["dialogue"][0].update(relevance=[0, 2]),
        "dialogue[0].relevance[1] is 2, want 0 to 1",
    ),
    "score below threshold": (
        lambda r: r["synthetic_captions"][0].update(score=0.25),
        "synthetic_captions[0].score is 0.25, below its threshold of 0.5",
    ),
    "question_id twice": (lambda r: r["questions"][1].update(question_id="20"), "question_id '20' names 2 questions"),
}


@pytest.mark.parametrize("name", JSON_DAMAGES)
def test_json_that_is_no_record_is_told_field_by_field(name: str) -> None:
    damage, wanted = JSON_DAMAGES[name]
    raw = json.loads(SAID)
    assert json_faults(SAID) == []
    damage(raw)
    assert json_faults(json.dumps(raw).encode()) == [wanted]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"null", "is null"),
        (b"[]", "it is a list, want an object"),
        (b'{"captions": [], "captions": []}', "'captions' stands twice"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_told(content: bytes, wanted: str) -> None:
    assert wanted in json_faults(content)[0]


def test_records_of_converters_have_no_faults() -> None:
    for made in (record(1), replace(record(1), questions=(), dialogue=()), Record(key="a", image=b"")):
        assert json_faults(record_json(made)) == []


def test_images_of_absurd_sizes_are_not_decoded() -> None:
    assert image_faults("png", picture(1, size=(1, 12))) == ["decodes to 1 x 12 pixels, which is absurd"]
    assert image_faults("jpg", picture(1, "JPEG", size=(20_001, 3))) == ["decodes to 20001 x 3 pixels, which is absurd"]
    assert image_faults("png", b"") == ["is empty"]
    assert image_faults("png", picture(1)) == []


# --- launcher ---------------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        inspect_data.main()
    return int(stopped.value.code or 0)


def test_the_launcher_exits_with_0_1_or_2_and_prints_a_line_per_fault(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(root), "--lint") == 0
    assert "sound" in capsys.readouterr().out
    (root / "train/000000.tar").unlink()
    (root / "test/000000.tar").unlink()
    assert run(monkeypatch, str(root), "--lint") == 1
    assert capsys.readouterr().out.splitlines() == ["test/000000.tar: is missing", "train/000000.tar: is missing"]
    assert run(monkeypatch, str(root / "absent"), "--lint") == 2
