"""The real language model behind the shipped connector: what `make smollm2` makes answers questions, and decodes exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from free_dist.backbones import Blip2Backbone
from free_dist.config import DataConfig
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import Sample, SampleEncoder
from free_dist.data.stream import split_samples
from free_dist.decoding import generate
from free_dist.evaluation.benchmark import hf_generate
from free_dist.evaluation.tasks import find_task
from free_dist.exits import ExitBank
from free_dist.recipe_io import load_recipe

ROOT = Path(__file__).resolve().parents[2]
MADE = ROOT / "models" / "smollm2"
RECIPE = ROOT / "launch" / "recipes" / "smollm2.yaml"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MADE.is_dir(), reason="models/smollm2 is not there; make smollm2 makes it"),
]
Real = tuple[Blip2Backbone, SampleEncoder, DataConfig]


@pytest.fixture(scope="module")
def real(tiny_root: Path) -> Real:
    backbone, encoder = load_pretrained(str(MADE))
    return backbone, encoder, load_recipe(RECIPE, [f"data.root={tiny_root}", "data.visual_cache=null"]).data


def asked(real: Real, sample: Sample) -> tuple[torch.Tensor, list[int]]:
    return real[1].encode_image(sample.image)[None], real[1].encode_prompt(sample.turns)


def test_it_answers_questions_about_held_out_images(real: Real) -> None:
    backbone, encoder, data = real
    samples = split_samples(data, "test", "vqa", max_samples=40)
    answers = []
    for sample in samples:
        pixels, ids = asked(real, sample)
        answers.append(encoder.decode(generate(backbone, None, pixels, [ids], max_new_tokens=6)[0].tokens))
    wrong = [(s.turns[-1], a) for s, a in zip(samples, answers, strict=True) if a not in s.references]
    assert find_task("vqa").score(answers, [sample.references for sample in samples]).quality >= 0.9, wrong


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_thirty_blocks_decode_as_hugging_face_does_with_exits_and_without(real: Real, task: str) -> None:
    backbone, encoder, data = real
    bank = ExitBank(backbone, [6, 20], init="last").eval()
    drafted = 0
    for sample in split_samples(data, "test", task, max_samples=3):
        pixels, ids = asked(real, sample)
        wanted = hf_generate(backbone, pixels, ids, max_new_tokens=12, eos=encoder.layout.eos_token_id).tokens
        full = generate(backbone, None, pixels, [ids], max_new_tokens=12)[0]
        exact = generate(backbone, bank, pixels, [ids], max_new_tokens=12, thresholds=0.05, lossless=True)[0]
        assert full.tokens == wanted
        assert exact.tokens == wanted
        drafted += exact.drafted
    assert drafted > 0
