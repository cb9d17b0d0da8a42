"""A memory plan as JSON and as lines of text.  Does not know how a plan is made."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from free_dist.config import DataConfig
from free_dist.planning.memory import MemoryPlan
from free_dist.planning.workload import TRAINING_SAMPLES

GIB = 1 << 30


def epoch_samples(data: DataConfig) -> int | None:
    """Rows of one epoch of a known data set, by the name of its directory; None for another."""
    return TRAINING_SAMPLES.get(Path(data.root).name)


def plan_json(plan: MemoryPlan, *, gpu_gb: float, samples: int | None, gpu_tflops: float, mfu: float) -> dict[str, Any]:
    """Everything the plan knows; bytes are per GPU, ``gpu_gb`` is in 10^9 bytes, ``gpu_tflops`` in 10^12 operations a second."""
    hours = None if samples is None else plan.hours(samples, tflops=gpu_tflops, mfu=mfu)
    return {
        "backbone": plan.backbone,
        "stage": plan.stage,
        "world": plan.work.world_size,
        "task": plan.work.task,
        "micro_batch_size": plan.work.rows,
        "gradient_accumulation_steps": plan.work.accumulation,
        "rows_per_step": plan.work.rows_per_step,
        "images": plan.work.images,
        "positions": plan.positions,
        "answer_tokens": plan.work.answer_tokens,
        "trained_parameters": plan.trained,
        "replicated_backbone_bytes": plan.backbone_bytes,
        "engines": {name: asdict(engine) for name, engine in plan.engines.items()},
        "activations": plan.activations,
        "moments": plan.moments,
        "total_bytes": plan.total,
        "fullest_moment": plan.fullest,
        "gpu_bytes": int(gpu_gb * 1e9),
        "fits": plan.total <= gpu_gb * 1e9,
        "flops_per_sample": plan.flops_per_sample,
        "samples_per_epoch": samples,
        "gpu_tflops": gpu_tflops,
        "mfu": mfu,
        "hours_per_epoch": hours,
    }


def plan_lines(found: dict[str, Any]) -> list[str]:
    """What :func:`plan_json` returned, as text."""
    lines = [
        f"{found['backbone']}, stage {found['stage']}, {found['world']} GPUs, task {found['task']}: "
        f"{found['micro_batch_size']} rows x {found['gradient_accumulation_steps']} x {found['world']} = "
        f"{found['rows_per_step']} rows per step, {found['positions']} positions, {found['answer_tokens']} answer tokens a row",
        f"{'GiB per GPU':<22}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'buckets':>10}{'gathered':>10}",
    ]
    for name, engine in found["engines"].items():
        columns = ("parameters", "gradients", "optimizer_states", "buffers", "gathered")
        widths = (10, 11, 11, 10, 10)
        lines.append(
            f"  {name:<20}" + "".join(f"{_gib(engine[key]):>{w}}" for key, w in zip(columns, widths, strict=True))
        )
    lines.append("activations alive during")
    lines += [f"  {part:<20}{_gib(size):>10}" for part, size in found["activations"].items()]
    lines.append("in all, at the fullest moment of")
    lines += [f"  {moment:<20}{_gib(size):>10}" for moment, size in found["moments"].items()]
    verdict = "fits" if found["fits"] else "does NOT fit"
    lines.append(
        f"total {_gib(found['total_bytes'])} GiB ({found['fullest_moment']}): {verdict} {found['gpu_bytes'] / 1e9:.0f} GB; "
        f"the whole backbone alone is {_gib(found['replicated_backbone_bytes'])} GiB"
    )
    parts = ", ".join(f"{part} {count / 1e12:.3f}" for part, count in found["flops_per_sample"].items())
    lines.append(f"TFLOP per sample: {parts}; together {sum(found['flops_per_sample'].values()) / 1e12:.3f}")
    if found["hours_per_epoch"] is not None:
        lines.append(
            f"{found['hours_per_epoch']:.2f} hours per epoch of {found['samples_per_epoch']:,} rows, at {found['mfu']:.0%} of "
            f"{found['gpu_tflops']:g} TFLOP/s"
        )
    return lines


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 100 else f"{size / GIB:.4f}"
