"""What stage 1 leaves behind: ordinary Hugging Face directories, swapped in whole.

Knows checkpoint directories and names of weights; does not know engines, ranks or data.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.loading import load_model
from free_dist.config import FinetuneConfig
from free_dist.data.samples import SampleEncoder
from free_dist.training.trained_parts import load_trained, train_parts

COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files that stand beside the weights: configuration, tokenizers, image processor."""

WEIGHT_INDEX = "*.index.json"


def save_backbone(backbone: Blip2Backbone, encoder: SampleEncoder, directory: Path) -> None:
    """Write model, tokenizer and image processor as one Hugging Face directory, in place of what ``directory`` held."""
    with replaced(directory) as written:
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

    Weights that were not trained keep the stored type and value bit by bit, trained ones take the stored type; everything
    beside the weights is copied.  LoRA is merged; ``adapter`` names a directory for the update by itself, in peft's format.
    Holds one whole copy of the model on the CPU.
    """
    model = load_model(start, dtype="auto", allow_pickle=allow_pickle)
    lora = train_parts(model, settings)
    load_trained(model, weights)
    if lora is not None:
        if adapter is not None:
            with replaced(adapter) as written:
                lora.save_pretrained(str(written))
        model = lora.merge_and_unload()
    with replaced(directory) as written:
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


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """An empty directory to write into, which then takes the place of ``directory``.

    Swapped in by renaming: whoever is interrupted finds a whole directory, at worst the former one under ``NAME.old``.
    """
    written, former = (directory.with_name(f"{directory.name}.{suffix}") for suffix in ("tmp", "old"))
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    yield written
    if directory.exists():
        shutil.rmtree(former, ignore_errors=True)
        directory.rename(former)
    written.rename(directory)
    shutil.rmtree(former, ignore_errors=True)
