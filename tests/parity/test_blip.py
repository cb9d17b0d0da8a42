"""LAVIS's BLIP captioner and matching filter against transformers' classes for them, through a mapping of names.

The names of the text half are the same in both; the vision tower is a plain ViT, whose norms have epsilon 1e-6 in LAVIS and
1e-5 in transformers' default configuration.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from tests.parity.committed import REFERENCE, Reference, read_reference

pytestmark = pytest.mark.parity

TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}
"""Float32 on another processor: sums in another order."""
CLS, SEP, PAD = 2, 3, 0
VISION_NAMES = (
    (r"visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.(.+)", r"vision_model.embeddings.patch_embedding.\1"),
    (r"visual_encoder\.blocks\.(\d+)\.norm(\d)\.(.+)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(.+)", r"vision_model.encoder.layers.\1.self_attn.qkv.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.+)", r"vision_model.encoder.layers.\1.self_attn.projection.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.(.+)", r"vision_model.encoder.layers.\1.mlp.\2"),
    (r"visual_encoder\.norm\.(.+)", r"vision_model.post_layernorm.\1"),
)


def renamed(name: str) -> str:
    for pattern, replacement in VISION_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def load(model_class: Any, reference: Reference) -> Any:
    """Transformers' model with LAVIS's weights; every tensor must have its place."""
    notes, tensors = reference.notes, reference.tensors
    text = {name: notes[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    text |= {"intermediate_size": notes["intermediate_size"], "max_position_embeddings": 40, "projection_dim": 12}
    text |= {"bos_token_id": notes["vocab_size"] - 2, "sep_token_id": SEP, "pad_token_id": PAD, "eos_token_id": SEP}
    vision_width = tensors["image_embeds"].shape[-1]
    vision = {"hidden_size": vision_width, "intermediate_size": 4 * vision_width, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 3, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
    config = BlipConfig(
        text_config=text | {"encoder_hidden_size": vision_width},
        vision_config=vision,
        projection_dim=12,
        image_text_hidden_size=12,
    )
    model = model_class(config)
    weights: dict[str, Tensor] = torch.load(reference.folder / "checkpoint.pth", weights_only=True)["model"]
    placed = {renamed(name): tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
    assert placed.keys() == model.state_dict().keys()
    model.load_state_dict(placed)
    return model.eval()


@pytest.fixture(scope="module")
def caption() -> Reference:
    return read_reference(REFERENCE / "blip_caption")


@pytest.fixture(scope="module")
def matching() -> Reference:
    return read_reference(REFERENCE / "blip_itm")


@torch.no_grad()
def test_captioner_of_transformers_gives_the_logits_of_lavis(caption: Reference) -> None:
    model, tensors = load(BlipForConditionalGeneration, caption), caption.tensors
    output = model(pixel_values=tensors["image"], input_ids=tensors["input_ids"], attention_mask=tensors["mask"])
    torch.testing.assert_close(output.last_hidden_state, tensors["image_embeds"], **TOLERANCE)
    counted = tensors["mask"].bool()
    assert tensors["logits"].std() > 0.3
    torch.testing.assert_close(output.logits[counted], tensors["logits"][counted], **TOLERANCE)


def test_captioner_of_transformers_writes_the_tokens_of_lavis(caption: Reference) -> None:
    model, tensors = load(BlipForConditionalGeneration, caption), caption.tensors
    opening = caption.notes["generated"][0][:4]
    assert all(tokens[:4] == opening for tokens in caption.notes["generated"]), "the prompt"
    for row, wanted in enumerate(caption.notes["generated"]):
        # transformers cuts off the last token of a prompt, which is [SEP] as tokenizers make it.
        prompt = torch.tensor([[*opening, SEP]])
        made = model.generate(
            tensors["image"][row : row + 1], input_ids=prompt, max_length=len(wanted), do_sample=False, num_beams=1
        )
        assert made[0].tolist() == wanted


@torch.no_grad()
def test_filter_of_transformers_gives_the_scores_of_lavis_if_texts_open_with_enc(matching: Reference) -> None:
    model, tensors = load(BlipForImageTextRetrieval, matching), matching.tensors
    asked = {"pixel_values": tensors["image"], "attention_mask": tensors["mask"]}
    opened = tensors["input_ids"]
    assert (opened[:, 0] == matching.notes["vocab_size"] - 1).all(), "[ENC] is the last token"
    torch.testing.assert_close(model(input_ids=opened, **asked).itm_score, tensors["itm"], **TOLERANCE)
    plain = torch.cat((torch.full_like(opened[:, :1], CLS), opened[:, 1:]), 1)
    assert (model(input_ids=plain, **asked).itm_score - tensors["itm"]).abs().max() > 1e-3, (
        "[CLS] in its place does not"
    )
    similarity = model(input_ids=plain, use_itm_head=False, **asked).itm_score
    torch.testing.assert_close(similarity, tensors["itc"], **TOLERANCE)
