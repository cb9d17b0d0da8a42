"""Everything that belongs to trained exits, gathered in one directory: weights, manifest, calibrations, checks, model card.

The directory is made beside its place and appears there when complete.  Paths of the machine stay behind.  Does not know how
exits are trained, calibrated or uploaded.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from free_dist.atomic import replaced_directory, write_atomically
from free_dist.backbones.checkpoint_files import read_header
from free_dist.backbones.checkpoint_hash import FILES_PREFIX, checkpoint_hash
from free_dist.backbones.embedded import resolve_backbone
from free_dist.config import MissingFileError, Recipe, UserError
from free_dist.data.pretrained import load_pretrained
from free_dist.evaluation.calibration import Calibration, read_calibration, write_calibration
from free_dist.evaluation.rows import read_results
from free_dist.exits import check_files
from free_dist.exits.export import WEIGHTS, load_exits, read_weights
from free_dist.exits.hub import CARD, check_release
from free_dist.exits.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    BackboneFacts,
    ExitsManifest,
    ExportError,
    TaskThresholds,
    decoding_settings,
    read_exits_manifest,
)
from free_dist.exits.model_card import CardNotes, model_card


def build_release(
    exits: str | Path,
    out: str | Path,
    *,
    backbone: str,
    notes: CardNotes,
    recipe: Recipe | None = None,
    results: Path | None = None,
    verify: bool = True,
    replace_old: bool = False,
) -> ExitsManifest:
    """Make ``out`` from the export ``exits``, trained on ``backbone`` (its directory, or ``embedded``) -> its manifest.

    An export that knows its backbone by its parameters alone (format 1) gets the hash of the files instead, so it can be
    loaded in any type, and with the run's ``recipe`` its prompts.  ``results``: a ``results.json`` for the card.
    ``verify=False`` neither reads nor needs the backbone.

    Raises MissingFileError, ExportError or UserError for files that are missing, damaged or do not belong together, and
    UserError for an ``out`` that exists, unless ``replace_old`` and it holds an export.
    """
    exits, out = Path(exits), Path(out)
    _check_out(exits, out, replace_old=replace_old)
    old = read_exits_manifest(exits)
    weights = read_weights(exits, old)
    calibrations = [
        read_calibration(exits, path.stem.removeprefix("calibration-"))
        for path in sorted(exits.glob("calibration-*.json"))
    ]
    allow_pickle = recipe is not None and recipe.backbone.allow_pickle
    facts = _verified_facts(exits, old, backbone, allow_pickle=allow_pickle) if verify else old.backbone
    if facts is not None and notes.base_model:
        facts = replace(facts, name=notes.base_model)
    extra = old.extra | ({"backbone": Path(str(old.extra["backbone"])).name} if "backbone" in old.extra else {})
    manifest = replace(
        old,
        format_version=FORMAT_VERSION,
        backbone=facts,
        backbone_hash=old.backbone_hash if facts is None else facts.hash,
        decoding=decoding_settings(recipe) if recipe is not None and not old.decoding else old.decoding,
        dtype=old.dtype or str(_dtype(exits)).removeprefix("torch."),
        calibration=old.calibration or str(extra.pop("thresholds", "")),
        calibrated={found.task: _promise(found) for found in calibrations},
        extra=extra,
    )
    rows = [] if results is None else _rows(results)
    has_checks = (exits / check_files.MANIFEST).is_file()
    card = model_card(manifest, replace(notes, checks=has_checks, measured=rows))
    with replaced_directory(out) as fresh:
        write_atomically(fresh / WEIGHTS, weights)
        if has_checks:
            _copy_checks(exits, fresh)
        for found in calibrations:
            write_calibration(replace(found, backbone_hash=manifest.backbone_hash), fresh)
        write_atomically(fresh / CARD, card.encode())
        write_atomically(fresh / MANIFEST, manifest.to_json())
        check_release(fresh)
    return manifest


def _check_out(exits: Path, out: Path, *, replace_old: bool) -> None:
    if out.resolve() == exits.resolve():
        raise UserError(f"--out {out} is where the exits lie: give another directory")
    if not out.exists():
        return
    if not replace_old:
        raise UserError(f"--out {out} exists: give another directory, or --replace to make it anew")
    if not (out / MANIFEST).is_file():
        raise UserError(f"--out {out} exists and holds no {MANIFEST}: --replace only replaces an export")


def _verified_facts(exits: Path, manifest: ExitsManifest, backbone: str, *, allow_pickle: bool) -> BackboneFacts | None:
    """The facts of the backbone that the exits were trained on, after a look at its files."""
    directory = resolve_backbone(backbone)
    if manifest.backbone is not None and manifest.backbone_hash.startswith(FILES_PREFIX):
        found = checkpoint_hash(directory)
        if found != manifest.backbone_hash:
            raise ExportError(
                f"{exits / WEIGHTS} belongs to {manifest.backbone.name} with hash {manifest.backbone_hash[:18]}, "
                f"{directory} has {found[:18]}: name the checkpoint with --backbone, or skip this with --no-verify"
            )
        return manifest.backbone
    model, _ = load_pretrained(backbone, allow_pickle=allow_pickle)
    load_exits(model, exits)
    return BackboneFacts.of(model, directory)


def _copy_checks(exits: Path, fresh: Path) -> None:
    """Copy the fitted checks; the directory of their data becomes its name."""
    checks, weights = check_files.read_checks_manifest(exits), exits / check_files.WEIGHTS
    if not weights.is_file():
        raise MissingFileError(f"{weights} does not exist although {check_files.MANIFEST} does: fit the checks again")
    content = asdict(checks)
    if "data" in checks.extra:
        content["extra"]["data"] = Path(str(checks.extra["data"])).name
    write_atomically(fresh / check_files.WEIGHTS, weights.read_bytes())
    write_atomically(fresh / check_files.MANIFEST, json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")


def _promise(found: Calibration) -> TaskThresholds:
    return TaskThresholds(
        thresholds=found.thresholds,
        method=found.method,
        loss=found.loss,
        epsilon=found.epsilon,
        delta=found.delta,
        guarantee=found.guarantee,
        n_images=found.n_images,
        settings=found.settings,
    )


def _dtype(exits: Path) -> torch.dtype:
    """The type of the stored exits."""
    return next(iter(read_header(exits / WEIGHTS).values())).dtype


def _rows(results: Path) -> list[dict[str, Any]]:
    return [row.to_json() for row in read_results(results)]
