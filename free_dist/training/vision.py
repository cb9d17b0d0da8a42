"""Before stage 1, for a visual path that has seen nothing: learn which answers belong to an image.

Published BLIP-2 models start from a pretrained vision tower and train the Q-Former without the language model first.  The
embedded one has nothing to start from, and through a language model that ignores the image the visual path learns colours but
not shapes.  Knows images and answers; does not know questions, tokens or the language model.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from free_dist.backbones import Blip2Backbone
from free_dist.config import Recipe, UserError
from free_dist.data.records import Record
from free_dist.data.samples import SampleEncoder
from free_dist.data.stream import records
from free_dist.training.finetune import augment_images
from free_dist.training.schedule import warmup_cosine

POSTFIX_EVERY = 10
"""Steps between two updates of the losses shown beside the progress bar."""


def pretrain_vision(backbone: Blip2Backbone, encoder: SampleEncoder, recipe: Recipe, *, steps: int) -> float:
    """Train vision tower, Q-Former and projection in place for ``steps`` steps of ``finetune.batch_size`` images.

    Two linear classifiers, thrown away afterwards, predict the image's answers, all equally likely: one from the mean patch
    feature, because the Q-Former alone passes on colours and never gets to shapes, one from the visual prefix.  The loss is
    the sum of their cross entropies.  Returns the last loss.  Raises UserError when no answer tells one image from another.
    """
    settings, seed = recipe.finetune, recipe.training.seed
    labels = distinctive_answers(records(recipe.data, "train"))
    torch.manual_seed(seed)
    from_patches = nn.Linear(backbone.model.config.vision_config.hidden_size, len(labels))
    from_prefix = nn.Linear(backbone.layout.num_query_tokens * backbone.hidden_size, len(labels))
    language_model = {id(parameter) for parameter in backbone.model.language_model.parameters()}
    visual = [parameter for parameter in backbone.parameters() if id(parameter) not in language_model]
    parameters = [*visual, *from_patches.parameters(), *from_prefix.parameters()]
    for parameter in visual:
        parameter.requires_grad_(True)
    backbone.train()
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    factor = warmup_cosine(warmup_steps=max(1, steps // 10), max_steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batches = _labelled_images(encoder, recipe, labels)
    rng = random.Random(f"{seed}/vision/augment")
    progress = tqdm(range(steps), desc="vision", mininterval=1.0)
    for step in progress:
        images, targets = next(batches)
        patches = backbone.model.vision_model(pixel_values=augment_images(images, rng)).last_hidden_state
        prefix = backbone.prefix_from_patches(patches)
        patch_loss = F.cross_entropy(from_patches(patches.mean(1)), targets)
        prefix_loss = F.cross_entropy(from_prefix(prefix.flatten(1)), targets)
        loss = patch_loss + prefix_loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % POSTFIX_EVERY == 0:
            progress.set_postfix(patches=f"{patch_loss.item():.3f}", prefix=f"{prefix_loss.item():.3f}", refresh=False)
    backbone.eval()
    return loss.item()


def distinctive_answers(all_records: Iterable[Record]) -> list[str]:
    """Answers given for fewer than half of the images, sorted: the others (yes, no) tell nothing about an image."""
    images = 0
    counts: Counter[str] = Counter()
    for record in all_records:
        images += 1
        counts.update({answer for question in record.questions for answer in question.answers})
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
        for record in records(recipe.data, "train", shuffle=shuffle):
            answers = {answer for question in record.questions for answer in question.answers}
            target = torch.tensor([float(label in answers) for label in labels])
            if target.any():
                images.append(encoder.encode_image(record.image))
                targets.append(target / target.sum())
            if len(images) == recipe.finetune.batch_size:
                yield torch.stack(images), torch.stack(targets)
                images, targets = [], []
        epoch += 1
