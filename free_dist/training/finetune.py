"""Stage 1: train parts of the backbone itself on the answers of the task data, in one DeepSpeed engine.

The loop: stream, step, log, evaluate, checkpoint.  Batches, augmentation and dropout of a step are functions of (seed, step,
rank), so a run that goes on from a checkpoint repeats exactly what an uninterrupted one would have done.  Knows the order of
things in a run; does not know how modules are sharded, which parameters a part has, or exits.

Shape letters: B rows, T positions (of the decoder, if there is an encoder), N answer positions, I images.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from free_dist.backbones import Backbone, Instruction
from free_dist.backbones.checkpoint_hash import checkpoint_hash, has_safetensors
from free_dist.config import Recipe
from free_dist.data.order import StreamState
from free_dist.data.pretrained import load_pretrained
from free_dist.data.quarantine import QUARANTINE
from free_dist.data.samples import IGNORE, Batch, Sample, SampleEncoder
from free_dist.data.stream import split_samples, training_batches
from free_dist.data.visual_cache import use_visual_cache
from free_dist.distributed import (
    Interrupted,
    StopFlag,
    World,
    all_equal,
    all_gather,
    all_reduce_sum,
    all_true,
    seed_everything,
)
from free_dist.ds_config import precision, rows_per_step
from free_dist.engines import DeepSpeedEngine, build_single_engine, sharded_loading, trained_weights
from free_dist.monitor import LOG, Monitor
from free_dist.training.checkpoint import Checkpoints, go_on, newest_sound
from free_dist.training.run_directory import CHECKPOINTS, is_evaluated
from free_dist.training.run_watch import RunWatch
from free_dist.training.runs import file_hash
from free_dist.training.schedule import warmup_cosine
from free_dist.training.stage1_result import save_backbone, save_trained
from free_dist.training.stage1_run import ADAPTER, BACKBONE
from free_dist.training.trained_parts import describe_parts, set_training_mode, train_parts
from free_dist.watchdog import Watchdog

__all__ = ["AnswerScores", "answer_loss", "augment_images", "finetune", "save_backbone", "teacher_forced_accuracy"]

MAX_SHIFT = 6
"""Largest random translation of an image, in pixels."""

EVALUATED = 640
"""Samples of the calibration split that an evaluation takes per task."""

MODEL = "backbone.model."
"""What the engine puts before the names of the model's own parameters."""


class AnswerScores(nn.Module):
    """A backbone with its loss: everything that reads weights happens in one forward, as sharding wants."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        pixel_values: Tensor,
        image_index: Tensor,
        input_ids: Tensor,
        targets: Tensor,
        decoder_ids: Tensor | None = None,
        instruction: Instruction | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A batch -> (cross entropy summed over its N answer tokens, scalar; whether every answer token of a row is the most
        likely one given the true answer so far, bool [B])."""
        features = self.backbone(
            pixel_values, image_index, input_ids, (), decoder_ids=decoder_ids, instruction=instruction
        ).final
        kept = targets != IGNORE
        logits = self.backbone.lm_head(features[kept]).float()
        hit = torch.ones_like(kept)
        hit[kept] = logits.argmax(-1) == targets[kept]
        return F.cross_entropy(logits, targets[kept], reduction="sum"), hit.all(-1)


def answer_loss(backbone: Backbone, batch: Batch) -> Tensor:
    """Mean cross entropy of the targets of a batch, over answer tokens only; scalar."""
    return AnswerScores(backbone)(**batch.inputs(), targets=batch.targets)[0] / answer_tokens(batch)


def answer_tokens(batch: Batch) -> Tensor:
    """Number of targets in a batch, scalar."""
    return (batch.targets != IGNORE).sum()


@torch.no_grad()
def teacher_forced_accuracy(backbone: Backbone, batches: Iterable[Batch]) -> float:
    """Share of rows whose every answer token is the most likely one given the true answer so far."""
    scores = AnswerScores(backbone)
    hits = torch.cat([scores(**batch.inputs(), targets=batch.targets)[1] for batch in batches])
    return hits.float().mean().item()


def augment_images(images: Tensor, rng: random.Random) -> Tensor:
    """Mirror and shift images [I, 3, height, width] at random, replicating the border."""
    moved = []
    for image in images:
        flipped = image.flip(-1) if rng.random() < 0.5 else image
        dy, dx = rng.randint(-MAX_SHIFT, MAX_SHIFT), rng.randint(-MAX_SHIFT, MAX_SHIFT)
        padded = F.pad(flipped[None], [MAX_SHIFT] * 4, mode="replicate")[0]
        height, width = image.shape[-2:]
        moved.append(padded[:, MAX_SHIFT + dy :, MAX_SHIFT + dx :][:, :height, :width])
    return torch.stack(moved)


def finetune(recipe: Recipe, section: dict[str, Any], start: Path, world: World, tell: Callable[[str], None]) -> Path:
    """Train the backbone in ``start`` as the recipe says, going on from ``run_dir``'s newest checkpoint if there is one.

    ``section`` comes from :func:`~free_dist.training.stage1_run.engine_section`; ``tell`` receives lines for the person who
    waits.  Returns the Hugging Face directory of the result, complete on rank 0.  Raises Interrupted after SIGINT, SIGTERM or
    SIGUSR1 to any rank, on all ranks, with a checkpoint written; RunFailed after too many skipped steps or for an alarm;
    UserError for a checkpoint that does not fit, or cannot be written.
    """
    run_dir, steps, settings = Path(recipe.run_dir), recipe.training.max_steps, recipe.finetune
    dtype = getattr(torch, precision(section))
    found = newest_sound(run_dir / CHECKPOINTS, world, tell)
    backbone, encoder = load_pretrained(
        str(start),
        dtype=dtype,
        attn_implementation=recipe.backbone.attn_implementation,
        allow_pickle=recipe.backbone.allow_pickle,
        sharding=sharded_loading(section),
    )
    use_visual_cache(recipe.data, backbone, encoder)
    # Loading draws random numbers, or none, as the ZeRO stage has it; the first LoRA factors are drawn after it.
    seed_everything(recipe.training.seed)
    train_parts(backbone.model, settings)
    tell(describe_parts(backbone.model))
    factor = warmup_cosine(warmup_steps=recipe.training.warmup_steps, max_steps=steps)
    engine = build_single_engine(AnswerScores(backbone), section, factor)
    checkpoints = Checkpoints(
        run_dir / CHECKPOINTS,
        {"backbone": engine},
        world=world,
        training=recipe.training,
        rows_per_step=rows_per_step({"exits": section}, world.size),
        tasks=recipe.data.tasks,
        backbone=_weights_hash(start, world),
        facts={"recipe": asdict(recipe), "ds_config": section},
    )
    done, samples = go_on(checkpoints, found, recipe, world, tell)
    batches = _remaining_steps(recipe, encoder, section, world, checkpoints.position(done))
    evaluated = _evaluated_samples(recipe, world) if settings.eval_every else {}
    set_training_mode(backbone.model)
    with (
        StopFlag(world.device) as stop,
        checkpoints,
        Watchdog.of(recipe, world) as watchdog,
        Monitor(run_dir, total_steps=steps, description="stage 1", done=done, enabled=world.is_main) as monitor,
    ):
        watch = RunWatch.of_backbone(recipe, engine, world, monitor)
        tokens = torch.zeros((), dtype=torch.long, device=world.device)
        is_complete = True
        if _is_owed(done, run_dir / LOG, recipe, world):
            is_complete = _evaluate(done, monitor, engine, encoder, evaluated, section, world, stop)
            if not is_complete:
                raise Interrupted(
                    f"stopped while evaluating step {done} of {steps}; the same command goes on from there"
                )
            set_training_mode(backbone.model)
        for step in range(done + 1, steps + 1):
            micro_batches = [batch.to(world.device) for batch in watch.next(batches)]
            samples.add(step, micro_batches)
            if settings.augment_images:
                rng = _random(recipe, "augment", step, world)
                micro_batches = [replace(b, pixel_values=augment_images(b.pixel_values, rng)) for b in micro_batches]
            torch.manual_seed(_random(recipe, "dropout", step, world).getrandbits(63))
            watch.saw(micro_batches)
            loss = _train_one_step(engine, micro_batches, dtype, world)
            watch.step_done(step)
            watchdog.beat(step)
            tokens += torch.stack([encoder.text_tokens(batch) for batch in micro_batches]).sum()
            monitor.advance(samples=sum(len(batch.keys) for batch in micro_batches) * world.size)
            measure = step == 1 or step % recipe.training.log_every == 0 or step == steps
            if measure:
                values = _scalars(engine, loss, micro_batches[0].task) | watch.measured()
                monitor.scalars(step, values, tokens=int(all_reduce_sum(tokens).item()))
                watch.look(step, values, last=step == steps)
                tokens.zero_()
            if _is_evaluation_due(step, recipe):
                is_complete = _evaluate(step, monitor, engine, encoder, evaluated, section, world, stop)
                set_training_mode(backbone.model)
            stopped = stop.agreed() or watch.stopped
            last = stopped or step == steps
            if measure or checkpoints.is_due(step, last=last):
                samples.write()
            checkpoints.after_step(step, loss, last=last)
            watch.raise_if_stopped(run_dir / CHECKPOINTS)
            if stopped and (step < steps or not is_complete):
                raise Interrupted(f"stopped after step {step} of {steps}; the same command goes on from there")
    return _write_result(recipe, engine, start, world)


def _train_one_step(engine: DeepSpeedEngine, batches: list[Batch], dtype: torch.dtype, world: World) -> Tensor:
    """One optimizer step on this rank's micro-batches; returns the mean loss over all ranks' answer tokens, scalar.

    The mean is over the tokens of the whole step, however these are spread over ranks and micro-batches.
    """
    tokens = all_reduce_sum(torch.stack([answer_tokens(batch) for batch in batches]).sum().float())
    total = torch.zeros((), device=world.device)
    for batch in batches:
        summed, _ = engine(**_arguments(batch, dtype))
        # The engine divides by the number of micro-batches and of ranks.
        loss = summed * (len(batches) * world.size / tokens)
        engine.backward(loss)
        total += summed.detach() / tokens
        # Skips on all ranks where the norm of the gradients, which is over all of them, is not finite.
        engine.step()
    return all_reduce_sum(total)


def _arguments(batch: Batch, dtype: torch.dtype) -> dict[str, Any]:
    return batch.inputs() | {"pixel_values": batch.pixel_values.to(dtype), "targets": batch.targets}


def _remaining_steps(
    recipe: Recipe, encoder: SampleEncoder, section: dict[str, Any], world: World, start: StreamState
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of every optimizer step from ``start`` on, found by seeking: nothing is read again."""
    size, accumulation = section["train_micro_batch_size_per_gpu"], section.get("gradient_accumulation_steps", 1)
    batches = training_batches(
        recipe.data,
        encoder,
        seed=recipe.training.seed,
        micro_batch_size=size,
        gradient_accumulation_steps=accumulation,
        rank=world.rank,
        world_size=world.size,
        start=start,
        quarantine=Path(recipe.run_dir) / QUARANTINE,
        agreed=all_equal,
    )
    while True:
        yield list(itertools.islice(batches, accumulation))


def _evaluated_samples(recipe: Recipe, world: World) -> dict[str, list[Sample]]:
    """Task -> this rank's calibration samples, equally many on every rank: a sharded model must run equally often."""
    shares = {}
    for task in (task for task, weight in recipe.data.tasks.items() if weight > 0):
        samples = split_samples(recipe.data, "calibration", task, max_samples=EVALUATED)
        each = len(samples) // world.size
        shares[task] = samples[world.rank * each : (world.rank + 1) * each] if each else samples
    return shares


def _is_evaluation_due(step: int, recipe: Recipe) -> bool:
    every = recipe.finetune.eval_every
    return bool(every) and (step % every == 0 or step == recipe.training.max_steps)


def _is_owed(done: int, log: Path, recipe: Recipe, world: World) -> bool:
    """Whether the evaluation after the last step of a former run was cut off; as rank 0's log has it."""
    if done == 0 or not _is_evaluation_due(done, recipe):
        return False
    return not all_true(not world.is_main or is_evaluated(log, done), world.device)


@torch.no_grad()
def _evaluate(
    step: int,
    monitor: Monitor,
    engine: DeepSpeedEngine,
    encoder: SampleEncoder,
    evaluated: dict[str, list[Sample]],
    section: dict[str, Any],
    world: World,
    stop: StopFlag,
) -> bool:
    """Log loss per answer token and share of wholly right rows, per task, given the true answer so far; in evaluation mode.

    Returns False, with nothing logged, where a rank was asked to stop meanwhile: an evaluation takes longer than a step, and
    whoever goes on from here does it first.
    """
    engine.eval()
    size = section["train_micro_batch_size_per_gpu"]
    values: dict[str, float] = {}
    for task, samples in evaluated.items():
        counts = torch.zeros(4, dtype=torch.float64, device=world.device)
        for first in range(0, len(samples), size):
            if stop.agreed():
                engine.train()
                return False
            batch = encoder.collate(samples[first : first + size]).to(world.device)
            summed, hit = engine(**_arguments(batch, getattr(torch, precision(section))))
            counts += torch.stack([summed.double(), answer_tokens(batch), hit.sum(), torch.tensor(len(hit))])
        loss, tokens, hits, rows = all_reduce_sum(counts).tolist()
        values |= {f"calibration_loss_{task}": loss / tokens, f"calibration_accuracy_{task}": hits / rows}
    engine.train()
    monitor.scalars(step, values, tokens=0)
    return True


def _scalars(engine: DeepSpeedEngine, loss: Tensor, task: str) -> dict[str, float]:
    norm = engine.get_global_grad_norm()
    values = {"loss": loss.item(), f"loss_{task}": loss.item(), "learning_rate": engine.get_lr()[0]}
    return values if norm is None else values | {"grad_norm": float(norm)}


def _random(recipe: Recipe, purpose: str, step: int, world: World) -> random.Random:
    return random.Random(f"{recipe.training.seed}/{purpose}/{step}/{world.rank}")


def _weights_hash(start: Path, world: World) -> str:
    """Which weights stage 1 starts from: rank 0 reads them once more and tells the others."""
    known = ""
    if world.is_main:
        known = checkpoint_hash(start) if has_safetensors(start) else file_hash(start, "*.bin")
    return all_gather([known])[0][0]


def _write_result(recipe: Recipe, engine: DeepSpeedEngine, start: Path, world: World) -> Path:
    run_dir = Path(recipe.run_dir)
    weights = trained_weights(engine, keep=world.is_main)
    if world.is_main:
        save_trained(
            start,
            {name.removeprefix(MODEL): weight for name, weight in weights.items()},
            recipe.finetune,
            run_dir / BACKBONE,
            adapter=run_dir / ADAPTER if recipe.finetune.keep_adapter else None,
            allow_pickle=recipe.backbone.allow_pickle,
        )
    return run_dir / BACKBONE
