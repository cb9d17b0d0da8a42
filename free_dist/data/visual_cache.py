"""Frozen vision outputs, computed once and read in training in the place of pixels.

A cache is a directory of safetensors files of a bounded size, each with the features [n, P, W] of n images and the hashes of
these images, and an index, written last.  It belongs to one *source*: the vision tower's weights and structure, and the image
processor, so the resolution.  Opening it for another source is an error that names what differs.  An image is known by the hash
of its encoded bytes, so splits, tasks and data sets share it.  Does not know how a cache is made (``visual_cache_maker``),
splits, tasks or prompts.

Shape letters: P positions of one image (patches, and a class token where the tower has one), W width of the vision tower.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from free_dist.backbones import Backbone, Blip2Backbone
from free_dist.backbones.checkpoint_files import StoredTensor, stored_tensors
from free_dist.backbones.checkpoint_hash import has_safetensors
from free_dist.config import DataConfig, MissingFileError, UserError
from free_dist.data.quarantine import BadSample
from free_dist.data.samples import SampleEncoder

INDEX = "index.json"
FORMAT = 2
"""Version of index and files; 1 was one growing file of feature maps."""

FEATURES, IMAGES, SOURCE = "features", "images", "source"
"""What a file holds: tensors [n, P, W] and uint8 [n, 32], and a source as JSON in the header."""

STORED_AS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types in which features can be kept; float32 is what the tower gave, bit by bit."""

VISION_FIELDS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps", "qkv_bias"),
)
"""Fields of a vision tower's configuration that decide, with its weights, what it computes."""


class VisualCache:
    """Features by image; files are mapped into memory, so processes of a machine share what they read."""

    def __init__(self, directory: Path, backbone: Blip2Backbone, encoder: SampleEncoder) -> None:
        """Raises MissingFileError or UserError for a cache that is absent, unfinished, damaged or of another source."""
        stored = read_index(directory)
        check_source(directory, stored[SOURCE], cache_source(backbone, encoder))
        self._directory = directory
        self._unreadable = {bytes.fromhex(digest) for digest in stored["unreadable"]}
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._files: dict[Path, Any] = {}
        for shard in stored["shards"]:
            path = directory / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise UserError(f"data.visual_cache: {path} is missing or cut short: {_again(path)}")
            self._places |= {digest: (path, row) for row, digest in enumerate(stored_images(path))}

    def __len__(self) -> int:
        return len(self._places)

    def __call__(self, image: bytes) -> Tensor:
        """Encoded bytes -> features [P, W] in the type in which they are kept.

        Raises UserError for an image that is not in the cache, and BadSample, as decoding does, for one that cannot be decoded.
        """
        digest = image_digest(image)
        if digest in self._unreadable:
            raise BadSample("corrupt image", "it could not be decoded when the visual cache was made")
        if digest not in self._places:
            raise UserError(
                f"data.visual_cache: {self._directory} lacks an image of data.root; launch/cache_vision.py adds it"
            )
        path, row = self._places[digest]
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        features: Tensor = self._files[path].get_slice(FEATURES)[row]
        return features

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; it opens the files itself."""
        return self.__dict__ | {"_files": {}}


def use_visual_cache(config: DataConfig, backbone: Backbone, encoder: SampleEncoder) -> None:
    """Let ``encoder`` read features instead of decoding images if the recipe says so; raises what VisualCache raises."""
    if config.visual_cache is None:
        return
    if not isinstance(backbone, Blip2Backbone):
        raise UserError("data.visual_cache: this backbone takes pixels alone; leave the field out")
    encoder.visual_cache = VisualCache(Path(config.visual_cache), backbone, encoder)


def image_digest(image: bytes) -> bytes:
    """What a cache knows an image by: the sha256 of its encoded bytes, 32 bytes."""
    return hashlib.sha256(image).digest()


def cache_source(backbone: Blip2Backbone, encoder: SampleEncoder) -> dict[str, Any]:
    """What features depend on besides the image."""
    vision = backbone.model.config.vision_config.to_dict()
    processor = json.loads(encoder.image_processor.to_json_string())
    return {
        "weights": _vision_hash(backbone),
        "vision_config": {name: vision[name] for name in VISION_FIELDS if name in vision},
        "processor": {name: value for name, value in processor.items() if not name.startswith("_")},
    }


def check_source(place: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError, naming every setting that differs, unless features of ``stored`` are those of ``wanted``."""
    before, now = dict(_flat(stored)), dict(_flat(wanted))
    differing = [
        f"{name} was {_short(before.get(name))}, the backbone has {_short(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(
            f"data.visual_cache: {place} is stale: {'; '.join(differing)}; name another directory, or remove this one and run "
            "launch/cache_vision.py"
        )


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a finished cache; raises MissingFileError or UserError."""
    path = directory / INDEX
    if not path.is_file():
        raise MissingFileError(
            f"data.visual_cache: {path} does not exist; make it, or finish it, with: python launch/cache_vision.py"
        )
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"data.visual_cache: {path} is not JSON ({error}): {_again(path)}") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise UserError(
            f"data.visual_cache: {directory} was made by another version of this program: remove it and run "
            "launch/cache_vision.py"
        )
    return stored


def read_header(path: Path) -> tuple[dict[str, Any], list[int], str]:
    """(source, [n, P, W], type of the features) of one file; raises UserError for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            features = file.get_slice(FEATURES)
            shape, kind = list(features.get_shape()), str(features[:0].dtype).removeprefix("torch.")
            return json.loads((file.metadata() or {})[SOURCE]), shape, kind
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"data.visual_cache: {path} is damaged ({error}): {_again(path)}") from error


def stored_images(path: Path) -> list[bytes]:
    """Digests of the images of one file, in the order of its rows; raises UserError for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return [row.tobytes() for row in file.get_tensor(IMAGES).numpy()]
    except (SafetensorError, OSError) as error:
        raise UserError(f"data.visual_cache: {path} is damaged ({error}): {_again(path)}") from error


def _again(path: Path) -> str:
    return f"remove {path} and run launch/cache_vision.py, which makes what is missing"


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:12]}...{text[-5:]}"


def _vision_hash(backbone: Blip2Backbone) -> str:
    """sha256 of the vision weights as float32: those of the checkpoint's files, which do not depend on the type they are loaded
    in nor on how they are sharded, wherever the model still holds them."""
    model = backbone.model
    held = dict(sorted(model.vision_model.named_parameters(prefix="vision_model")))
    stored: dict[str, StoredTensor] = {}
    if model.name_or_path and has_safetensors(Path(model.name_or_path)):
        stored = stored_tensors(model.name_or_path)
    digests = [hashlib.sha256(), hashlib.sha256()]
    of_files = held.keys() <= stored.keys()
    for name, parameter in held.items():
        tensors = [parameter.detach().cpu()]
        if of_files:
            tensors.append(stored[name].read())
            # A process that holds one shard of the weights, or none, cannot compare; everyone else can.
            of_files = not parameter.numel() or torch.equal(tensors[1].to(parameter.dtype), tensors[0])
        for digest, tensor in zip(digests, tensors, strict=False):
            digest.update(f"{name} {list(tensor.shape)}\n".encode())
            digest.update(tensor.float().contiguous().numpy().tobytes())
    return digests[of_files].hexdigest()
