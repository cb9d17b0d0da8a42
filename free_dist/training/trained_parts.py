"""Which parameters of a backbone stage 1 trains: named parts, everything else frozen.

Knows the modules of transformers' BLIP-2 and InstructBLIP by name; does not know batches or losses.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from free_dist.config import FinetuneConfig
from free_dist.engines import full_shape
from free_dist.training.lora import add_lora

if TYPE_CHECKING:
    from peft import PeftModel

PART_PREFIXES = {
    "vision": ("vision_model.",),
    "qformer": ("qformer.", "query_tokens"),
    "projection": ("language_projection.",),
}
"""Part of ``finetune.train`` -> beginnings of its parameters' names."""


def train_parts(model: PreTrainedModel, settings: FinetuneConfig) -> PeftModel | None:
    """Make exactly the parts that ``settings.train`` names trainable, in place; returns peft's handle if there is LoRA.

    A part without trained parameters runs in evaluation mode, without dropout.
    """
    lora = add_lora(model, settings) if "lora" in settings.train else None
    prefixes = tuple(prefix for part in settings.train for prefix in PART_PREFIXES.get(part, ()))
    for name, parameter in model.named_parameters():
        is_update = lora is not None and ".lora_" in name
        parameter.requires_grad_("all" in settings.train or name.startswith(prefixes) or is_update)
    set_training_mode(model)
    return lora


def set_training_mode(model: PreTrainedModel) -> None:
    """Training mode for every part that has a trained parameter, evaluation mode for the others."""
    for part in model.children():
        part.train(any(parameter.requires_grad for parameter in part.parameters()))


def describe_parts(model: PreTrainedModel) -> str:
    """One line: how many parameters are trained, of how many, in which part of the model."""
    counts: dict[str, int] = {}
    total = 0
    for name, parameter in model.named_parameters():
        size = math.prod(full_shape(parameter))
        total += size
        if parameter.requires_grad:
            part = "LoRA" if ".lora_" in name else _part_of(name)
            counts[part] = counts.get(part, 0) + size
    listed = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    return f"trains {sum(counts.values()):,} of {total:,} parameters: {listed}"


def load_trained(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Copy trained weights, by name, into a model prepared by :func:`train_parts`; every trained parameter must get its own."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == weights.keys(), "the weights belong to another set of trained parameters"
    for name, parameter in trained.items():
        parameter.data.copy_(weights[name])


def _part_of(name: str) -> str:
    for part, prefixes in PART_PREFIXES.items():
        if name.startswith(prefixes):
            return part
    return "language model"
