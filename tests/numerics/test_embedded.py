"""The backbone that ships: what TRAINING.md says of it holds, it is good, and it decodes like Hugging Face."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch

from free_dist.backbones.embedded import HEAD_TO_BLOCK, resolve_backbone
from free_dist.config import EMBEDDED_BACKBONE, DataConfig
from free_dist.data import easyvqa
from free_dist.data.pretrained import load_pretrained
from free_dist.data.stream import split_samples
from free_dist.decoding import generate
from free_dist.training.finetune import teacher_forced_accuracy

PROMISED_ACCURACY = 0.93
"""On the official test split; always giving a question's most frequent training answer reaches 0.67."""


@pytest.fixture(scope="module")
def embedded():
    return load_pretrained(EMBEDDED_BACKBONE)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    root = tmp_path_factory.mktemp("easyvqa")
    easyvqa.prepare(root)
    return DataConfig(root=str(root))


def test_the_shipped_file_is_small_and_has_the_hash_that_its_record_names() -> None:
    directory = resolve_backbone(EMBEDDED_BACKBONE)
    weights = (directory / "model.safetensors").read_bytes()
    assert len(weights) <= 24_000_000
    recorded = re.search(r"\b[0-9a-f]{64}\b", (directory / "TRAINING.md").read_text())
    assert recorded is not None
    assert recorded.group() == hashlib.sha256(weights).hexdigest()


def test_head_and_blocks_have_the_proportions_of_opt_2_7b(embedded) -> None:
    backbone, _ = embedded
    block = sum(parameter.numel() for parameter in backbone.block(1).parameters())
    head = backbone.shared_modules()[1].weight.numel()
    assert abs(head / block - HEAD_TO_BLOCK) < 0.02
    assert backbone.n_blocks >= 12


def test_it_answers_the_official_test_questions_as_well_as_promised(embedded, data: DataConfig) -> None:
    backbone, encoder = embedded
    samples = split_samples(data, "test", "vqa", max_samples=2000)
    batches = (encoder.collate(samples[i : i + 100]) for i in range(0, 2000, 100))
    assert teacher_forced_accuracy(backbone, batches) >= PROMISED_ACCURACY


@pytest.mark.parametrize("task", ["vqa", "caption", "dialogue"])
def test_full_depth_gives_the_tokens_of_hugging_face(embedded, data: DataConfig, task: str) -> None:
    backbone, encoder = embedded
    for sample in split_samples(data, "test", task, max_samples=8):
        pixels = encoder.encode_image(sample.image)[None]
        prompt = torch.tensor([encoder.encode_prompt(sample.turns)])
        ours = generate(backbone, None, pixels, prompt, max_new_tokens=24)[0].tokens
        theirs = backbone.model.generate(
            pixel_values=pixels,
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=24,
            do_sample=False,
        )[0].tolist()
        assert theirs[-len(ours) :] == ours
        assert encoder.decode(ours)


def test_features_after_every_block_and_logits_equal_hugging_face(embedded, data: DataConfig) -> None:
    backbone, encoder = embedded
    sample = split_samples(data, "test", "dialogue", max_samples=1)[0]
    batch = encoder.collate([sample])
    output = backbone.model(
        pixel_values=batch.pixel_values,
        input_ids=batch.input_ids,
        attention_mask=torch.ones_like(batch.input_ids),
        output_hidden_states=True,
    )
    theirs = output.language_model_outputs.hidden_states
    ours = backbone(batch.pixel_values, batch.image_index, batch.input_ids, range(1, backbone.n_blocks))
    for k, feature in enumerate(ours.exits, start=1):
        torch.testing.assert_close(feature, theirs[k], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.final, theirs[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.lm_head(ours.final), output.logits, rtol=1e-4, atol=1e-4)


def test_other_words_still_have_tokens(embedded) -> None:
    _, encoder = embedded
    text = " un zèbre, 3 €"
    assert encoder.tokenizer.decode(encoder.tokenizer.encode(text, add_special_tokens=False)) == text


def test_assets_are_found_from_any_directory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_backbone(EMBEDDED_BACKBONE).is_absolute()
    assert resolve_backbone("some/where") == Path("some/where")
