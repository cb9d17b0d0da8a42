"""The BLIP-2 adapter against transformers' own forward and generate, on random models."""

from __future__ import annotations

import itertools

import pytest
import torch

from free_dist.backbones import Blip2Backbone, LayerCache
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


def run(backbone: Blip2Backbone, hidden: torch.Tensor, caches: list[LayerCache], start: int) -> torch.Tensor:
    span = backbone.new_span(start, hidden.shape[1], hidden.device)
    with torch.no_grad():
        return backbone.run_blocks(hidden, 0, len(caches), caches, span)


def new_caches(backbone: Blip2Backbone, capacity: int, n_blocks: int = 4) -> list[LayerCache]:
    return [backbone.new_layer_cache(3, capacity) for _ in range(n_blocks)]


@pytest.mark.parametrize("split", [1, 8, 20])
def test_cached_blocks_equal_uncached(backbone, inputs, split: int) -> None:
    pixels, ids = inputs
    prefix = backbone.encode_prefix(pixels)
    hidden = backbone.embed(ids, prefix)
    whole = backbone.run_blocks(hidden, 0, backbone.n_blocks)
    caches = new_caches(backbone, ids.shape[1])
    parts = [run(backbone, hidden[:, :split], caches, 0), run(backbone, hidden[:, split:], caches, split)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_the_last_position_alone_is_the_last_of_all(backbone, inputs) -> None:
    pixels, ids = inputs
    hidden = backbone.embed(ids, backbone.encode_prefix(pixels))
    wanted = run(backbone, hidden, new_caches(backbone, 21), 0)[:, -1:]
    span = backbone.new_span(0, 21, hidden.device)
    with torch.no_grad():
        ours = backbone.run_blocks(hidden, 0, 4, new_caches(backbone, 21), span, last_only=True)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_embedding_after_a_past_takes_the_later_positions(backbone, inputs) -> None:
    _, ids = inputs
    text = ids[:, 9:]
    padded = torch.cat([torch.full((3, 4), 7), text], dim=1)
    later = backbone.embed(padded)[:, 4:]
    torch.testing.assert_close(backbone.embed(text, past_length=4), later)
    one_by_row = backbone.embed(text, past_length=torch.tensor([4, 0, 4]))
    torch.testing.assert_close(one_by_row[0], later[0])
    torch.testing.assert_close(one_by_row[1], backbone.embed(text)[1])


def test_prompts_of_several_lengths_start_as_on_their_own(backbone, inputs) -> None:
    pixels, ids = inputs
    prefix = backbone.encode_prefix(pixels)
    prompts = [ids[0].tolist(), ids[1, :9].tolist(), ids[2, :15].tolist()]
    start = backbone.start(prompts, prefix)
    assert start.lengths == [21, 9, 15] and start.memory is None
    for row, prompt in enumerate(prompts):
        alone = backbone.embed(torch.tensor([prompt]), prefix[row : row + 1])[0]
        torch.testing.assert_close(start.hidden[row, : len(prompt)], alone)


def test_a_full_cache_is_an_error_that_says_so(backbone, inputs) -> None:
    pixels, ids = inputs
    hidden = backbone.embed(ids, backbone.encode_prefix(pixels))
    with pytest.raises(ValueError, match="holds 20 positions, 21 are needed"):
        run(backbone, hidden, new_caches(backbone, 20), 0)


def test_positions_that_are_written_again_continue_as_if_the_rest_never_was(backbone, inputs) -> None:
    pixels, ids = inputs
    hidden = backbone.embed(ids, backbone.encode_prefix(pixels))
    caches = new_caches(backbone, 40)
    run(backbone, hidden[:, :10], caches, 0)
    wanted = run(backbone, hidden[:, 10:], caches, 10)
    run(backbone, -hidden, caches, 10)
    torch.testing.assert_close(run(backbone, hidden[:, 10:], caches, 10), wanted)


def test_images_are_encoded_alike_with_and_without_gradients_and_when_modules_are_hooked(backbone, inputs) -> None:
    pixels, _ = inputs
    wanted = backbone.encode_prefix(pixels)
    called = []
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode_prefix(pixels), wanted, rtol=1e-5, atol=1e-5)
        for module in (backbone.model.vision_model, backbone.model.qformer):
            hook = module.register_forward_hook(lambda *_: called.append(None))
            torch.testing.assert_close(backbone.encode_prefix(pixels), wanted, rtol=1e-5, atol=1e-5)
            hook.remove()
    assert len(called) == 2, "a sharding engine gathers weights in such hooks"


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


def test_a_post_norm_language_model_is_refused(backbone) -> None:
    model = new_model(width=32, n_blocks=2, n_heads=2)
    model.config.text_config.do_layer_norm_before = False
    with pytest.raises(ValueError, match="pre-norm OPT"):
        Blip2Backbone(model)
