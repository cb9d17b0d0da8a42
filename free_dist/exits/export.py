"""Trained exits on disk: ``exits.safetensors`` (weights) and ``exits.json`` (what they belong to).

The JSON is written last and holds the checksum of the weights, so a half-written export is noticed; there is no pickle on
the way.  Does not know how exits are trained or thresholds chosen: both are handed in as plain values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from free_dist.atomic import write_atomically
from free_dist.backbones import Backbone
from free_dist.config import MissingFileError, UserError
from free_dist.exits.transformer import ExitBank

FORMAT_VERSION = 1
WEIGHTS = "exits.safetensors"
MANIFEST = "exits.json"


class ExportError(UserError):
    """An export that cannot be used as it stands; the message names the file and what to do."""


@dataclass(frozen=True, kw_only=True)
class ExitsManifest:
    """What ``exits.json`` says."""

    format_version: int
    backbone_hash: str
    """:func:`backbone_hash` of the frozen backbone the exits were trained on."""
    exit_layers: tuple[int, ...]
    """Blocks the exits follow, 1-based."""
    variant: str
    """Kind of exit transformer; ``full`` is a replica of one block."""
    thresholds: tuple[float, ...]
    """Confidence threshold per exit."""
    weights_sha256: str
    """Of ``exits.safetensors``."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever the trainer wants to keep: backbone name, recipe, git hash, how thresholds were chosen."""


def backbone_hash(module: nn.Module) -> str:
    """sha256 over name, type, shape and bytes of every parameter, in the order of their names.

    Pass the ``Backbone`` itself, unsharded; the same checkpoint loaded in another type has another hash.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_exits(
    bank: ExitBank,
    directory: str | Path,
    *,
    backbone_hash: str,
    thresholds: float | Sequence[float],
    extra: dict[str, Any] | None = None,
) -> None:
    """Write an export to ``directory``; ``thresholds`` is one value for all exits or one per exit, ``extra`` is JSON."""
    n_exits = len(bank.exit_layers)
    values = [thresholds] * n_exits if isinstance(thresholds, (int, float)) else list(thresholds)
    if len(values) != n_exits:
        raise ValueError(f"thresholds: {len(values)} values for {n_exits} exits; give one for all, or one per exit")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bank.trainable_state_dict().items()}
    weights = save(tensors)
    manifest = ExitsManifest(
        format_version=FORMAT_VERSION,
        backbone_hash=backbone_hash,
        exit_layers=bank.exit_layers,
        variant="full",
        thresholds=tuple(float(value) for value in values),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        extra=extra or {},
    )
    content = json.dumps(asdict(manifest), indent=2, allow_nan=False).encode() + b"\n"
    Path(directory).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(directory) / WEIGHTS, weights)
    write_atomically(Path(directory) / MANIFEST, content)


def read_exits_manifest(directory: str | Path) -> ExitsManifest:
    """What an export says about itself; raises MissingFileError or ExportError."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: give the directory that save_exits wrote")
    try:
        content = json.loads(path.read_text())
        manifest = ExitsManifest(**content)
    except (json.JSONDecodeError, TypeError) as error:
        raise ExportError(f"{path} is not an exits manifest ({error}); export the exits again") from error
    if manifest.format_version != FORMAT_VERSION or manifest.variant != "full":
        raise ExportError(
            f"{path}: format {manifest.format_version}, variant {manifest.variant!r}; "
            f"this version reads format {FORMAT_VERSION}, variant 'full'"
        )
    return ExitsManifest(
        **content | {"exit_layers": tuple(manifest.exit_layers), "thresholds": tuple(manifest.thresholds)}
    )


def load_exits(backbone: Backbone, directory: str | Path) -> ExitBank:
    """An export on the backbone it was trained on -> its bank, frozen, in the backbone's type and device.

    Raises MissingFileError for a missing file and ExportError for another backbone, a damaged file or wrong shapes.
    """
    manifest = read_exits_manifest(directory)
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist although {MANIFEST} does: export the exits again")
    found = backbone_hash(backbone)
    if found != manifest.backbone_hash:
        raise ExportError(
            f"{path} belongs to a backbone with hash {manifest.backbone_hash[:12]}, this one has {found[:12]}: "
            "load the checkpoint the exits were trained on, in the type it was trained in"
        )
    weights = path.read_bytes()
    if hashlib.sha256(weights).hexdigest() != manifest.weights_sha256:
        raise ExportError(f"{path} does not match the checksum in {MANIFEST}: it is damaged or from another export")
    bank = ExitBank(backbone, manifest.exit_layers)
    tensors = load(weights)
    wanted = bank.trainable_state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is not a weight of these exits" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {list(tensors[name].shape)}, wanted {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        raise ExportError(f"{path} does not fit this backbone: {problems[0]} (and {len(problems) - 1} more)")
    prefix = "transformers."
    bank.transformers.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return bank.eval().requires_grad_(False)
