"""Stage 1: train the backbone itself on the answers of the task data, then save it as a Hugging Face directory.

Plain PyTorch in a single process; does not know ranks, exits, discriminators or DeepSpeed.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from free_dist.backbones import Blip2Backbone
from free_dist.config import Recipe
from free_dist.data.samples import IGNORE, Batch, SampleEncoder
from free_dist.data.stream import split_samples, training_batches
from free_dist.training.schedule import warmup_cosine

MAX_SHIFT = 6
"""Largest random translation of an image, in pixels."""


def answer_loss(backbone: Blip2Backbone, batch: Batch) -> Tensor:
    """Mean cross entropy of the targets of a batch, over answer tokens only; scalar."""
    features = backbone(batch.pixel_values, batch.image_index, batch.input_ids, ()).final
    kept = batch.targets != IGNORE
    return F.cross_entropy(backbone.lm_head(features[kept]), batch.targets[kept])


@torch.no_grad()
def teacher_forced_accuracy(backbone: Blip2Backbone, batches: Iterator[Batch]) -> float:
    """Share of rows whose every answer token is the most likely one given the true answer so far."""
    right = rows = 0
    for batch in batches:
        features = backbone(batch.pixel_values, batch.image_index, batch.input_ids, ()).final
        kept = batch.targets != IGNORE
        hit = torch.ones_like(kept)
        hit[kept] = backbone.lm_head(features[kept]).argmax(-1) == batch.targets[kept]
        right += int(hit.all(-1).sum())
        rows += len(hit)
    return right / rows


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


def finetune(backbone: Blip2Backbone, encoder: SampleEncoder, recipe: Recipe) -> None:
    """Train ``backbone`` in place; logs to ``run_dir/log.jsonl`` and saves ``run_dir/backbone`` at every evaluation.

    Raises FloatingPointError when the loss is not finite.
    """
    settings = recipe.finetune
    steps, seed = recipe.training.max_steps, recipe.training.seed
    run_dir = Path(recipe.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    backbone.requires_grad_(True).train()
    matrices = [p for p in backbone.parameters() if p.ndim >= 2]
    others = [p for p in backbone.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
    factor = warmup_cosine(warmup_steps=recipe.training.warmup_steps, max_steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batches = training_batches(recipe.data, encoder, seed=seed, micro_batch_size=settings.batch_size)
    rng = random.Random(f"{seed}/augment/0")
    started = time.perf_counter()
    with open(run_dir / "log.jsonl", "w") as log:
        for step in tqdm(range(1, steps + 1), desc="stage 1", mininterval=1.0):
            batch = next(batches)
            batch = replace(batch, pixel_values=augment_images(batch.pixel_values, rng))
            loss = answer_loss(backbone, batch)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"stage 1: loss is {loss.item()} at step {step}: lower finetune.learning_rate")
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(backbone.parameters(), settings.grad_clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if step % recipe.training.log_every == 0 or step == 1:
                entry = {"step": step, "task": batch.task, "loss": loss.item(), "grad_norm": grad_norm.item()}
                entry |= {"lr": schedule.get_last_lr()[0], "seconds": round(time.perf_counter() - started, 1)}
                log.write(json.dumps(entry) + "\n")
                log.flush()
            if step % settings.eval_every == 0 or step == steps:
                backbone.eval()
                accuracy = teacher_forced_accuracy(backbone, _evaluation_batches(recipe, encoder))
                log.write(json.dumps({"step": step, "calibration_accuracy": accuracy}) + "\n")
                log.flush()
                save_backbone(backbone, encoder, run_dir / "backbone")
                backbone.train()
    backbone.requires_grad_(False).eval()


def save_backbone(backbone: Blip2Backbone, encoder: SampleEncoder, directory: Path) -> None:
    """Write model, tokenizer and image processor as one Hugging Face directory, in place of what ``directory`` held.

    Written beside it and swapped in by renaming: whoever is interrupted finds a whole checkpoint, at worst the former one
    under ``NAME.old``.
    """
    written, former = (directory.with_name(f"{directory.name}.{suffix}") for suffix in ("tmp", "old"))
    shutil.rmtree(written, ignore_errors=True)
    backbone.model.save_pretrained(written)
    encoder.tokenizer.save_pretrained(written)
    encoder.image_processor.save_pretrained(written)
    if directory.exists():
        shutil.rmtree(former, ignore_errors=True)
        directory.rename(former)
    written.rename(directory)
    shutil.rmtree(former, ignore_errors=True)


def _evaluation_batches(recipe: Recipe, encoder: SampleEncoder, batch_size: int = 64) -> Iterator[Batch]:
    samples = split_samples(recipe.data, "calibration", "vqa", max_samples=640)
    for first in range(0, len(samples), batch_size):
        yield encoder.collate(samples[first : first + batch_size])
