"""Frozen vision-language models as stacks of blocks."""

from free_dist.backbones.base import Backbone, BackboneFeatures, LayerCache, TokenLayout
from free_dist.backbones.blip2 import Blip2Backbone

__all__ = ["Backbone", "BackboneFeatures", "Blip2Backbone", "LayerCache", "TokenLayout"]
