"""The plan of a run: bytes per GPU by engine and by moment, operations per sample by part, hours per epoch.

Puts together what the engines hold (``engine_memory``) and what a step allocates (``dry_steps``).  Not counted: what libraries
and the driver take before any tensor exists (about a gigabyte of a GPU), workspaces of kernels, fragments, tables of rotary
angles (3 MB).  Does not know how any of it is printed, nor what speed a device reaches: that is the caller's ``mfu``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.published import PUBLISHED_BACKBONES, meta_model
from free_dist.config import MissingFileError, Recipe, UserError
from free_dist.data.pretrained import ADAPTERS
from free_dist.ds_config import fits, names_stage, needs_frozen_copy, precision, with_backbone_stage
from free_dist.exits import ExitBank, FeatureClassifiers
from free_dist.exits.variants import ExitVariant
from free_dist.planning import dry_steps as steps
from free_dist.planning.dry_run import META, DryRun
from free_dist.planning.engine_memory import EngineMemory, engine_memory
from free_dist.planning.workload import Workload, positions, workload


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What one GPU will hold and compute."""

    backbone: str
    stage: int
    work: Workload
    positions: int
    """T."""
    trained: dict[str, int]
    """Trained numbers by engine, whole."""
    backbone_bytes: int
    """All weights of the backbone in its precision, as one GPU holds them that shares none."""
    engines: dict[str, EngineMemory]
    activations: dict[str, int]
    """Most bytes of activations alive during each part of a micro-batch."""
    moments: dict[str, int]
    """Bytes held in all at each moment of a step."""
    flops_per_sample: dict[str, float]
    """Floating-point operations of one row by part, forward and backward."""

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return max(self.moments.values())

    @property
    def fullest(self) -> str:
        """The moment that decides."""
        return max(self.moments, key=self.moments.__getitem__)

    def hours(self, samples: int, *, tflops: float, mfu: float) -> float:
        """Hours of ``samples`` rows on all GPUs, each reaching ``mfu`` of ``tflops`` (10^12 operations a second)."""
        operations = samples * sum(self.flops_per_sample.values())
        return operations / (self.work.world_size * tflops * 1e12 * mfu) / 3600


def plan_memory(
    name: str,
    recipe: Recipe,
    ds_config: dict[str, dict[str, Any]],
    *,
    world_size: int,
    stage: int = 2,
    text_tokens: int | None = None,
    answer_tokens: int | None = None,
    gpu_bytes: float = 80e9,
) -> MemoryPlan:
    """The plan of ``stage`` for a published backbone's name or a Hugging Face directory; reads no weights.

    ``gpu_bytes``, a GPU's memory, decides where a backbone section without a ZeRO stage is placed, as it does in training.
    The two lengths replace those of the published data sets (``workload``).  Raises UserError for an unknown backbone,
    ConfigError for exit layers that it does not have.
    """
    work = workload(recipe.data, ds_config, world_size=world_size, text_tokens=text_tokens, answer_tokens=answer_tokens)
    model = backbone_on_meta(name)
    if stage == 2 and not names_stage(ds_config["backbone"]):
        dtype = _dtype(ds_config["backbone"])
        weight_bytes = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        ds_config = with_backbone_stage(ds_config, 0 if fits(weight_bytes, gpu_bytes) else 3)
    if stage == 1:
        backbone, engines, trained, run = _finetuning(model, recipe, ds_config, work)
        moments = _finetuning_moments(engines["backbone"], run)
    else:
        backbone, engines, trained, run = _exits(model, recipe, ds_config, work)
        moments = _exits_moments(engines, run)
    return MemoryPlan(
        backbone=name,
        stage=stage,
        work=work,
        positions=positions(backbone.layout, work),
        trained=trained,
        backbone_bytes=sum(parameter.nbytes for parameter in backbone.parameters()),
        engines=engines,
        activations={part: size for part, size in run.peaks.items() if part},
        moments=moments,
        flops_per_sample={part: count / work.rows for part, count in run.flops.items() if count},
    )


def backbone_on_meta(name: str) -> PreTrainedModel:
    """The whole model without storage, frozen, in evaluation mode; raises UserError for a name that is neither."""
    if name in PUBLISHED_BACKBONES:
        model = meta_model(name)
    elif (Path(name) / "config.json").is_file():
        with META:
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name, local_files_only=True))
    else:
        raise MissingFileError(
            f"--backbone {name}: neither a Hugging Face directory with a config.json nor one of {', '.join(PUBLISHED_BACKBONES)}"
        )
    if model.config.model_type not in ADAPTERS:
        raise UserError(
            f"--backbone {name}: a {model.config.model_type!r} model has no vision half to plan for; "
            f"want one of {', '.join(ADAPTERS)}"
        )
    return model.eval().requires_grad_(False)


def _exits(
    model: PreTrainedModel, recipe: Recipe, ds_config: dict[str, dict[str, Any]], work: Workload
) -> tuple[Blip2Backbone, dict[str, EngineMemory], dict[str, int], DryRun]:
    settings = recipe.exits
    dtype = _dtype(ds_config["exits"])
    with META:
        backbone = ADAPTERS[model.config.model_type](model.to(_dtype(ds_config["backbone"])))
        bank = ExitBank(
            backbone,
            settings.exit_layers,
            variant=ExitVariant.from_config(settings),
            init=settings.init,
            copy_frozen=needs_frozen_copy(ds_config),
        )
        classifiers = None
        if recipe.loss.adversarial_weight > 0:
            classifiers = FeatureClassifiers(
                len(settings.exit_layers),
                backbone.hidden_size,
                settings.discriminator_hidden_size,
                shared=settings.discriminator == "shared",
            )
    modules: dict[str, nn.Module] = {"backbone": backbone, "exits": bank.to(dtype)}
    if classifiers is not None:
        modules["discriminators"] = classifiers.to(dtype)
    engines, trained, counted = {}, {}, set[int]()
    for name, module in modules.items():
        # Exits may share weights with the backbone by reference.
        own = [parameter for parameter in module.parameters() if id(parameter) not in counted]
        counted.update(id(parameter) for parameter in own)
        engines[name] = _engine(ds_config[name], own, work)
        trained[name] = sum(parameter.numel() for parameter in own if parameter.requires_grad)
    return backbone, engines, trained, steps.dry_exits_step(backbone, bank, classifiers, work, recipe.loss, dtype)


def _exits_moments(engines: dict[str, EngineMemory], run: DryRun) -> dict[str, int]:
    backbone, exits = engines["backbone"], engines["exits"]
    judges = engines.get("discriminators")
    resting = sum(engine.resting + engine.accumulated for engine in engines.values())
    judged = 0 if judges is None else judges.gradients - judges.accumulated
    peaks = run.peaks
    moments = {
        "backbone forward": max(peaks[part] for part in (steps.VISION, steps.QFORMER, steps.LANGUAGE_MODEL))
        + backbone.gathered,
        steps.EXITS_FORWARD: peaks[steps.EXITS_FORWARD] + exits.gathered,
        steps.HEADS: peaks[steps.HEADS] + judged + exits.gathered,
        steps.EXITS_BACKWARD: peaks[steps.EXITS_BACKWARD]
        + exits.backward
        - exits.accumulated
        + judged
        + exits.gathered,
        steps.OPTIMIZER_STEP: peaks[steps.OPTIMIZER_STEP] + judged + exits.step - exits.accumulated,
    }
    if judges is not None:
        moments[steps.DISCRIMINATORS] = (
            peaks[steps.DISCRIMINATORS] + judges.backward - judges.accumulated + judges.gathered + exits.gathered
        )
    return {moment: resting + held for moment, held in moments.items()}


def _finetuning(
    model: PreTrainedModel, recipe: Recipe, ds_config: dict[str, dict[str, Any]], work: Workload
) -> tuple[Blip2Backbone, dict[str, EngineMemory], dict[str, int], DryRun]:
    # Brings peft along, which takes seconds.
    from free_dist.training.trained_parts import train_parts

    section = ds_config["exits"]
    with META:
        train_parts(model, recipe.finetune)
        backbone = ADAPTERS[model.config.model_type](model.to(_dtype(section)))
    parameters = list(backbone.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    engine = _engine(section, parameters, work)
    return backbone, {"backbone": engine}, {"backbone": trained}, steps.dry_finetuning_step(backbone, work)


def _finetuning_moments(engine: EngineMemory, run: DryRun) -> dict[str, int]:
    peaks, resting = run.peaks, engine.resting + engine.accumulated
    forward = max(peaks[part] for part in (steps.VISION, steps.QFORMER, steps.LANGUAGE_MODEL))
    return {
        "forward": resting + forward + engine.gathered,
        steps.HEADS: resting + peaks[steps.HEADS] + engine.gathered,
        steps.BACKWARD: resting + peaks[steps.BACKWARD] + engine.backward - engine.accumulated + engine.gathered,
        steps.OPTIMIZER_STEP: resting + peaks[steps.OPTIMIZER_STEP] + engine.step - engine.accumulated,
    }


def _engine(section: dict[str, Any], parameters: Iterable[nn.Parameter], work: Workload) -> EngineMemory:
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for parameter in parameters:
        sizes[parameter.requires_grad].append(parameter.numel())
    return engine_memory(section, sizes[True], sizes[False], world_size=work.world_size, accumulation=work.accumulation)


def _dtype(section: dict[str, Any]) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision(section)]
