"""The BLIP-2 adapter against transformers' own forward and generate, on random models."""

from __future__ import annotations

import itertools

import pytest
import torch

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import HEAD_TO_BLOCK, new_model


@pytest.fixture(scope="module")
def backbone() -> Blip2Backbone:
    model = new_model(width=32, n_blocks=4, n_heads=2).eval().requires_grad_(False)
    # Random initial weights are so small that every block is nearly the identity; larger ones make a difference visible.
    for parameter in model.language_model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(4.0)
    return Blip2Backbone(model)


@pytest.fixture(scope="module")
def inputs(backbone: Blip2Backbone) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 64, 64, generator=generator)
    ids = torch.randint(5, 90, (3, 21), generator=generator)
    ids[:, : backbone.layout.num_query_tokens] = backbone.layout.image_token_id
    return pixels, ids


def reference(
    backbone: Blip2Backbone, pixels: torch.Tensor, ids: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    output = backbone.model(
        pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
    )
    return output.language_model_outputs.hidden_states, output.logits


def test_features_after_every_block_and_logits_equal_hugging_face(backbone, inputs) -> None:
    pixels, ids = inputs
    hidden_states, logits = reference(backbone, pixels, ids)
    features = backbone(pixels, torch.arange(3), ids, range(1, backbone.n_blocks))
    for k, ours in enumerate(features.exits, start=1):
        torch.testing.assert_close(ours, hidden_states[k], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.final, hidden_states[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone.lm_head(features.final), logits, rtol=1e-5, atol=1e-5)


def test_neighbouring_blocks_differ_more_than_the_tolerance(backbone, inputs) -> None:
    pixels, ids = inputs
    exits = backbone(pixels, torch.arange(3), ids, range(1, backbone.n_blocks)).exits
    for earlier, later in itertools.pairwise(exits):
        assert (earlier - later).abs().max() > 1e-2


def test_rows_that_share_an_image_equal_rows_with_their_own(backbone, inputs) -> None:
    pixels, ids = inputs
    shared = backbone(pixels[:2], torch.tensor([0, 1, 1]), ids, (2,))
    own = backbone(pixels[[0, 1, 1]], torch.arange(3), ids, (2,))
    torch.testing.assert_close(shared.final, own.final, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared.exits[0], own.exits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [1, 8, 20])
def test_cached_blocks_equal_uncached(backbone, inputs, split: int) -> None:
    pixels, ids = inputs
    prefix = backbone.encode_prefix(pixels)
    whole = backbone.run_blocks(backbone.embed(ids, prefix), 0, backbone.n_blocks)
    cache = backbone.new_cache(batch_size=3, capacity=ids.shape[1])
    hidden = backbone.embed(ids, prefix)
    parts = [backbone.run_blocks(part, 0, backbone.n_blocks, cache) for part in (hidden[:, :split], hidden[:, split:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_embedding_after_a_past_takes_the_later_positions(backbone, inputs) -> None:
    _, ids = inputs
    text = ids[:, 9:]
    padded = torch.cat([torch.full((3, 4), 7), text], dim=1)
    torch.testing.assert_close(backbone.embed(text, past_length=4), backbone.embed(padded)[:, 4:])


def test_a_full_cache_is_an_error_that_says_so(backbone, inputs) -> None:
    pixels, ids = inputs
    hidden = backbone.embed(ids, backbone.encode_prefix(pixels))
    with pytest.raises(ValueError, match="larger capacity"):
        backbone.run_blocks(hidden, 0, 1, backbone.new_cache(batch_size=3, capacity=20))


def test_truncated_cache_continues_as_if_the_rest_never_was(backbone, inputs) -> None:
    pixels, ids = inputs
    hidden = backbone.embed(ids, backbone.encode_prefix(pixels))
    cache = backbone.new_cache(batch_size=3, capacity=40)
    backbone.run_blocks(hidden[:, :10], 0, 4, cache)
    wanted = backbone.run_blocks(hidden[:, 10:], 0, 4, cache)
    for layer in cache:
        layer.truncate(10)
    torch.testing.assert_close(backbone.run_blocks(hidden[:, 10:], 0, 4, cache), wanted)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 5)])
def test_impossible_block_ranges_are_errors(backbone, inputs, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="run_blocks"):
        backbone.run_blocks(torch.zeros(1, 1, 32), start, stop)


def test_embedded_model_has_the_proportions_of_opt_2_7b() -> None:
    model = new_model()
    block = sum(p.numel() for p in model.language_model.model.decoder.layers[0].parameters())
    head = model.language_model.lm_head.weight.numel()
    assert abs(head / block - HEAD_TO_BLOCK) < 0.02
    assert model.config.text_config.num_hidden_layers >= 12


def test_missing_directory_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"backbone\.path.*nowhere"):
        Blip2Backbone.from_pretrained(tmp_path / "nowhere")


def test_a_post_norm_or_foreign_language_model_is_refused(backbone) -> None:
    model = new_model(width=32, n_blocks=2, n_heads=2)
    model.config.text_config.do_layer_norm_before = False
    with pytest.raises(ValueError, match="pre-norm OPT"):
        Blip2Backbone(model)
