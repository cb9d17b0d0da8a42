"""CapFilt with LAVIS's own models, in LAVIS's environment, against transformers' classes with the same weights.

A nucleus of one token leaves sampling no choice, so both captioners must write the same.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import (
    BertTokenizerFast,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
)

from free_dist.data.capfilt import CapFiltSettings, bootstrap
from free_dist.data.capfilt_models import BlipCaptioner, BlipFilter
from free_dist.data.records import Record
from free_dist.data.shards import is_intact, write_split
from free_dist.data.stream import records
from tests.parity.committed import REFERENCE, read_reference
from tests.parity.test_blip import load

SIDE_ENVIRONMENT = Path(__file__).parents[2] / ".venv-lavis"

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not (SIDE_ENVIRONMENT / ".installed").exists(), reason="no .venv-lavis: make lavis-env builds it"
    ),
]


@pytest.fixture(scope="module")
def source(tiny_root: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("source")
    found = list(records(tiny_root, "train"))[:5]
    write_split(root, dataset="easyvqa", split="train", records=found, total=5, records_per_shard=2)
    return root


def by_lavis(source: Path, out: Path, *flags: str) -> list[Record]:
    words = [SIDE_ENVIRONMENT / "bin" / "python", Path(__file__).parent / "run_lavis_capfilt.py"]
    # LAVIS cuts the prompt off by its characters, so its words must be in the small vocabulary.
    words += [
        "--source",
        source,
        "--out",
        out,
        "--prompt",
        "two dogs ",
        "--min-length",
        "8",
        "--max-length",
        "14",
        *flags,
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [str(word) for word in words], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert is_intact(out, "train")
    return list(records(out, "train"))


def saved(folder: Path, name: str, model_class: type) -> Path:
    """The committed weights as a Hugging Face directory."""
    load(model_class, read_reference(REFERENCE / name)).save_pretrained(folder)
    BertTokenizerFast(str(REFERENCE / name / "vocab.txt")).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_both_write_and_score_the_same_captions(source: Path, tmp_path: Path) -> None:
    flags = ("--top-p", "1e-6", "--threshold", "0", "--filter-human")
    made = by_lavis(source, tmp_path / "out", *flags)
    settings = CapFiltSettings(
        prompt="two dogs ", top_p=1e-6, threshold=0.0, filter_human=True, min_length=8, max_length=14
    )
    captioner = BlipCaptioner(saved(tmp_path / "captioner", "blip_caption", BlipForConditionalGeneration))
    matcher = BlipFilter(saved(tmp_path / "filter", "blip_itm", BlipForImageTextRetrieval))
    wanted, _ = bootstrap(list(records(source, "train")), captioner, matcher, settings)
    for ours, lavis in zip(wanted, made, strict=True):
        # Empty where the small model writes nothing but unknown words.
        assert [c.text for c in lavis.synthetic_captions] == [c.text for c in ours.synthetic_captions]
        assert [c.score for c in lavis.synthetic_captions] == pytest.approx(
            [c.score for c in ours.synthetic_captions], abs=2e-5
        )
        assert {c.model for c in lavis.synthetic_captions} <= {"lavis:blip_caption/base_coco"}
        assert replace(ours, synthetic_captions=()) == replace(lavis, synthetic_captions=())
    assert len({c.text for record in made for c in record.synthetic_captions}) > 1


def test_what_lavis_samples_depends_on_keys_and_seed(source: Path, tmp_path: Path) -> None:
    runs = [by_lavis(source, tmp_path / name, "--captions", "3", "--threshold", "0", "--batch-size", size, "--seed", seed)
            for name, size, seed in (("one", "1", "0"), ("two", "5", "0"), ("other", "5", "1"))]  # fmt: skip
    assert runs[0] == runs[1] != runs[2]
    assert sum(len(record.synthetic_captions) for record in runs[0]) > len(runs[0])
