"""Sizes, random values and tokenizers of the small models that ``make_lavis_reference.py`` builds of LAVIS's classes.

Imported by that script alone, in the side environment.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from lavis.models.blip2_models import blip2
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from lavis.models.eva_vit import VisionTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, GPT2Tokenizer, T5TokenizerFast

IMAGE_SIZE = 42
PATCH = 14
VISION_WIDTH = 24
VISION_HEADS = 3
QFORMER_WIDTH = 16
QUERIES = 5
TEXT_WIDTH = 32
NEW_TOKENS = 8
N_IMAGES = 3
TEXT = (
    "a photo of two dogs on the grass . question : what color is the shape ? answer : red blue green square circle "
    "in front of a white house near the old lake with many small boats and one person"
)
WORDS = sorted(set(TEXT.split()))
PROMPTS = ("a photo of", "question : what color is the shape ? answer :", "in front of the house")
CAPTIONS = ("a photo of two dogs", "question : what color is the shape ? answer : red", "a white house near the lake")


def small_sizes(folder: Path) -> ExitStack:
    """Within it, LAVIS's constructors build EVA and BERT at this file's sizes, from nothing but local files."""
    bert_vocabulary = folder / "vocab.txt"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    bert_vocabulary.write_text("\n".join([*special, *WORDS]) + "\n")
    tokenizer = BertTokenizer(str(bert_vocabulary))
    bert = BertConfig(
        vocab_size=len(tokenizer) + 1,
        hidden_size=QFORMER_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=40,
    )

    def eva(img_size: int, drop_path_rate: float, *_: object) -> VisionTransformer:
        return VisionTransformer(
            img_size=img_size,
            patch_size=PATCH,
            use_mean_pooling=False,
            embed_dim=VISION_WIDTH,
            depth=3,
            num_heads=VISION_HEADS,
            mlp_ratio=4.3637,
            qkv_bias=True,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        )

    patches = {
        (blip2, "create_eva_vit_g"): eva,
        (BertConfig, "from_pretrained"): lambda *_: bert,
        (BertLMHeadModel, "from_pretrained"): lambda *_, config: BertLMHeadModel(config),
        (BertTokenizer, "from_pretrained"): lambda *_: BertTokenizer(str(bert_vocabulary)),
    }
    stack = ExitStack()
    for (owner, name), replacement in patches.items():
        stack.enter_context(mock.patch.object(owner, name, replacement))
    return stack


MIXING = ("v_proj", "out_proj", "fc1", "fc2", ".v.", ".o.", ".wi", ".wo")
"""Weights of language models that carry what other positions say; larger, or greedy answers repeat one token for ever."""


def spread(model: torch.nn.Module, frozen: str) -> None:
    """Random values for everything outside ``frozen``: also where LAVIS's initialisation has ones, zeros or near-zeros."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.startswith(frozen):
            continue
        if parameter.dim() == 1:
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, centre, 0.2)
        elif parameter.dim() == 3:
            torch.nn.init.normal_(parameter, std=1.0)
        elif "embed_positions" in name:
            torch.nn.init.normal_(parameter)
        else:
            gain = 2.5 if any(part in name for part in MIXING) else 1.0
            gain *= 0.5 if ".q." in name else 1.0  # T5 does not divide its scores by the root of the head width
            torch.nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)


def save_gpt2_tokenizer(folder: Path) -> int:
    """OPT's kind of tokenizer (slow files, ids 0 to 3 special); returns its size."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([TEXT] * 3, trainer)
    bpe.model.save(str(folder))
    GPT2Tokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    ).save_pretrained(folder)
    return bpe.get_vocab_size()


def save_t5_tokenizer(folder: Path) -> int:
    """T5's kind of tokenizer (pad 0, eos 1, unknown 2); returns its size."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = sorted(set("".join(WORDS)) | {"▁"})
    pieces += [("▁" + word, -float(rank)) for rank, word in enumerate(WORDS, 1)]
    pieces += [(letter, -100.0) for letter in letters if letter not in dict(pieces)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    T5TokenizerFast(
        tokenizer_object=unigram, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0
    ).save_pretrained(folder)
    return unigram.get_vocab_size()
