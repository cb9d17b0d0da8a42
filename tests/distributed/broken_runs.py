"""Short adversarial runs of real engines that are broken in one way each, and what their log then says."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import scene
import torch
from torch import nn

from free_dist.config import AlarmsConfig, DecodingConfig, LossConfig, Recipe, RunFailed, TrainingConfig
from free_dist.data.samples import IGNORE, Batch
from free_dist.distributed import World
from free_dist.ds_config import needs_frozen_copy
from free_dist.engines import Engines, build_engines
from free_dist.monitor import LOG, Monitor
from free_dist.training.run_watch import RunWatch
from free_dist.training.step import adversarial_step
from free_dist.training.trainer import _scalars

STEPS = 16
WINDOW = 3
EOS = 2
THRESHOLD = 0.9

Log = list[dict[str, Any]]


def run(
    *,
    sections: dict[str, dict[str, Any]] | None = None,
    factor: Callable[[int], float] = lambda step: 1.0,
    loss: Callable[[int], LossConfig] = lambda step: LossConfig(mode="unsupervised"),
    batch: Callable[[int, Batch], Batch] = lambda step, batch: batch,
    before: Callable[[nn.Module], object] = lambda classifiers: None,
    breakage: Callable[[Engines], object] = lambda engines: None,
    at_step: Callable[[int, Engines], object] = lambda step, engines: nullcontext(),
    threshold: float = THRESHOLD,
    steps: int = STEPS,
    max_skipped: int = 10,
    accumulation: int = 1,
) -> tuple[Log, str]:
    """Train; returns rank 0's log and the message of the error that ended the run, or an empty one."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    world = World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu"))
    sections = sections or scene.sections(world_size=size, accumulation=accumulation)
    backbone, bank, classifiers = scene.modules(copy_frozen=needs_frozen_copy(sections))
    before(classifiers)
    engines = build_engines(backbone, bank, classifiers, sections, factor)
    engines.exits.train()
    breakage(engines)
    run_dir = Path(tempfile.mkdtemp(prefix="broken"))
    recipe = Recipe(
        run_dir=str(run_dir),
        training=TrainingConfig(max_steps=steps, log_every=1, max_skipped_in_a_row=max_skipped, peak_tflops=1.0),
        decoding=DecodingConfig(confidence_threshold=threshold),
        alarms=AlarmsConfig(window=WINDOW),
    )
    error = ""
    with Monitor(run_dir, total_steps=steps, description="broken", enabled=world.is_main) as monitor:
        watch = RunWatch.of_exits(recipe, engines, world, monitor, eos_token_id=EOS)
        for step in range(1, steps + 1):
            for micro in range(accumulation):
                own = batch(step, scene.batch(accumulation * step + micro, rank=rank, world_size=size))
                with at_step(step, engines) or nullcontext():
                    report = watch.around(adversarial_step, engines, watch.next(iter([own])), loss(step), measure=True)
            try:
                watch.step_done(step)
            except RunFailed as failure:
                error = str(failure)
                break
            values = _scalars(report, bank.exit_layers, engines, "vqa") | watch.measured()
            monitor.scalars(step, values, tokens=1)
            watch.look(step, values, last=step == steps)
    log = [json.loads(line) for line in (run_dir / LOG).read_text().splitlines()] if world.is_main else []
    return log, error


def faster(engine: str, times: float) -> dict[str, dict[str, Any]]:
    """The usual distribution with one engine's learning rate multiplied."""
    sections = scene.sections()
    optimizer = sections[engine]["optimizer"]
    params = optimizer["params"] | {"lr": times * optimizer["params"]["lr"]}
    return sections | {engine: sections[engine] | {"optimizer": optimizer | {"params": params}}}


def detached(engines: Engines) -> None:
    """The first exit's output takes part in no backward pass."""
    engines.exits.module.transformers[0].register_forward_hook(lambda _module, _inputs, output: output.detach())


def blind(classifiers: nn.Module) -> None:
    """A discriminator with one verdict for everything, which its learning rate of zero keeps."""
    for parameter in classifiers.parameters():
        nn.init.zeros_(parameter)


def overwritten(step: int, engines: Engines) -> None:
    """One element of the frozen backbone changes by its last bit in step 5."""
    if step == 5:
        weight = engines.backbone.block(2).fc1.weight.data
        weight[1, 1] = torch.nextafter(weight[1, 1], torch.tensor(9.0))


def one_for_all(engines: Engines) -> None:
    """Every exit gives the features of the first: a wire in the wrong place."""
    forward = engines.exits.module.forward
    engines.exits.module.forward = lambda *a, **k: forward(*a, **k)[:1].expand(len(scene.EXIT_LAYERS), -1, -1)


def constant(engines: Engines) -> None:
    """A bias that drowns whatever the last exit computes."""

    def drown(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + 1e4 * torch.arange(output.shape[-1])

    engines.exits.module.transformers[1].register_forward_hook(drown)


def only(target: int) -> Callable[[int, Batch], Batch]:
    """Labels that are all the same token."""
    return lambda _step, batch: replace(
        batch, targets=torch.where(batch.targets == IGNORE, batch.targets, torch.full_like(batch.targets, target))
    )


def labels(_step: int) -> LossConfig:
    """Labels instead of the full model's own predictions."""
    return LossConfig()


def delayed(engines: Engines) -> None:
    """Rank 1 needs a second more for its own work."""
    if torch.distributed.get_rank() == 1:
        engines.backbone.register_forward_hook(lambda *_: time.sleep(1.0))


def delayed_layer(engines: Engines) -> None:
    """Rank 1 needs a second more for one layer of a backbone that ranks share."""
    if torch.distributed.get_rank() == 1:
        engines.backbone.block(1).fc1.register_forward_hook(lambda *_: time.sleep(1.0))


def one_process() -> dict[str, tuple[Log, str]]:
    """Every broken run of one process, and a healthy one."""
    return {
        "healthy": run(steps=24),
        "discriminator too fast": run(sections=faster("discriminators", 1000)),
        "discriminator blind": run(sections=faster("discriminators", 0), before=blind),
        "exit detached": run(breakage=detached),
        "weight overwritten": run(at_step=overwritten),
        "one for all": run(breakage=one_for_all, loss=lambda step: LossConfig(adversarial_weight=0.3)),
        "constant": run(breakage=constant),
        "exits too fast, late": run(factor=lambda step: 1.0 if step < 8 else 200.0),
        "wrong labels": run(factor=lambda step: 5.0, batch=only(77), loss=labels, steps=24),
        "ends at once": run(factor=lambda step: 5.0, batch=only(EOS), loss=labels),
        "never leaves": run(threshold=1.1),
        "no loss left": run(
            loss=lambda step: LossConfig(
                adversarial_weight=0.1 if step < 8 else 1e-9, task_weight=1.0 if step < 8 else 1e-9
            )
        ),
    }


def spoilt(step: int, batch: Batch) -> Batch:
    """In step 4 one image of rank 1 holds a number that is none."""
    if step == 4 and torch.distributed.get_rank() == 1:
        batch.pixel_values[1, 0, 3, 3] = float("nan")
        return replace(batch, keys=tuple(f"rank-1-row-{row}" for row in range(len(batch.keys))))
    return batch


class overflowing_gradient:
    """On rank 1, in step 6, the backward pass through the last exit gives infinity."""

    def __init__(self, step: int, engines: Engines) -> None:
        self._handle = None
        if step == 6 and torch.distributed.get_rank() == 1:
            self._handle = engines.exits.module.transformers[1].register_forward_hook(
                lambda _module, _inputs, output: output.register_hook(lambda gradient: gradient * float("inf")) and None
            )

    def __enter__(self) -> None: ...

    def __exit__(self, *_exception: object) -> None:
        if self._handle is not None:
            self._handle.remove()


def two_processes() -> dict[str, tuple[Log, str]]:
    """Two processes: one of them slow; inputs, gradients and losses that are not finite, once and again and again."""

    def always(_step: int, batch: Batch) -> Batch:
        batch.pixel_values.fill_(float("inf"))
        return batch

    def infinite(step: int) -> LossConfig:
        return LossConfig(task_weight=float("inf") if step == 5 else 1.0)

    return {
        "slow": run(breakage=delayed, steps=6),
        "slow, shared backbone": run(
            breakage=delayed_layer, sections=scene.sections(backbone_stage=3, world_size=2), steps=6
        ),
        "input": run(batch=spoilt, steps=6),
        "gradient": run(at_step=overflowing_gradient, steps=8, accumulation=2),
        "loss": run(loss=infinite, steps=6),
        "always": run(batch=always, max_skipped=3),
    }
