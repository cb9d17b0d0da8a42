"""The adapter of :class:`~free_dist.backbones.feature_lm_model.FeatureLm`: BLIP-2's, with feature maps in the place of pixels.

What the vision network says about an image is a function of the image alone, so it can be computed once.  Does not know
where that is kept.

Shape letters: I images, W channels of a feature map.
"""

from __future__ import annotations

from torch import Tensor

from free_dist.backbones.blip2 import Blip2Backbone


class FeatureLmBackbone(Blip2Backbone):
    """Adapter over :class:`FeatureLm`.  Where pixels are wanted, feature maps [I, W, h, w] do as well."""

    model_type = "feature_lm"

    def feature_maps(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels [I, 3, height, width] -> [I, W, height / 32, width / 32]."""
        return self.model.vision_model.feature_map(pixel_values)
