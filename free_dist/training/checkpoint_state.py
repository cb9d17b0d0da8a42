"""What a DeepSpeed engine must remember, as pieces that do not depend on the number of ranks or the ZeRO stage.

A rank holds, of every trained parameter, a stretch of its elements in float32 and of whatever the optimizer keeps for them.
Such a piece is stored under ``engine/kind/parameter@start``; whoever reads takes from all pieces the elements it needs.  So a
rank saves what it holds, without any communication, nothing is stored twice, and N ranks' checkpoint can be read by M.  Frozen
parameters are never stored.  Knows engines; does not know where the files lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import safe_open
from torch import Tensor, nn
from torch import distributed as dist

from free_dist.config import UserError
from free_dist.engines import full_shape

WEIGHT = "weight"
"""Kind of a piece that holds weights; other kinds are the optimizer's own names (``exp_avg``)."""

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""What an engine counts."""


class EngineState:
    """The state of one engine, ``name`` in keys and messages.  What never changes is looked up once: a save is short."""

    def __init__(self, name: str, engine: DeepSpeedEngine) -> None:
        self._name = name
        self._engine = engine
        self._trained = [(key, value) for key, value in engine.module.named_parameters() if value.requires_grad]
        self._shapes = {key: list(full_shape(parameter)) for key, parameter in self._trained}
        self._pieces: dict[str, Tensor] = {}
        self._pieces_at: dict[int, int] | None = None

    def pieces(self) -> dict[str, Tensor]:
        """Everything this rank holds: key -> flat tensor, a view of the engine's own.

        At the end of an optimizer step.  Raises UserError for an optimizer whose state is not one number per weight.
        """
        kinds, _ = _kinds(self._engine)
        at = _addresses(self._engine, kinds)
        if self._pieces_at != at:
            self._pieces = {
                f"{self._name}/{kind}/{parameter_name}@{start}": stretch
                for parameter_name, parameter in self._trained
                for start, stretches in [_held(self._engine, parameter, (WEIGHT, *kinds))]
                for kind, stretch in stretches.items()
            }
            views = all(stretch.untyped_storage().data_ptr() in at for stretch in self._pieces.values())
            self._pieces_at = at if views else None
        return dict(self._pieces)

    def facts(self) -> dict[str, Any]:
        """What is the same on every rank, for JSON: counters, schedule, the optimizer's settings, the parameters' shapes."""
        engine = self._engine
        kinds, scalars = _kinds(engine)
        schedule = engine.lr_scheduler.state_dict()
        return {
            "counters": {name: int(getattr(engine, name)) for name in COUNTERS},
            "schedule": {key: value for key, value in schedule.items() if key != "lr_lambdas"},
            "groups": [
                {key: value for key, value in group.items() if key != "params"}
                for group in engine.basic_optimizer.param_groups
            ],
            "kinds": kinds,
            "scalars": scalars,
            "shapes": self._shapes,
        }

    def restore(self, facts: Mapping[str, Any], stored: Pieces) -> None:
        """Put an engine that was just built where the one was that gave ``facts`` and the pieces; all ranks call it.

        Raises UserError when it trains other parameters.
        """
        engine, shapes = self._engine, self._shapes
        if shapes != facts["shapes"]:
            names = shapes.keys() | facts["shapes"].keys()
            other = sorted(key for key in names if shapes.get(key) != facts["shapes"].get(key))
            raise UserError(
                f"the checkpoint's engine of the {self._name} trains other parameters ({other[0]}, one of {len(other)}): "
                "choose another run_dir"
            )
        if _is_sharded(engine):
            engine.optimizer.checkpoint_event_prologue()
        for flat in _flat_partitions(engine):
            state = engine.basic_optimizer.state[flat]
            state.update({kind: torch.zeros_like(flat) for kind in facts["kinds"]})
            state.update({key: _scalar(value) for key, value in facts["scalars"].items()})
        for parameter_name, parameter in self._trained:
            start, stretches = _held(engine, parameter, (WEIGHT, *facts["kinds"]))
            for kind, stretch in stretches.items():
                values = stored.read(f"{self._name}/{kind}/{parameter_name}", start, stretch.numel())
                stretch.copy_(values)
        _copy_to_parameters(engine)
        for group, values in zip(engine.basic_optimizer.param_groups, facts["groups"], strict=True):
            group.update({key: tuple(v) if isinstance(group.get(key), tuple) else v for key, v in values.items()})
        engine.lr_scheduler.load_state_dict({**facts["schedule"], "lr_lambdas": [None] * len(facts["groups"])})
        for counter in COUNTERS:
            setattr(engine, counter, facts["counters"][counter])


class Pieces:
    """The pieces in the files of a checkpoint, read where they are needed.  Use as a context manager."""

    def __init__(self, checkpoint: Path, names: list[str]) -> None:
        self._stack = ExitStack()
        self._found: dict[str, list[tuple[int, Any, str]]] = {}
        for name in names:
            file = self._stack.enter_context(safe_open(checkpoint / name, framework="pt"))
            for key in file.keys():  # noqa: SIM118 - not a mapping
                whole, at, start = key.rpartition("@")
                if at:
                    self._found.setdefault(whole, []).append((int(start), file, key))

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def read(self, whole: str, start: int, count: int) -> Tensor:
        """Elements ``start`` to ``start + count`` of ``engine/kind/parameter``, flat.  Raises UserError if some are missing."""
        result: Tensor | None = None
        missing = count
        for first, file, key in self._found.get(whole, []):
            part = file.get_slice(key)
            (length,) = part.get_shape()
            begin, end = max(start, first), min(start + count, first + length)
            if begin < end:
                values = part[begin - first : end - first]
                result = torch.empty(count, dtype=values.dtype) if result is None else result
                result[begin - start : end - start] = values
                missing -= end - begin
        if missing or result is None:
            raise UserError(f"the checkpoint lacks {missing} elements of {whole}: it belongs to other modules")
        return result


def _is_sharded(engine: DeepSpeedEngine) -> bool:
    return bool(engine.zero_optimization_stage() == 3)


def _flat_partitions(engine: DeepSpeedEngine) -> list[Tensor]:
    """This rank's float32 weights as the optimizer sees them: one flat tensor per group."""
    if engine.zero_nvme_offload_optimizer():
        raise UserError(
            "--ds_config: an optimizer state that is offloaded to NVMe cannot be saved: offload it to cpu, or set "
            "training.save_every=0"
        )
    if _is_sharded(engine):
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    if isinstance(engine.optimizer, BF16_Optimizer):
        return list(engine.optimizer.fp32_groups_flat_partition)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def _kinds(engine: DeepSpeedEngine) -> tuple[list[str], dict[str, list[Any]]]:
    """What the optimizer keeps: names of what it has for every weight, and single numbers; nothing before its first step."""
    flat = _flat_partitions(engine)[0]
    kinds: list[str] = []
    scalars: dict[str, list[Any]] = {}
    for key, value in engine.basic_optimizer.state.get(flat, {}).items():
        if isinstance(value, Tensor) and value.shape == flat.shape:
            kinds.append(key)
        elif isinstance(value, Tensor) and value.numel() == 1:
            scalars[key] = [value.item(), str(value.dtype).removeprefix("torch.")]
        elif isinstance(value, int | float):
            scalars[key] = [value, ""]
        else:
            kind = type(engine.basic_optimizer).__name__
            raise UserError(
                f"--ds_config: the optimizer {kind} keeps {key!r}, which is not one number per weight and cannot be saved: "
                "take AdamW, or set training.save_every=0"
            )
    return kinds, scalars


def _addresses(engine: DeepSpeedEngine, kinds: Iterable[str]) -> dict[int, int]:
    """Where the flat tensors lie of which this rank's pieces are stretches: address of the memory -> its bytes."""
    flats = _flat_partitions(engine)
    states = (engine.basic_optimizer.state.get(flat, {}) for flat in flats)
    tensors = [*flats, *(state[kind] for state in states for kind in kinds if kind in state)]
    return {(storage := tensor.untyped_storage()).data_ptr(): int(storage.nbytes()) for tensor in tensors}


def _scalar(stored: list[Any]) -> Any:
    value, dtype = stored
    return torch.tensor(value, dtype=getattr(torch, dtype)) if dtype else value


def _held(engine: DeepSpeedEngine, parameter: Any, kinds: Iterable[str]) -> tuple[int, dict[str, Tensor]]:
    """(first element, kind -> values) of the stretch of a parameter that this rank holds; no values where it holds nothing."""
    if _is_sharded(engine):
        whole = {kind: _local(engine, parameter, kind) for kind in kinds}
        length = whole[WEIGHT].numel()
        start = dist.get_rank(parameter.ds_process_group) * length
        count = min(length, parameter.ds_numel - start)  # the last rank's stretch is padded
        return (start, {kind: values[:count] for kind, values in whole.items()}) if count > 0 else (0, {})
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, {}
    # Not through the mapping's own table of optimizer states: DeepSpeed fills it when only the first group has any.
    flat = _flat_partitions(engine)[mapping.param_group_index]
    state = engine.basic_optimizer.state.get(flat, {})
    place = mapping.get_hp_fragment_address()
    return mapping.lp_fragment_address.start, {
        kind: (flat if kind == WEIGHT else state[kind]).detach().narrow(0, place.start, place.numel) for kind in kinds
    }


def _local(engine: DeepSpeedEngine, parameter: nn.Parameter, kind: str) -> Tensor:
    """This rank's partition under ZeRO-3 where it lies, which safe_get_local_fp32_param would copy to the GPU."""
    key = None if kind == WEIGHT else kind
    found: tuple[Tensor, int] = engine.optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=True, optim_state_key=key
    )
    return found[0].detach()


def _copy_to_parameters(engine: DeepSpeedEngine) -> None:
    """Let the module's parameters, in whatever precision, follow the float32 weights."""
    if not _is_sharded(engine):
        engine.optimizer.update_lp_params()
        return
    for group in range(len(engine.optimizer.fp16_groups)):
        engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)
    engine.optimizer.checkpoint_event_epilogue()  # gathers what stays whole on every rank
