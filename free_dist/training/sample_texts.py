"""Texts that exits in training generate from a few calibration samples: a table for people, numbers for the alarms.

Knows how a sample is decoded and shown; does not know when, nor what is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from free_dist.backbones import Backbone, Instruction
from free_dist.config import Recipe, UserError
from free_dist.data.samples import Sample, SampleEncoder
from free_dist.data.shards import ShardError, shard_paths
from free_dist.data.stream import split_samples
from free_dist.decoding.generate import generate
from free_dist.decoding.result import GenerationResult
from free_dist.exits import ExitBank
from free_dist.monitor import Monitor
from free_dist.training.cache_drift import answer_drift, drift_checks
from free_dist.training.sample_checks import sample_checks

SHOWN_SAMPLES = 4
"""Samples per task whose generated text is logged."""

SAMPLED_SPLIT = "calibration"
"""Split they are taken from."""


def check_samples(recipe: Recipe) -> None:
    """Raise UserError if sample texts are wanted but cannot be made: found later, on rank 0 alone, the others would wait."""
    if not recipe.training.sample_every:
        return
    try:
        shard_paths(recipe.data.root, SAMPLED_SPLIT)
    except ShardError as error:
        raise UserError(
            f"training.sample_every={recipe.training.sample_every}: sample texts need the {SAMPLED_SPLIT} split of "
            f"data.root={recipe.data.root} ({error}); add it, or set training.sample_every=0"
        ) from error


def log_samples(
    monitor: Monitor, step: int, decoder: Backbone, bank: ExitBank, encoder: SampleEncoder, recipe: Recipe
) -> dict[str, float]:
    """Generate a few calibration samples with the exits as they are, and log question, answer and exits as a table.

    Returns what :func:`~free_dist.training.sample_checks.sample_checks` and
    :func:`~free_dist.training.cache_drift.drift_checks` say of them.
    """
    lines = ["| task | prompt | expected | generated | exit after block |", "|---|---|---|---|---|"]
    exits = _decoding_copy(bank, decoder)
    early, full, drifts = [], [], []
    for task in recipe.data.tasks:
        for sample in split_samples(recipe.data, SAMPLED_SPLIT, task, max_samples=SHOWN_SAMPLES):
            pixels, prompt, instruction = _inputs(sample, decoder, encoder)
            options: dict[str, Any] = {
                "instruction": instruction,
                "max_new_tokens": recipe.decoding.max_new_tokens,
            }
            threshold = recipe.decoding.confidence_threshold
            early.append(generate(decoder, exits, pixels, prompt, thresholds=threshold, **options)[0])
            full.append(generate(decoder, None, pixels, prompt, **options)[0])
            drifts.append(answer_drift(decoder, exits, pixels, prompt, early[-1], instruction=instruction))
            lines.append(_sample_row(sample, early[-1], encoder))
    monitor.text(step, "samples", "\n".join(lines))
    return sample_checks(early, full) | drift_checks(drifts)


def _decoding_copy(bank: ExitBank, decoder: Backbone) -> ExitBank:
    """The bank's weights in the decoder's precision, on the decoder's own norm and head."""
    copy = ExitBank(decoder, bank.exit_layers, variant=bank.variant, init=bank.init).eval()
    copy.load_trainable_state_dict(bank.trainable_state_dict())
    return copy.merged()


def _inputs(sample: Sample, decoder: Backbone, encoder: SampleEncoder) -> tuple[Tensor, Tensor, Instruction | None]:
    """Pixels, prompt and the Q-Former's instruction of one sample, each one row, where the decoder is."""
    parameter = next(decoder.parameters())
    pixels = encoder.encode_image(sample.image)[None].to(parameter.device, parameter.dtype)
    prompt = torch.tensor([encoder.encode_prompt(sample.turns)], device=parameter.device)
    return pixels, prompt, encoder.encode_instruction(sample.turns, parameter.device)


def _sample_row(sample: Sample, result: GenerationResult, encoder: SampleEncoder) -> str:
    where = " ".join("full" if layer is None else str(layer) for layer in result.exit_layers)
    cells = [sample.task, sample.turns[-1].prompt, sample.turns[-1].answer, encoder.decode(result.tokens), where]
    return "| " + " | ".join(cells) + " |"
