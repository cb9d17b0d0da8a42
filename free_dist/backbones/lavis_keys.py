"""The names of LAVIS's tensors and transformers' names for the same: BLIP-2, InstructBLIP and MiniGPT-4.

A pure function of names and shapes: does not open files, build models or know where a tensor came from.

LAVIS (salesforce-lavis 1.0.2) keeps EVA's own names for the vision tower, BERT's for the Q-Former, and calls the projection
and the language model after the latter (``opt_proj``, ``t5_model``, ``llm_proj``).  MiniGPT-4 says ``llama_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

EVA_DEPTH = 39
"""Blocks that LAVIS builds of EVA-g's 40: it reads the features before the last one."""


@dataclass(frozen=True, kw_only=True)
class LavisKind:
    """One family of LAVIS checkpoints."""

    language_model: str
    """``model_type`` of the language model's configuration."""
    prefixes: tuple[str, ...]
    """What stands before ``_proj`` and ``_model`` in the names of projection and language model."""
    instruct: bool = False
    """The Q-Former also reads text (InstructBLIP), so its word embeddings and text branch are used."""


KINDS = {
    "blip2-opt": LavisKind(language_model="opt", prefixes=("opt",)),
    "blip2-t5": LavisKind(language_model="t5", prefixes=("t5",)),
    "instructblip-vicuna": LavisKind(language_model="llama", prefixes=("llm",), instruct=True),
    "instructblip-t5": LavisKind(language_model="t5", prefixes=("t5",), instruct=True),
    "minigpt4": LavisKind(language_model="llama", prefixes=("llama",)),
}
"""What ``launch/import_lavis.py --kind`` takes."""


@dataclass(kw_only=True)
class Renamed:
    """Tensors under transformers' names, and what became of every other one."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Outside the language model, under the names of ``Blip2ForConditionalGeneration`` or ``InstructBlip...``."""
    language_model: dict[str, Tensor] = field(default_factory=dict)
    """The language model's own, if the files hold any: names without their prefix."""
    left_out: list[str] = field(default_factory=list)
    """LAVIS's names of tensors that the model does not have on purpose, such as stage 1's matching head."""
    unexpected: list[str] = field(default_factory=list)
    """LAVIS's names that mean nothing here."""


_BLOCK = r"visual_encoder\.blocks\.(\d+)\."
_LEFT_OUT = (
    r"Qformer\.bert\.embeddings\.position_ids",
    r"Qformer\.cls\..+",
    r"(vision_proj|text_proj|itm_head)\..+",
    r"temp",
    r"visual_encoder\.(norm|fc_norm|head)\..+",
)
"""A buffer; stage 1's language head, contrastive projections, matching head and temperature; EVA's own classifier."""
_LEFT_OUT_OF_BLIP2 = (
    r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..+",
)
"""The Q-Former's text half, which BLIP-2 removes after stage 1 and InstructBLIP keeps."""
_LEFT_OUT_OF_MINIGPT4 = (r"(t5|opt)_(proj|model)\..+",)
"""The language model beside which MiniGPT-4's Q-Former was trained (LAVIS stores its tied embeddings) and the way to it."""
_LEFT_OUT_OF_LANGUAGE_MODELS = (r".*\.rotary_emb\.inv_freq",)
"""A constant that older versions of LLaMA stored."""

_RENAMES = (
    (r"visual_encoder\.cls_token", r"vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", r"vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.(weight|bias)", r"vision_model.embeddings.patch_embedding.\1"),
    (_BLOCK + r"norm([12])\.(weight|bias)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    (_BLOCK + r"attn\.qkv\.weight", r"vision_model.encoder.layers.\1.self_attn.qkv.weight"),
    (_BLOCK + r"attn\.proj\.(weight|bias)", r"vision_model.encoder.layers.\1.self_attn.projection.\2"),
    (_BLOCK + r"mlp\.fc([12])\.(weight|bias)", r"vision_model.encoder.layers.\1.mlp.fc\2.\3"),
    (r"ln_vision\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (r"query_tokens", r"query_tokens"),
)
_QFORMER_LAYER = re.compile(
    r"Qformer\.bert\.(encoder\.layer\.\d+\.)"
    r"((?:(?:cross)?attention\.(?:self\.(?:query|key|value)|output\.(?:dense|LayerNorm))"
    r"|intermediate(?:_query)?\.dense|output(?:_query)?\.(?:dense|LayerNorm))\.(?:weight|bias))"
)
_EMBEDDING_NORM = re.compile(r"Qformer\.bert\.embeddings\.LayerNorm\.(weight|bias)")
_EMBEDDING = re.compile(r"Qformer\.bert\.embeddings\.((?:word|position)_embeddings\.weight)")


def with_vision_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of a bare vision tower (``eva_vit_g.pth``) as they are in a whole model; other names stay."""
    bare = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "fc_norm.", "head.")
    return {f"visual_encoder.{name}" if name.startswith(bare) else name: tensor for name, tensor in weights.items()}


def vision_depth(weights: Mapping[str, Tensor]) -> int:
    """Blocks of the vision tower to keep: all, but of EVA-g's 40 the first 39."""
    numbers = [int(found[1]) for name in weights if (found := re.match(_BLOCK, name))]
    return min(max(numbers, default=-1) + 1, EVA_DEPTH)


def to_transformers(weights: Mapping[str, Tensor], kind: LavisKind, *, depth: int) -> Renamed:
    """Sort every tensor of ``weights`` (LAVIS's names, files already laid over each other) into one of four lists.

    ``depth``: blocks of the vision tower to keep.  EVA has biases of queries and values alone; transformers has one vector
    for all three, with zeros for the keys.
    """
    found = Renamed()
    for name, tensor in weights.items():
        language_name = _after(name, [f"{prefix}_model." for prefix in kind.prefixes])
        if _is_left_out(name, kind, depth):
            found.left_out.append(name)
        elif language_name is not None:
            found.language_model[language_name] = tensor
        elif (projection := _after(name, [f"{prefix}_proj." for prefix in kind.prefixes])) in ("weight", "bias"):
            found.tensors[f"language_projection.{projection}"] = tensor
        elif re.fullmatch(_BLOCK + r"attn\.[qv]_bias", name):
            _join_biases(name, weights, found)
        elif (new := _renamed(name, instruct=kind.instruct)) is not None:
            found.tensors[new] = tensor
        else:
            found.unexpected.append(name)
    return found


def _is_left_out(name: str, kind: LavisKind, depth: int) -> bool:
    patterns = [*_LEFT_OUT, *_LEFT_OUT_OF_LANGUAGE_MODELS]
    if not kind.instruct:
        patterns += _LEFT_OUT_OF_BLIP2
    if kind.prefixes == ("llama",):
        patterns += _LEFT_OUT_OF_MINIGPT4
    block = re.match(_BLOCK, name)
    return any(re.fullmatch(pattern, name) for pattern in patterns) or (block is not None and int(block[1]) >= depth)


def _after(name: str, starts: list[str]) -> str | None:
    return next((name.removeprefix(start) for start in starts if name.startswith(start)), None)


def _join_biases(name: str, weights: Mapping[str, Tensor], found: Renamed) -> None:
    # Runs for both biases; a missing partner leaves the pair out, and the check for missing names tells.
    stem = name.rpartition(".")[0]
    query, value = weights.get(f"{stem}.q_bias"), weights.get(f"{stem}.v_bias")
    if query is not None and value is not None:
        layer = re.match(_BLOCK, name)
        assert layer is not None
        joined = torch.cat([query, torch.zeros_like(query), value])
        found.tensors[f"vision_model.encoder.layers.{layer[1]}.self_attn.qkv.bias"] = joined


def _renamed(name: str, *, instruct: bool) -> str | None:
    for pattern, replacement in _RENAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    if match := _QFORMER_LAYER.fullmatch(name):
        return f"qformer.{match[1]}{match[2].replace('attention.self.', 'attention.attention.')}"
    if match := _EMBEDDING_NORM.fullmatch(name):
        return f"qformer.embeddings.layernorm.{match[1]}" if instruct else f"qformer.layernorm.{match[1]}"
    if instruct and (match := _EMBEDDING.fullmatch(name)):
        return f"qformer.embeddings.{match[1]}"
    return None
