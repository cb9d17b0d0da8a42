"""What stage 1 leaves behind: ordinary Hugging Face directories, swapped in whole.

Knows checkpoint directories and names of weights; does not know engines, ranks or data.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from free_dist.atomic import replaced_directory
from free_dist.backbones import Blip2Backbone
from free_dist.backbones.checkpoint_files import open_checkpoint
from free_dist.backbones.loading import load_model
from free_dist.config import FinetuneConfig
from free_dist.data.samples import SampleEncoder
from free_dist.training.trained_parts import load_trained, train_parts

COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files that stand beside the weights: configuration, tokenizers, image processor."""

WEIGHT_INDEX = "*.index.json"


def save_backbone(backbone: Blip2Backbone, encoder: SampleEncoder, directory: Path) -> None:
    """Write model, tokenizer and image processor as one Hugging Face directory, in place of what ``directory`` held."""
    with replaced_directory(directory) as written:
        backbone.model.save_pretrained(written)
        encoder.tokenizer.save_pretrained(written)
        encoder.image_processor.save_pretrained(written)


def save_trained(
    start: Path,
    weights: dict[str, Tensor],
    settings: FinetuneConfig,
    directory: Path,
    *,
    adapter: Path | None = None,
    allow_pickle: bool = False,
) -> None:
    """Write the backbone of ``start`` with trained ``weights`` (name in the model -> float32) into ``directory``.

    Weights that were not trained keep the stored type and value bit by bit, trained ones are rounded to the type that each
    is stored in; everything beside the weights is copied.  Of a pickle the type is not known before it is read: all weights
    take the one that config.json states.  LoRA is merged; ``adapter`` names a directory for the update by itself, in peft's
    format.  Holds one whole copy of the model on the CPU, in float32 if the stored types are several.
    """
    stored = open_checkpoint(start, allow_pickle=allow_pickle).tensors or {}
    types = {tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point}
    loaded: torch.dtype | str = next(iter(types), "auto") if len(types) < 2 else torch.float32
    model = load_model(start, dtype=loaded, allow_pickle=allow_pickle)
    lora = train_parts(model, settings)
    load_trained(model, weights)
    if lora is not None:
        if adapter is not None:
            with replaced_directory(adapter) as written:
                lora.save_pretrained(str(written))
        model = lora.merge_and_unload()
    for name, parameter in model.named_parameters():
        if name in stored:  # some parts of a half-precision model are loaded in float32 all the same
            parameter.data = parameter.data.to(stored[name].dtype)
    write_beside(start, model, directory)


def write_beside(start: Path, model: PreTrainedModel, directory: Path) -> None:
    """Write ``model``, made of the checkpoint ``start``, with all that lies beside that one's weights, as ``directory``."""
    with replaced_directory(directory) as written:
        model.save_pretrained(written)
        # Copied over what the library wrote: it adds to config.json what it worked out while it loaded.
        for source in companions(start):
            copy = written / source.relative_to(start)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def companions(directory: Path) -> list[Path]:
    """Files of a checkpoint beside its weights, those of nested tokenizers (a Q-Former's) included."""
    found = [path for pattern in COMPANIONS for path in directory.rglob(pattern) if path.is_file()]
    return [path for path in found if not path.match(WEIGHT_INDEX)]
