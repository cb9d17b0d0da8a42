"""Three DeepSpeed engines from one distribution file: a frozen backbone, the exits, the discriminators.

Knows how modules are sharded, stepped together and frozen; does not know losses, data, or what the modules compute.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_grad
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from free_dist.config import UserError
from free_dist.distributed import all_reduce_max, all_true, world_size
from free_dist.ds_config import fits, names_stage, needs_frozen_copy, precision, with_backbone_stage, zero_stage
from free_dist.gradients import GradientNorms

__all__ = [
    "Engines",
    "build_engines",
    "build_single_engine",
    "device_memory",
    "frozen",
    "full_shape",
    "gathered",
    "gathered_parameters",
    "joint_step",
    "place_backbone",
    "sharded_loading",
    "trained_weights",
]


@dataclass(kw_only=True)
class Engines:
    """The three engines of one run."""

    backbone: nn.Module
    """Frozen; a ZeRO-3 engine without optimizer, or the module itself when replicated.  Call it, always as a whole."""
    exits: DeepSpeedEngine
    """Around the ExitBank."""
    discriminators: DeepSpeedEngine | None
    """Around the FeatureClassifiers; None when training is not adversarial."""
    device: torch.device
    """Where batches must lie."""
    dtype: torch.dtype
    """Precision of exits and discriminators: what features are cast to at their boundary."""
    finite: Tensor = field(init=False)
    """Whether every loss of this rank since the last optimizer step was finite; bool scalar."""
    gradients: GradientNorms = field(init=False)
    """This rank's own gradients, by parameter."""

    def __post_init__(self) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        names = ("exits", "discriminators")[: len(self.trained)]
        modules = {name: engine.module for name, engine in zip(names, self.trained, strict=True)}
        self.gradients = GradientNorms(modules, self.device)

    @property
    def trained(self) -> list[DeepSpeedEngine]:
        """The engines that have an optimizer."""
        return [self.exits] if self.discriminators is None else [self.exits, self.discriminators]

    @property
    def at_boundary(self) -> bool:
        """Whether the current micro-batch is the last one of its optimizer step."""
        return bool(self.exits.is_gradient_accumulation_boundary())

    def grad_norms(self) -> dict[str, Tensor]:
        """Global gradient norm per engine at the last optimizer step, before clipping; scalars, inf if it was skipped."""
        norms = {"exits": self.exits.get_global_grad_norm()}
        if self.discriminators is not None:
            norms["discriminators"] = self.discriminators.get_global_grad_norm()
        return {
            name: torch.as_tensor(float("nan") if norm is None else norm, dtype=torch.float32, device=self.device)
            for name, norm in norms.items()
        }

    def most_positions(self, own: int) -> int:
        """How many answer positions this rank must act as if it had: its ``own``, or the most of any rank where all ranks read
        a sharded head together and must do so equally often."""
        if self.exits.zero_optimization_stage() < 3 or world_size() == 1:
            return own
        return int(all_reduce_max(torch.tensor(own, device=self.device)))


def build_engines(
    backbone: nn.Module,
    bank: nn.Module,
    classifiers: nn.Module | None,
    ds_config: dict[str, dict[str, Any]],
    schedule_factor: Callable[[int], float],
    *,
    discriminator_steps: int = 1,
) -> Engines:
    """Wrap the three modules, in place, inside a running process group.

    ``ds_config`` comes from :func:`~free_dist.ds_config.read_ds_config`; ``schedule_factor`` maps an optimizer step to a
    factor on each section's learning rate; discriminators make ``discriminator_steps`` updates in one.  ``classifiers`` None
    builds no discriminators.  The bank must own copies of the shared modules when
    :func:`~free_dist.ds_config.needs_frozen_copy` says so.  Raises ValueError otherwise, UserError for an optimizer that would
    be compiled on CPU.
    """
    if needs_frozen_copy(ds_config) and _shares_parameters(backbone, bank):
        raise ValueError(
            "--ds_config shards the backbone or gives it another precision: build the ExitBank with copy_frozen=True"
        )
    exits = _trained_engine(bank, ds_config["exits"], "exits", schedule_factor)
    discriminators = None
    if classifiers is not None:
        discriminators = _trained_engine(
            classifiers,
            ds_config["discriminators"],
            "discriminators",
            lambda update: schedule_factor(update // discriminator_steps),
        )
    return Engines(
        backbone=_frozen_backbone(backbone, ds_config["backbone"], exits.device),
        exits=exits,
        discriminators=discriminators,
        device=torch.device(exits.device),
        dtype=getattr(torch, precision(ds_config["exits"])),
    )


def build_single_engine(
    module: nn.Module, section: dict[str, Any], schedule_factor: Callable[[int], float]
) -> DeepSpeedEngine:
    """Wrap one module, in place: parameters that require a gradient are trained, the others stay as they are.

    Its forward must return tensors and use every parameter inside one call.  The section's weight decay holds for matrices,
    not for biases and norms.  Raises UserError as :func:`build_engines` does.
    """
    if zero_stage(section) == 3:
        _make_container_parameters_reachable(module)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if len(full_shape(parameter)) >= 2]},
        {"params": [parameter for parameter in trained if len(full_shape(parameter)) < 2], "weight_decay": 0.0},
    ]
    return _trained_engine(module, section, "exits", schedule_factor, [group for group in groups if group["params"]])


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of ``module`` takes a gradient inside; afterwards each is as before."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def sharded_loading(section: dict[str, Any]) -> AbstractContextManager[None] | None:
    """What a backbone section means for loading: a context in which ``from_pretrained`` partitions, or None to replicate.

    All ranks enter together; each keeps 1/N of every parameter from the start, in the section's precision.
    """
    return _partitioning(section) if zero_stage(section) == 3 else None


def place_backbone(
    ds_config: dict[str, dict[str, Any]], weight_bytes: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """The distribution with a backbone section that names its ZeRO stage, the same on all ranks.

    A section that names none gets 0 (replicated: no communication) where ``weight_bytes``, the whole backbone in the section's
    precision, leave room on every rank's device, and 3 (sharded) elsewhere.  Raises UserError when weights cannot fit at all.
    """
    section, memory, size = ds_config["backbone"], device_memory(device), world_size()
    replicated = zero_stage(section) == 0 if names_stage(section) else all_true(fits(weight_bytes, memory), device)
    stage = 0 if replicated else 3
    needed = weight_bytes if stage == 0 else -(-weight_bytes // size)
    # Every rank must know of one rank's failure: the others would wait for it in the next collective.
    if not all_true(needed <= memory, device):
        advice = (
            "set zero_optimization.stage to 3, which gives each process a part,"
            if stage == 0
            else "start more processes"
        )
        raise UserError(
            f"--ds_config, section 'backbone': zero_optimization.stage {stage} on {size} process{'es' * (size > 1)} puts "
            f"{needed / 1e9:.1f} GB of weights on a device of {memory / 1e9:.1f} GB: {advice} or take a smaller backbone"
        )
    return with_backbone_stage(ds_config, stage)


def device_memory(device: torch.device) -> int:
    """Bytes in all that this process can use: its GPU's memory, or its part of a machine that all processes may share."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // world_size()


@contextmanager
def gathered_parameters(*modules: nn.Module) -> Iterator[None]:
    """Inside, every rank can read the whole parameters of these modules alone; all ranks must enter.

    For copies of single blocks of a sharded backbone: what a block copied here holds is whole and belongs to nobody else.
    Does nothing to modules that are not sharded.
    """
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    sharded = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


@contextmanager
def gathered(engine: DeepSpeedEngine) -> Iterator[None]:
    """Inside, every rank can read the whole parameters of the engine's module, also under ZeRO-3; all ranks must enter."""
    with gathered_parameters(engine.module):
        yield


def trained_weights(engine: DeepSpeedEngine, *, keep: bool) -> dict[str, Tensor]:
    """Name -> whole float32 weight on the CPU of every trained parameter, at any ZeRO stage; all ranks must call it.

    Empty on ranks that do not ``keep`` them; these hold one weight at a time.
    """
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            weight = safe_get_full_fp32_param(parameter)
            assert weight is not None, f"{name} is trained, but not by this engine"
            if keep:
                found[name] = weight.detach().to(device="cpu", dtype=torch.float32, copy=True)
    return found


def joint_step(engines: Engines, losses: Tensor) -> bool | None:
    """After both backward passes of a micro-batch: step both engines, or skip both, on all ranks.

    ``losses`` are this rank's, any shape.  Skips when a loss or gradient of any rank since the last step was not finite.
    Returns whether the weights moved, or None on a micro-batch that only accumulates.  Raises FloatingPointError if an
    engine overrules the joint decision, which only finite gradients with an infinite global norm can cause.
    """
    engines.finite &= torch.isfinite(losses).all()
    if not engines.at_boundary:
        for engine in engines.trained:
            engine.step()
        return None
    move = all_true(engines.finite & engines.gradients.finite())
    engines.finite.fill_(True)
    engines.gradients.close_step()
    for engine in engines.trained:
        if not move:
            _spoil_gradients(engine)
        engine.step()
        if engine.was_step_applied() != move:
            raise FloatingPointError(
                "one engine would step and another skip: a gradient norm overflows float32; lower the learning rate"
            )
    return move


def _spoil_gradients(engine: DeepSpeedEngine) -> None:
    # An engine skips, and does all its own bookkeeping of a skipped step, when its gradient norm is not finite: the one
    # refusal that works alike at every ZeRO stage and in both precisions.
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            safe_set_full_grad(parameter, torch.full(full_shape(parameter), float("nan"), device=engine.device))


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter, also of one that is sharded."""
    # A ZeRO-3 parameter is empty between forward passes and carries its real shape beside it.
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape


def _trained_engine(
    module: nn.Module,
    section: dict[str, Any],
    name: str,
    schedule_factor: Callable[[int], float],
    parameter_groups: list[dict[str, Any]] | None = None,
) -> DeepSpeedEngine:
    kind = section["optimizer"]["type"].lower()
    on_cpu = deepspeed.accelerator.get_accelerator().device_name() == "cpu"
    if on_cpu and kind in ("adam", "adamw") and not section["optimizer"].get("params", {}).get("torch_adam", False):
        raise UserError(
            f"--ds_config, section {name!r}: on CPU DeepSpeed would compile its own {kind}; "
            'add "torch_adam": true to optimizer.params'
        )
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # Without bf16 DeepSpeed leaves types as they are, and exits may be copied from a backbone of another precision.
    module.to(getattr(torch, precision(section)))
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        model_parameters=trained if parameter_groups is None else parameter_groups,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_factor),
        config=section,
        dist_init_required=False,
    )
    return engine


@contextmanager
def _partitioning(section: dict[str, Any]) -> Iterator[None]:
    # transformers looks for a live object of this class, by weak reference, and unset is its only way back.
    config = HfDeepSpeedConfig(_without_own_linear(section))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


def _frozen_backbone(backbone: nn.Module, section: dict[str, Any], device: torch.device | str) -> nn.Module:
    backbone.requires_grad_(False).eval()
    if zero_stage(section) == 0:
        return backbone.to(device=device, dtype=getattr(torch, precision(section)))
    _make_container_parameters_reachable(backbone)
    engine, _, _, _ = deepspeed.initialize(
        model=backbone, config=_without_own_linear(section), dist_init_required=False
    )
    return engine


def _without_own_linear(section: dict[str, Any]) -> dict[str, Any]:
    # DeepSpeed would replace torch's linear map, in the whole process, by one that saves memory in backward passes and
    # rounds twice in bfloat16.  A frozen backbone has no backward pass, and must give what a replicated one gives.
    zero = {"memory_efficient_linear": False} | section.get("zero_optimization", {})
    return section | {"zero_optimization": zero}


def _make_container_parameters_reachable(top: nn.Module) -> None:
    for module in top.modules():
        if any(True for _ in module.children()):
            # Gathering follows the module whose forward runs.  A parameter that sits directly on a container, such as
            # BLIP-2's query tokens, is read while another module's forward runs: the top-level one.
            for parameter in module.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(top, parameter)
    # ZeRO-3 warns that it cannot hook the backward pass of modules with structured outputs.  None of them holds a
    # parameter that is read after its own forward began, except those that the top level, with its plain output, gathers.
    deepspeed.utils.logger.addFilter(lambda record: "unknown inputs or outputs type" not in record.getMessage())


def _shares_parameters(first: nn.Module, second: nn.Module) -> bool:
    known = {id(parameter) for parameter in first.parameters()}
    return any(id(parameter) in known for parameter in second.parameters())
