"""Training a small BLIP captioner and filter on a data set's captions, for data that the published ones never saw.

    vision tower of a backbone, frozen -> captioner (language model loss), filter (image-text matching loss): two directories

BLIP (arXiv 2201.12086) fine-tunes its captioner and filter each alone on these losses; here the captioner's text tower begins
untrained, the filter's as the captioner's ended, and negatives of the filter are captions of any other image.  A BLIP-2's vision
tower has the shape of a BLIP's, weight by weight.  Knows records and transformers' BLIP; does not know shards, nor what CapFilt
writes.

Shape letters: B batch, P image patches, D width, T positions, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertTokenizerFast,
    Blip2VisionModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    InstructBlipVisionModel,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)

from free_dist.atomic import replaced_directory
from free_dist.config import UserError
from free_dist.data.images import decode_image
from free_dist.data.lavis_text import caption_text
from free_dist.data.quarantine import BadSample
from free_dist.data.records import Record

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MODELS = ("captioner", "filter")
"""Directories that are written."""
OWN = ("[DEC]", "[ENC]")
"""What BLIP opens texts with that are written and judged; they have rows in the model but no name in its tokenizer."""
MAX_LENGTH = 35
"""Tokens of a text; more is cut off."""
POSITIONS = 512
"""Longest text that either model could be given."""
MEMORY = 2**30
"""Bytes of what the vision tower saw that are kept."""


@dataclass(frozen=True, kw_only=True)
class BlipTraining:
    """Sizes and schedule of both models."""

    prompt: str = "a picture of "
    """Begins every text that the captioner learns to write; :class:`~free_dist.data.capfilt.CapFiltSettings` must name it too."""
    layers: int = 2
    """Blocks of a text tower, whose width is the vision tower's."""
    steps: int = 600
    """Optimizer steps of each model."""
    batch_size: int = 32
    """Images per step; the filter sees each with a caption of its own and one of another image."""
    learning_rate: float = 1e-3
    """Its peak, after a tenth of the steps."""
    seed: int = 0


Progress = Callable[[Iterable[int], str], Iterable[int]]
"""Wraps the numbers of the steps to show how far a model is."""


def train_blip(
    records: Iterable[Record],
    vision: PreTrainedModel,
    processor: Any,
    directory: Path,
    settings: BlipTraining,
    *,
    progress: Progress = lambda steps, _: steps,
) -> None:
    """Write ``directory/captioner`` and ``directory/filter``, Hugging Face directories, each whole or not at all.

    ``vision``: a tower of BLIP-2's kind; ``processor``: what makes its pixels.  Raises UserError for another kind, and where
    no two captions differ.
    """
    if not isinstance(vision, Blip2VisionModel | InstructBlipVisionModel):
        raise UserError(f"a {type(vision).__name__} has not the shape of BLIP's vision tower: take a BLIP-2's")
    pictures, texts = _examples(records)
    known = sorted({word for own in texts for text in own for word in _words(text)})
    words = list(dict.fromkeys([*SPECIAL, *_words(settings.prompt), *known]))
    kinds = ((BlipForConditionalGeneration, _caption_loss), (BlipForImageTextRetrieval, _matching_loss))
    patches = _Patches(vision, processor, pictures)
    text: dict[str, Tensor] | None = None
    for name, (model_class, loss) in zip(MODELS, kinds, strict=True):
        torch.manual_seed(settings.seed)
        model = model_class(_config(settings, vision, len(words)))
        model.vision_model.load_state_dict(vision.state_dict())
        model.vision_model.requires_grad_(False)
        if text is not None:
            model.text_encoder.load_state_dict(text)
        with replaced_directory(directory / name) as unfinished:
            (unfinished / "vocab.txt").write_text("\n".join(words) + "\n")
            tokenizer = BertTokenizerFast(str(unfinished / "vocab.txt"), model_max_length=512)
            steps = progress(range(settings.steps), name)
            _train(model, loss, patches, texts, tokenizer, settings, steps)
            for part in (model, tokenizer, processor):
                part.save_pretrained(unfinished)
        text = model.text_decoder.bert.state_dict() if name == "captioner" else None


def _examples(records: Iterable[Record]) -> tuple[list[bytes], list[list[str]]]:
    pictures, texts = [], []
    for record in records:
        own = list(dict.fromkeys(record.captions))
        if own:
            try:
                decode_image(record.image)
            except BadSample:  # as whoever captions it skips it
                continue
            pictures.append(record.image)
            texts.append(own)
    if len({text for own in texts for text in own}) < 2:
        raise UserError(f"{len(texts)} images with captions, and no two different ones: BLIP cannot be trained on that")
    return pictures, texts


def _words(text: str) -> list[str]:
    """A text's words and signs as BERT's tokenizer tells them apart."""
    return [word for word, _ in BertPreTokenizer().pre_tokenize_str(BertNormalizer().normalize_str(text))]


def _config(settings: BlipTraining, vision: PreTrainedModel, words: int) -> BlipConfig:
    own = vision.config
    size = {"hidden_size": own.hidden_size, "intermediate_size": own.intermediate_size}
    text = size | {
        "num_hidden_layers": settings.layers, "num_attention_heads": own.num_attention_heads, "vocab_size": words + len(OWN),
        "bos_token_id": words, "sep_token_id": SPECIAL.index("[SEP]"), "eos_token_id": SPECIAL.index("[SEP]"),
        "pad_token_id": SPECIAL.index("[PAD]"), "encoder_hidden_size": own.hidden_size, "projection_dim": own.hidden_size,
        "max_position_embeddings": POSITIONS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    picture = size | {
        name: getattr(own, name)
        for name in (
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
            "hidden_act",
            "layer_norm_eps",
        )
    }
    return BlipConfig(
        text_config=text, vision_config=picture, projection_dim=own.hidden_size, image_text_hidden_size=own.hidden_size
    )


class _Patches:
    """What the frozen tower sees in a picture, computed once where memory allows."""

    def __init__(self, vision: Any, processor: Any, pictures: Sequence[bytes]) -> None:
        self._vision, self._processor, self._pictures = vision, processor, pictures
        self._known: dict[int, Tensor] = {}
        self._bytes = 0

    @torch.no_grad()
    def of(self, chosen: Sequence[int]) -> Tensor:
        """Numbers of B pictures -> [B, P, D]."""
        new = [i for i in dict.fromkeys(chosen) if i not in self._known]
        seen = dict(self._known)
        if new:
            images = [decode_image(self._pictures[i]) for i in new]
            pixels = self._processor(images, return_tensors="pt")["pixel_values"]
            seen |= dict(zip(new, self._vision(pixels).last_hidden_state, strict=True))
            size = sum(seen[i].nbytes for i in new)
            if self._bytes + size <= MEMORY:
                self._known, self._bytes = seen, self._bytes + size
        return torch.stack([seen[i] for i in chosen])


def _train(
    model: Any,
    loss: Callable[..., Tensor],
    patches: _Patches,
    texts: Sequence[Sequence[str]],
    tokenizer: Any,
    settings: BlipTraining,
    steps: Iterable[int],
) -> None:
    rng = random.Random(settings.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, settings.steps // 10), settings.steps)
    model.train()
    for _ in steps:
        chosen = rng.choices(range(len(texts)), k=settings.batch_size)
        value = loss(model, patches.of(chosen), [texts[i] for i in chosen], texts, tokenizer, settings, rng)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _caption_loss(
    model: Any, patches: Tensor, own: Sequence[Sequence[str]], _texts: Sequence[Sequence[str]], tokenizer: Any,
    settings: BlipTraining, rng: random.Random,
) -> Tensor:  # fmt: skip
    """Cross-entropy of a caption of each image, behind the prompt, which is given."""
    read = _read(tokenizer, [settings.prompt + rng.choice(choice) for choice in own])
    ids = read.input_ids.clone()
    ids[:, 0] = model.config.text_config.bos_token_id
    given = 1 + len(tokenizer.encode(settings.prompt, add_special_tokens=False))
    labels = ids.masked_fill(read.attention_mask == 0, -100)
    labels[:, :given] = -100
    logits = model.text_decoder(
        input_ids=ids, attention_mask=read.attention_mask, encoder_hidden_states=patches
    ).logits  # [B, T, V]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _matching_loss(
    model: Any, patches: Tensor, own: Sequence[Sequence[str]], texts: Sequence[Sequence[str]], tokenizer: Any,
    _settings: BlipTraining, rng: random.Random,
) -> Tensor:  # fmt: skip
    """Cross-entropy of "matches" for one caption of each image, and of "does not" for one of another."""
    right = [rng.choice(choice) for choice in own]
    wrong = [_other(choice, texts, rng) for choice in own]
    read = _read(tokenizer, [caption_text(text) for text in (*right, *wrong)])  # as the filter is given them
    ids = read.input_ids.clone()
    ids[:, 0] = model.config.text_config.bos_token_id + OWN.index("[ENC]")
    states = model.text_encoder(
        input_ids=ids, attention_mask=read.attention_mask, encoder_hidden_states=patches.repeat(2, 1, 1)
    ).last_hidden_state
    answers = torch.tensor([1] * len(right) + [0] * len(wrong))
    return F.cross_entropy(model.itm_head(states[:, 0]), answers)


def _other(own: Sequence[str], texts: Sequence[Sequence[str]], rng: random.Random) -> str:
    """A caption that is none of ``own``; there is one, though perhaps not of every image."""
    for _ in range(1000):
        if (text := rng.choice(texts[rng.randrange(len(texts))])) not in own:
            return text
    return next(text for choice in texts for text in choice if text not in own)


def _read(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, padding="longest", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
