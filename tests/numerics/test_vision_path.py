"""The lean vision tower and Q-Former against transformers' own modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import resolve_backbone
from free_dist.backbones.vision_path import encode_patches, run_qformer, supports_qformer, supports_vision
from free_dist.config import UserError

QUERIES = 5


def random_model(
    *, vision: dict | None = None, qformer: dict | None = None, attention: str = "sdpa"
) -> Blip2ForConditionalGeneration:
    """A small BLIP-2 in float64 whose every weight matters: no bias is zero and no norm is one, as they initially are.

    By default heads are 88 wide and patches 14 pixels, as in the published vision tower, and the Q-Former's width is its own.
    """
    tower = {"hidden_size": 176, "num_attention_heads": 2, "intermediate_size": 96, "image_size": 42, "patch_size": 14}
    former = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80, "vocab_size": 16}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**(tower | {"num_hidden_layers": 2} | (vision or {}))),
        qformer_config=Blip2QFormerConfig(**(former | {"num_hidden_layers": 3} | (qformer or {}))),
        text_config=OPTConfig(
            vocab_size=32,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
        num_query_tokens=QUERIES,
        image_token_index=4,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(mean=1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, std=0.2)
    return model


def pixels_for(model: Blip2ForConditionalGeneration, images: int, *size: int) -> Tensor:
    height, width = size or 2 * (model.config.vision_config.image_size,)
    weight = model.vision_model.embeddings.class_embedding
    return torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)


def reference(model: Blip2ForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    patches = model.vision_model(pixel_values=pixels).last_hidden_state
    queries = model.query_tokens.expand(len(pixels), -1, -1)
    return patches, model.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state


def lean(model: Blip2ForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    patches = encode_patches(model.vision_model, pixels)
    return patches, run_qformer(model.qformer, model.query_tokens, patches)


def assert_lean_equals_reference(model: Blip2ForConditionalGeneration, pixels: Tensor, *, atol: float) -> None:
    for ours, theirs in zip(lean(model, pixels), reference(model, pixels), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def model() -> Blip2ForConditionalGeneration:
    return random_model()


@pytest.fixture(scope="module")
def embedded() -> Blip2ForConditionalGeneration:
    return Blip2Backbone.from_pretrained(resolve_backbone("embedded")).model


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision": {"qkv_bias": False}},
        {"vision": {"hidden_act": "quick_gelu"}, "qformer": {"hidden_act": "relu"}},
        {"qformer": {"cross_attention_frequency": 1}},
        {"qformer": {"use_qformer_text_input": True}},
        {"attention": "eager"},
    ],
    ids=["published", "no_qkv_bias", "other_activations", "cross_attention_everywhere", "text_layers_present", "eager"],
)
def test_both_towers_equal_hugging_face_in_float64(changes: dict, images: int) -> None:
    model = random_model(**changes)
    assert supports_vision(model) and supports_qformer(model)
    assert_lean_equals_reference(model, pixels_for(model, images), atol=1e-10)


@pytest.mark.parametrize("images", [1, 4])
def test_trained_embedded_model_equals_hugging_face_in_float32(embedded, images: int) -> None:
    assert supports_vision(embedded) and supports_qformer(embedded)
    with torch.inference_mode():
        assert_lean_equals_reference(embedded, pixels_for(embedded, images), atol=1e-5)


def test_images_and_weights_change_the_output_by_more_than_the_tolerance(model) -> None:
    patches, queries = lean(model, pixels_for(model, 2))
    assert (patches[0] - patches[1]).abs().max() > 1e-2
    assert (queries[0] - queries[1]).abs().max() > 1e-2
    changed = copy.deepcopy(model)
    for tower, index in ((changed.vision_model, 0), (changed.qformer, 1)):
        for name, parameter in tower.named_parameters():
            kept = parameter.clone()
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
            moved = (lean(changed, pixels_for(model, 2))[index] - (patches, queries)[index]).abs().max()
            parameter.copy_(kept)
            # A key's bias shifts all scores of one query alike, which softmax does not see.
            assert moved > 1e-6 or name.endswith("key.bias"), name


def test_a_changed_or_replaced_weight_is_followed() -> None:
    model = random_model()
    pixels = pixels_for(model, 1)
    lean(model, pixels)
    model.vision_model.encoder.layers[1].mlp.fc2.weight.mul_(2.0)
    model.qformer.layernorm.weight = nn.Parameter(model.qformer.layernorm.weight * 3.0)
    assert_lean_equals_reference(model, pixels, atol=1e-10)


def test_inputs_are_left_alone(model) -> None:
    pixels = pixels_for(model, 2)
    patches = encode_patches(model.vision_model, pixels)
    kept = [tensor.clone() for tensor in (pixels, patches, model.query_tokens)]
    lean(model, pixels)
    run_qformer(model.qformer, model.query_tokens, patches)
    assert all(torch.equal(now, then) for now, then in zip((pixels, patches, model.query_tokens), kept, strict=True))


def test_gradients_to_the_pixels_equal_hugging_face(model) -> None:
    gradients = []
    for path in (lean, reference):
        pixels = pixels_for(model, 2).requires_grad_()
        path(model, pixels)[1].square().sum().backward()
        gradients.append(pixels.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_half_precision_tower_with_float32_qformer_keeps_both_precisions() -> None:
    model = random_model()
    model.vision_model.bfloat16()
    model.qformer.float()
    model.query_tokens.data = model.query_tokens.data.float()
    pixels = pixels_for(model, 2).float()
    ours, theirs = lean(model, pixels), reference(model, pixels)
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in theirs] == [torch.bfloat16, torch.float32]
    # bfloat16 has eight bits of mantissa, and norms bring values to the size of one.
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=5e-2)
    exact = model.qformer(query_embeds=model.query_tokens.expand(2, -1, -1), encoder_hidden_states=ours[0])
    torch.testing.assert_close(ours[1], exact.last_hidden_state, rtol=0, atol=1e-5)


def test_wrapped_linear_maps_run_as_modules() -> None:
    model = random_model()
    layer, query_layer = model.vision_model.encoder.layers[0], model.qformer.encoder.layer[0]
    layer.self_attn.qkv = nn.Sequential(layer.self_attn.qkv, nn.Tanh())
    layer.mlp.fc2 = nn.Sequential(layer.mlp.fc2, nn.Tanh())
    query_layer.output_query.dense = nn.Sequential(query_layer.output_query.dense, nn.Tanh())
    assert supports_vision(model) and supports_qformer(model)
    assert_lean_equals_reference(model, pixels_for(model, 2), atol=1e-10)


@pytest.mark.parametrize("size", [(28, 28), (28, 42), (45, 43), (14, 126)])
def test_other_sizes_that_hugging_face_takes_give_the_same(model, size: tuple[int, int]) -> None:
    assert_lean_equals_reference(model, pixels_for(model, 2, *size), atol=1e-10)


@pytest.mark.parametrize("size", [(56, 56), (42, 56), (13, 42)])
def test_sizes_that_hugging_face_refuses_are_refused_by_name(model, size: tuple[int, int]) -> None:
    pixels = pixels_for(model, 1, *size)
    with pytest.raises(RuntimeError):
        model.vision_model(pixel_values=pixels)
    with pytest.raises(UserError, match=rf"pixel_values: {size[0]} x {size[1]}.*preprocessor_config\.json"):
        encode_patches(model.vision_model, pixels)


def replace_attention_class(model: Blip2ForConditionalGeneration) -> None:
    attention = model.vision_model.encoder.layers[1].self_attn
    attention.__class__ = type("OwnAttention", (type(attention),), {})


def override_a_leafs_forward(model: Blip2ForConditionalGeneration) -> None:
    linear = model.qformer.encoder.layer[0].output_query.dense
    linear.forward = lambda hidden: nn.Linear.forward(linear, hidden)


def replace_a_norm_class(model: Blip2ForConditionalGeneration) -> None:
    norm = model.qformer.encoder.layer[1].output_query.LayerNorm
    norm.__class__ = type("OwnNorm", (nn.LayerNorm,), {})


def add_an_adapter(model: Blip2ForConditionalGeneration) -> None:
    model.qformer.encoder.layer[2].adapter = nn.Linear(48, 48)


def let_patches_overlap(model: Blip2ForConditionalGeneration) -> None:
    model.vision_model.embeddings.patch_embedding.stride = (7, 7)


def choose_another_attention(model: Blip2ForConditionalGeneration) -> None:
    model.qformer.config._attn_implementation = "flex_attention"


def feed_forward_in_chunks(model: Blip2ForConditionalGeneration) -> None:
    model.qformer.config.chunk_size_feed_forward = 1


def take_another_vision_tower(model: Blip2ForConditionalGeneration) -> None:
    model.vision_model = nn.Identity()


@pytest.mark.parametrize(
    ("change", "still_supports"),
    [
        (replace_attention_class, supports_qformer),
        (replace_a_norm_class, supports_vision),
        (override_a_leafs_forward, supports_vision),
        (add_an_adapter, supports_vision),
        (let_patches_overlap, supports_qformer),
        (choose_another_attention, supports_vision),
        (feed_forward_in_chunks, supports_vision),
        (take_another_vision_tower, supports_qformer),
    ],
)
def test_a_structure_that_is_not_written_out_is_unsupported_in_its_own_half(change, still_supports) -> None:
    model = random_model()
    change(model)
    assert [half for half in (supports_vision, supports_qformer) if half(model)] == [still_supports]
