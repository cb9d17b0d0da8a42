"""Lets test modules import their neighbours, and ranks import the test modules, whatever pytest's import mode."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """A folder for published annotation files."""
    folder = tmp_path / "annotations"
    folder.mkdir()
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder for published images."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder
