"""Frozen vision outputs, computed once: a file of feature maps beside an index that says of which images and by which weights.

A cache belongs to one *source*: the hash of the vision weights, the image processor's settings, and so the resolution.
Opening it for another source is an error.  Maps are kept in float32, bit by bit what the vision network gave.  Knows images by
the hash of their encoded bytes; does not know splits, tasks or prompts.

Shape letters: W channels of a feature map.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from free_dist.atomic import write_atomically
from free_dist.backbones import Backbone, FeatureLmBackbone
from free_dist.backbones.checkpoint_files import stored_tensors
from free_dist.backbones.checkpoint_hash import has_safetensors
from free_dist.config import DataConfig, MissingFileError, UserError
from free_dist.data.samples import SampleEncoder

INDEX, MAPS = "index.json", "maps.bin"
BATCH = 16
"""Images that the vision network sees at once while a cache is made."""


class VisualCache:
    """Feature maps by image; closed over one memory-mapped file, so processes share what they read."""

    def __init__(self, directory: Path, backbone: FeatureLmBackbone, encoder: SampleEncoder) -> None:
        """Raises MissingFileError or UserError for a cache that is absent, cut short, or of another source."""
        index = directory / INDEX
        if not index.is_file():
            raise MissingFileError(
                f"data.visual_cache: {index} does not exist; make it with: python launch/cache_vision.py"
            )
        stored = json.loads(index.read_text())
        for name, wanted in source(backbone, encoder).items():
            if stored["source"].get(name) != wanted:
                raise UserError(
                    f"data.visual_cache: {directory} was made with {name} {stored['source'].get(name)!r}, the backbone has "
                    f"{wanted!r}: it is stale, remove it and make it again"
                )
        self._rows = {digest: row for row, digest in enumerate(stored["images"])}
        shape = (len(self._rows), *backbone.feature_shape())
        path = directory / MAPS
        if not path.is_file() or path.stat().st_size != 4 * math.prod(shape):
            raise UserError(f"data.visual_cache: {path} is missing or cut short: remove {directory} and make it again")
        self._maps = np.memmap(path, dtype=np.float32, mode="r", shape=shape)
        self._directory = directory

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, image: bytes) -> Tensor:
        """Encoded bytes -> feature map [W, h, w]; raises UserError for an image that is not in the cache."""
        row = self._rows.get(image_digest(image))
        if row is None:
            raise UserError(
                f"data.visual_cache: {self._directory} lacks an image of data.root: remove it and make it again for these shards"
            )
        return torch.from_numpy(np.array(self._maps[row]))


def use_visual_cache(config: DataConfig, backbone: Backbone, encoder: SampleEncoder) -> None:
    """Let ``encoder`` read feature maps if the recipe says so; raises what VisualCache raises, or UserError."""
    if config.visual_cache is None:
        return
    if not isinstance(backbone, FeatureLmBackbone):
        raise UserError("data.visual_cache: this backbone takes pixels alone; leave the field out")
    encoder.visual_cache = VisualCache(Path(config.visual_cache), backbone, encoder)


def image_digest(image: bytes) -> str:
    """What a cache knows an image by: the sha256 of its encoded bytes."""
    return hashlib.sha256(image).hexdigest()


def source(backbone: FeatureLmBackbone, encoder: SampleEncoder) -> dict[str, Any]:
    """What feature maps depend on besides the image."""
    processor = json.loads(encoder.image_processor.to_json_string())
    return {
        "weights": _vision_hash(backbone),
        "processor": hashlib.sha256(json.dumps(processor, sort_keys=True).encode()).hexdigest(),
        "shape": list(backbone.feature_shape()),
    }


@torch.inference_mode()
def make_cache(
    directory: Path,
    images: Iterable[bytes],
    backbone: FeatureLmBackbone,
    encoder: SampleEncoder,
    progress: Callable[[Iterable[list[bytes]]], Iterable[list[bytes]]] = iter,
) -> None:
    """Write the cache of every distinct image, the index last; an interrupted one has no index and is made again.

    ``progress`` wraps the batches, for a bar.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX).unlink(missing_ok=True)
    digests: list[str] = []
    distinct = _distinct(images, digests)
    with (directory / MAPS).open("wb") as file:
        for batch in progress(iter(lambda: list(islice(distinct, BATCH)), [])):
            pixels = torch.stack([encoder.encode_image(image) for image in batch])
            file.write(backbone.feature_maps(pixels).contiguous().numpy().tobytes())
    index = {"source": source(backbone, encoder), "images": digests}
    write_atomically(directory / INDEX, json.dumps(index).encode())


def _distinct(images: Iterable[bytes], digests: list[str]) -> Iterator[bytes]:
    """Every image once; their digests are appended to ``digests`` in that order."""
    seen: set[str] = set()
    for image in images:
        digest = image_digest(image)
        if digest not in seen:
            seen.add(digest)
            digests.append(digest)
            yield image


def _vision_hash(backbone: FeatureLmBackbone) -> str:
    """sha256 of the vision weights: those of the checkpoint's files where there are any, for a process may hold none."""
    model = backbone.model
    stored = None
    if model.name_or_path and has_safetensors(Path(model.name_or_path)):
        stored = stored_tensors(model.name_or_path)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.vision_model.named_parameters(prefix="vision_model")):
        tensor = parameter.detach().cpu() if stored is None else stored[name].read()
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
