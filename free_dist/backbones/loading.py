"""A Hugging Face directory -> its frozen model, with every mistake told before minutes of reading.

The order: config, weight files (headers alone), names and shapes against the model's structure, attention kernels, and only
then the weights.  A sharded load reads one tensor at a time and lets the caller's context partition it.  Knows
directories and transformers' loader; does not know what the model computes, tokens, or how ranks are organised.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Blip2ForConditionalGeneration,
    GenerationConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from free_dist.backbones.checkpoint_files import Checkpoint, StoredTensor, open_checkpoint
from free_dist.backbones.feature_lm_model import FeatureLm
from free_dist.config import MissingFileError, UserError

MODEL_CLASSES = {
    "blip-2": Blip2ForConditionalGeneration,
    "instructblip": InstructBlipForConditionalGeneration,
    "feature_lm": FeatureLm,
}
"""``model_type`` of config.json -> the class that loads it."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions by the names that command lines use; ``auto`` besides is the checkpoint's own."""

CONSTANTS = ("position_ids", "rotary_emb.inv_freq")
"""Endings of names that older checkpoints stored although they are not weights: every model computes them itself."""

LISTED = 5
"""Names that an error message lists before it counts the rest."""


def load_model(
    directory: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str = "sdpa",
    allow_pickle: bool = False,
    sharding: AbstractContextManager[None] | None = None,
) -> PreTrainedModel:
    """``Blip2ForConditionalGeneration`` or ``InstructBlipForConditionalGeneration`` of a directory, frozen, for inference.

    ``dtype``: a type, its name, or ``auto`` for the checkpoint's own.  ``attn_implementation`` is the language model's;
    vision tower and Q-Former always run ``sdpa``.  ``sharding``: entered around the reading of weights; inside it,
    ``from_pretrained`` must build partitioned parameters (:func:`free_dist.engines.sharded_loading`), and every rank must call.
    A few biases of the vision tower are then right on rank 0 alone, until the engine that is built next sends them round.
    The caller's random numbers are not touched.

    Raises MissingFileError or UserError, naming file and tensor, for whatever would not load exactly and wholly: no default
    initialisation takes the place of a weight.
    """
    directory = Path(directory)
    config = read_config(directory)
    model_class = _model_class(config, directory)
    checkpoint = open_checkpoint(directory, allow_pickle=allow_pickle)
    if sharding is not None and checkpoint.tensors is None:
        raise UserError(
            f"backbone.path: {directory} holds a pickle, which cannot be read one tensor at a time: save it as safetensors, or "
            "choose a zero_optimization.stage other than 3 for it in --ds_config"
        )
    options: dict[str, Any] = {
        "dtype": parse_dtype(dtype),
        "attn_implementation": {
            "": "sdpa",
            "vision_config": "sdpa",
            "qformer_config": "sdpa",
            "text_config": attn_implementation,
        },
        "local_files_only": True,
        "use_safetensors": checkpoint.tensors is not None,
        "weights_only": True,
    }
    try:
        structure = _check_structure(model_class, checkpoint, options)
        _check_attention(structure, attn_implementation)
        if sharding is None:
            model = model_class.from_pretrained(directory, **options)
        else:
            # Partitioned parameters exist before their values do, and are drawn at random in between.
            generators = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with torch.random.fork_rng(generators), _untied(structure, checkpoint), sharding:
                config = model_class.config_class.from_pretrained(directory)
                model = model_class.from_pretrained(None, config=config, **options, state_dict=checkpoint.tensors)
            # What the library would have taken from the directory, had it been given one.
            model.name_or_path = model.config.name_or_path = str(directory)
            if (directory / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(directory)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        if checkpoint.tensors is not None:
            raise  # headers were whole, so this is no matter of the files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{directory}/pytorch_model*.bin holds more than weights, or is damaged: {reason}") from error
    return model.eval().requires_grad_(False)


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json as it stands; raises MissingFileError or UserError."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise MissingFileError(f"backbone.path: {directory} has no config.json; give a Hugging Face BLIP-2 directory")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy or download it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; copy or download it again")
    return config


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """``auto``, a type, or the name of one -> what ``from_pretrained`` takes; raises UserError for another name."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: want one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, directory: str | Path) -> None:
    """Raise UserError unless every id of the tokenizer has a row in the embeddings."""
    rows = model.config.get_text_config().vocab_size
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[token] >= rows:
        raise UserError(
            f"backbone.path: the tokenizer in {directory} gives {token!r} the id {vocabulary[token]}, but the language model "
            f"has {rows} embeddings (text_config.vocab_size): tokenizer and weights belong to different checkpoints"
        )


def _model_class(config: dict[str, Any], directory: Path) -> type[PreTrainedModel]:
    model_type = config.get("model_type")
    if model_type not in MODEL_CLASSES:
        raise UserError(
            f"backbone.path: {directory}/config.json has model_type {model_type!r}; want {' or '.join(MODEL_CLASSES)}"
        )
    return MODEL_CLASSES[model_type]


def _check_structure(
    model_class: type[PreTrainedModel], checkpoint: Checkpoint, options: dict[str, Any]
) -> PreTrainedModel:
    """The model without weights, every name and shape of which the checkpoint fits; raises UserError."""
    where = checkpoint.directory
    with _quiet():
        # On the meta device transformers goes through renamings, ties and shapes as ever, and reads no values.
        model, found = model_class.from_pretrained(
            where, **options | {"attn_implementation": "sdpa"}, device_map="meta", ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip
    stored = checkpoint.tensors or {}
    if found["mismatched_keys"]:
        name, in_file, in_model = min(found["mismatched_keys"])
        path = stored[name].path if name in stored else where
        raise UserError(
            f"{path}: {name} is {list(in_file)}, config.json wants {list(in_model)}"
            f"{_and_more(len(found['mismatched_keys']) - 1)}: config and weights belong to different checkpoints"
        )
    if found["missing_keys"]:
        raise UserError(f"backbone.path: the weights in {where} lack {_listed(found['missing_keys'])}")
    unexpected = [name for name in found["unexpected_keys"] if not name.endswith(CONSTANTS)]
    if unexpected:
        raise UserError(
            f"backbone.path: the weights in {where} hold what {model_class.__name__} has no place for: {_listed(unexpected)}"
        )
    if found["error_msgs"]:
        raise UserError(f"backbone.path: {where} does not load: {found['error_msgs'][0]}")
    return model


def _check_attention(model: PreTrainedModel, attn_implementation: str) -> None:
    if attn_implementation == "sdpa":
        return
    field = f"backbone.attn_implementation={attn_implementation}"
    if attn_implementation != "flash_attention_2":
        raise UserError(f"{field}: want sdpa or flash_attention_2; the blocks run without a mask, which eager needs")
    if not model.language_model._supports_flash_attn:
        raise UserError(f"{field}: {type(model.language_model).__name__} has none in transformers; want sdpa")
    if model.dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"{field}: computes in bfloat16 or float16 alone: load in one of them, or choose sdpa")
    if not is_flash_attn_2_available():
        raise UserError(f"{field}: needs a GPU and the package flash-attn (pip install flash-attn); or choose sdpa")


@contextmanager
def _untied(model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[None]:
    """Inside, weights that the library would tie but that differ in the checkpoint (the head of FlanT5) stay apart.

    The library compares them itself, but partitioned parameters are empty and so always equal.
    """
    stored = checkpoint.tensors or {}
    changed: dict[type[PreTrainedModel], dict[str, str]] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or not isinstance(module._tied_weights_keys, dict):
            continue
        ties = module._tied_weights_keys
        start = f"{prefix}." if prefix else ""
        apart = {target for target, source in ties.items() if _differ(stored, start + target, start + source)}
        if apart:
            changed[type(module)] = ties
            type(module)._tied_weights_keys = {target: ties[target] for target in ties if target not in apart}
    try:
        yield
    finally:
        for module_class, ties in changed.items():
            module_class._tied_weights_keys = ties


def _differ(stored: dict[str, StoredTensor], first: str, second: str) -> bool:
    if first not in stored or second not in stored:
        return False
    return not torch.equal(stored[first].read(), stored[second].read())


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers neither reports what does not fit (an error will) nor draws a progress bar."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:LISTED]) + _and_more(len(ordered) - LISTED)


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count > 0 else ""
