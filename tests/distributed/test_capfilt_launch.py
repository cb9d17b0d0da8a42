"""launch/capfilt.py as users start it: one process, two under a launcher, and a real kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from free_dist.config import DataConfig
from free_dist.data.stream import epoch_samples, records, split_samples
from tests.small_blip import capfilt_words, captioned_files, save_captioner, save_filter

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent


def environment() -> dict[str, str]:
    path = os.pathsep.join((str(SCRIPTS), os.environ["PATH"]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("capfilt")
    save_captioner(root / "captioner")
    save_filter(root / "filter")
    return root


def command(*arguments: object) -> list[str]:
    # Images one by one, so that there is time to kill it.
    return ["launch/capfilt.py", *capfilt_words(*arguments), "--batch-size", "1"]


def launch(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def alone(workplace: Path, tiny_root: Path) -> Path:
    out = workplace / "alone"
    finished = launch([sys.executable, *command(workplace, tiny_root, out)])
    assert finished.returncode == 0, finished.stderr
    assert f"{out / 'train'}: 24 images, 48 captions written" in finished.stdout
    assert f"{out / 'test'}: 8 images, as they were" in finished.stdout
    return out


def test_two_processes_write_the_files_of_one(workplace, tiny_root, alone) -> None:
    out = workplace / "two"
    starter = [str(SCRIPTS / "deepspeed"), "--num_gpus", "2", "--master_port", "29621"]
    finished = launch([*starter, *command(workplace, tiny_root, out)])
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("captions written") == 1
    assert captioned_files(out) == captioned_files(alone)


def test_what_it_wrote_trains_and_evaluates(alone: Path, tiny_root: Path) -> None:
    texts = {caption.text for record in records(alone, "train") for caption in record.synthetic_captions}
    data = DataConfig(root=str(alone), tasks={"caption": 1.0}, synthetic_share=1.0)
    samples = list(epoch_samples(data, "caption", seed=0, epoch=0))
    assert samples and {sample.turns[0].answer for sample in samples} <= texts
    assert split_samples(data, "test", "caption") == split_samples(DataConfig(root=str(tiny_root)), "test", "caption")


def test_a_run_of_two_that_is_killed_goes_on_as_one_with_what_is_whole(workplace, tiny_root, alone) -> None:
    out = workplace / "killed"
    words = command(workplace, tiny_root, out)
    starter = [str(SCRIPTS / "torchrun"), "--nproc_per_node", "2", "--master_port", "29622"]
    process = subprocess.Popen(
        [*starter, *words], env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    work = out / ".train.capfilt"
    everybody: list[psutil.Process] = []
    until = time.monotonic() + 200
    while not (whole := sorted(work.glob("*.json"))) and time.monotonic() < until:
        assert process.poll() is None, f"it ended by itself with code {process.returncode}"
        if not everybody and work.is_dir():  # looked for before there is a hurry
            everybody = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        time.sleep(0.001)
    for one in everybody:
        one.kill()
    process.wait()
    assert whole and not (out / "train" / "manifest.json").exists(), "it was too quick to be killed"
    kept = out / "kept.tar"
    kept.hardlink_to(whole[0].with_suffix(".tar"))
    finished = launch([sys.executable, *words])
    assert finished.returncode == 0, finished.stderr
    assert kept.samefile(out / "train" / f"{whole[0].stem}.tar"), "the very file, not one like it"
    kept.unlink()
    assert captioned_files(out) == captioned_files(alone)


def test_a_second_run_with_other_settings_is_refused_in_one_line(workplace, tiny_root, alone) -> None:
    before = captioned_files(alone)
    other = launch([sys.executable, *command(workplace, tiny_root, alone, "--threshold", 0.9)])
    assert other.returncode == 2 and "threshold 0.5, not 0.9" in other.stderr and "Traceback" not in other.stderr
    assert captioned_files(alone) == before
