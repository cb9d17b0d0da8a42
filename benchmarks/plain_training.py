"""Adversarial training of exits as it is written down first: plain PyTorch, and one switch per thing that need not be computed.

What ``benchmarks/training.py`` measures against, and what the tests compare gradients with.  Without a switch: every row is
padded to one fixed length and brings its own image, the discriminators' turn and the exits' turn each run the backbone, exit
transformers and vocabulary head compute every position, and the loss ignores what is no answer.  It has what costs nothing to
have: the backbone runs without gradients and without its own head, the vision tower is the project's lean one, the
discriminators judge answers alone, and no engine keeps books.

Shape letters: B rows, T positions, N answer positions, K exits, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from free_dist.backbones import Backbone
from free_dist.backbones.base import BackboneFeatures
from free_dist.config import CostConfig
from free_dist.data.samples import IGNORE, Batch
from free_dist.exits import ExitBank, FeatureClassifiers
from free_dist.losses import cross_entropy_loss, discriminator_loss, generator_loss, head_parts
from free_dist.training.step import packing_of

ADVERSARIAL_WEIGHT = 0.1
CLIP = 1.0


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What is not computed, or not computed twice."""

    one_forward: bool = False
    """Both players learn from one forward pass of backbone and exits."""
    label_only_heads: bool = False
    """The head reads answer positions alone."""
    chunked_heads: bool = False
    """Logits of a part of the answers at a time: for memory, not for speed."""
    bucketing: bool = False
    """Rows of similar length stand together and are padded to the longest one."""
    image_once: bool = False
    """An image that several rows of a batch share goes through vision tower and Q-Former once."""
    visual_cache: bool = False
    """Batches bring vision features in the place of pixels."""
    drop_padding: bool = False
    share_prefix: bool = False
    answer_queries: bool = False
    """The last three: see ``CostConfig``."""


NEEDS = {
    "chunked_heads": ("label_only_heads",),
    "drop_padding": ("label_only_heads",),
    "share_prefix": ("label_only_heads", "image_once"),
    "answer_queries": ("label_only_heads",),
}
"""What else must be switched on, on both sides of a comparison."""

CHUNK = 64
"""Logits held at once with ``chunked_heads``: several parts in every batch here."""


class PlainTrainer:
    """Backbone, exits and discriminators with an AdamW each for the latter two."""

    def __init__(
        self,
        backbone: Backbone,
        bank: ExitBank,
        classifiers: FeatureClassifiers,
        *,
        fixed_length: int,
        savings: Savings | None = None,
    ) -> None:
        """``fixed_length``: what rows are padded to, at least the longest one."""
        self.backbone, self.bank, self.classifiers = backbone, bank, classifiers
        self.fixed_length = fixed_length
        self.savings = savings or Savings()
        self.cost = CostConfig(
            drop_padding=self.savings.drop_padding,
            share_prefix=self.savings.share_prefix,
            answer_queries=self.savings.answer_queries,
            head_chunk=CHUNK if self.savings.chunked_heads else 1 << 30,
        )
        self.exit_weights = [weight for weight in bank.parameters() if weight.requires_grad]
        self.optimizers = [
            torch.optim.AdamW(self.exit_weights, lr=7e-4, weight_decay=0.01),
            torch.optim.AdamW(classifiers.parameters(), lr=1.4e-3, betas=(0.5, 0.999), weight_decay=0.0),
        ]

    def prepared(self, batch: Batch) -> Batch:
        """A batch as it was collated (distinct images, rows as long as the longest) -> as this trainer wants it."""
        if not (self.savings.image_once or self.savings.share_prefix):
            pixels = batch.pixel_values[batch.image_index]
            batch = replace(batch, pixel_values=pixels, image_index=torch.arange(len(batch.image_index)))
        if not self.savings.bucketing:
            missing = self.fixed_length - batch.input_ids.shape[1]
            if missing < 0:
                raise ValueError(f"rows of {batch.input_ids.shape[1]} positions do not fit {self.fixed_length}")
            pad = self.backbone.layout.pad_token_id
            ids, targets = (
                F.pad(batch.input_ids, (0, missing), value=pad),
                F.pad(batch.targets, (0, missing), value=IGNORE),
            )
            batch = replace(batch, input_ids=ids, targets=targets)
        return batch

    def step(self, batch: Batch) -> None:
        """One optimizer step of each player on a prepared batch."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.backward(batch)
        torch.nn.utils.clip_grad_norm_(self.exit_weights, CLIP)
        torch.nn.utils.clip_grad_norm_(self.classifiers.parameters(), CLIP)
        for optimizer in self.optimizers:
            optimizer.step()

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradients of both players at the same weights; returns the losses (task and generator, discriminator), [K] each."""
        answers = batch.targets != IGNORE
        features = self._features(batch, answers)
        with torch.set_grad_enabled(self.savings.one_forward):
            states = self._exit_features(features, answers)
        final = self._at_answers(features.final, answers)
        judged = self._at_answers(states, answers).detach()
        discriminator = discriminator_loss(self.classifiers(final.expand_as(judged)), self.classifiers(judged))
        discriminator.sum().backward()

        if not self.savings.one_forward:
            states = self._exit_features(self._features(batch, answers), answers)
        self.classifiers.requires_grad_(False)
        generator = generator_loss(self.classifiers(self._at_answers(states, answers)))
        loss = self._task_loss(states, batch.targets, answers) + ADVERSARIAL_WEIGHT * generator
        loss.sum().backward()
        self.classifiers.requires_grad_(True)
        return loss.detach(), discriminator.detach()

    @torch.no_grad()
    def _features(self, batch: Batch, answers: Tensor) -> BackboneFeatures:
        features: BackboneFeatures = self.backbone(
            **batch.inputs(), exit_layers=self.bank.exit_layers, packing=packing_of(self.cost, answers)
        )
        return features

    def _exit_features(self, features: BackboneFeatures, answers: Tensor) -> Tensor:
        """[K, B, T, D], or of packed rows [K, N, D]."""
        states: Tensor = self.bank(features.exits, memory=features.memory, span=features.span)
        return states

    def _at_answers(self, features: Tensor, answers: Tensor) -> Tensor:
        return features if self.cost.packs else features[..., answers, :]

    def _task_loss(self, states: Tensor, targets: Tensor, answers: Tensor) -> Tensor:
        if self.savings.label_only_heads:
            features = self._at_answers(states, answers)
            parts = head_parts(features.shape[0] * features.shape[1], self.cost.head_chunk)
            return cross_entropy_loss(self.bank, features, targets[answers], parts=parts)
        losses = [
            F.cross_entropy(self.bank.logits(state).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
            for state in states
        ]
        return torch.stack(losses)
