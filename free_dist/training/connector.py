"""Before stage 1, for a language model that has never seen an image: Q-Former and projection learn to say words.

Each query's projection is pulled towards the embedding of some word that belongs to the image, so that the language model
finds, where the image stands, something like words it knows.  Through the language model's blocks alone this takes far
longer: every step costs all blocks, and answers can be guessed from questions.  Reads embeddings and no block.
Does not know questions.

Shape letters: I images, Q query tokens, D width of the language model, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from free_dist.backbones import Blip2Backbone
from free_dist.config import Recipe, UserError
from free_dist.data.records import Record
from free_dist.data.samples import SampleEncoder
from free_dist.data.stream import records
from free_dist.training.pretraining import distinctive, labelled_images, train_alone
from free_dist.training.vision import given_answers

SHARPNESS = 20.0
"""Cosines between a projection and embeddings are multiplied by it before the softmax."""

BEST = 4.0
"""Power of the mean over queries that stands for the best of them."""

OTHER_WORDS = 4096
"""Embeddings, drawn once, that a query must tell from those of its image's words."""

WORD = re.compile(r"[a-z]{3,}")
"""What counts as a word of a caption."""

SIZE_WEIGHT = 1.0
"""Weight of the term that keeps a projection as long as an embedding is on average."""


def pretrain_connector(backbone: Blip2Backbone, encoder: SampleEncoder, recipe: Recipe, *, steps: int) -> float:
    """Train Q-Former and projection in place for ``steps`` steps of ``finetune.batch_size`` images; returns the last loss.

    An image's words are its answers or, where nothing was asked, the words of its captions, as far as fewer than half of the
    images have them.  Raises UserError when no word tells one image from another.
    """
    settings, seed = recipe.finetune, recipe.training.seed
    tokens = word_tokens(encoder, records(recipe.data, "train"))
    model = backbone.model
    embedded = model.get_input_embeddings().weight.detach()
    others = torch.randperm(len(embedded), generator=torch.Generator().manual_seed(seed))[:OTHER_WORDS]
    rows = torch.cat((torch.tensor(sorted(set(tokens.values()))), others)).unique()
    place = {int(token): row for row, token in enumerate(rows.tolist())}
    trained = [model.query_tokens, *model.qformer.parameters(), *model.language_projection.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    known = {word: place[token] for word, token in tokens.items()}
    batches = labelled_images(encoder, recipe, "connector", lambda record: _words_present(record, known))

    def next_losses() -> dict[str, Tensor]:
        images, present = next(batches)
        return {
            "loss": word_loss(backbone.prefix_from_patches(backbone.encode_patches(images)), embedded[rows], present)
        }

    loss = train_alone(trained, next_losses, settings, steps=steps, description="connector")
    for parameter in trained:
        parameter.requires_grad_(False)
    return loss


def word_loss(prefix: Tensor, embedded: Tensor, present: Sequence[Sequence[int]]) -> Tensor:
    """How badly the queries of a prefix [I, Q, D] say the words ``present`` in each image, rows of ``embedded`` [V, D]; scalar.

    A query's word is the softmax of its cosines with all embeddings.  The loss of a word is minus the log of its probability
    in the query that says it best, nearly: a mean over queries would have all of them say the same mixture.
    """
    cosines = F.normalize(prefix, dim=-1) @ F.normalize(embedded, dim=-1).T
    logs = BEST * (SHARPNESS * cosines).log_softmax(-1)  # [I, Q, V]
    logs = (logs.logsumexp(1) - math.log(prefix.shape[1])) / BEST  # [I, V]
    said = torch.stack([-row[list(words)].mean() for row, words in zip(logs, present, strict=True)])
    size = (prefix.norm(dim=-1) / embedded.norm(dim=-1).mean()).log().square().mean()
    return said.mean() + SIZE_WEIGHT * size


def record_words(record: Record) -> set[str]:
    """The answers given of an image, or the words of its captions where nothing was asked; in lower case."""
    if record.questions:
        return {answer.lower() for answer in given_answers(record)}
    return {word for caption in record.captions for word in WORD.findall(caption.lower())}


def word_tokens(encoder: SampleEncoder, all_records: Iterable[Record]) -> dict[str, int]:
    """Words that fewer than half of the images have -> the first token of each, as it stands after a space.

    Raises UserError if there are none.
    """
    found = distinctive(record_words(record) for record in all_records)
    if not found:
        raise UserError("data.root: no word belongs to fewer than half of the images; set finetune.vision_steps=0")
    return {word: encoder.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in found}


def _words_present(record: Record, rows: dict[str, int]) -> list[int] | None:
    """The rows of an image's words, in the order of the words; None without any."""
    return [rows[word] for word in sorted(record_words(record) & rows.keys())] or None
