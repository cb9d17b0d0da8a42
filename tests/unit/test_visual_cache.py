"""A visual cache gives what pixels give, and never what belongs to other weights, sizes or images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from free_dist.backbones import FeatureLmBackbone
from free_dist.backbones.efficientnet_lite import EfficientNetLite
from free_dist.backbones.smollm2 import joined, new_image_processor
from free_dist.config import ConfigError, DataConfig, FinetuneConfig, MissingFileError, Recipe, UserError
from free_dist.data.samples import SampleEncoder
from free_dist.data.stream import records, training_batches
from free_dist.data.visual_cache import MAPS, VisualCache, make_cache, use_visual_cache
from free_dist.recipe_checks import check_recipe
from free_dist.training.finetune import answer_loss

SIZE = 64
Made = tuple[FeatureLmBackbone, SampleEncoder, Path]


@pytest.fixture
def made(tiny_tokenizer: PreTrainedTokenizerBase, tiny_data: DataConfig, tmp_path: Path) -> Made:
    """A small backbone, its encoder and a cache of the training images."""
    torch.manual_seed(0)
    width = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = LlamaConfig(vocab_size=len(tiny_tokenizer), num_hidden_layers=1, max_position_embeddings=256, **width)
    text.pad_token_id = 1
    model = joined(LlamaForCausalLM(text), EfficientNetLite().state_dict(), n_queries=2, width=64, n_layers=1)
    backbone = FeatureLmBackbone(model.requires_grad_(False))
    backbone.model.config.vision_config.image_size = SIZE
    encoder = SampleEncoder(tiny_tokenizer, new_image_processor(SIZE), backbone.layout, backbone.max_positions)
    make_cache(tmp_path / "cache", images_of(tiny_data, "train"), backbone, encoder)
    return backbone, encoder, tmp_path / "cache"


def images_of(data: DataConfig, split: str) -> list[bytes]:
    return [record.image for record in records(Path(data.root), split)]


def test_the_loss_from_the_cache_is_the_loss_from_pixels(made: Made, tiny_data: DataConfig) -> None:
    backbone, encoder, directory = made

    def losses() -> list[float]:
        batches = training_batches(tiny_data, encoder, seed=0, micro_batch_size=4)
        return [answer_loss(backbone, next(batches)).item() for _ in range(3)]

    from_pixels = losses()
    use_visual_cache(replace(tiny_data, visual_cache=str(directory)), backbone, encoder)
    assert encoder.encode_image(images_of(tiny_data, "train")[0]).shape == backbone.feature_shape()
    assert losses() == pytest.approx(from_pixels, abs=1e-6)


def test_an_image_is_kept_once(made: Made, tiny_data: DataConfig, tmp_path: Path) -> None:
    backbone, encoder, _ = made
    images = images_of(tiny_data, "test")
    make_cache(tmp_path / "twice", [*images, *images], backbone, encoder)
    assert len(VisualCache(tmp_path / "twice", backbone, encoder)) == len(set(images))


def test_an_image_that_is_not_in_the_cache_is_an_error(made: Made, tiny_data: DataConfig) -> None:
    cache = VisualCache(made[2], made[0], made[1])
    with pytest.raises(UserError, match="lacks an image"):
        cache(images_of(tiny_data, "test")[0])


def test_a_cache_of_other_weights_is_stale(made: Made) -> None:
    backbone, encoder, directory = made
    backbone.model.vision_model.network.head.bias.data[0] += 1
    with pytest.raises(UserError, match=r"weights.*stale"):
        VisualCache(directory, backbone, encoder)


def test_a_cache_of_another_image_processor_is_stale(made: Made) -> None:
    backbone, encoder, directory = made
    encoder.image_processor = new_image_processor(2 * SIZE)
    with pytest.raises(UserError, match=r"processor.*stale"):
        VisualCache(directory, backbone, encoder)


def test_a_cache_that_was_cut_short_or_interrupted_is_refused(made: Made, tiny_data: DataConfig) -> None:
    backbone, encoder, directory = made
    content = (directory / MAPS).read_bytes()
    (directory / MAPS).write_bytes(content[:-4])
    with pytest.raises(UserError, match="cut short"):
        VisualCache(directory, backbone, encoder)

    def broken() -> list[bytes]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_cache(directory, (image for _ in range(1) for image in broken()), backbone, encoder)
    with pytest.raises(MissingFileError, match="cache_vision"):
        VisualCache(directory, backbone, encoder)


def test_a_recipe_cannot_train_or_move_what_is_cached() -> None:
    data = DataConfig(visual_cache="cache")
    for settings in (
        FinetuneConfig(train=["all"]),
        FinetuneConfig(train=["vision"]),
        FinetuneConfig(augment_images=True),
    ):
        with pytest.raises(ConfigError, match="visual_cache"):
            check_recipe(Recipe(data=data, finetune=settings))
    check_recipe(Recipe(data=data))
