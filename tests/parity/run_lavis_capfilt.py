"""Run launch/capfilt.py on small models of LAVIS's own classes, with the weights of ``reference``.

Run by the side environment, which has salesforce-lavis 1.0.2 and neither transformers 5 nor DeepSpeed:

    .venv-lavis/bin/python tests/parity/run_lavis_capfilt.py --source SHARDS --out DIRECTORY [flags of launch/capfilt.py]

Only what LAVIS would download is replaced: its weights, and the vocabulary of bert-base-uncased.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path
from unittest import mock

import lavis.models
import torch
from lavis.models.blip_models.blip_caption import BlipCaption
from lavis.models.blip_models.blip_image_text_matching import BlipITM
from lavis.models.med import XBertEncoder, XBertLMHeadDecoder
from lavis.models.vit import VisionTransformerEncoder
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor
from small_lavis import QFORMER_WIDTH, VISION_HEADS, VISION_WIDTH, small_sizes
from transformers import BertConfig

HERE = Path(__file__).parent


def load(name: str, model_type: str, is_eval: bool, device: str) -> tuple[torch.nn.Module, dict, dict]:
    """What ``load_model_and_preprocess`` gives, small."""
    assert is_eval and device == "cpu"
    vision = VisionTransformerEncoder(
        img_size=32, patch_size=8, embed_dim=VISION_WIDTH, depth=2, num_heads=VISION_HEADS, drop_path_rate=0.0
    )
    vision.vision_width = VISION_WIDTH
    with tempfile.TemporaryDirectory() as folder, small_sizes(Path(folder)):
        config = BertConfig(
            vocab_size=len(BlipCaption.init_tokenizer()),
            hidden_size=QFORMER_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=40,
            pad_token_id=0,
        )
        config.encoder_width, config.add_cross_attention, config.add_type_embeddings = VISION_WIDTH, True, False
        if name == "blip_caption":
            model = BlipCaption(vision, XBertLMHeadDecoder(config), prompt="a picture of ")
        else:
            model = BlipITM(vision, XBertEncoder(config, add_pooling_layer=False), embed_dim=12)
    folder = {"blip_caption": "blip_caption", "blip_image_text_matching": "blip_itm"}[name]
    weights = torch.load(HERE / "reference" / folder / "checkpoint.pth", weights_only=True)["model"]
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys and all(name.endswith("position_ids") for name in found.missing_keys)
    return model.eval(), {"eval": BlipImageEvalProcessor(image_size=32)}, {"eval": BlipCaptionProcessor()}


if __name__ == "__main__":
    sys.argv = [
        "launch/capfilt.py", "--captioner", "lavis:blip_caption/base_coco",
        "--filter", "lavis:blip_image_text_matching/base", *sys.argv[1:],
    ]  # fmt: skip
    with mock.patch.object(lavis.models, "load_model_and_preprocess", load):
        runpy.run_path(str(HERE.parents[1] / "launch" / "capfilt.py"), run_name="__main__")
