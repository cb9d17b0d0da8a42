"""How many parameters exits train, for every published backbone and kind of exit, counted on modules without weights.

Saving is against independent exit classifiers, as FREE counts (arXiv 2506.06884): a trainable vocabulary head, V x D, at every
exit.  Nothing is estimated: the modules that training would build are built on the meta device and their parameters counted.
Does not know speed, memory or quality.

Shape letters: K exits, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from free_dist.backbones.decoders import TextDecoder, text_decoder
from free_dist.backbones.published import PUBLISHED_BACKBONES, meta_language_model, n_language_blocks
from free_dist.config import EXIT_VARIANTS
from free_dist.exits import ExitVariant, FeatureClassifiers
from free_dist.exits.variants import new_exit_transformer

PAPER_BACKBONE = "blip2-opt-2.7b"
PAPER_CLASSIFIER = 130e6
"""Parameters of one exit classifier of OPT-2.7B, as the paper rounds them."""
PAPER_SAVING = 0.52
"""What the paper says its exits save there."""


@dataclass(frozen=True, kw_only=True)
class ExitCount:
    """Parameters of one exit of one kind on one backbone."""

    backbone: str
    variant: ExitVariant
    n_blocks: int
    """Decoder blocks of the backbone, L."""
    width: int
    """D."""
    block: int
    """Of one decoder block, which a ``full`` exit replicates (T5's first block has a position bias more)."""
    classifier: int
    """Of an independent exit classifier: a vocabulary head, V x D."""
    per_exit: int
    """Trained by one exit."""
    discriminator: int
    """Of the exit's feature classifier, which training alone needs."""

    @property
    def saving(self) -> float:
        """Share of the classifiers' parameters that these exits do not have; negative where they have more."""
        return 1 - self.per_exit / self.classifier

    def trained(self, n_exits: int, *, with_discriminators: bool = False) -> int:
        """By K exits together."""
        return n_exits * (self.per_exit + (self.discriminator if with_discriminators else 0))


def count_exit(backbone: str, variant: ExitVariant, *, discriminator_hidden_size: int = 256) -> ExitCount:
    """Counts of a published backbone; raises UserError for an unknown name or sizes that do not fit."""
    decoder = _decoder(backbone)
    # Of two blocks the second is taken: T5's first owns the position bias of all.
    block = decoder.blocks[1]
    vocab_size, width = _linear(decoder.lm_head).weight.shape
    exit_transformer = new_exit_transformer(variant, block, decoder.block_call, width, decoder.lm_head)
    with torch.device("meta"):
        discriminator = FeatureClassifiers(1, width, discriminator_hidden_size)
    return ExitCount(
        backbone=backbone,
        variant=variant.sized(width),
        n_blocks=n_language_blocks(backbone),
        width=width,
        block=n_parameters(block),
        classifier=vocab_size * width,
        per_exit=n_parameters(exit_transformer, trained_only=True),
        discriminator=n_parameters(discriminator),
    )


def parameter_table(
    backbones: Iterable[str] = PUBLISHED_BACKBONES,
    *,
    rank: int = ExitVariant.rank,
    bottleneck_size: int | None = None,
    discriminator_hidden_size: int = 256,
) -> list[ExitCount]:
    """Every kind of exit on every backbone, backbone by backbone; see :func:`count_exit` for what is raised."""
    return [
        count_exit(
            backbone,
            ExitVariant(name=name, rank=rank, bottleneck_size=bottleneck_size),
            discriminator_hidden_size=discriminator_hidden_size,
        )
        for backbone in backbones
        for name in EXIT_VARIANTS
    ]


def as_json(counts: Sequence[ExitCount]) -> dict[str, dict[str, dict[str, float]]]:
    """{backbone: {variant: {"per_exit": N, "saving_vs_classifiers": share}}}."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for count in counts:
        numbers = {"per_exit": count.per_exit, "saving_vs_classifiers": round(count.saving, 4)}
        table.setdefault(count.backbone, {})[count.variant.name] = numbers
    return table


def variants_that_save(counts: Sequence[ExitCount], share: float = PAPER_SAVING) -> dict[str, float]:
    """Kinds of exits that save at least ``share`` on every backbone counted -> the least that they save on any."""
    least: dict[str, float] = {}
    for count in counts:
        least[count.variant.name] = min(count.saving, least.get(count.variant.name, 1.0))
    return {name: saving for name, saving in least.items() if saving >= share}


def paper_claim() -> dict[str, int]:
    """Parameters of what the paper's saving on OPT-2.7B may have counted, by description.

    A replica of a block is what the paper describes.  The authors' code builds its exits of ``torch.nn.TransformerDecoderLayer``,
    which has cross-attention, unlike OPT's blocks; the inner width of that class is 2048 unless one is given, there 2560.
    """
    count = count_exit(PAPER_BACKBONE, ExitVariant())
    block = _decoder(PAPER_BACKBONE).blocks[1]
    with torch.device("meta"):
        layers = {inner: nn.TransformerDecoderLayer(count.width, 8, inner) for inner in (2048, count.width)}
    return {
        "a replica of a block": count.per_exit,
        "its attention alone": n_parameters(block.get_submodule("self_attn")),
        "its feed-forward maps alone": sum(n_parameters(block.get_submodule(name)) for name in ("fc1", "fc2")),
        "torch.nn.TransformerDecoderLayer, inner width 2048 (its default)": n_parameters(layers[2048]),
        "torch.nn.TransformerDecoderLayer, inner width 2560 (the authors' code)": n_parameters(layers[count.width]),
    }


@cache
def _decoder(backbone: str) -> TextDecoder:
    """Two blocks deep: what is counted is in a block and in the head."""
    return text_decoder(meta_language_model(backbone, n_blocks=2))


def _linear(head: nn.Module) -> nn.Linear:
    assert isinstance(head, nn.Linear)
    return head


def n_parameters(module: nn.Module, *, trained_only: bool = False) -> int:
    """Parameters of a module, shared ones once."""
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad or not trained_only)
