"""What an export says about itself: ``exits.json``, its fields, its two format versions, and whether a backbone fits.

Does not know weights: those are :mod:`free_dist.exits.export`'s business.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from free_dist.backbones import Backbone
from free_dist.backbones.checkpoint_hash import (
    checkpoint_hash,
    has_safetensors,
    loaded_from,
    parameters_hash,
    stored_dtype,
)
from free_dist.backbones.embedded import resolve_backbone
from free_dist.config import EMBEDDED_BACKBONE, EXIT_VARIANTS, MissingFileError, Recipe, UserError
from free_dist.exits.variants import ExitVariant

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 knew one variant and nothing of the backbone but its hash."""
MANIFEST = "exits.json"

FIXED_IDS = (
    "image_token_id", "num_query_tokens", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"
)  # fmt: skip
"""Parts of a token layout that belong to the model; the others come with its tokenizer."""


class ExportError(UserError):
    """An export that cannot be used as it stands; the message names the file and what to do."""


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """Which backbone exits belong to, and what they need of it: enough to tell most others without reading them."""

    hash: str
    """Of its checkpoint's files, or of its parameters where there are none; ``backbone_hash`` in the file."""
    name: str
    """A hub id, ``embedded``, or the name of a directory; for people, not for paths."""
    dtype: str
    """Type of the checkpoint's weights as they are stored, such as ``bfloat16``."""
    architecture: str
    """Class of the adapter."""
    block: str
    """Class of a decoder block."""
    n_blocks: int
    hidden_size: int
    vocab_size: int
    layout: dict[str, Any]
    """The backbone's ``TokenLayout``: which ids a prompt consists of."""

    @classmethod
    def of(cls, backbone: Backbone, directory: str | Path | None = None) -> BackboneFacts:
        """The facts of a backbone; its files are hashed where it was loaded from some, its parameters where not.

        ``directory``: where the backbone is known to come from; its own weights, which may be sharded, are then not read,
        unless that checkpoint is a pickle.
        """
        found = loaded_from(backbone) if directory is None else Path(directory)
        if found is not None and not has_safetensors(found):
            found = None
        name, dtype = type(backbone).__name__, str(next(backbone.parameters()).dtype).removeprefix("torch.")
        if found is not None:
            is_embedded = found.resolve() == resolve_backbone(EMBEDDED_BACKBONE).resolve()
            name, dtype = EMBEDDED_BACKBONE if is_embedded else found.resolve().name, stored_dtype(found)
        return cls(
            hash=parameters_hash(backbone) if found is None else checkpoint_hash(found),
            name=name,
            dtype=dtype,
            **_shape(backbone),
        )


def _shape(backbone: Backbone) -> dict[str, Any]:
    """The facts that hold whatever the weights are."""
    return {
        "architecture": type(backbone).__name__,
        "block": type(backbone.block(1)).__name__,
        "n_blocks": backbone.n_blocks,
        "hidden_size": backbone.hidden_size,
        "vocab_size": backbone.vocab_size,
        "layout": _as_json(asdict(backbone.layout)),
    }


@dataclass(frozen=True, kw_only=True)
class TaskThresholds:
    """Thresholds that were calibrated for one task, and what is promised about them."""

    thresholds: tuple[float, ...]
    """Per exit; above 1 the exit is never asked."""
    method: str
    loss: str
    epsilon: float
    delta: float | None
    guarantee: str
    """The promise in words."""
    n_images: int
    """Images it rests on."""
    settings: dict[str, Any]
    """Recipe fields for which it holds."""


@dataclass(frozen=True, kw_only=True)
class ExitsManifest:
    """What ``exits.json`` says."""

    format_version: int
    backbone_hash: str
    """Of the frozen backbone the exits were trained on: of its files (``files:...``), or of its parameters in memory."""
    exit_layers: tuple[int, ...]
    """Blocks the exits follow, 1-based."""
    variant: ExitVariant
    """Kind of exit transformer, with its sizes."""
    thresholds: tuple[float, ...]
    """Confidence threshold per exit, where a task has none of its own."""
    weights_sha256: str
    """Of ``exits.safetensors``."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever the trainer wants to keep: steps, losses, library versions."""
    init: str = "next"
    """Blocks that the exits started from; ``lora`` needs them still."""
    backbone: BackboneFacts | None = None
    """None in an export of version 1, or one that was given a hash alone."""
    calibration: str = ""
    """How ``thresholds`` were chosen; empty: nothing is known."""
    calibrated: dict[str, TaskThresholds] = field(default_factory=dict)
    """Task -> its own thresholds."""
    dtype: str = ""
    """Type of the stored exits."""
    git_commit: str = ""
    """Of the code that trained them."""
    decoding: dict[str, Any] = field(default_factory=dict)
    """Recipe fields that shape prompts and answers: ``data.question_prompt``, ``decoding.max_new_tokens``, ..."""

    def to_json(self) -> bytes:
        """The content of the file."""
        content = asdict(self)
        if self.backbone is not None:
            del content["backbone"]["hash"]
        return json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"


def read_exits_manifest(directory: str | Path) -> ExitsManifest:
    """What an export says about itself; raises MissingFileError or ExportError."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: give the directory that save_exits wrote")
    again = "export the exits again"
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
        if version not in READABLE_VERSIONS:
            raise ExportError(
                f"{path}: format {version}, this version of free_dist reads {' and '.join(map(str, READABLE_VERSIONS))}; "
                f"install the version that wrote it, or {again}"
            )
        facts, variant = content.get("backbone"), content["variant"]
        name = variant["name"] if version > 1 else variant
        if name not in EXIT_VARIANTS:
            raise ExportError(
                f"{path}: variant {name!r}, this version of free_dist knows {', '.join(EXIT_VARIANTS)}; "
                "install the version that wrote it"
            )
        manifest = ExitsManifest(
            **content
            | {
                "exit_layers": tuple(content["exit_layers"]),
                "thresholds": tuple(content["thresholds"]),
                "variant": ExitVariant(**variant) if version > 1 else ExitVariant(name=name),
                "backbone": None if facts is None else BackboneFacts(hash=content["backbone_hash"], **facts),
                "calibrated": {
                    task: TaskThresholds(**found | {"thresholds": tuple(found["thresholds"])})
                    for task, found in content.get("calibrated", {}).items()
                },
            }
        )
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{path} is not an exits manifest ({error}); {again}") from error
    n_exits = len(manifest.exit_layers)
    if not _increases(manifest.exit_layers):
        raise ExportError(
            f"{path}: exit_layers {list(manifest.exit_layers)} are not block numbers from 1 on, in rising order; {again}"
        )
    for name, values in [("thresholds", manifest.thresholds)] + [
        (f"calibrated.{task}.thresholds", found.thresholds) for task, found in manifest.calibrated.items()
    ]:
        if len(values) != n_exits:
            raise ExportError(f"{path}: {len(values)} {name} for {n_exits} exits; {again}")
        if not all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in values):
            raise ExportError(f"{path}: {name} {list(values)}: want numbers that are not negative; {again}")
    return manifest


def decoding_settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe fields that shape prompts and answers, by their dotted names."""
    return {
        "decoding.max_new_tokens": recipe.decoding.max_new_tokens,
        "data.question_prompt": recipe.data.question_prompt,
        "data.caption_prompt": recipe.data.caption_prompt,
        "data.max_turns": recipe.data.max_turns,
    }


def check_facts(manifest: ExitsManifest, backbone: Backbone, path: Path) -> None:
    """Raise ExportError, naming both sides, where a backbone has another shape than the one the exits were trained on."""
    if manifest.exit_layers[-1] > backbone.n_blocks:
        raise ExportError(
            f"{path}: an exit after block {manifest.exit_layers[-1]}, but this backbone has {backbone.n_blocks} blocks: "
            "load the backbone the exits were trained on"
        )
    trained = manifest.backbone
    if trained is None:
        return
    here = _shape(backbone)
    pairs = [
        (what, getattr(trained, name), here[name])
        for name, what in {
            "vocab_size": "vocabulary mismatch", "hidden_size": "width mismatch", "n_blocks": "depth mismatch",
            "block": "another kind of block",
        }.items()
    ]  # fmt: skip
    pairs += [(f"{name} mismatch", trained.layout.get(name), here["layout"][name]) for name in FIXED_IDS]
    for what, wanted, found in pairs:
        if wanted != found:
            raise ExportError(
                f"{path}: {what}: the exits were trained on {trained.name} with {wanted}, this backbone has {found}: "
                "load the backbone the exits were trained on"
            )


def check_layout(manifest: ExitsManifest, backbone: Backbone, path: Path) -> None:
    """Raise ExportError where prompts are laid out otherwise than when the exits were trained."""
    if manifest.backbone is None:
        return
    here = _as_json(asdict(backbone.layout))
    changed = [name for name, value in manifest.backbone.layout.items() if here.get(name) != value]
    if changed:
        name = changed[0]
        raise ExportError(
            f"{path}: the exits were trained on prompts with {name} {manifest.backbone.layout[name]}, this backbone's have "
            f"{here.get(name)}: load it with the tokenizer and config.json of {manifest.backbone.name}"
        )


def _increases(layers: tuple[int, ...]) -> bool:
    whole = all(isinstance(layer, int) for layer in layers)
    return bool(layers) and whole and layers[0] >= 1 and all(a < b for a, b in pairwise(layers))


def _as_json(value: Any) -> Any:
    """What JSON makes of plain values: tuples become lists."""
    return json.loads(json.dumps(value))
