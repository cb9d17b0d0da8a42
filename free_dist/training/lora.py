"""Low-rank updates (LoRA, arXiv 2106.09685) of a language model's linear maps, through ``peft``.

Knows names of modules and what ``peft`` wants; does not know batches, engines or what else is trained.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from free_dist.config import FinetuneConfig, UserError

if TYPE_CHECKING:
    from peft import PeftModel

DEFAULT_TARGETS = {"opt": ("q_proj", "v_proj"), "llama": ("q_proj", "v_proj"), "t5": ("q", "v")}
"""Language model's type -> linear maps adapted when the recipe names none: query and value, as in the paper."""


def add_lora(model: PreTrainedModel, settings: FinetuneConfig) -> PeftModel:
    """Put an untrained low-rank update on every target inside ``model.language_model``, in place, and return peft's handle.

    The update starts at zero, so the model computes what it did.  Afterwards nothing but the update requires a gradient.
    Raises UserError for a target that the language model's blocks do not have.
    """
    # Costs seconds, which runs without LoRA need not spend.
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=target_pattern(model, settings.lora_targets),
    )
    with quiet_peft():
        return get_peft_model(model, config)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Inside, ``peft`` does not warn that it asks for an attribute which transformers is about to rename."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
        yield


def target_pattern(model: PreTrainedModel, targets: list[str]) -> str:
    """A regular expression that exactly the adapted modules' full names match; empty ``targets``: the type's defaults.

    Only blocks are searched: exits share the language model's head by reference.  Raises UserError as :func:`add_lora` does.
    """
    kind = model.language_model.config.model_type
    if not targets:
        if kind not in DEFAULT_TARGETS:
            raise UserError(f"finetune.lora_targets: no defaults for a language model of type {kind!r}; name them")
        targets = list(DEFAULT_TARGETS[kind])
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    offered = {match[1] for name in linear if (match := re.fullmatch(_inside_blocks(r"([^.]+)"), name))}
    for target in targets:
        if target not in offered:
            raise UserError(
                f"finetune.lora_targets: no linear map {target!r} in the blocks of the {kind!r} language model; "
                f"there are {', '.join(sorted(offered))}"
            )
    return _inside_blocks(f"(?:{'|'.join(map(re.escape, targets))})")


def _inside_blocks(last: str) -> str:
    return rf"language_model\.(?:.*\.)?\d+\.(?:.*\.)?{last}"
