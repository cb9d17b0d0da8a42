"""A pretrained backbone together with the encoder of its samples: what every entry point starts from."""

from __future__ import annotations

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.blip2 import load_image_processor, load_tokenizer
from free_dist.backbones.embedded import resolve_backbone
from free_dist.data.samples import SampleEncoder


def load_pretrained(path: str) -> tuple[Blip2Backbone, SampleEncoder]:
    """``backbone.path`` -> the frozen backbone in float32 and the encoder with its tokenizer and image processor.

    Raises MissingFileError or UserError for a directory that is not a usable checkpoint.
    """
    directory = resolve_backbone(path)
    backbone = Blip2Backbone.from_pretrained(directory)
    encoder = SampleEncoder(
        load_tokenizer(directory), load_image_processor(directory), backbone.layout, backbone.max_positions
    )
    return backbone, encoder
