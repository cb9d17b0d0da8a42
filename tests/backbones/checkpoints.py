"""Checkpoint directories of every backbone that users hold, tiny and random, as transformers itself would have saved them.

Real model classes, real processors, real fast tokenizers of each family, trained on a handful of texts.  The widths are chosen
so that nothing fits by accident: heads times head width is not the model width (LLaMA, T5), encoder and decoder differ in
depth, the Q-Former is neither as wide as the vision tower nor as the language model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    GPT2Tokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5Tokenizer,
)

from free_dist.backbones.efficientnet_lite import EfficientNetLite
from free_dist.backbones.smollm2 import joined, new_image_processor

QUERIES = 4
BLOCKS = 4
IMAGE_SIZE = 64
IMAGE_OPENING, IMAGE_CLOSING = "###Human: <Img>", "</Img>"
"""What MiniGPT-4 was trained to read around an image."""

PROMPTS = {
    "minigpt4": [
        "data.question_prompt={question} ###Assistant:",
        "data.caption_prompt=Describe this image. ###Assistant:",
    ]
}
"""Recipe overrides of the models whose prompts are not the default ones, by the start of their name."""


def overrides(name: str) -> list[str]:
    """Recipe overrides that make the prompts of a combination those of its authors."""
    return PROMPTS.get(name.split("-")[0], [])


def _trained(model: Any, pre_tokenizer: Any, trainer: Any, texts: Sequence[str]) -> dict[str, Any]:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())["model"]


def opt_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """Byte-level BPE; texts open with ``</s>``."""
    found = _trained(
        models.BPE(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        texts,
    )
    return GPT2Tokenizer(
        vocab=found["vocab"],
        merges=[tuple(pair) for pair in found["merges"]],
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    )


def llama_tokenizer(texts: Sequence[str], **special: Any) -> PreTrainedTokenizerBase:
    """BPE with byte fallback; words begin with a space, written or not."""
    found = _trained(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        trainers.BpeTrainer(
            vocab_size=380,
            special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        ),
        texts,
    )
    merges = [tuple(pair) for pair in found["merges"]]
    return LlamaTokenizer(vocab=found["vocab"], merges=merges, add_bos_token=True, **special)


def t5_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """Unigram; texts end with ``</s>``.

    Its own trainer adds up in the order of a hash map, so that scores differ from process to process: the pieces are those of
    BPE, and what BPE joined earlier is the likelier piece.
    """
    found = _trained(
        models.BPE(),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        trainers.BpeTrainer(vocab_size=117, show_progress=False),
        texts,
    )
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(piece, -2.0 - index / 20) for piece, index in found["vocab"].items()]
    return T5Tokenizer(vocab=special + pieces, extra_ids=2)


def qformer_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """BERT's WordPiece: characters, at the beginning of a word and within, and the commonest words.

    Its trainer breaks ties by a hash map's order, so that the vocabulary differs from process to process: counted here.
    """
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted({character for word in counts for character in word})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))[:40]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *characters, *(f"##{character}" for character in characters), *words]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})


def opt_text(vocab_size: int) -> PreTrainedConfig:
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=256,
        dropout=0.0,
    )


def llama_text(vocab_size: int, *, n_shared_heads: int = 4) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=n_shared_heads,
        head_dim=12,
        max_position_embeddings=256,
    )


def t5_text(vocab_size: int) -> PreTrainedConfig:
    return T5Config(
        vocab_size=vocab_size,
        d_model=32,
        d_kv=12,
        d_ff=48,
        num_layers=BLOCKS + 1,
        num_decoder_layers=BLOCKS,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=9,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )


def _model(
    text: Callable[[int], PreTrainedConfig], vocab_size: int, image_token: int | None, *, instructed: int = 0
) -> PreTrainedModel:
    """A random model; ``instructed`` is the vocabulary of a Q-Former that reads prompts, 0 for one that does not."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": 16, "initializer_range": 0.1}
    qformer = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    qformer |= {"encoder_hidden_size": 16, "cross_attention_frequency": 2, "initializer_range": 0.1}
    qformer |= {"vocab_size": instructed or 8, "max_position_embeddings": 128}
    common = {"text_config": text(vocab_size), "num_query_tokens": QUERIES, "image_token_index": image_token}
    torch.manual_seed(5)
    if instructed:
        model = InstructBlipForConditionalGeneration(
            InstructBlipConfig(
                vision_config=InstructBlipVisionConfig(**vision),
                qformer_config=InstructBlipQFormerConfig(**qformer),
                **common,
            )
        )
    else:
        model = Blip2ForConditionalGeneration(
            Blip2Config(
                vision_config=Blip2VisionConfig(**vision), qformer_config=Blip2QFormerConfig(**qformer), **common
            )
        )
    _spread(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _spread(model: PreTrainedModel) -> None:
    """Weights so large that every block, image and prompt makes a difference that a tolerance sees."""
    nn.init.normal_(model.query_tokens)
    model.language_projection.weight.normal_(std=0.5)
    language_model = model.language_model
    is_t5 = model.config.text_config.model_type == "t5"
    for name, parameter in language_model.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape))
        elif not is_t5:
            parameter.normal_(std=0.3 if parameter.ndim == 2 else 0.1)
        elif "relative_attention_bias" in name:
            parameter.normal_()
    if is_t5:  # published ones have a head of their own
        language_model.lm_head.weight = nn.Parameter(torch.randn(language_model.lm_head.weight.shape) * 0.3)


def _rounded(count: int) -> int:
    """Published vocabularies are padded."""
    return -(-count // 16) * 16


def _save_blip2(
    directory: Path, tokenizer: PreTrainedTokenizerBase, text: Callable[[int], PreTrainedConfig]
) -> PreTrainedModel:
    """Today's convention: the processor knows the number of queries, the vocabulary has a placeholder."""
    processor = Blip2Processor(_image_processor(), tokenizer, num_query_tokens=QUERIES)
    model = _model(text, _rounded(len(tokenizer)), tokenizer.convert_tokens_to_ids("<image>"))
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return model


def _save_older_blip2(
    directory: Path, tokenizer: PreTrainedTokenizerBase, text: Callable[[int], PreTrainedConfig]
) -> PreTrainedModel:
    """The first convention: no placeholder anywhere, the vocabulary ends with the last word."""
    model = _model(text, len(tokenizer), None)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _image_processor().save_pretrained(directory)
    return model


def _save_instructblip(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    text: Callable[[int], PreTrainedConfig],
    texts: Sequence[str],
) -> PreTrainedModel:
    reader = qformer_tokenizer(texts)
    processor = InstructBlipProcessor(_image_processor(), tokenizer, reader, num_query_tokens=QUERIES)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = _model(text, _rounded(len(tokenizer)), image_token, instructed=len(reader))
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return model


def _save_minigpt4(
    directory: Path, tokenizer: PreTrainedTokenizerBase, text: Callable[[int], PreTrainedConfig]
) -> PreTrainedModel:
    model = _save_blip2(directory, tokenizer, text)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"image_opening": IMAGE_OPENING, "image_closing": IMAGE_CLOSING}
    path.write_text(json.dumps(config, indent=2))
    return model


def _save_feature_lm(directory: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    torch.manual_seed(5)
    text = LlamaForCausalLM(_grouped_llama_text(_rounded(len(tokenizer))))
    text.config.pad_token_id = tokenizer.pad_token_id
    text.config.bos_token_id = tokenizer.bos_token_id
    text.config.eos_token_id = tokenizer.eos_token_id
    vision = EfficientNetLite().state_dict()
    model = joined(text, vision, n_queries=QUERIES, width=64, n_layers=1, image_size=IMAGE_SIZE)
    _spread(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    new_image_processor(IMAGE_SIZE).save_pretrained(directory)
    return model


def _image_processor() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def _grouped_llama_text(vocab_size: int) -> PreTrainedConfig:
    return llama_text(vocab_size, n_shared_heads=2)


WRITERS: dict[str, Callable[[Path, Sequence[str]], PreTrainedModel]] = {
    "blip2-opt": lambda path, texts: _save_blip2(path, opt_tokenizer(texts), opt_text),
    "blip2-opt-older": lambda path, texts: _save_older_blip2(path, opt_tokenizer(texts), opt_text),
    "blip2-flan-t5": lambda path, texts: _save_blip2(path, t5_tokenizer(texts), t5_text),
    # Vicuna inside InstructBLIP was trained with texts that open with </s>, and with a padding token of its own.
    "instructblip-vicuna": lambda path, texts: _save_instructblip(
        path, llama_tokenizer(texts, bos_token="</s>", unk_token="</s>", pad_token="[PAD]"), llama_text, texts
    ),
    "instructblip-flan-t5": lambda path, texts: _save_instructblip(path, t5_tokenizer(texts), t5_text, texts),
    "minigpt4-vicuna": lambda path, texts: _save_minigpt4(path, llama_tokenizer(texts), llama_text),
    "minigpt4-llama2": lambda path, texts: _save_minigpt4(path, llama_tokenizer(texts), _grouped_llama_text),
}
"""The seven combinations of model and language model."""

COMBINATIONS = tuple(WRITERS)
FEATURE_LM = "feature-lm"
"""A convolutional network before a language model: the class is ours, so there is no processor to compare prompts with."""
WRITERS[FEATURE_LM] = lambda path, texts: _save_feature_lm(path, llama_tokenizer(texts))
INSTRUCTED = tuple(name for name in COMBINATIONS if name.startswith("instructblip"))
ENCODER_DECODERS = tuple(name for name in COMBINATIONS if name.endswith("t5"))


def write_checkpoint(name: str, directory: Path, texts: Sequence[str]) -> PreTrainedModel:
    """Save combination ``name`` to ``directory``, its tokenizers trained on ``texts``; returns the model that was saved."""
    directory.mkdir(parents=True)
    return WRITERS[name](directory, texts)
