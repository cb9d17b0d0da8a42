"""Checkpoints of a DeepSpeed engine: whole or absent, whenever the processes die.

A checkpoint is a directory ``step-N`` with one file per rank from DeepSpeed and a manifest.  It is written under another name
and renamed when all ranks are done, then older ones are removed.  Knows engines and files; does not know what is trained, nor
the data stream and the random numbers, which are functions of the step.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from free_dist.atomic import synchronise, write_atomically
from free_dist.config import UserError
from free_dist.distributed import World

MANIFEST = "manifest.json"
ENGINE = "engine"
PREFIX = "step-"
UNFINISHED = ".tmp"


def save_checkpoint(directory: Path, engine: DeepSpeedEngine, *, step: int, world: World) -> Path:
    """Write the trained weights, optimizer and schedule after optimizer step ``step``, then forget older checkpoints.

    All ranks call it.  Frozen weights are not stored.  Does nothing if this step's checkpoint exists.
    """
    final = directory / f"{PREFIX}{step:08d}"
    written = final.with_name(final.name + UNFINISHED)
    if final.is_dir():
        return final
    if world.is_main:
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir(parents=True)
    torch.distributed.barrier()
    engine.save_checkpoint(str(written), tag=ENGINE, save_latest=False, exclude_frozen_parameters=True)
    torch.distributed.barrier()
    if world.is_main:
        write_atomically(written / MANIFEST, json.dumps({"step": step, "world_size": world.size}).encode())
        synchronise(written)
        written.rename(final)
        synchronise(directory)
        for other in directory.iterdir():
            if other != final and other.name.startswith(PREFIX):
                shutil.rmtree(other)
    torch.distributed.barrier()
    return final


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint below ``directory``, or None."""
    complete = [path.parent for path in directory.glob(f"{PREFIX}*/{MANIFEST}") if path.parent.suffix != UNFINISHED]
    return max(complete, default=None)


def load_checkpoint(checkpoint: Path, engine: DeepSpeedEngine, *, world: World) -> int:
    """Put an engine, built as the one that was saved, back to where it was; returns the number of its optimizer steps.

    The files are DeepSpeed's own pickles, written by this program into the run's directory.  All ranks call it.  Raises
    UserError if another number of processes wrote it.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    if manifest["world_size"] != world.size:
        raise UserError(
            f"{checkpoint} was written by {manifest['world_size']} processes and cannot be read by {world.size}: start "
            f"with --num_gpus {manifest['world_size']}, or choose another run_dir"
        )
    # Frozen weights are absent, which a strict load refuses.
    found, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE, load_module_strict=False)
    if found is None:
        raise UserError(f"{checkpoint}: its files are incomplete; remove it to start from an older one or anew")
    return int(manifest["step"])
