"""Frozen vision-language models as stacks of blocks."""

from free_dist.backbones.base import Backbone, BackboneFeatures, Instruction, Start, TokenLayout
from free_dist.backbones.blip2 import Blip2Backbone
from free_dist.backbones.feature_lm import FeatureLmBackbone
from free_dist.backbones.instructblip import InstructBlipBackbone
from free_dist.backbones.span import ContiguousSpan, LayerCache, Memory, RaggedSpan, Span

__all__ = [
    "Backbone",
    "BackboneFeatures",
    "Blip2Backbone",
    "ContiguousSpan",
    "FeatureLmBackbone",
    "InstructBlipBackbone",
    "Instruction",
    "LayerCache",
    "Memory",
    "RaggedSpan",
    "Span",
    "Start",
    "TokenLayout",
]
