"""launch/generate.py tells a user's mistake in one line, and before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "generate.py"

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # makes any import of it an ImportError
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher on a good image and directory, with ``flags`` after and therefore over the good ones."""
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    good = ["--image", str(picture), "--exits", str(tmp_path), "--prompt", "a photo of"]
    command = [sys.executable, "-c", WITHOUT_TORCH, str(SCRIPT), *good, *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: 0: want at least 1"),
        (["--max-new-tokens", "many"], "--max-new-tokens: invalid positive_integer value: 'many'"),
        (["--threshold", "-1"], "--threshold: -1: want a number from 0"),
        (["--threshold", "nan"], "--threshold: nan: want a number from 0"),
        (["--image", "nowhere.png"], "--image nowhere.png: no such file"),
        (["--image", str(SCRIPT)], "generate.py: not a readable image"),
        (["--exits", "nowhere"], "--exits nowhere: no such directory"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line_before_torch_is_imported(
    tmp_path: Path, flags: list[str], words: str
) -> None:
    finished = run(tmp_path, *flags)
    assert finished.returncode == 2
    assert words in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr


def test_a_truncated_image_is_told_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    Image.effect_noise((64, 64), 50).save(broken)
    broken.write_bytes(broken.read_bytes()[:1500])
    finished = run(tmp_path, "--image", str(broken))
    assert finished.returncode == 2
    assert "broken.png: not a readable image" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_good_flags_get_as_far_as_torch(tmp_path: Path) -> None:
    assert "import of torch halted" in run(tmp_path).stderr


def test_help_shows_no_default_that_is_none(tmp_path: Path) -> None:
    text = run(tmp_path, "--help").stdout
    assert "(default: 32)" in text
    assert "default: None" not in text
