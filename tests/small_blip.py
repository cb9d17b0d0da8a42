"""Small random BLIP captioners and filters, saved as Hugging Face directories with every file that published ones have."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    PreTrainedModel,
)

TEXT = (
    "a picture of photo red blue green yellow black gray teal brown circle rectangle triangle shape is in the on what color "
    "with two dogs it and white house near large small person ##s"
)
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
IMAGE_SIZE = 32


def save_captioner(directory: Path, *, seed: int = 0) -> Path:
    """A ``BlipForConditionalGeneration``."""
    return _save(BlipForConditionalGeneration, directory, seed)


def save_filter(directory: Path, *, seed: int = 1) -> Path:
    """A ``BlipForImageTextRetrieval``, whose scores differ from text to text and from image to image."""
    return _save(BlipForImageTextRetrieval, directory, seed)


def _save(model_class: type[PreTrainedModel], directory: Path, seed: int) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    BertTokenizerFast(str(vocabulary), model_max_length=512).save_pretrained(directory)
    BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(directory)
    size = len(SPECIAL) + len(WORDS)
    text = {"vocab_size": size + 2, "bos_token_id": size, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text |= {"hidden_size": 24, "encoder_hidden_size": 24, "intermediate_size": 32, "projection_dim": 12}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40}
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": 8}
    torch.manual_seed(seed)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=12, image_text_hidden_size=12)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    model.save_pretrained(directory)
    return directory


def capfilt_words(models: Path, source: Path, out: Path, *extra: object) -> list[str]:
    """The arguments of ``launch/capfilt.py`` with the models that were saved to ``models/captioner`` and ``models/filter``."""
    words = [
        "--out", out, "--source", source, "--captioner", models / "captioner", "--filter", models / "filter",
        "--captions", 2, "--min-length", 6, "--max-length", 12, "--batch-size", 4, *extra,
    ]  # fmt: skip
    return [str(word) for word in words]


def captioned_files(out: Path) -> dict[str, bytes]:
    """Everything below ``out`` but the indices, which whoever reads a shard first puts beside it."""
    found = [path for path in sorted(out.rglob("*")) if path.is_file() and path.suffix != ".index"]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}
