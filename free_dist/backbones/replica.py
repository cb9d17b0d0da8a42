"""Replicas of single blocks, for exits: the modules of a block with weights of their own, or with the block's own weights.

Knows what the first block of an architecture owns on behalf of all, which a replica must not carry: it would never be read.
Does not know what replicas are for.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention


def replica(block: nn.Module, *, by_reference: bool = False) -> nn.Module:
    """A copy of a block's modules; ``by_reference``, its parameters and buffers are the block's own tensors.

    Modules of the copy can then be replaced without touching the block, while every later change of a weight is seen.
    """
    # What stands in the memo is not copied.
    kept: dict[int, Any] = {}
    if by_reference:
        kept = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    copied = copy.deepcopy(block, kept)
    for module in copied.modules():
        if isinstance(module, T5Attention) and module.has_relative_attention_bias:
            # All blocks are handed the position bias that the first one owns.
            module.has_relative_attention_bias = False
            del module.relative_attention_bias
    return copied
