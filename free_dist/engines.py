"""Three DeepSpeed engines from one distribution file: a frozen backbone, the exits, the discriminators.

Knows how modules are sharded, stepped together and frozen; does not know losses, data, or what the modules compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_set_full_grad
from torch import Tensor, nn

from free_dist.config import UserError
from free_dist.distributed import all_true
from free_dist.ds_config import needs_frozen_copy, precision, zero_stage

__all__ = ["Engines", "build_engines", "frozen", "gathered", "joint_step"]


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
    """Whether every loss and gradient of this rank since the last optimizer step was finite; bool scalar."""

    def __post_init__(self) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        for engine in self.trained:
            for parameter in engine.module.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._watch)

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

    def _watch(self, gradient: Tensor) -> None:
        # Looks at this rank's own gradient, before any engine reduces, partitions or clips it.
        self.finite &= torch.isfinite(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))


def build_engines(
    backbone: nn.Module,
    bank: nn.Module,
    classifiers: nn.Module | None,
    ds_config: dict[str, dict[str, Any]],
    schedule_factor: Callable[[int], float],
) -> Engines:
    """Wrap the three modules, in place, inside a running process group.

    ``ds_config`` comes from :func:`~free_dist.ds_config.read_ds_config`; ``schedule_factor`` maps an optimizer step to a
    factor on each section's learning rate.  ``classifiers`` None builds no discriminators.  The bank must own copies of
    the shared modules when :func:`~free_dist.ds_config.needs_frozen_copy` says so.  Raises ValueError otherwise,
    UserError for an optimizer that would be compiled on CPU.
    """
    if needs_frozen_copy(ds_config) and _shares_parameters(backbone, bank):
        raise ValueError(
            "--ds_config shards the backbone or gives it another precision: build the ExitBank with copy_frozen=True"
        )
    exits = _trained_engine(bank, ds_config["exits"], "exits", schedule_factor)
    discriminators = None
    if classifiers is not None:
        discriminators = _trained_engine(classifiers, ds_config["discriminators"], "discriminators", schedule_factor)
    return Engines(
        backbone=_frozen_backbone(backbone, ds_config["backbone"], exits.device),
        exits=exits,
        discriminators=discriminators,
        device=torch.device(exits.device),
        dtype=getattr(torch, precision(ds_config["exits"])),
    )


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


@contextmanager
def gathered(engine: DeepSpeedEngine) -> Iterator[None]:
    """Inside, every rank can read the whole parameters of the engine's module, also under ZeRO-3; all ranks must enter."""
    sharded = [parameter for parameter in engine.module.parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


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
    move = all_true(engines.finite)
    engines.finite.fill_(True)
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
            safe_set_full_grad(parameter, torch.full(_full_shape(parameter), float("nan"), device=engine.device))


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    # A ZeRO-3 parameter is empty between forward passes and carries its real shape beside it.
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape


def _trained_engine(
    module: nn.Module, section: dict[str, Any], name: str, schedule_factor: Callable[[int], float]
) -> DeepSpeedEngine:
    kind = section["optimizer"]["type"].lower()
    on_cpu = deepspeed.accelerator.get_accelerator().device_name() == "cpu"
    if on_cpu and kind in ("adam", "adamw") and not section["optimizer"].get("params", {}).get("torch_adam", False):
        raise UserError(
            f"--ds_config, section {name!r}: on CPU DeepSpeed would compile its own {kind}; "
            'add "torch_adam": true to optimizer.params'
        )
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_factor),
        config=section,
        dist_init_required=False,
    )
    return engine


def _frozen_backbone(backbone: nn.Module, section: dict[str, Any], device: torch.device | str) -> nn.Module:
    backbone.requires_grad_(False).eval()
    if zero_stage(section) == 0:
        return backbone.to(device=device, dtype=getattr(torch, precision(section)))
    for module in backbone.modules():
        if any(True for _ in module.children()):
            # Gathering follows the module whose forward runs.  A parameter that sits directly on a container, such as
            # BLIP-2's query tokens, is read while another module's forward runs: the top-level one.
            for parameter in module.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(backbone, parameter)
    # ZeRO-3 warns that it cannot hook the backward pass of a module with structured outputs; this one has none.
    deepspeed.utils.logger.addFilter(lambda record: "unknown inputs or outputs type" not in record.getMessage())
    engine, _, _, _ = deepspeed.initialize(model=backbone, config=section, dist_init_required=False)
    return engine


def _shares_parameters(first: nn.Module, second: nn.Module) -> bool:
    known = {id(parameter) for parameter in first.parameters()}
    return any(id(parameter) in known for parameter in second.parameters())
