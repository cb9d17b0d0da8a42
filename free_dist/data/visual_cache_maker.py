"""Writes a visual cache: files of a bounded size one after the other, each whole or absent, the index last.

An interrupted cache goes on where it stopped: images that a file holds are not computed again.  Several processes can share the
work, each on the images of its part; files are named by what they hold, so none overwrites another's.  Knows the vision
tower's first half (:meth:`~free_dist.backbones.Blip2Backbone.encode_patches`); does not know splits, or who trains on it.

Shape letters: n images of a file, P positions of one image, W width of the vision tower.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from free_dist.atomic import write_atomically
from free_dist.backbones import Blip2Backbone
from free_dist.config import UserError
from free_dist.data.quarantine import BadSample
from free_dist.data.samples import SampleEncoder
from free_dist.data.visual_cache import (
    FEATURES,
    FORMAT,
    IMAGES,
    INDEX,
    SOURCE,
    STORED_AS,
    cache_source,
    check_source,
    image_digest,
    read_header,
    read_index,
    stored_images,
)
from free_dist.hashing import file_sha256

BATCH = 16
"""Images that the vision network sees at once while a cache is made."""

SHARD_BYTES = 256 * 2**20
"""Most bytes of features in one file; twice as many are held in memory while it is written."""

FILES = "*.safetensors"


class CacheMaker:
    """One process that fills a cache directory."""

    def __init__(
        self,
        directory: Path,
        backbone: Blip2Backbone,
        encoder: SampleEncoder,
        *,
        store: str = "float32",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Raises UserError if the directory holds features of another source or type, or is damaged."""
        if store not in STORED_AS:
            raise UserError(f"--store {store}: want one of {', '.join(STORED_AS)}")
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.backbone, self.encoder, self.store = directory, backbone, encoder, store
        self.shard_bytes = shard_bytes
        self.source = cache_source(backbone, encoder)
        self.unreadable: set[bytes] = set()
        """Digests of images that do not decode."""
        if (directory / INDEX).is_file():
            self.unreadable |= {bytes.fromhex(digest) for digest in read_index(directory)["unreadable"]}
        self.known: set[bytes] = set()
        """Digests of images whose features are on disk."""
        for path in sorted(directory.glob(FILES)):
            stored, _, kind = read_header(path)
            check_source(path, stored, self.source)
            if kind != store:
                raise UserError(f"--store {store}: {directory} holds {kind}: go on with --store {kind}, or remove it")
            self.known.update(stored_images(path))

    def add(
        self,
        images: Iterable[bytes],
        *,
        part: tuple[int, int] = (0, 1),
        progress: Callable[[Iterable[list[bytes]]], Iterable[list[bytes]]] = iter,
    ) -> None:
        """Compute and write the features of every image of ``part`` (k of n) that no file holds.

        ``progress`` wraps the batches, for a bar.  Raises UserError where float16 cannot hold a feature.
        """
        missing = self._missing(images, part)
        features: list[Tensor] = []
        digests: list[bytes] = []
        for batch in progress(iter(lambda: list(islice(missing, BATCH)), [])):
            made, seen = self._features(batch)
            features += made
            digests += seen
            # A row is of the same size for all images: the processor resizes them to one.
            while features and len(features) >= (rows := max(1, self.shard_bytes // features[0].nbytes)):
                self._write(features[:rows], digests[:rows])
                del features[:rows], digests[:rows]
        if features:
            self._write(features, digests)

    def finish(self) -> None:
        """Write the index over all files, after which the cache can be opened.  No other process may be writing."""
        for leftover in self.directory.glob(f".{FILES}.*.tmp"):
            leftover.unlink()
        shards, shapes = [], set()
        for path in sorted(self.directory.glob(FILES)):
            _, (rows, *shape), _ = read_header(path)
            shapes.add(tuple(shape))
            content = {"name": path.name, "images": rows, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            shards.append(content)
        if len(shapes) > 1:
            raise UserError(f"data.visual_cache: {self.directory} holds features of several shapes, {sorted(shapes)}")
        index = {
            "format": FORMAT,
            SOURCE: self.source,
            "stored_as": self.store,
            "shape": list(next(iter(shapes), ())),
            "shards": shards,
            "unreadable": sorted(digest.hex() for digest in self.unreadable),
        }
        write_atomically(self.directory / INDEX, json.dumps(index, indent=1).encode())

    def _missing(self, images: Iterable[bytes], part: tuple[int, int]) -> Iterator[bytes]:
        """Every image of the part that is neither on disk nor known to be unreadable, once."""
        seen = self.known | self.unreadable
        number, parts = part
        for image in images:
            digest = image_digest(image)
            if digest not in seen and int.from_bytes(digest[:8], "big") % parts == number:
                seen.add(digest)
                yield image

    @torch.inference_mode()
    def _features(self, batch: list[bytes]) -> tuple[list[Tensor], list[bytes]]:
        pixels, digests = [], []
        for image in batch:
            try:
                pixels.append(self.encoder.encode_image(image))
                digests.append(image_digest(image))
            except BadSample:
                self.unreadable.add(image_digest(image))
        if not pixels:
            return [], []
        made = encode(self.backbone, torch.stack(pixels)).to(STORED_AS[self.store])
        if not made.isfinite().all():
            raise UserError(f"--store {self.store}: it cannot hold a feature of these images: take bfloat16 or float32")
        return [row.clone() for row in made], digests

    def _write(self, features: list[Tensor], digests: list[bytes]) -> None:
        images = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)
        header = {SOURCE: json.dumps(self.source, sort_keys=True)}
        content = save({FEATURES: torch.stack(features), IMAGES: images}, metadata=header)
        write_atomically(self.directory / f"{hashlib.sha256(b''.join(digests)).hexdigest()[:16]}.safetensors", content)
        self.known.update(digests)


def make_cache(
    directory: Path, images: Iterable[bytes], backbone: Blip2Backbone, encoder: SampleEncoder, **settings: Any
) -> None:
    """Make a whole cache in one process, or go on with one; ``settings`` are those of :class:`CacheMaker`."""
    maker = CacheMaker(directory, backbone, encoder, **settings)
    maker.add(images)
    maker.finish()


@torch.inference_mode()
def features_shape(backbone: Blip2Backbone, encoder: SampleEncoder) -> tuple[int, int]:
    """(P, W) of any image, by asking the vision tower about a grey one."""
    grey = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(grey, "PNG")
    positions, width = encode(backbone, encoder.encode_image(grey.getvalue())[None]).shape[1:]
    return positions, width


def cache_bytes(images: int, shape: tuple[int, int], store: str) -> int:
    """Bytes on disk of the features of so many images."""
    return images * math.prod(shape) * STORED_AS[store].itemsize


def encode(backbone: Blip2Backbone, pixels: Tensor) -> Tensor:
    """Pixels [I, 3, height, width] from anywhere -> features [I, P, W] on the CPU."""
    weight = next(backbone.model.vision_model.parameters())
    return backbone.encode_patches(pixels.to(weight.device, weight.dtype)).cpu()


def damaged_files(directory: Path) -> list[str]:
    """Names of files of a finished cache whose bytes are not those that were written; reads all of them."""
    damaged = []
    for shard in read_index(directory)["shards"]:
        digest = None
        with suppress(FileNotFoundError):
            digest = file_sha256(directory / shard["name"])
        if digest != shard["sha256"]:
            damaged.append(shard["name"])
    return damaged
