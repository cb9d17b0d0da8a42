"""The backbone that ships with the package: a small BLIP-2 with the proportions of BLIP-2 OPT-2.7B.

Vocabulary rows are padded so that the head weighs 1.64 blocks, as in OPT-2.7B; otherwise a speed-up found here would mean
nothing there.  Knows how to build it untrained and where the trained one lies; does not know how it is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from free_dist.config import EMBEDDED_BACKBONE, UserError

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<image>")
"""OPT's first four ids, then the image placeholder."""

IMAGE_SIZE = 64
HEAD_TO_BLOCK = 1.64
"""Parameters of OPT-2.7B's head over those of one of its blocks."""

# The libraries' 0.02 suits widths near a thousand.  At width 128 it shrinks what the prefix says about the image to a few
# percent of its constant part, and training stays on the question-only plateau.
VISION_STD = 0.08
TEXT_STD = 0.05
QUERY_STD = 0.5


def resolve_backbone(path: str) -> Path:
    """The directory behind ``backbone.path``."""
    if path == EMBEDDED_BACKBONE:
        return Path(__file__).parent.parent / "assets" / "blip2-easyvqa"
    return Path(path)


def new_model(
    *, width: int = 128, n_blocks: int = 16, n_heads: int = 4, seed: int = 0
) -> Blip2ForConditionalGeneration:
    """An untrained embedded backbone; tests make it smaller."""
    block = 12 * width * width + 13 * width
    vocab_size = int(HEAD_TO_BLOCK * block / width) // 8 * 8
    text = OPTConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=n_blocks,
        num_attention_heads=n_heads,
        max_position_embeddings=256,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=TEXT_STD,
        bos_token_id=SPECIAL_TOKENS.index("</s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
    )
    vision = Blip2VisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        initializer_range=VISION_STD,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=32,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        encoder_hidden_size=128,
        cross_attention_frequency=1,
        initializer_range=VISION_STD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=8,
        image_token_index=SPECIAL_TOKENS.index("<image>"),
    )
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(config)
    # transformers zeroes the queries; equal queries would stay equal for ever.
    torch.nn.init.normal_(model.query_tokens, std=QUERY_STD)
    return model


def grown(shallow: PreTrainedModel, n_blocks: int) -> Blip2ForConditionalGeneration:
    """A deeper copy: every decoder block becomes ``n_blocks / L`` successive ones, each with that share of its update.

    A deep model with a tiny vision tower stays on the question-only plateau for long; a shallow one leaves it within a few
    hundred steps, and this carries over what it learnt.  Raises UserError unless L divides ``n_blocks``, and for a model of
    another kind than :func:`new_model` makes.
    """
    text = shallow.config.text_config
    if not isinstance(shallow, Blip2ForConditionalGeneration) or not isinstance(text, OPTConfig):
        raise UserError(
            f"finetune.n_blocks={n_blocks}: finetune.start is a {type(shallow).__name__} with {text.model_type}, and only the "
            "embedded backbone can be grown; leave finetune.n_blocks out"
        )
    old = shallow.language_model.model.decoder.layers
    copies, rest = divmod(n_blocks, len(old))
    if rest or copies < 1:
        raise UserError(f"finetune.n_blocks={n_blocks}: not a multiple of the {len(old)} blocks of finetune.start")
    deep = new_model(width=text.hidden_size, n_blocks=n_blocks, n_heads=text.num_attention_heads)
    weights = {name: tensor for name, tensor in shallow.state_dict().items() if ".decoder.layers." not in name}
    deep.load_state_dict(weights, strict=False)
    for index, layer in enumerate(deep.language_model.model.decoder.layers):
        layer.load_state_dict(old[index // copies].state_dict())
        for linear in (layer.self_attn.out_proj, layer.fc2):
            linear.weight.data /= copies
            linear.bias.data /= copies
    return deep


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on ``texts``; any other text still encodes, as bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def new_image_processor() -> BlipImageProcessorPil:
    """BLIP's own preprocessing at the embedded backbone's resolution."""
    return BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
