"""Bytes that one DeepSpeed engine holds on one rank: parameters, gradients, optimizer states, buffers, by ZeRO stage.

Plain arithmetic on a section of the distribution file, after what DeepSpeed 0.19 allocates.  Does not know models, activations
or devices; needs no torch.

Sources: ZeRO (arXiv 1910.02054, section 5) for who keeps what; ``runtime/zero/stage_1_and_2.py``, ``stage3.py`` and
``partitioned_param_coordinator.py`` of DeepSpeed 0.19.8 for the buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from free_dist.ds_config import precision, zero_stage

ITEM_BYTES = {"bfloat16": 2, "float32": 4}
"""Precision of a section -> bytes of one number."""

MASTER_BYTES = 4
"""ZeRO keeps float32 copies of what it trains, whatever the precision, even beside float32 weights."""

OPTIMIZER_MOMENTS = 2
"""Numbers that Adam and its kin remember of each weight."""

OPTIMIZER_TEMPORARIES = 2
"""Numbers per weight that an Adam step written in PyTorch holds for a moment: a square root and a quotient."""

# DeepSpeed's defaults of the keys read here, in numbers, not bytes.
_REDUCE_BUCKET = 500_000_000
_PREFETCH_BUCKET = 50_000_000
_PERSISTENCE_THRESHOLD = 100_000
_MAX_LIVE = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes on one rank."""

    parameters: int
    """Weights, trained and frozen, between two steps."""
    gradients: int
    """At the end of the backward pass."""
    accumulated: int
    """The share of ``gradients`` that waits from one micro-batch to the next."""
    optimizer_states: int
    """Float32 weights and moments."""
    buffers: int
    """Communication buckets of the backward pass."""
    resting_buffers: int
    """The share of ``gradients`` and ``buffers`` that is held outside the backward pass too."""
    gathered: int
    """Whole weights and what they are gathered through, while a sharded module runs."""
    step: int
    """Held for a moment by the optimizer step, besides what rests; the gradients of the backward pass are among it."""

    @property
    def resting(self) -> int:
        """Bytes held at every moment."""
        return self.parameters + self.optimizer_states + self.resting_buffers

    @property
    def backward(self) -> int:
        """Bytes that the backward pass adds to those that rest."""
        return self.gradients + self.buffers - self.resting_buffers


def engine_memory(
    section: dict[str, Any],
    trained: Sequence[int],
    frozen: Sequence[int],
    *,
    world_size: int,
    accumulation: int = 1,
) -> EngineMemory:
    """Memory of an engine from its section and the sizes (numbers per tensor) of its trained and frozen parameters.

    A section with ZeRO stage 0 and nothing trained is a replicated module.
    """
    item, stage = ITEM_BYTES[precision(section)], zero_stage(section)
    zero = section.get("zero_optimization", {})
    n_trained = sum(trained)
    share = -(-n_trained // world_size)
    if stage == 3:
        parameters, gathered = _sharded(zero, [*trained, *frozen], item, world_size, in_graph=n_trained > 0)
    else:
        parameters, gathered = (n_trained + sum(frozen)) * item, 0
    if n_trained == 0:
        nothing = {
            "gradients": 0,
            "accumulated": 0,
            "optimizer_states": 0,
            "buffers": 0,
            "resting_buffers": 0,
            "step": 0,
        }
        return EngineMemory(parameters=parameters, gathered=gathered, **nothing)
    bucket = int(zero.get("reduce_bucket_size", _REDUCE_BUCKET)) * item
    if zero.get("overlap_comm", False) and stage < 3:
        bucket *= 2
    gradients = (n_trained if stage == 1 else share) * item
    accumulated = gradients if accumulation > 1 and stage < 3 else 0
    if stage == 2:
        gradients += accumulated
    resting = bucket + gradients if stage == 3 else 0
    # Flattened and widened first, then freed, then the optimizer's own temporaries.
    widening = gradients + share * item + (share * MASTER_BYTES if item != MASTER_BYTES else 0)
    stepping = share * MASTER_BYTES * (1 + OPTIMIZER_TEMPORARIES)
    return EngineMemory(
        parameters=parameters,
        gradients=gradients,
        accumulated=accumulated,
        optimizer_states=share * MASTER_BYTES * (1 + OPTIMIZER_MOMENTS),
        buffers=bucket,
        resting_buffers=resting,
        gathered=gathered,
        step=max(widening, stepping) if stage < 3 else stepping,
    )


def _sharded(
    zero: dict[str, Any], sizes: Sequence[int], item: int, world_size: int, *, in_graph: bool
) -> tuple[int, int]:
    """(bytes between steps, bytes of gathering) of ZeRO-3 parameters of these sizes."""
    threshold = int(zero.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD))
    kept_whole = sum(size for size in sizes if size <= threshold)
    parts = sum(-(-size // world_size) for size in sizes)
    wandering = sum(sizes) - kept_whole
    # Prefetching runs ahead of the module that computes until so many numbers are gathered; one batch of them exists twice,
    # as it arrived and as parameters.
    # What a backward pass will need stays whole: autograd holds transposed views of the gathered matrices.
    live = wandering if in_graph else min(wandering, int(zero.get("stage3_max_live_parameters", _MAX_LIVE)))
    batch = int(zero.get("stage3_prefetch_bucket_size", _PREFETCH_BUCKET)) + max(sizes, default=0)
    return (parts + kept_whole) * item, (live + min(wandering, batch)) * item
