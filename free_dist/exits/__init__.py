"""Early exits: the trained transformers that emit, and the discriminators that train them."""

from free_dist.exits.classifier import FeatureClassifiers
from free_dist.exits.transformer import ExitBank, ExitTransformer

__all__ = ["ExitBank", "ExitTransformer", "FeatureClassifiers"]
