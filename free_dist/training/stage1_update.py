"""What stage 1 changed, by itself: a connector and a LoRA adapter, small enough to be passed on without the backbone.

A directory of ``connector.safetensors`` (query tokens, Q-Former and projection under the model's own names) beside an adapter in
peft's format, all in float16.  Put on the backbone that stage 1 started from, it gives the trained one within that rounding.
Knows files and names of weights; does not know data or engines.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from free_dist.atomic import replaced_directory
from free_dist.backbones.checkpoint_files import stored_tensors
from free_dist.backbones.checkpoint_hash import checkpoint_hash
from free_dist.backbones.loading import load_model
from free_dist.config import MissingFileError, UserError
from free_dist.training.lora import quiet_peft
from free_dist.training.stage1_result import write_beside
from free_dist.training.trained_parts import PART_PREFIXES

CONNECTOR = "connector.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ABOUT = "update.json"
PREFIXES = (*PART_PREFIXES["qformer"], *PART_PREFIXES["projection"])


def save_update(start: Path, backbone: Path, adapter: Path, directory: Path) -> None:
    """Write what turns ``start`` into ``backbone``, which stage 1 made of it with ``finetune.keep_adapter``.

    Raises UserError when ``start`` lacks a weight of the connector, and MissingFileError for a missing adapter.
    """
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise MissingFileError(
            f"{adapter / ADAPTER_WEIGHTS} does not exist: stage 1 writes it with finetune.keep_adapter=true"
        )
    connector = {name: tensor.read() for name, tensor in stored_tensors(backbone).items() if name.startswith(PREFIXES)}
    if connector.keys() != {name for name in stored_tensors(start) if name.startswith(PREFIXES)}:
        raise UserError(f"{backbone} and {start} have other weights in Q-Former and projection: not made of each other")
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text())
    settings["base_model_name_or_path"] = None  # where it lay is nobody's business
    with replaced_directory(directory) as written:
        (written / CONNECTOR).write_bytes(_packed(connector))
        (written / ADAPTER_WEIGHTS).write_bytes(_packed(load_file(adapter / ADAPTER_WEIGHTS)))
        (written / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
        (written / ABOUT).write_text(json.dumps({"start": frozen_hash(start)}, indent=1) + "\n")


def apply_update(start: Path, update: Path, directory: Path) -> None:
    """Write the trained backbone: the Hugging Face directory ``start`` with ``update`` merged into it, as ``directory``.

    Raises MissingFileError or UserError for an update that is not whole, or that was made on another backbone.
    """
    from peft import PeftModel

    missing = [name for name in (CONNECTOR, ADAPTER_CONFIG, ADAPTER_WEIGHTS, ABOUT) if not (update / name).is_file()]
    if missing:
        raise MissingFileError(f"{update} lacks {', '.join(missing)}: want a directory that holds what stage 1 changed")
    wanted, found = json.loads((update / ABOUT).read_text())["start"], frozen_hash(start)
    if wanted != found:
        raise UserError(f"{update} was trained on frozen weights with hash {wanted}; those of {start} have {found}")
    try:
        connector = load_file(update / CONNECTOR)
        load_file(update / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{update} is damaged ({error}): get it again") from error
    model = load_model(start, dtype=torch.float32)
    weights = dict(model.named_parameters())
    for name, value in connector.items():
        weights[name].data.copy_(value)
    with quiet_peft():
        merged = PeftModel.from_pretrained(model, str(update)).merge_and_unload()
    write_beside(start, merged, directory)


def frozen_hash(start: Path) -> str:
    """The hash of what stage 1 leaves as it is, before LoRA; the untrained connector's random numbers do not matter."""
    return checkpoint_hash(start, without=PREFIXES)


def _packed(tensors: dict[str, Tensor]) -> bytes:
    return save({name: tensor.half().contiguous() for name, tensor in sorted(tensors.items())})
