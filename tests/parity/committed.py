"""The committed answers of LAVIS's own models, and the files they came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from free_dist.backbones.lavis import LavisFiles

REFERENCE = Path(__file__).parent / "reference"
PUBLISHED = "published_names.json"
"""Name and shape of every tensor of LAVIS's BLIP-2 OPT-2.7B before the language model."""

VISION_HEADS, QFORMER_HEADS = 3, 2
"""Of the small models; the checkpoint does not tell."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One of LAVIS's models: its files, and what it answered."""

    folder: Path
    tensors: dict[str, Tensor]
    notes: dict[str, Any]

    @property
    def files(self) -> LavisFiles:
        """What imports it, BLIP-2 kinds only."""
        return LavisFiles(
            kind=self.folder.name.replace("_", "-"),
            language_model=self.folder / "language_model",
            checkpoints=(self.folder / "checkpoint.pth",),
            vision=self.folder / "eva_vit_g.pth",
            vision_heads=VISION_HEADS,
            qformer_heads=QFORMER_HEADS,
        )


def read_reference(folder: Path) -> Reference:
    tensors = load_file(folder / "reference.safetensors")
    return Reference(folder=folder, tensors=tensors, notes=json.loads((folder / "reference.json").read_text()))
