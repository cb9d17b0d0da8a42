"""Trained exits on disk: ``exits.safetensors`` (weights) and ``exits.json`` (what they belong to).

The JSON is written last and holds the checksum of the weights, so a half-written export is noticed; there is no pickle on
the way.  Does not know how exits are trained or thresholds chosen: both are handed in as plain values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from free_dist.atomic import write_atomically
from free_dist.backbones import Backbone
from free_dist.backbones.checkpoint_files import read_header
from free_dist.backbones.checkpoint_hash import FILES_PREFIX, checkpoint_hash, loaded_from, parameters_hash
from free_dist.config import MissingFileError
from free_dist.exits.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    BackboneFacts,
    ExitsManifest,
    ExportError,
    TaskThresholds,
    check_facts,
    check_layout,
    read_exits_manifest,
)
from free_dist.exits.transformer import ExitBank
from free_dist.exits.variants import LENS

__all__ = ["MANIFEST", "WEIGHTS", "ExportError", "backbone_hash", "load_exits", "read_exits_manifest", "save_exits"]

WEIGHTS = "exits.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of torch's zip files and of bare pickles."""


def backbone_hash(module: nn.Module) -> str:
    """The hash of a backbone's parameters in memory: :func:`~free_dist.backbones.checkpoint_hash.parameters_hash`."""
    return parameters_hash(module)


def save_exits(
    bank: ExitBank,
    directory: str | Path,
    *,
    thresholds: float | Sequence[float],
    backbone: Backbone | BackboneFacts | None = None,
    backbone_hash: str | None = None,
    calibration: str = "",
    calibrated: Mapping[str, TaskThresholds] | None = None,
    decoding: Mapping[str, Any] | None = None,
    git_commit: str = "",
    extra: dict[str, Any] | None = None,
) -> ExitsManifest:
    """Write an export to ``directory``; ``thresholds`` is one value for all exits or one per exit, the rest as in the manifest.

    ``backbone``: the one the exits were trained on, or its facts, taken before it was sharded.  With nothing but a
    ``backbone_hash``, loading tells another backbone by the hash alone.  Raises ValueError for thresholds that do not fit.
    """
    n_exits = len(bank.exit_layers)
    values = [thresholds] * n_exits if isinstance(thresholds, (int, float)) else list(thresholds)
    if len(values) != n_exits:
        raise ValueError(f"thresholds: {len(values)} values for {n_exits} exits; give one for all, or one per exit")
    facts = BackboneFacts.of(backbone) if isinstance(backbone, Backbone) else backbone
    known = facts.hash if facts is not None else backbone_hash
    if known is None:
        raise ValueError("give the backbone that the exits belong to, or its hash")
    if bank.variant.name == LENS:
        raise ValueError("exits of the logit lens have no weights to export: build them anew, with variant='lens'")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bank.trainable_state_dict().items()}
    weights = save(tensors)
    manifest = ExitsManifest(
        format_version=FORMAT_VERSION,
        backbone_hash=known,
        exit_layers=bank.exit_layers,
        variant=bank.variant,
        init=bank.init,
        thresholds=tuple(float(value) for value in values),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        extra=extra or {},
        backbone=facts,
        calibration=calibration,
        calibrated=dict(calibrated or {}),
        dtype=str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        git_commit=git_commit,
        decoding=dict(decoding or {}),
    )
    content = manifest.to_json()
    Path(directory).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(directory) / WEIGHTS, weights)
    write_atomically(Path(directory) / MANIFEST, content)
    return manifest


def load_exits(backbone: Backbone, directory: str | Path, *, verify: bool = True, merged: bool = True) -> ExitBank:
    """An export on the backbone it was trained on -> its bank, frozen, in the backbone's type and device.

    ``verify=False`` does not hash the backbone (0.7 CPU seconds per GB), nor look at how its prompts are laid out: its shape
    alone is compared.  ``merged=False`` keeps low-rank updates apart from their blocks, which is the form that was saved and
    the slower one to decode with.

    Raises MissingFileError for a missing file and ExportError for another backbone, other prompts, a damaged file or wrong
    shapes.
    """
    manifest = read_exits_manifest(directory)
    path = Path(directory) / WEIGHTS
    weights = read_weights(directory, manifest)
    check_facts(manifest, backbone, path)
    if verify:
        _check_hash(manifest, backbone, path)
        check_layout(manifest, backbone, path)
    bank = ExitBank(backbone, manifest.exit_layers, variant=manifest.variant, init=manifest.init)
    try:
        tensors = load(weights)
    except SafetensorError as error:
        raise ExportError(f"{path} is damaged ({error}): export the exits again") from error
    _check_shapes(tensors, bank.trainable_state_dict(), path)
    bank.load_trainable_state_dict(tensors)
    return (bank.merged() if merged else bank).eval().requires_grad_(False)


def read_weights(directory: str | Path, manifest: ExitsManifest) -> bytes:
    """The content of ``exits.safetensors``, whole and the one that the manifest speaks of.

    Raises MissingFileError, ExportError, or UserError for a truncated file; a pickle is named and never loaded.
    """
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        pickles = sorted(other for pattern in PICKLES for other in Path(directory).glob(pattern))
        if pickles:
            raise ExportError(
                f"{pickles[0]} is a pickle, which can run code when it is read, and is never loaded; "
                f"exits are read from {WEIGHTS} alone, which save_exits writes"
            )
        raise MissingFileError(f"{path} does not exist although {MANIFEST} does: export the exits again")
    with open(path, "rb") as file:
        if file.read(4).startswith(PICKLE_STARTS):
            raise ExportError(
                f"{path} is a pickle under another name: reading one can run code, so it is never loaded; "
                "export the exits again with save_exits"
            )
    read_header(path)  # tells a truncated file as one
    weights = path.read_bytes()
    if hashlib.sha256(weights).hexdigest() != manifest.weights_sha256:
        raise ExportError(f"{path} does not match the checksum in {MANIFEST}: it is damaged or from another export")
    return weights


def _check_hash(manifest: ExitsManifest, backbone: Backbone, path: Path) -> None:
    """Raise ExportError, naming both, unless the backbone is the one the exits were trained on."""
    wanted = manifest.backbone_hash
    trained = "a backbone" if manifest.backbone is None else manifest.backbone.name
    directory = loaded_from(backbone)
    if wanted.startswith(FILES_PREFIX):
        if directory is None:
            raise ExportError(
                f"{path} belongs to {trained}, the checkpoint with hash {wanted[:18]}, but the weights of this backbone are "
                "not those of any files: load it from its directory, or pass verify=False if you know that it is the same"
            )
        found, advice = checkpoint_hash(directory), "load the checkpoint the exits were trained on"
    else:
        found = parameters_hash(backbone)
        advice = "load the checkpoint the exits were trained on, in the type it was trained in"
    if found != wanted:
        here = "this one" if directory is None else str(directory)
        raise ExportError(f"{path} belongs to {trained} with hash {wanted[:18]}, {here} has {found[:18]}: {advice}")


def _check_shapes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Raise ExportError unless names and shapes are those of the bank."""
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is not a weight of these exits" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {list(tensors[name].shape)}, wanted {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        raise ExportError(f"{path} does not fit this backbone: {problems[0]} (and {len(problems) - 1} more)")
