"""The distribution file (``--ds_config``): read, split into three sections and checked before torch is imported.

Each section is a plain DeepSpeed configuration, which DeepSpeed validates again when it builds an engine.  Checked here is what
DeepSpeed accepts in silence (an unknown key) or fails on late and obscurely.  Knows no model, no recipe and no device.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from free_dist.config import MissingFileError, UserError

SECTIONS = ("backbone", "exits", "discriminators")
"""One DeepSpeed configuration per engine."""

TRAINED_SECTIONS = ("exits", "discriminators")
"""The sections that have an optimizer."""

KNOWN_KEYS = frozenset(
    {
        "activation_checkpointing",
        "bf16",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "data_types",
        "disable_allgather",
        "dump_state",
        "flops_profiler",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "optimizer",
        "prescale_gradients",
        "steps_per_print",
        "timers",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
"""Top-level DeepSpeed keys a section may hold."""

UNTRAINED_KEYS = frozenset(
    {
        "activation_checkpointing",
        "checkpoint",
        "comms_logger",
        "dump_state",
        "flops_profiler",
        "gradient_accumulation_steps",
        "log_level",
        "memory_breakdown",
        "steps_per_print",
        "timers",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "zero_optimization",
    }
)
"""Keys that spread work or report on it, and change nothing of what is learnt as long as a step keeps its rows."""

REPLICATED_SHARE = 0.6
"""Most of a device's memory that a replicated backbone may take when the choice is ours."""

REFUSED_KEYS = {
    "train_batch_size": "it would change meaning with the number of processes: give train_micro_batch_size_per_gpu and "
    "gradient_accumulation_steps",
    "scheduler": "the schedule is part of the recipe: training.warmup_steps and training.max_steps",
    "fp16": "losses of two engines cannot share one dynamic loss scale: use bf16, or neither for float32",
    "amp": "use bf16, or neither for float32",
    "tensorboard": "one writer logs all three engines: see run_dir in the recipe",
    "csv_monitor": "one writer logs all three engines: see run_dir in the recipe",
    "wandb": "one writer logs all three engines: see run_dir in the recipe",
    "managed_gradient_accumulation": "both engines must reach the accumulation boundary together",
}
"""DeepSpeed keys that a section may not hold, and what to do instead."""


def read_ds_config(path: str | Path) -> dict[str, dict[str, Any]]:
    """Section name -> checked DeepSpeed configuration, for all three sections.

    A file without sections is one configuration for all three; the backbone's copy loses what only training needs.
    Raises UserError naming the file, the section and the key; MissingFileError if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"--ds_config {path}: no such file")
    try:
        content = json.loads(path.read_text(), object_pairs_hook=lambda pairs: _without_duplicates(pairs, path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: want a JSON object with the sections {', '.join(SECTIONS)}")
    sections = _sections(content, path)
    for name in SECTIONS:
        _check_section(sections[name], name, path)
    for key, default in (("train_micro_batch_size_per_gpu", None), ("gradient_accumulation_steps", 1)):
        values = {name: sections[name].get(key, default) for name in SECTIONS}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name}={value}" for name, value in values.items())
            raise UserError(
                f"{path}: {key} differs between sections ({listed}); the three engines see the same batches"
            )
    return sections


def micro_batch_size(ds_config: dict[str, dict[str, Any]]) -> int:
    """Rows per process and forward pass."""
    return int(ds_config["exits"]["train_micro_batch_size_per_gpu"])


def gradient_accumulation_steps(ds_config: dict[str, dict[str, Any]]) -> int:
    """Micro-batches per optimizer step."""
    return int(ds_config["exits"].get("gradient_accumulation_steps", 1))


def rows_per_step(ds_config: dict[str, dict[str, Any]], world_size: int) -> int:
    """Rows of one optimizer step, over all processes."""
    return micro_batch_size(ds_config) * gradient_accumulation_steps(ds_config) * world_size


def with_rows_per_step(
    ds_config: dict[str, dict[str, Any]], rows: int | None, world_size: int
) -> dict[str, dict[str, Any]]:
    """The same distribution with as many accumulation steps as give a step ``rows`` rows; None changes nothing.

    So a run goes on with the same global batches after it lost or gained processes.  Raises UserError when its micro-batches
    cannot give so many rows.
    """
    if rows is None or rows == rows_per_step(ds_config, world_size):
        return ds_config
    at_once = micro_batch_size(ds_config) * world_size
    steps, rest = divmod(rows, at_once)
    if rest or not steps:
        raise UserError(
            f"--ds_config: the steps of this run have {rows} rows, which {world_size} process{'es' * (world_size > 1)} with "
            f"{micro_batch_size(ds_config)} rows each cannot share: change train_micro_batch_size_per_gpu or the number of "
            "processes"
        )
    return {name: section | {"gradient_accumulation_steps": steps} for name, section in ds_config.items()}


def zero_stage(section: dict[str, Any]) -> int:
    """ZeRO stage of a section; DeepSpeed's default is 0."""
    stage: int = section.get("zero_optimization", {}).get("stage", 0)
    return stage


def names_stage(section: dict[str, Any]) -> bool:
    """Whether a section says itself how it is sharded; a backbone's that does not is placed by its size."""
    return "stage" in section.get("zero_optimization", {})


def with_backbone_stage(ds_config: dict[str, dict[str, Any]], stage: int) -> dict[str, dict[str, Any]]:
    """The same distribution with the backbone's ZeRO stage written out."""
    section = ds_config["backbone"]
    zero = section.get("zero_optimization", {}) | {"stage": stage}
    return ds_config | {"backbone": section | {"zero_optimization": zero}}


def fits(weight_bytes: int, memory_bytes: float) -> bool:
    """Whether a replicated backbone leaves enough of a device's memory to exits, their optimizer and activations."""
    return weight_bytes <= REPLICATED_SHARE * memory_bytes


def precision(section: dict[str, Any]) -> str:
    """``bfloat16`` or ``float32``, the dtype of a section's weights."""
    return "bfloat16" if section.get("bf16", {}).get("enabled", False) else "float32"


def needs_frozen_copy(ds_config: dict[str, dict[str, Any]]) -> bool:
    """Whether the exits must own a copy of the backbone's final norm and head.

    They must when the backbone will be sharded (its head would be gathered by the wrong engine) or has another precision.
    """
    backbone, exits = ds_config["backbone"], ds_config["exits"]
    return zero_stage(backbone) == 3 or zero_stage(exits) == 3 or precision(backbone) != precision(exits)


def _sections(content: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    # A misspelt section name must not turn a sectioned file into an unsectioned one: any key that holds an object no
    # DeepSpeed key holds is looked at as a section.
    looks_sectioned = any(key in SECTIONS for key in content) or any(
        isinstance(value, dict) and "train_micro_batch_size_per_gpu" in value for value in content.values()
    )
    if not looks_sectioned:
        _check_types(content, str(path))
        backbone = {key: value for key, value in content.items() if key not in ("optimizer", "gradient_clipping")}
        if zero_stage(backbone) != 3:
            backbone["zero_optimization"] = {"stage": 0}
        return {"backbone": backbone, "exits": dict(content), "discriminators": dict(content)}
    for key in content:
        if key not in SECTIONS:
            raise UserError(
                f"{path}: unknown section {key!r}{_nearest(key, SECTIONS)}; sections: {', '.join(SECTIONS)}"
            )
    for name in SECTIONS:
        if not isinstance(content.get(name), dict):
            raise UserError(f"{path}: section {name!r} is missing or not an object; sections: {', '.join(SECTIONS)}")
    return {name: content[name] for name in SECTIONS}


def _check_section(section: dict[str, Any], name: str, path: Path) -> None:
    where = f"{path}, section {name!r}"
    for key in section:
        if key in REFUSED_KEYS:
            raise UserError(f"{where}: {key!r} is not allowed: {REFUSED_KEYS[key]}")
        if key not in KNOWN_KEYS:
            raise UserError(f"{where}: unknown key {key!r}{_nearest(key, KNOWN_KEYS)}")
    _check_types(section, where)
    for key, default in (("train_micro_batch_size_per_gpu", None), ("gradient_accumulation_steps", 1)):
        value = section.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {key!r} must be a positive integer, not {value!r}")
    stage = zero_stage(section)
    if name in TRAINED_SECTIONS:
        if not isinstance(section.get("optimizer", {}).get("type"), str):
            raise UserError(f"{where}: 'optimizer' with a 'type' is required, for example AdamW")
        # Stage 0 takes another code path, in which unfrozen gradients of the generator step would leak into the
        # discriminators' update unnoticed.
        if stage not in (1, 2, 3):
            raise UserError(f"{where}: zero_optimization.stage must be 1, 2 or 3, not {stage!r}")
    else:
        if "optimizer" in section:
            raise UserError(f"{where}: the backbone is frozen and takes no 'optimizer'")
        if stage not in (0, 3):
            raise UserError(f"{where}: zero_optimization.stage must be 0 (replicated) or 3 (sharded), not {stage!r}")


def _check_types(section: dict[str, Any], where: str) -> None:
    # Before anything looks inside these objects: the accessors above take their types for granted.
    for key in ("optimizer", "zero_optimization", "bf16"):
        if not isinstance(section.get(key, {}), dict):
            raise UserError(f"{where}: {key!r} must be an object, not {section[key]!r}")
    stage = section.get("zero_optimization", {}).get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool):
        raise UserError(f"{where}: zero_optimization.stage must be an integer, not {stage!r}")
    enabled = section.get("bf16", {}).get("enabled", False)
    if not isinstance(enabled, bool):
        raise UserError(f"{where}: bf16.enabled must be true or false, not {enabled!r}")
    params = section.get("optimizer", {}).get("params", {})
    if not isinstance(params, dict):
        raise UserError(f"{where}: optimizer.params must be an object, not {params!r}")


def _without_duplicates(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{path}: key {key!r} is given twice in one object")
    return dict(pairs)


def _nearest(name: str, known: frozenset[str] | tuple[str, ...]) -> str:
    match = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
