"""The command line: every data set has a help that names its files and splits, and mistakes are one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import official_files as official
import pytest

from free_dist.data.published import LAYOUTS
from free_dist.data.shards import read_manifest

REPOSITORY = Path(__file__).parents[2]
NAMES = ("coco", "nocaps", "vqav2", "okvqa", "gqa", "visdial", "vg", "stamps", "openclipart", "easyvqa", "joined")


@pytest.fixture(scope="module")
def parser_help() -> dict[str, str]:
    """Name -> what its --help prints, from one process."""
    program = (
        "import sys, runpy, io, contextlib\n"
        f"for name in {NAMES!r}:\n"
        "    sys.argv = ['prepare_data.py', name, '--help']\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        runpy.run_path('launch/prepare_data.py', run_name='__main__')\n"
        "    print('=====')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return dict(zip(NAMES, done.stdout.split("=====\n"), strict=False))


def test_every_data_set_has_a_help_that_names_its_splits(parser_help: dict[str, str]) -> None:
    for name in NAMES:
        assert f"prepare_data.py {name}" in parser_help[name]
        if name != "joined":
            assert "test" in parser_help[name] and "--workers" in parser_help[name], name
    assert "--sources" in parser_help["joined"]


@pytest.mark.parametrize("dataset", sorted(LAYOUTS))
def test_the_help_names_every_layout_and_the_files_that_tell_it(dataset: str, parser_help: dict[str, str]) -> None:
    described = parser_help[dataset].replace("{train,val,test}", "train").replace("{train,val}", "train")
    described = described.replace("{train,val,testdev}", "train")
    for name, layout in LAYOUTS[dataset].items():
        if len(LAYOUTS[dataset]) > 1:
            assert name in described
        assert layout.files[0] in described


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(REPOSITORY / "launch" / "prepare_data.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_conversion_says_what_it_wrote_and_a_mistake_is_one_line(tmp_path: Path) -> None:
    official.coco_captions(tmp_path / "annotations", 2017)
    official.coco_images(tmp_path / "images", "train2017", "val2017")
    folders = ("--annotations", tmp_path / "annotations", "--images", tmp_path / "images")
    done = run("coco", *folders, "--workers", 2, "--records-per-shard", 10, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'out' / 'train'}: 39 images in 4 shards",
        f"{tmp_path / 'out' / 'calibration'}: 3 images in 1 shards",
        f"{tmp_path / 'out' / 'test'}: 6 images in 1 shards",
    ]
    assert "coco/train: 100%" in done.stderr or "coco/train: 39image" in done.stderr  # the progress bar
    assert read_manifest(tmp_path / "out", "train").dataset == "coco"
    (tmp_path / "images" / "train2017" / official.coco_name("train2017", 1005)).unlink()
    failed = run("coco", *folders, "--out", tmp_path / "other")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("prepare_data.py: error: ")
    assert "000000001005.jpg does not exist" in failed.stderr.splitlines()[-1]
