"""Per-block accuracy under teacher forcing: the mid-crisis picture (FREE, figure 3).

Reads every block through the frozen final norm and head alone (the logit lens: exits without exit transformers), and
the exit layers through given exit banks.  Scored on the answer's own tokens; the end-of-answer token is left out,
because guessing it is easy and would flatter every curve.  Runs batched, in one forward per batch; knows no decoding,
thresholds or clocks.

Shape letters: B batch, T positions, N scored positions, L blocks, K exits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from free_dist.backbones import Backbone, BackboneFeatures
from free_dist.config import Recipe
from free_dist.data.samples import IGNORE, Batch, SampleEncoder
from free_dist.data.stream import nothing_for_task, split_samples
from free_dist.evaluation.evaluate import Gather, alone
from free_dist.evaluation.tasks import find_task
from free_dist.exits import ExitBank

LENS = "no exit transformer"
"""Name of the curve read through final norm and head alone, over all blocks."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Counts of one way of reading the blocks; lists are parallel."""

    layers: tuple[int, ...]
    """Blocks read, 1-based; the last block read by the lens is the model itself."""
    right: tuple[int, ...]
    """Tokens predicted correctly, of ``Probe.tokens``."""
    agreeing: tuple[int, ...]
    """Tokens on which the final layer makes the same prediction."""

    def __add__(self, other: Curve) -> Curve:
        assert self.layers == other.layers
        right = tuple(a + b for a, b in zip(self.right, other.right, strict=True))
        return replace(
            self, right=right, agreeing=tuple(a + b for a, b in zip(self.agreeing, other.agreeing, strict=True))
        )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """All curves of one task."""

    task: str
    tokens: int
    """Scored tokens."""
    curves: dict[str, Curve]
    """``LENS`` and one entry per bank."""

    def __add__(self, other: Probe) -> Probe:
        assert (self.task, self.curves.keys()) == (other.task, other.curves.keys())
        curves = {name: curve + other.curves[name] for name, curve in self.curves.items()}
        return replace(self, tokens=self.tokens + other.tokens, curves=curves)

    def accuracy(self, name: str) -> dict[int, float]:
        """Block -> share of tokens predicted correctly."""
        curve = self.curves[name]
        return {k: right / self.tokens for k, right in zip(curve.layers, curve.right, strict=True)}

    def agreement(self, name: str) -> dict[int, float]:
        """Block -> share of tokens on which the final layer makes the same prediction."""
        curve = self.curves[name]
        return {k: same / self.tokens for k, same in zip(curve.layers, curve.agreeing, strict=True)}

    def to_json(self) -> dict[str, object]:
        """Accuracies and agreements, for a JSON file."""
        curves = {name: {"accuracy": self.accuracy(name), "agreement": self.agreement(name)} for name in self.curves}
        return {"task": self.task, "tokens": self.tokens, "curves": curves}


def scored_positions(backbone: Backbone, batch: Batch) -> Tensor:
    """[B, T], the positions that are scored: those of the answers' own tokens."""
    return (batch.targets != IGNORE) & (batch.targets != backbone.layout.eos_token_id)


def all_blocks(backbone: Backbone, batch: Batch) -> BackboneFeatures:
    """One forward with the hidden states after every block."""
    return backbone(**batch.inputs(), exit_layers=range(1, backbone.n_blocks + 1))


def lens_tokens(backbone: Backbone, features: BackboneFeatures, kept: Tensor) -> Tensor:
    """Every block read through final norm and head alone -> tokens [L, N] at the positions ``kept`` [B, T]."""
    # One block at a time: the logits of all L at once would be the largest tensor by far.
    return torch.stack([backbone.lm_head(backbone.final_norm(h[kept])).argmax(-1) for h in features.exits])


def bank_tokens(bank: ExitBank, features: BackboneFeatures, kept: Tensor) -> Tensor:
    """What the exits of a bank name, [K, N]; ``features`` has the states after all blocks."""
    taps = [features.exits[k - 1] for k in bank.exit_layers]
    exits = bank(taps, kept, memory=features.memory, span=features.span)
    return torch.stack([bank.logits_of(index, one).argmax(-1) for index, one in enumerate(exits)])


@torch.inference_mode()
def probe_batch(backbone: Backbone, banks: Mapping[str, ExitBank], batch: Batch) -> Probe:
    """Curves of one batch; one forward of the backbone and one of each bank."""
    features, kept = all_blocks(backbone, batch), scored_positions(backbone, batch)
    targets = batch.targets[kept]
    final = backbone.lm_head(features.final[kept]).argmax(-1)

    def curve(layers: Sequence[int], predicted: Tensor) -> Curve:
        right, agreeing = (predicted == targets).sum(-1), (predicted == final).sum(-1)
        return Curve(layers=tuple(layers), right=tuple(right.tolist()), agreeing=tuple(agreeing.tolist()))

    curves = {LENS: curve(range(1, backbone.n_blocks + 1), lens_tokens(backbone, features, kept))}
    for name, bank in banks.items():
        curves[name] = curve(bank.exit_layers, bank_tokens(bank, features, kept))
    return Probe(task=batch.task, tokens=len(targets), curves=curves)


def probe_exits(
    backbone: Backbone,
    encoder: SampleEncoder,
    banks: Mapping[str, ExitBank],
    recipe: Recipe,
    *,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather[Probe] = alone,
    quiet: bool = False,
) -> list[Probe]:
    """One Probe per task of ``recipe.evaluation``, over at most ``evaluation.max_samples`` rows of its split.

    ``banks``: curve name -> exits, such as ``{"CE": a, "CE + GAN": b}``.  Every rank returns the same probes.
    """
    device = next(backbone.parameters()).device
    settings = recipe.evaluation
    for name in settings.tasks:
        find_task(name)
    probes = []
    for name in settings.tasks:
        samples = split_samples(
            recipe.data, settings.split, name, max_samples=settings.max_samples, rank=rank, world_size=world_size
        )
        starts = range(0, len(samples), batch_size)
        found = []
        for first in tqdm(starts, desc=f"probe {name}", unit="batch", disable=quiet or rank != 0, mininterval=1.0):
            batch = encoder.collate(samples[first : first + batch_size]).to(device)
            found.append(probe_batch(backbone, banks, batch))
        merged = [probe for part in gather(found) for probe in part]
        if not merged:
            raise nothing_for_task(recipe.data, settings.split, name)
        total = merged[0]
        for probe in merged[1:]:
            total = total + probe
        probes.append(total)
    return probes
