"""LAVIS's ``.pth`` files and a language model's directory -> one Hugging Face directory that transformers' own class loads.

LAVIS stores what was trained: of BLIP-2's second stage the query tokens, the Q-Former, ``ln_vision`` and the projection.  The
vision tower lies in ``eva_vit_g.pth`` and the language model in a Hugging Face directory.  Several files are laid over each
other, later ones on top; at the end every tensor of the model must have come from somewhere and every tensor of the files
must have gone somewhere, or be known to be left out.

Needs no LAVIS.  Files are read with ``weights_only``, so nothing in them is executed.  The language model is held once: it is
loaded by transformers and put into a model whose other parts are empty until the tensors are assigned.

One difference to LAVIS remains: its ``ln_vision`` has epsilon 1e-5, transformers' ``post_layernorm`` 1e-6, as in the
conversions that are published.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from free_dist.atomic import replaced_directory
from free_dist.backbones.checkpoint_files import open_checkpoint
from free_dist.backbones.lavis_config import (
    MINIGPT4_CLOSING,
    MINIGPT4_OPENING,
    POSITIONS,
    lavis_config,
    resized_positions,
)
from free_dist.backbones.lavis_keys import (
    KINDS,
    LavisKind,
    Renamed,
    to_transformers,
    vision_depth,
    with_vision_prefix,
)
from free_dist.backbones.loading import CONSTANTS
from free_dist.config import MissingFileError, UserError

MAX_NAMED = 20
"""Names that an error lists before it only counts."""

TURN_MARK = "###"
"""Begins every turn of MiniGPT-4's template."""

VICUNA_SPECIAL_TOKENS = {"pad_token": "[PAD]", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
"""What LAVIS's InstructBLIP makes of a Vicuna tokenizer; the first of them is new."""

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True, kw_only=True)
class LavisFiles:
    """What an import reads."""

    kind: str
    """One of ``KINDS``."""
    language_model: Path
    """Hugging Face directory of the language model with its tokenizer."""
    checkpoints: tuple[Path, ...]
    """``.pth`` files, later ones on top."""
    vision: Path | None = None
    """``eva_vit_g.pth``: below the others, so a checkpoint with a trained vision tower wins."""
    qformer: Path | None = None
    """A whole earlier checkpoint, below ``checkpoints``; for MiniGPT-4 the one its Q-Former comes from."""
    qformer_tokenizer: Path | None = None
    """InstructBLIP only: Hugging Face directory of bert-base-uncased's tokenizer."""
    image_size: int | None = None
    """Pixels; None keeps what the position embedding was trained with."""
    vision_heads: int | None = None
    qformer_heads: int | None = None
    """Attention heads; None for EVA-g's and BERT's."""
    max_shard_size: str = "5GB"
    """Largest safetensors file to write."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import wrote."""

    directory: Path
    parameters: int
    left_out: tuple[str, ...]
    """LAVIS's names of tensors that the model does not have."""


def import_lavis(files: LavisFiles, out: Path) -> Imported:
    """Write the Hugging Face directory ``out``, whole or not at all.

    Raises MissingFileError for a file that is not there and UserError for one that is damaged or holds code, for missing,
    unexpected or misshapen tensors (listed), and when ``out`` exists.
    """
    if out.exists():
        raise UserError(f"--out {out}: exists already; name a new directory or remove it")
    kind = KINDS[files.kind]
    if kind.instruct and files.qformer_tokenizer is None:
        raise UserError(f"--qformer-tokenizer: {files.kind} needs the directory of bert-base-uncased's tokenizer")
    weights = _overlay(files)
    found = to_transformers(weights, kind, depth=vision_depth(weights))
    _refuse("unexpected", found.unexpected, "no such tensors are known in a checkpoint of this kind; is --kind right?")
    stored = _text_config(files, kind)
    tokenizer = _tokenizer(files)
    config = lavis_config(
        found.tensors,
        kind,
        _changed_text_config(stored, files.kind, tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_size=files.image_size,
        vision_heads=files.vision_heads,
        qformer_heads=files.qformer_heads,
    )
    if files.kind == "minigpt4":
        config.image_opening, config.image_closing = MINIGPT4_OPENING, MINIGPT4_CLOSING
    side = config.vision_config.image_size // config.vision_config.patch_size
    found.tensors[POSITIONS] = resized_positions(found.tensors[POSITIONS], side)

    processor = _processor(files, config, tokenizer)
    with torch.device("meta"):
        model_class = InstructBlipForConditionalGeneration if kind.instruct else Blip2ForConditionalGeneration
        model = model_class(config)
    # Before the gigabytes of the language model are read, so that a wrong file is told at once.
    _check_vision_half(model, found)
    model.language_model = _load_language_model(files, stored, config.text_config, found.language_model)
    model.load_state_dict(found.tensors, strict=False, assign=True)
    _save(model, processor, files, out)
    return Imported(
        directory=out,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        left_out=tuple(found.left_out),
    )


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` file, bare or under ``"model"``, mapped rather than read; its other entries are ignored.

    Raises MissingFileError, or UserError when it is damaged, holds objects that only code can rebuild, or no tensors.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist")
    try:
        # Only the zip format can be mapped; what torch wrote before version 1.6 is read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values, and unpacking it would run code: it is not read "
            f"({_first_line(error)}); keep only its tensors, or get it from another source"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut off ({_first_line(error)}); copy it again") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f'{path}: want tensors by name, bare or under "model"')
    wrong = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if wrong:
        raise UserError(f"{path}: not tensors: {_listed(wrong)}; want a LAVIS checkpoint")
    return {str(name): value for name, value in content.items()}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _overlay(files: LavisFiles) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    if files.vision is not None:
        weights |= with_vision_prefix(read_pth(files.vision))
    for path in (*([files.qformer] if files.qformer else []), *files.checkpoints):
        weights |= read_pth(path)
    return weights


def _text_config(files: LavisFiles, kind: LavisKind) -> Any:
    if not (files.language_model / "config.json").is_file():
        raise MissingFileError(
            f"--language-model {files.language_model}: no config.json; give a Hugging Face directory"
        )
    config = AutoConfig.from_pretrained(files.language_model, local_files_only=True)
    if config.model_type != kind.language_model:
        raise UserError(
            f"--language-model {files.language_model}: is {config.model_type!r}, --kind {files.kind} wants "
            f"{kind.language_model!r}"
        )
    config._name_or_path = ""  # or the path on this machine is saved
    if kind.language_model == "t5":
        # LAVIS replaces FlanT5's tanh approximation by the exact function.
        config.dense_act_fn = "gelu"
    return config


def _tokenizer(files: LavisFiles) -> PreTrainedTokenizerBase:
    """The language model's, with what LAVIS adds to it and the image placeholder that transformers wants."""
    special = VICUNA_SPECIAL_TOKENS if files.kind == "instructblip-vicuna" else {}
    replaced = {name: token for name, token in special.items() if name != "pad_token"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.language_model, local_files_only=True, **replaced)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--language-model {files.language_model}: its tokenizer cannot be loaded ({_first_line(error)})"
        ) from error
    if special:
        tokenizer.add_special_tokens({"pad_token": special["pad_token"]})
        tokenizer.add_bos_token = True  # makes it put the new opening token, not the stored one, before a text
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def _changed_text_config(stored: Any, kind: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The language model's configuration with the token ids that LAVIS gives it and a row for every token."""
    config = copy.deepcopy(stored)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    if kind == "blip2-opt":
        # LAVIS ends OPT's answers with a line break.
        config.eos_token_id = tokenizer.encode("\n", add_special_tokens=False)[0]
    elif kind == "instructblip-vicuna":
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    elif kind == "minigpt4":
        # MiniGPT-4 was trained to end answers with the mark that opens the next turn, one token in LLaMA's vocabulary.
        mark = tokenizer.encode(TURN_MARK, add_special_tokens=False)
        if len(mark) == 1:
            config.eos_token_id = mark[0]
    return config


def _check_vision_half(model: PreTrainedModel, found: Renamed) -> None:
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("language_model.")}
    missing = sorted(wanted.keys() - found.tensors.keys())
    _refuse("missing", missing, "name the file that holds them with --vision, --qformer or another --checkpoint")
    _refuse("unexpected", sorted(found.tensors.keys() - wanted.keys()), "is --kind right?")
    _refuse("misshapen", _misshapen(found.tensors, wanted), "the files do not belong together")


def _misshapen(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
        for name, tensor in given.items()
        if tensor.shape != wanted[name].shape
    ]


def _load_language_model(files: LavisFiles, stored: Any, wanted: Any, trained: Mapping[str, Tensor]) -> PreTrainedModel:
    try:
        open_checkpoint(files.language_model, allow_pickle=True)
    except UserError as error:
        raise UserError(f"--language-model {files.language_model}: {error}") from error
    auto = AutoModelForSeq2SeqLM if stored.is_encoder_decoder else AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            files.language_model, config=stored, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise UserError(
            f"--language-model {files.language_model} holds more than weights, or is damaged ({_first_line(error)}): "
            "copy it again"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info[what] if not str(name).endswith(CONSTANTS))
        _refuse(what.partition("_")[0], names, f"--language-model {files.language_model} is not whole")
    own = model.state_dict()
    left = sorted(trained.keys() - own.keys())
    _refuse("unexpected", left, f"the language model in {files.language_model} has no such tensors")
    _refuse("misshapen", _misshapen(trained, own), f"the language model in {files.language_model} is another one")
    model.load_state_dict(trained, strict=False)
    if wanted.vocab_size > stored.vocab_size:
        _add_rows(model, wanted.vocab_size)
    model.config = wanted
    return model


def _add_rows(model: PreTrainedModel, n_tokens: int) -> None:
    """Rows for new tokens, as likely as the first token, which is padding or unknown and which no answer has."""
    old = model.config.vocab_size
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight[old:] = embedding.weight[0]


def _processor(files: LavisFiles, config: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    size = config.vision_config.image_size
    images = BlipImageProcessorPil(size={"height": size, "width": size})
    if files.qformer_tokenizer is None:
        return Blip2Processor(images, tokenizer, num_query_tokens=config.num_query_tokens)
    qformer_tokenizer = AutoTokenizer.from_pretrained(files.qformer_tokenizer, local_files_only=True)
    qformer_tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    if len(qformer_tokenizer) != config.qformer_config.vocab_size:
        raise UserError(
            f"--qformer-tokenizer {files.qformer_tokenizer}: has {len(qformer_tokenizer)} tokens with [DEC], the "
            f"checkpoint's Q-Former {config.qformer_config.vocab_size}; give bert-base-uncased's"
        )
    return InstructBlipProcessor(images, tokenizer, qformer_tokenizer, num_query_tokens=config.num_query_tokens)


def _save(model: PreTrainedModel, processor: Any, files: LavisFiles, out: Path) -> None:
    with replaced_directory(out) as written:
        model.save_pretrained(written, max_shard_size=files.max_shard_size)
        processor.save_pretrained(written)
        processor.image_processor.save_pretrained(written)


def _refuse(what: str, names: Sequence[str], advice: str) -> None:
    if names:
        raise UserError(f"{len(names)} {what} tensors: {_listed(names)}; {advice}")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
