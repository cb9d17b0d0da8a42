"""Stage 2: the loop that trains exits on a frozen backbone — stream, step, log, checkpoint, export.

Knows the order of things in a run; the step itself, the engines, the stream and the log are other modules' business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from free_dist.backbones.checkpoint_files import open_checkpoint
from free_dist.backbones.checkpoint_hash import has_safetensors
from free_dist.backbones.embedded import resolve_backbone
from free_dist.config import ConfigError, Recipe, UserError
from free_dist.data.pretrained import load_pretrained
from free_dist.data.quarantine import QUARANTINE
from free_dist.data.stream import training_batches
from free_dist.data.visual_cache import use_visual_cache
from free_dist.distributed import (
    Interrupted,
    StopFlag,
    World,
    all_equal,
    all_gather,
    all_reduce_mean,
    all_reduce_sum,
    seed_everything,
)
from free_dist.ds_config import (
    fits,
    gradient_accumulation_steps,
    micro_batch_size,
    needs_frozen_copy,
    precision,
    rows_per_step,
    zero_stage,
)
from free_dist.engines import (
    Engines,
    build_engines,
    device_memory,
    gathered,
    gathered_parameters,
    place_backbone,
    sharded_loading,
)
from free_dist.exits import ExitBank, FeatureClassifiers
from free_dist.exits.export import save_exits
from free_dist.exits.manifest import BackboneFacts, decoding_settings
from free_dist.exits.transformer import check_exit_layers, init_block
from free_dist.exits.variants import ExitVariant
from free_dist.monitor import Monitor
from free_dist.training.accumulation import train_step
from free_dist.training.checkpoint import Checkpoints, go_on, newest_sound
from free_dist.training.run_directory import CHECKPOINTS
from free_dist.training.run_watch import RunWatch
from free_dist.training.runs import BACKBONE_FILES, EXPORT, file_hash, provenance
from free_dist.training.sample_texts import check_samples, log_samples
from free_dist.training.schedule import warmup_cosine
from free_dist.watchdog import Watchdog


def train(
    recipe: Recipe,
    ds_config: dict[str, dict[str, Any]],
    world: World,
    tell: Callable[[str], None] = lambda _line: None,
) -> Path:
    """Train the recipe's exits inside a running process group, going on from ``run_dir``'s newest sound checkpoint.

    ``tell`` receives lines for the person who waits.  Returns the export directory, complete on rank 0.  Raises Interrupted
    after SIGINT, SIGTERM or SIGUSR1 to any rank, on all ranks, with a checkpoint written and the exits as they are exported;
    UserError for a checkpoint that does not fit, or cannot be written.
    """
    run_dir = Path(recipe.run_dir)
    check_samples(recipe)
    found = newest_sound(run_dir / CHECKPOINTS, world, tell)
    seed_everything(recipe.training.seed)
    directory = resolve_backbone(recipe.backbone.path)
    options: dict[str, Any] = {
        "attn_implementation": recipe.backbone.attn_implementation,
        "allow_pickle": recipe.backbone.allow_pickle,
    }
    dtype = getattr(torch, precision(ds_config["backbone"]))
    if dtype != torch.float32 and recipe.backbone.allow_pickle and not has_safetensors(directory):
        # Exits know such a backbone by its parameters as they were trained on, and inference loads others.
        raise UserError(
            f"backbone.path: {directory} holds a pickle, on which exits are trained in float32 alone: convert it to safetensors "
            "(model.save_pretrained of transformers writes them), or leave bf16 out of section 'backbone' of --ds_config"
        )
    weight_bytes = open_checkpoint(directory, allow_pickle=recipe.backbone.allow_pickle).nbytes(dtype)
    ds_config = place_backbone(ds_config, weight_bytes, world.device)
    backbone, encoder = load_pretrained(
        recipe.backbone.path, dtype=dtype, sharding=sharded_loading(ds_config["backbone"]), **options
    )
    use_visual_cache(recipe.data, backbone, encoder)
    if recipe.cost.packs:
        backbone.check_packing(share_prefix=recipe.cost.share_prefix)
    if backbone.layout.num_query_tokens + recipe.decoding.max_new_tokens >= backbone.max_positions:
        raise ConfigError(
            f"decoding.max_new_tokens={recipe.decoding.max_new_tokens}: the backbone has {backbone.max_positions} positions, "
            f"{backbone.layout.num_query_tokens} of them for the image"
        )
    facts = BackboneFacts.of(backbone, directory) if world.is_main else None
    files_sha256 = file_hash(directory) if world.is_main else None
    layers, init = recipe.exits.exit_layers, recipe.exits.init
    check_exit_layers(layers, backbone.n_blocks)
    copied = (backbone.block(init_block(k, init, backbone.n_blocks)) for k in layers)
    with gathered_parameters(*backbone.shared_modules(), *copied):
        bank = ExitBank(
            backbone,
            layers,
            variant=ExitVariant.from_config(recipe.exits),
            init=init,
            copy_frozen=needs_frozen_copy(ds_config),
        )
    classifiers = None
    if recipe.loss.adversarial_weight > 0:
        classifiers = FeatureClassifiers(
            len(bank.exit_layers),
            backbone.hidden_size,
            recipe.exits.discriminator_hidden_size,
            shared=recipe.exits.discriminator == "shared",
        )
    decoder = None
    if world.is_main and recipe.training.sample_every:
        if zero_stage(ds_config["backbone"]) == 0:
            decoder = backbone
        elif fits(weight_bytes, device_memory(world.device)):
            # A sharded backbone cannot decode alone on one rank; sample texts come from a replica.
            decoder = load_pretrained(recipe.backbone.path, dtype=dtype, **options)[0].to(world.device)
    steps = recipe.training.max_steps
    factor = warmup_cosine(warmup_steps=recipe.training.warmup_steps, max_steps=steps)
    engines = build_engines(
        backbone, bank, classifiers, ds_config, factor, discriminator_steps=recipe.loss.discriminator_steps
    )
    engines.exits.train()  # the blocks were copied from a model in evaluation mode
    accumulation, rows = gradient_accumulation_steps(ds_config), rows_per_step(ds_config, world.size)
    trained = {"exits": engines.exits, "discriminators": engines.discriminators}
    checkpoints = Checkpoints(
        run_dir / CHECKPOINTS,
        {name: engine for name, engine in trained.items() if engine is not None},
        world=world,
        training=recipe.training,
        rows_per_step=rows,
        tasks=recipe.data.tasks,
        backbone=all_gather([None if facts is None else facts.hash])[0][0] or "",
        facts={"recipe": asdict(recipe), "ds_config": ds_config, BACKBONE_FILES: files_sha256},
    )
    done, samples = go_on(checkpoints, found, recipe, world, tell)
    batches = training_batches(
        recipe.data,
        encoder,
        seed=recipe.training.seed,
        micro_batch_size=micro_batch_size(ds_config),
        gradient_accumulation_steps=accumulation,
        rank=world.rank,
        world_size=world.size,
        start=checkpoints.position(done),
        quarantine=run_dir / QUARANTINE,
        agreed=all_equal,
    )
    stopped = False
    with (
        StopFlag(world.device) as stop,
        checkpoints,
        Watchdog.of(recipe, world) as watchdog,
        Monitor(run_dir, total_steps=steps, description="training exits", done=done, enabled=world.is_main) as monitor,
    ):
        watch = RunWatch.of_exits(recipe, engines, world, monitor, eos_token_id=encoder.layout.eos_token_id)
        tokens = torch.zeros((), dtype=torch.long, device=world.device)
        step = done
        for step in range(done + 1, steps + 1):
            measure = step == 1 or step % recipe.training.log_every == 0 or step == steps
            micro_batches = [watch.next(batches) for _ in range(accumulation)]
            samples.add(step, micro_batches)
            report = train_step(engines, micro_batches, recipe.loss, watch.around, cost=recipe.cost, measure=measure)
            watch.step_done(step)
            watchdog.beat(step)
            tokens += sum(encoder.text_tokens(batch) for batch in micro_batches)
            monitor.advance(samples=rows)
            if measure:
                values = _scalars(report, bank.exit_layers, engines, micro_batches[0].task) | watch.measured()
                monitor.scalars(step, values, tokens=int(all_reduce_sum(tokens).item()))
                watch.look(step, values, last=step == steps)
                tokens.zero_()
            if recipe.training.sample_every and step % recipe.training.sample_every == 0:
                with gathered(engines.exits):
                    if decoder is not None:
                        watch.sampled(log_samples(monitor, step, decoder, bank, encoder, recipe))
            stopped = stop.agreed() or watch.stopped
            last = stopped or step == steps
            if measure or checkpoints.is_due(step, last=last):
                samples.write()
            checkpoints.after_step(step, report["task_loss"].mean(), last=last)
            if stopped:
                break
    export = run_dir / EXPORT
    with gathered(engines.exits):
        if world.is_main:
            versions = provenance()
            save_exits(
                bank,
                export,
                backbone=facts,
                thresholds=recipe.decoding.confidence_threshold,
                calibration="decoding.confidence_threshold of the recipe; not calibrated",
                decoding=decoding_settings(recipe),
                git_commit=versions.pop("git_commit"),
                extra={
                    "backbone": recipe.backbone.path,
                    BACKBONE_FILES: files_sha256,
                    "steps": step,
                    "data": {
                        "set": Path(recipe.data.root).name,
                        "tasks": ", ".join(task for task, weight in recipe.data.tasks.items() if weight),
                    },
                    "loss": vars(recipe.loss),
                    **versions,
                },
            )
    watch.raise_if_stopped(export)
    if stopped and step < steps:
        goes_on = "; the same command goes on from there" if recipe.training.save_every else ""
        raise Interrupted(f"stopped after step {step} of {steps}; exits exported to {export}{goes_on}")
    return export


def _scalars(report: dict[str, Tensor], exit_layers: tuple[int, ...], engines: Engines, task: str) -> dict[str, float]:
    """One step's report as named numbers, averaged over ranks; per-exit values get one name each."""
    names = {
        "task_loss": f"loss_{task}",
        "g_loss": "loss_generator",
        "d_loss": "loss_discriminator",
        "d_accuracy_real": "discriminator_accuracy_real",
        "d_accuracy_fake": "discriminator_accuracy_fake",
        "agreement": f"agreement_with_full_{task}",
        "accuracy": f"token_accuracy_{task}",
        "cosine": "cosine_to_full",
        "kl_to_full": f"kl_to_full_{task}",
    }
    values: dict[str, float] = {}
    for key, value in report.items():
        if key == "answer_tokens":
            values["batch/answer_tokens"] = all_reduce_sum(value).item()
        elif value.ndim:
            per_exit = all_reduce_mean(value.float()).tolist()
            values |= {
                f"{names.get(key, key)}/exit_{k}": number for k, number in zip(exit_layers, per_exit, strict=True)
            }
        elif key.startswith("grad_norm/"):
            values[key] = value.item()
        else:
            values[f"step/{key}"] = all_reduce_mean(value.float()).item()
    values["learning_rate/exits"] = engines.exits.get_lr()[0]
    if engines.discriminators is not None:
        values["learning_rate/discriminators"] = engines.discriminators.get_lr()[0]
    return values
