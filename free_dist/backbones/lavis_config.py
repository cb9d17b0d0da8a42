"""The sizes of a LAVIS model, read off its tensors, as transformers' configuration.

A checkpoint says every size but the number of attention heads, which is EVA-g's and BERT's unless told otherwise.  Knows
names and shapes; does not open files or build models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Blip2Config, InstructBlipConfig, PretrainedConfig

from free_dist.backbones.lavis_keys import LavisKind
from free_dist.config import UserError

EVA_HEAD_WIDTH = 88
"""EVA-g's 1408 is 16 heads of 88."""

BERT_HEAD_WIDTH = 64
"""BERT-base's 768 is 12 heads of 64."""

POSITIONS = "vision_model.embeddings.position_embedding"

MINIGPT4_OPENING = "###Human: <Img>"
MINIGPT4_CLOSING = "</Img>"
"""What MiniGPT-4 was trained with before and after an image."""


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """Position embedding [1, 1 + s * s, D] -> [1, 1 + side * side, D]: the class token's kept, the others bicubic.

    As LAVIS does when image sizes differ: in float32, corners not aligned.  The type of ``positions`` is kept.
    """
    first, others = positions[:, :1], positions[:, 1:]
    old = math.isqrt(others.shape[1])
    if old == side:
        return positions
    grid = others.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((first, grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)), dim=1)


def lavis_config(
    tensors: Mapping[str, Tensor],
    kind: LavisKind,
    text_config: PretrainedConfig,
    *,
    image_token_id: int,
    image_size: int | None = None,
    vision_heads: int | None = None,
    qformer_heads: int | None = None,
) -> Blip2Config | InstructBlipConfig:
    """The configuration of the model that ``tensors`` (transformers' names) belong to.

    ``image_size`` in pixels replaces the one that the position embedding was trained with.  Raises UserError when a tensor
    that tells a size is missing, when the parts do not fit each other, or when the number of heads must be given.
    """
    positions, patch = _of(tensors, POSITIONS), _of(tensors, "vision_model.embeddings.patch_embedding.weight")
    vision_width, patch_size = patch.shape[0], patch.shape[-1]
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": _of(tensors, "vision_model.encoder.layers.0.mlp.fc1.weight").shape[0],
        "num_hidden_layers": _count(tensors, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": _heads("--vision-heads", vision_width, EVA_HEAD_WIDTH, vision_heads),
        "patch_size": patch_size,
        "image_size": image_size or patch_size * math.isqrt(positions.shape[1] - 1),
    }
    if vision["image_size"] % patch_size:
        raise UserError(f"--image-size {image_size}: not a multiple of the patch size {patch_size}")
    queries = _of(tensors, "query_tokens")
    qformer_width = queries.shape[2]
    crossing = sorted(_numbers(tensors, r"qformer\.encoder\.layer\.(\d+)\.crossattention\."))
    n_layers = _count(tensors, r"qformer\.encoder\.layer\.(\d+)\.")
    qformer: dict[str, Any] = {
        "hidden_size": qformer_width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": _heads("--qformer-heads", qformer_width, BERT_HEAD_WIDTH, qformer_heads),
        "intermediate_size": _of(tensors, "qformer.encoder.layer.0.intermediate_query.dense.weight").shape[0],
        "cross_attention_frequency": crossing[1] - crossing[0] if len(crossing) > 1 else n_layers,
        "encoder_hidden_size": vision_width,
    }
    if kind.instruct:
        qformer["vocab_size"] = _of(tensors, "qformer.embeddings.word_embeddings.weight").shape[0]
        qformer["max_position_embeddings"] = _of(tensors, "qformer.embeddings.position_embeddings.weight").shape[0]
    projection = _of(tensors, "language_projection.weight")
    if projection.shape[0] != text_config.hidden_size:
        raise UserError(
            f"--language-model: its width is {text_config.hidden_size}, but the checkpoint's projection leads to "
            f"{projection.shape[0]}: give the language model that the checkpoint was trained with"
        )
    config_class = InstructBlipConfig if kind.instruct else Blip2Config
    return config_class(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text_config,
        num_query_tokens=queries.shape[1],
        image_token_index=image_token_id,
    )


def _of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        part = "--vision" if name.startswith("vision_model") else "--checkpoint or --qformer"
        raise UserError(f"none of the files holds {name} (under its LAVIS name); name the file that does with {part}")
    return tensors[name]


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(found[1]) for name in names if (found := re.match(pattern, name))}


def _count(names: Iterable[str], pattern: str) -> int:
    return max(_numbers(names, pattern), default=-1) + 1


def _heads(flag: str, width: int, head_width: int, given: int | None) -> int:
    if given is None and width % head_width:
        raise UserError(
            f"{flag}: the checkpoint does not say how many heads its width {width} is divided into; give it"
        )
    heads = given or width // head_width
    if width % heads:
        raise UserError(f"{flag} {heads}: does not divide the width {width}")
    return heads
