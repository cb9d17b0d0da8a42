"""Before stage 1, for a vision tower that has seen nothing: learn which answers belong to an image.

Published BLIP-2 models start from a pretrained vision tower; the embedded one has none to start from, and through a language
model that ignores the image a fresh tower learns colours but not shapes.  Knows images and answers; does not know questions,
tokens, the Q-Former or the language model.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from free_dist.backbones import Blip2Backbone
from free_dist.config import Recipe, UserError
from free_dist.data.samples import Record, SampleEncoder
from free_dist.data.stream import records
from free_dist.training.finetune import augment_images
from free_dist.training.schedule import warmup_cosine


def pretrain_vision(backbone: Blip2Backbone, encoder: SampleEncoder, recipe: Recipe, *, steps: int) -> float:
    """Train the vision tower in place for ``steps`` steps of ``finetune.batch_size`` images.

    The loss is the cross entropy of a linear classifier on the mean patch feature to the image's answers, all equally likely;
    the classifier is thrown away.  Returns the last loss.  Raises UserError when no answer tells one image from another.
    """
    settings, seed = recipe.finetune, recipe.training.seed
    labels = distinctive_answers(records(Path(recipe.data.root), "train"))
    vision = backbone.model.vision_model.requires_grad_(True).train()
    torch.manual_seed(seed)
    classifier = nn.Linear(backbone.model.config.vision_config.hidden_size, len(labels))
    parameters = [*vision.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    factor = warmup_cosine(warmup_steps=max(1, steps // 10), max_steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batches = _labelled_images(encoder, recipe, labels)
    rng = random.Random(f"{seed}/vision/augment")
    progress = tqdm(range(steps), desc="vision", mininterval=1.0)
    for _ in progress:
        images, targets = next(batches)
        logits = classifier(vision(pixel_values=augment_images(images, rng)).last_hidden_state.mean(1))
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    vision.eval()
    return loss.item()


def distinctive_answers(all_records: Iterator[Record]) -> list[str]:
    """Answers given for fewer than half of the images, sorted: the others (yes, no) tell nothing about an image."""
    images = 0
    counts: Counter[str] = Counter()
    for record in all_records:
        images += 1
        counts.update({answer for _, answer in record.questions})
    found = sorted(answer for answer, count in counts.items() if count < images / 2)
    if not found:
        raise UserError("data.root: no answer is given for fewer than half of the images; set finetune.vision_steps=0")
    return found


def _labelled_images(encoder: SampleEncoder, recipe: Recipe, labels: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: pixels [B, 3, height, width] and target distributions [B, labels]."""
    images: list[Tensor] = []
    targets: list[Tensor] = []
    epoch = 0
    while True:
        shuffle = (f"{recipe.training.seed}/vision/{epoch}", recipe.data.shuffle_buffer)
        for record in records(Path(recipe.data.root), "train", shuffle=shuffle):
            answers = {answer for _, answer in record.questions}
            target = torch.tensor([float(label in answers) for label in labels])
            if target.any():
                images.append(encoder.encode_image(record.image))
                targets.append(target / target.sum())
            if len(images) == recipe.finetune.batch_size:
                yield torch.stack(images), torch.stack(targets)
                images, targets = [], []
        epoch += 1
