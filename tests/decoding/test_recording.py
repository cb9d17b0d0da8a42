"""Recordings against the decoder that they stand for, and banks cut from a larger one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from free_dist.backbones import Blip2Backbone
from free_dist.config import ConfigError
from free_dist.data.samples import Sample
from free_dist.data.stream import split_samples
from free_dist.decoding.generate import generate
from free_dist.evaluation.calibration import OFF
from free_dist.evaluation.placement_benchmark import bank_thresholds
from free_dist.evaluation.recording import UNKNOWN, record_answers
from free_dist.exits import ExitBank
from free_dist.exits.placement import Placement

LIMIT = 6


@pytest.fixture(scope="module")
def samples(tiny_data) -> list[Sample]:
    return split_samples(tiny_data, "calibration", "vqa", max_samples=6)


@pytest.fixture(scope="module")
def lively(tiny_backbone: Blip2Backbone) -> tuple[Blip2Backbone, ExitBank]:
    """The tiny backbone with weights that make tokens vary, and exits after all but the last block that differ from it."""
    import copy

    backbone = copy.deepcopy(tiny_backbone)
    for parameter in backbone.model.language_model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(8.0)
    bank = ExitBank(backbone, (1, 2, 3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bank.transformers.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return backbone, bank.eval().requires_grad_(False)


def test_recordings_are_the_full_models_answers_with_the_decoders_own_confidences(
    lively, tiny_encoder, samples
) -> None:
    backbone, bank = lively
    recorded = record_answers(backbone, tiny_encoder, bank, "vqa", samples, max_new_tokens=LIMIT)
    seen = 0
    for number, sample in enumerate(samples):
        rows = np.flatnonzero(recorded.answers == number)
        pixels = tiny_encoder.encode_image(sample.image)[None]
        prompt = tiny_encoder.encode_prompt(sample.turns)
        (full,) = generate(backbone, None, pixels, prompt, max_new_tokens=LIMIT)
        assert recorded.tokens[rows].tolist() == full.tokens
        assert recorded.prompts[number] == len(prompt)
        for c, confidence in enumerate(recorded.confidences[:, rows[0]]):
            # This exit alone, at a threshold just below what was recorded: it emits the first token, with this confidence.
            thresholds = [OFF] * 3
            thresholds[c] = max(0.0, float(confidence) - 1e-6)
            (own,) = generate(backbone, bank, pixels, prompt, thresholds=thresholds, max_new_tokens=1)
            assert own.exit_layers == [bank.exit_layers[c]]
            assert own.confidences[0] == pytest.approx(float(confidence), abs=1e-6)
            assert own.tokens == [recorded.named[c, rows[0]]]
            thresholds[c] = min(1.0, float(confidence) + 1e-6)
            (none,) = generate(backbone, bank, pixels, prompt, thresholds=thresholds, max_new_tokens=1)
            assert none.exit_layers == [None]
            seen += 1
    assert seen == 3 * len(samples)
    assert not recorded.agrees.all() and recorded.recording().blocks == (1, 2, 3)


def test_harm_is_counted_per_answer_and_labels_excuse_what_the_full_model_got_wrong(
    lively, tiny_encoder, samples
) -> None:
    backbone, bank = lively
    recorded = record_answers(backbone, tiny_encoder, bank, "vqa", samples, max_new_tokens=LIMIT)
    agreement, labels = recorded.harm("agreement"), recorded.harm("labels")
    assert set(np.unique(agreement)) == {0.0, 1 / len(samples)}
    assert (labels <= agreement).all()
    for t in range(len(recorded.tokens)):
        wrong = recorded.labels[t] not in (UNKNOWN, recorded.tokens[t])
        assert (labels[:, t] == (0 if wrong else agreement[:, t])).all()
    for number, sample in enumerate(samples):
        rows = np.flatnonzero(recorded.answers == number)
        label = tiny_encoder._answer(sample.turns[-1])
        assert recorded.labels[rows[0]] == label[0]
        for before, t in enumerate(rows[1:]):
            follows = recorded.tokens[rows[: before + 1]].tolist() == label[: before + 1] and before + 1 < len(label)
            assert recorded.labels[t] == (label[before + 1] if follows else UNKNOWN)
    caption = record_answers(backbone, tiny_encoder, bank, "caption", samples[:2], max_new_tokens=LIMIT)
    assert set(np.unique(caption.harm())) <= {0.0, 1 / len(caption.tokens)}


def test_part_of_a_bank_decodes_as_the_bank_with_the_others_off_and_as_a_bank_trained_alone(
    backbone: Blip2Backbone, bank: ExitBank, cases: list[tuple[Tensor, Tensor]]
) -> None:
    part = bank.subset((1, 5))
    alone = ExitBank(backbone, (1, 5))
    alone.load_trainable_state_dict(part.trainable_state_dict())
    alone.eval()
    exits: set[int | None] = set()
    for pixels, prompt in cases:
        for low in (0.02, 0.1, 0.3):
            settings = {"max_new_tokens": 8, "eos_token_id": -1}
            (whole,) = generate(backbone, bank, pixels, prompt, thresholds=[low, OFF, 0.05], **settings)
            (cut,) = generate(backbone, part, pixels, prompt, thresholds=[low, 0.05], **settings)
            (own,) = generate(backbone, alone, pixels, prompt, thresholds=[low, 0.05], **settings)
            assert whole.records == cut.records == own.records
            exits |= set(whole.exit_layers)
    assert 1 in exits and len(exits) > 1


def test_part_of_a_low_rank_bank_keeps_the_updates_of_its_exits_alone(backbone: Blip2Backbone) -> None:
    whole = ExitBank(backbone, (1, 3, 5), variant="lora")
    part = whole.subset((3,))
    weights = part.trainable_state_dict()
    assert weights.keys() == ExitBank(backbone, (3,), variant="lora").trainable_state_dict().keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, whole.trainable_state_dict()[name.replace("transformers.0", "transformers.1")])
    assert part.merged().exit_layers == (3,) and len(part.merged().transformers) == 1
    with pytest.raises(ConfigError, match=r"no exit after \[2\]"):
        whole.subset((2, 3))


def test_a_placement_switches_off_what_it_does_not_use(bank: ExitBank) -> None:
    placement = Placement(layers=(3,), thresholds=(0.4,), seconds=1.0, harm=0.0)
    assert bank_thresholds(bank, placement) == (OFF, 0.4, OFF)
    with pytest.raises(ConfigError, match=r"no exit after blocks \[4\]"):
        bank_thresholds(bank, Placement(layers=(4,), thresholds=(0.4,), seconds=1.0, harm=0.0))
