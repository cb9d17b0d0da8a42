"""The feature-map backbone against transformers' own language model, and through save, load, generate and stage 1's parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from free_dist.backbones import FeatureLmBackbone
from free_dist.backbones.checkpoint_hash import checkpoint_hash, loaded_from
from free_dist.backbones.efficientnet_lite import BATCH_NORM_EPS, STAGES, STRIDE, WIDTH, EfficientNetLite, folded
from free_dist.backbones.smollm2 import joined, new_image_processor
from free_dist.config import FinetuneConfig, UserError
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import SampleEncoder, Turn
from free_dist.decoding import generate
from free_dist.evaluation.benchmark import hf_generate
from free_dist.exits import ExitBank
from free_dist.training.stage1_result import save_backbone
from free_dist.training.trained_parts import train_parts

SIZE = 64


def new_backbone(vocab_size: int) -> FeatureLmBackbone:
    torch.manual_seed(0)
    text = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
            initializer_range=0.3,
        )
    )
    model = joined(text, EfficientNetLite().state_dict(), n_queries=3, width=64, n_layers=1, image_size=SIZE)
    return FeatureLmBackbone(model.requires_grad_(False))


@pytest.fixture(scope="module")
def backbone(tiny_tokenizer: PreTrainedTokenizerBase) -> FeatureLmBackbone:
    return new_backbone(len(tiny_tokenizer))


@pytest.fixture(scope="module")
def directory(
    backbone: FeatureLmBackbone, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("feature_lm") / "backbone"
    processor = new_image_processor(SIZE)
    save_backbone(backbone, SampleEncoder(tiny_tokenizer, processor, backbone.layout, backbone.max_positions), path)
    return path


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def published_weights() -> dict[str, torch.Tensor]:
    """Random weights under the published names, batch norms apart."""
    draw = torch.Generator().manual_seed(2)
    named: dict[str, torch.Tensor] = {"_fc.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}

    def layer(conv: str, norm: str, shape: tuple[int, ...]) -> None:
        fan_in = shape[1] * shape[2] * shape[3]
        named[f"{conv}.weight"] = torch.randn(shape, generator=draw) * (2 / fan_in) ** 0.5
        for part in ("weight", "running_var"):
            named[f"{norm}.{part}"] = torch.rand(shape[0], generator=draw) + 0.5
        for part in ("bias", "running_mean"):
            named[f"{norm}.{part}"] = torch.randn(shape[0], generator=draw) * 0.1
        named[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    layer("_conv_stem", "_bn0", (32, 3, 3, 3))
    index, channels = 0, 32
    for repeats, kernel, _, expansion, n_out in STAGES:
        for _ in range(repeats):
            name, inner = f"_blocks.{index}", channels * expansion
            if expansion > 1:
                layer(f"{name}._expand_conv", f"{name}._bn0", (inner, channels, 1, 1))
            layer(f"{name}._depthwise_conv", f"{name}._bn1", (inner, 1, kernel, kernel))
            layer(f"{name}._project_conv", f"{name}._bn2", (n_out, inner, 1, 1))
            index, channels = index + 1, n_out
    layer("_conv_head", "_bn1", (1280, 320, 1, 1))
    return named


def reference_features(named: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    """The network in float64 with its batch norms, straight from the published names."""

    def conv(name: str, norm: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = named[f"{name}.weight"].double()
        groups = x.shape[1] // weight.shape[1]
        need = max((-(-x.shape[-1] // stride) - 1) * stride + weight.shape[-1] - x.shape[-1], 0)
        x = F.pad(x, (need // 2, need - need // 2, need // 2, need - need // 2))
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        parts = (named[f"{norm}.{part}"].double() for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=BATCH_NORM_EPS)

    x = F.relu6(conv("_conv_stem", "_bn0", image.double(), 2))
    index = 0
    for repeats, _, stride, expansion, n_out in STAGES:
        for place in range(repeats):
            name, step = f"_blocks.{index}", stride if place == 0 else 1
            inner = F.relu6(conv(f"{name}._expand_conv", f"{name}._bn0", x)) if expansion > 1 else x
            inner = F.relu6(conv(f"{name}._depthwise_conv", f"{name}._bn1", inner, step))
            inner = conv(f"{name}._project_conv", f"{name}._bn2", inner)
            x = x + inner if step == 1 and x.shape[1] == n_out else inner
            index += 1
    return F.relu6(conv("_conv_head", "_bn1", x))


def test_folded_convolutions_equal_convolutions_with_batch_norm() -> None:
    named = published_weights()
    network = EfficientNetLite()
    network.load_state_dict(folded(named))
    with torch.no_grad():
        torch.testing.assert_close(
            network(pixels(2)).double(), reference_features(named, pixels(2)), atol=1e-3, rtol=1e-4
        )


def test_vision_weights_of_another_network_are_refused() -> None:
    named = published_weights()
    with pytest.raises(UserError, match=r"_blocks\.16"):
        folded(named | {"_blocks.16._depthwise_conv.weight": torch.zeros(1)})
    del named["_bn1.bias"]
    with pytest.raises(UserError, match=r"_bn1\.bias"):
        folded(named)


@torch.no_grad()
def test_logits_are_those_of_the_language_model_behind_the_prefix(backbone: FeatureLmBackbone) -> None:
    prefix = backbone.encode_prefix(pixels(2))
    ids = torch.tensor([[backbone.layout.image_token_id] * 3 + [2, 5, 6, 7]] * 2)
    embedded = torch.cat((prefix, backbone.model.get_input_embeddings()(ids[:, 3:])), dim=1)
    expected = backbone.model.language_model(inputs_embeds=embedded, output_hidden_states=True)
    features = backbone(pixels(2), torch.arange(2), ids, (1, 3))
    torch.testing.assert_close(backbone.lm_head(features.final), expected.logits, atol=1e-5, rtol=1e-5)
    for k, tapped in zip((1, 3), features.exits, strict=True):
        torch.testing.assert_close(tapped, expected.hidden_states[k], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_feature_maps_stand_for_the_pixels_they_were_made_of(backbone: FeatureLmBackbone) -> None:
    maps = backbone.feature_maps(pixels(3))
    assert maps.shape == (3, WIDTH, SIZE // STRIDE, SIZE // STRIDE)
    assert torch.equal(backbone.encode_prefix(maps), backbone.encode_prefix(pixels(3)))
    assert not torch.equal(backbone.encode_prefix(maps[:1]), backbone.encode_prefix(maps[1:2]))


def test_other_channels_are_refused(backbone: FeatureLmBackbone) -> None:
    with pytest.raises(ValueError, match="feature maps"):
        backbone.encode_prefix(torch.zeros(1, 4, SIZE, SIZE))


def test_generation_equals_transformers_and_lossless_exits_change_nothing(
    directory: Path, backbone: FeatureLmBackbone
) -> None:
    loaded, encoder = load_pretrained(str(directory))
    prompt = encoder.encode_prompt([Turn(prompt="what color is the circle?", answer="")])
    full = generate(loaded, None, pixels(1), [prompt], max_new_tokens=8, eos_token_id=-1)
    assert hf_generate(loaded, pixels(1), prompt, max_new_tokens=8, eos=-1).tokens == full[0].tokens
    maps = backbone.feature_maps(pixels(1))
    bank = ExitBank(loaded, [1, 3]).eval()
    options = {"max_new_tokens": 8, "eos_token_id": -1, "thresholds": 0.05}
    exits = generate(loaded, bank, maps, [prompt], **options)
    assert any(layer is not None for layer in exits[0].exit_layers)
    assert generate(loaded, bank, maps, [prompt], lossless=True, **options)[0].tokens == full[0].tokens


def test_a_saved_directory_loads_with_the_same_weights_and_hash(directory: Path, backbone: FeatureLmBackbone) -> None:
    loaded, encoder = load_pretrained(str(directory))
    assert isinstance(loaded, FeatureLmBackbone)
    assert loaded_from(loaded) == directory
    for (name, stored), held in zip(loaded.named_parameters(), backbone.parameters(), strict=True):
        assert torch.equal(stored, held), name
    again = directory.parent / "again"
    save_backbone(loaded, encoder, again)
    assert checkpoint_hash(again) == checkpoint_hash(directory)


def test_stage_1_trains_connector_and_low_rank_updates_but_no_vision(directory: Path) -> None:
    loaded, _ = load_pretrained(str(directory))
    train_parts(loaded.model, FinetuneConfig(train=["qformer", "projection", "lora"], lora_rank=2))
    trained = {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    beginnings = {name.split(".")[0] for name in trained}
    assert beginnings == {"query_tokens", "qformer", "language_projection", "language_model"}
    assert all(".lora_" in name for name in trained if name.startswith("language_model"))
    ids = torch.tensor([[loaded.layout.image_token_id] * 3 + [2, 5, 6]])
    loaded(loaded.feature_maps(pixels(1)), torch.tensor([0]), ids, ()).final.sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters() if parameter.requires_grad)
