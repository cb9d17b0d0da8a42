"""Early exits: the trained transformers that emit, and the discriminators that train them."""

from free_dist.exits.classifier import FeatureClassifiers
from free_dist.exits.transformer import ExitBank, trained_parameters
from free_dist.exits.variants import ExitTransformer, ExitVariant

__all__ = ["ExitBank", "ExitTransformer", "ExitVariant", "FeatureClassifiers", "trained_parameters"]
