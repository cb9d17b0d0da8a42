"""Before stage 1, for a visual path that has seen nothing: learn which answers belong to an image.

Published BLIP-2 models start from a pretrained vision tower and train the Q-Former without the language model first.  The
embedded one has nothing to start from, and through a language model that ignores the image the visual path learns colours but
not shapes.  Knows images and answers; does not know questions, tokens or the language model.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from free_dist.backbones import Blip2Backbone
from free_dist.config import Recipe, UserError
from free_dist.data.records import Record
from free_dist.data.samples import SampleEncoder
from free_dist.data.stream import records
from free_dist.training.finetune import augment_images
from free_dist.training.pretraining import distinctive, labelled_images, train_alone


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
    batches = labelled_images(encoder, recipe, "vision", lambda record: _target(record, labels))
    rng = random.Random(f"{seed}/vision/augment")

    def next_losses() -> dict[str, Tensor]:
        images, shares = next(batches)
        targets = torch.stack(shares)
        patches = backbone.model.vision_model(pixel_values=augment_images(images, rng)).last_hidden_state
        prefix = backbone.prefix_from_patches(patches)
        return {
            "patches": F.cross_entropy(from_patches(patches.mean(1)), targets),
            "prefix": F.cross_entropy(from_prefix(prefix.flatten(1)), targets),
        }

    loss = train_alone(parameters, next_losses, settings, steps=steps, description="vision")
    backbone.eval()
    return loss


def distinctive_answers(all_records: Iterable[Record]) -> list[str]:
    """Answers given for fewer than half of the images, sorted: the others (yes, no) tell nothing about an image."""
    found = distinctive(given_answers(record) for record in all_records)
    if not found:
        raise UserError("data.root: no answer is given for fewer than half of the images; set finetune.vision_steps=0")
    return found


def given_answers(record: Record) -> set[str]:
    """Every answer that somebody gave to some question about the image."""
    return {answer for question in record.questions for answer in question.answers}


def _target(record: Record, labels: list[str]) -> Tensor | None:
    """Target distribution [labels] of an image, all its answers equally likely; None without any."""
    answers = given_answers(record)
    target = torch.tensor([float(label in answers) for label in labels])
    return target / target.sum() if target.any() else None
