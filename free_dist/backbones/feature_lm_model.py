"""A frozen convolutional vision network, a small Q-Former and any causal language model, as one transformers model.

The parts have BLIP-2's names and the Q-Former is transformers' own, so stage 1, exports and hashes treat the model as any
BLIP-2.  What the vision network says about an image is a function of the image alone; whoever has computed it before passes
the feature map where pixels are expected.  Does not know where feature maps are kept.

Shape letters: I images, W channels of a feature map, P its positions, Q query tokens, D width of the language model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2PreTrainedModel,
    Blip2QFormerModel,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from free_dist.backbones.efficientnet_lite import WIDTH, EfficientNetLite

COLOURS = 3
"""Channels of pixels; a feature map has W."""


class FeatureVisionConfig(PreTrainedConfig):
    """What the Q-Former and the image processor need to know of the vision network."""

    model_type = "efficientnet_lite0"
    base_config_key = "vision_config"
    hidden_size: int = WIDTH
    image_size: int = 224


class FeatureLmConfig(Blip2Config):
    """Configuration of :class:`FeatureLm`; config.json's ``model_type`` is ``feature_lm``."""

    model_type = "feature_lm"
    sub_configs_defaults: ClassVar[dict[str, Any]] = Blip2Config.sub_configs_defaults | {
        "vision_config": FeatureVisionConfig
    }


class FeatureMaps(nn.Module):
    """The vision network, and what happens to a feature map behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite()

    def feature_map(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels [I, 3, height, width] -> [I, W, height / 32, width / 32]."""
        return self.network(pixel_values)

    def forward(self, pixel_values: Tensor, **_options: Any) -> BaseModelOutputWithPooling:
        """Pixels [I, 3, height, width] or feature maps [I, W, h, w] -> ``last_hidden_state`` [I, P, W], each position normed."""
        maps = pixel_values
        if maps.shape[1] == COLOURS:
            with torch.no_grad():
                maps = self.feature_map(maps)
        elif maps.shape[1] != WIDTH:
            raise ValueError(f"want pixels [I, 3, h, w] or feature maps [I, {WIDTH}, h, w], got {list(maps.shape)}")
        patches = maps.flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=F.layer_norm(patches, patches.shape[-1:]))


class FeatureLm(Blip2ForConditionalGeneration):
    """``Blip2ForConditionalGeneration`` with another vision tower; everything behind the features is inherited."""

    config_class = FeatureLmConfig
    config: FeatureLmConfig

    def __init__(self, config: FeatureLmConfig) -> None:
        Blip2PreTrainedModel.__init__(self, config)
        self.vision_model = FeatureMaps()
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()


# Tokenizers, configurations and structures without weights are looked up by the type that config.json names.
AutoConfig.register(FeatureVisionConfig.model_type, FeatureVisionConfig)
AutoConfig.register(FeatureLmConfig.model_type, FeatureLmConfig)
AutoModelForImageTextToText.register(FeatureLmConfig, FeatureLm)
