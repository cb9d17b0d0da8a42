"""The connector's loss is what it says, and training it makes the prefix say the words of held-in images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from free_dist.backbones import FeatureLmBackbone
from free_dist.backbones.efficientnet_lite import EfficientNetLite
from free_dist.backbones.smollm2 import joined, new_image_processor
from free_dist.config import DataConfig, FinetuneConfig, Recipe, UserError
from free_dist.data.records import Question, Record
from free_dist.data.samples import SampleEncoder
from free_dist.data.stream import records
from free_dist.training.connector import BEST, SHARPNESS, pretrain_connector, record_words, word_loss, word_tokens


def test_the_loss_is_the_power_mean_over_queries_written_out() -> None:
    torch.manual_seed(0)
    embedded = F.normalize(torch.randn(7, 5), dim=-1)
    prefix = F.normalize(torch.randn(2, 3, 5), dim=-1)  # of the embeddings' length, so no term for size
    present = [[1, 4], [6]]
    expected = 0.0
    for image, words in enumerate(present):
        for word in words:
            said = [
                math.exp(SHARPNESS * query @ embedded[word]) / sum(math.exp(SHARPNESS * query @ e) for e in embedded)
                for query in prefix[image]
            ]
            expected -= math.log(sum(p**BEST for p in said) / len(said)) / BEST / len(words) / len(present)
    assert word_loss(prefix, embedded, present).item() == pytest.approx(expected, rel=1e-4)


def test_one_word_to_a_query_is_better_than_the_mixture_in_every_query() -> None:
    embedded = torch.eye(4)
    apart = torch.stack((embedded[0], embedded[1]))[None]
    mixed = F.normalize(embedded[0] + embedded[1], dim=0).expand(1, 2, 4)
    assert word_loss(apart, embedded, [[0, 1]]) < word_loss(mixed, embedded, [[0, 1]])


def test_a_prefix_of_another_length_than_the_embeddings_costs() -> None:
    embedded = torch.eye(4)
    assert word_loss(3 * embedded[None, :1], embedded, [[0]]) > word_loss(embedded[None, :1], embedded, [[0]])


def test_words_are_answers_or_those_of_captions_where_nothing_was_asked() -> None:
    assert record_words(
        Record(key="a", image=b"", questions=(Question(question="?", answers=("Red",)),), captions=("no blue",))
    ) == {"red"}
    assert record_words(Record(key="a", image=b"", captions=("A green tree", "an oak"))) == {"green", "tree", "oak"}


def test_words_of_every_image_tell_nothing(tiny_encoder: SampleEncoder) -> None:
    same = [Record(key=str(i), image=b"", captions=("a tree",)) for i in range(4)]
    with pytest.raises(UserError, match="vision_steps=0"):
        word_tokens(tiny_encoder, same)


def test_training_the_connector_makes_the_prefix_say_the_words(
    tiny_encoder: SampleEncoder, tiny_data: DataConfig
) -> None:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(tiny_encoder.tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=1,
    )  # fmt: skip
    model = joined(LlamaForCausalLM(text), EfficientNetLite().state_dict(), n_queries=3, width=64, n_layers=1)
    backbone = FeatureLmBackbone(model.requires_grad_(False))
    encoder = SampleEncoder(tiny_encoder.tokenizer, new_image_processor(64), backbone.layout, 128)
    images = [record.image for record in records(Path(tiny_data.root), "train")]
    with torch.no_grad():
        maps = dict(
            zip(images, backbone.feature_maps(torch.stack([encoder.encode_image(i) for i in images])), strict=True)
        )
    encoder.visual_cache = maps.__getitem__
    settings = FinetuneConfig(batch_size=12, learning_rate=3e-3)
    recipe = Recipe(data=tiny_data, finetune=settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = word_tokens(encoder, records(Path(tiny_data.root), "train"))

    def loss() -> float:
        images, present = [], []
        for record in records(Path(tiny_data.root), "train"):
            words = sorted(record_words(record) & tokens.keys())
            if words:
                images.append(encoder.encode_image(record.image))
                present.append([tokens[word] for word in words])
        with torch.no_grad():
            prefix = backbone.encode_prefix(torch.stack(images))
            return word_loss(prefix, model.get_input_embeddings().weight, present).item()

    untrained = loss()
    pretrain_connector(backbone, encoder, recipe, steps=40)
    assert loss() < 0.7 * untrained
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    for name, tensor in model.state_dict().items():
        moved = name.startswith(("qformer.", "query_tokens", "language_projection."))
        assert moved or torch.equal(tensor, before[name]), name
