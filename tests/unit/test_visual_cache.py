"""A visual cache gives what pixels give, and never what belongs to other weights, sizes or images."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from free_dist.backbones import Blip2Backbone, FeatureLmBackbone
from free_dist.backbones.efficientnet_lite import EfficientNetLite
from free_dist.backbones.embedded import new_image_processor as new_pixel_processor
from free_dist.backbones.embedded import new_model
from free_dist.backbones.smollm2 import joined, new_image_processor
from free_dist.config import (
    UNTRAINED_BACKBONE,
    ConfigError,
    DataConfig,
    ExitsConfig,
    FinetuneConfig,
    LossConfig,
    MissingFileError,
    Recipe,
    UserError,
)
from free_dist.data.pretrained import load_pretrained
from free_dist.data.quarantine import BadSample
from free_dist.data.samples import IGNORE, SampleEncoder
from free_dist.data.stream import records, split_samples, training_batches
from free_dist.data.visual_cache import INDEX, VisualCache, image_digest, use_visual_cache
from free_dist.data.visual_cache_maker import (
    FILES,
    CacheMaker,
    cache_bytes,
    damaged_files,
    features_shape,
    make_cache,
)
from free_dist.exits import ExitBank
from free_dist.planning.vision_share import vision_share
from free_dist.planning.workload import workload
from free_dist.recipe_checks import check_recipe
from free_dist.training.finetune import answer_loss
from free_dist.training.stage1_result import save_backbone
from free_dist.training.step import task_loss
from launch import cache_vision

SIZE = 64
SMALL_FILES = 5 * 65 * 128 * 4
"""Bytes of five images' features of the small BLIP-2; the other backbone's are smaller."""
Made = tuple[Blip2Backbone, SampleEncoder, Path]


def feature_lm(tokenizer: PreTrainedTokenizerBase) -> tuple[Blip2Backbone, SampleEncoder]:
    torch.manual_seed(0)
    width = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=256, initializer_range=0.3, **width
    )
    text.pad_token_id = 1
    vision = EfficientNetLite()
    for parameter in vision.parameters():  # a network without training hands little of an image on
        parameter.data.mul_(2 if parameter.dim() > 1 else 1)
    model = joined(LlamaForCausalLM(text), vision.state_dict(), n_queries=2, width=64, n_layers=1)
    model.language_projection.weight.data.mul_(20)
    backbone = FeatureLmBackbone(model.eval().requires_grad_(False))
    backbone.model.config.vision_config.image_size = SIZE
    return backbone, SampleEncoder(tokenizer, new_image_processor(SIZE), backbone.layout, backbone.max_positions)


def blip2(tokenizer: PreTrainedTokenizerBase) -> tuple[Blip2Backbone, SampleEncoder]:
    backbone = Blip2Backbone(new_model(width=32, n_blocks=4, n_heads=2).eval().requires_grad_(False))
    backbone.model.language_projection.weight.data.mul_(20)
    return backbone, SampleEncoder(tokenizer, new_pixel_processor(), backbone.layout, backbone.max_positions)


BACKBONES: dict[str, Callable[[PreTrainedTokenizerBase], tuple[Blip2Backbone, SampleEncoder]]] = {
    "feature_lm": feature_lm,
    "blip-2": blip2,
}


@pytest.fixture(params=BACKBONES)
def made(
    request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerBase, tiny_data: DataConfig, tmp_path: Path
) -> Made:
    """A small backbone, its encoder and a cache of the training images in several files."""
    backbone, encoder = BACKBONES[request.param](tiny_tokenizer)
    make_cache(tmp_path / "cache", images_of(tiny_data, "train"), backbone, encoder, shard_bytes=SMALL_FILES)
    return backbone, encoder, tmp_path / "cache"


@pytest.fixture
def made_blip2(tiny_tokenizer: PreTrainedTokenizerBase, tiny_data: DataConfig, tmp_path: Path) -> Made:
    backbone, encoder = blip2(tiny_tokenizer)
    make_cache(tmp_path / "cache", images_of(tiny_data, "train"), backbone, encoder, shard_bytes=SMALL_FILES)
    return backbone, encoder, tmp_path / "cache"


def images_of(data: DataConfig, split: str) -> list[bytes]:
    return [record.image for record in records(Path(data.root), split)]


def on_disk(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- the same numbers ------------------------------------------------------------------------------------------------


def stage_1_losses(backbone: Blip2Backbone, encoder: SampleEncoder, data: DataConfig) -> list[float]:
    batches = training_batches(data, encoder, seed=0, micro_batch_size=4)
    return [answer_loss(backbone, next(batches)).item() for _ in range(3)]


def stage_2_step(backbone: Blip2Backbone, encoder: SampleEncoder, data: DataConfig) -> list[torch.Tensor]:
    """Losses of the exits, and the exits' weights after one optimizer step."""
    torch.manual_seed(0)
    bank = ExitBank(backbone, (1,))
    optimizer = torch.optim.SGD([p for p in bank.parameters() if p.requires_grad], lr=0.1)
    batch = next(training_batches(data, encoder, seed=0, micro_batch_size=4))
    answers = batch.targets != IGNORE
    with torch.no_grad():
        features = backbone(**batch.inputs(), exit_layers=bank.exit_layers)
    fake = bank(features.exits, answers, memory=features.memory, span=features.span)
    losses = task_loss(bank, fake, features.final[answers], batch.targets[answers], LossConfig())
    losses.sum().backward()
    optimizer.step()
    return [losses.detach(), *(p.detach() for p in bank.parameters() if p.requires_grad)]


def test_stage_1_losses_and_a_stage_2_step_from_the_cache_are_those_from_pixels(made: Made, tiny_data: DataConfig):
    backbone, encoder, directory = made
    losses, step = stage_1_losses(backbone, encoder, tiny_data), stage_2_step(backbone, encoder, tiny_data)
    use_visual_cache(replace(tiny_data, visual_cache=str(directory)), backbone, encoder)
    assert encoder.encode_image(images_of(tiny_data, "train")[0]).dim() == 2
    assert stage_1_losses(backbone, encoder, tiny_data) == pytest.approx(losses, abs=1e-5)
    for ours, wanted in zip(stage_2_step(backbone, encoder, tiny_data), step, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def test_features_of_another_image_would_change_the_loss(made: Made, tiny_data: DataConfig) -> None:
    backbone, encoder, directory = made
    losses = stage_1_losses(backbone, encoder, tiny_data)
    cache = VisualCache(directory, backbone, encoder)
    other = images_of(tiny_data, "train")[0]
    encoder.visual_cache = lambda _image: cache(other)
    changes = [abs(a - b) for a, b in zip(stage_1_losses(backbone, encoder, tiny_data), losses, strict=True)]
    assert max(changes) > 1e-3


def test_features_are_what_the_vision_tower_gives(made: Made, tiny_data: DataConfig) -> None:
    backbone, encoder, directory = made
    cache = VisualCache(directory, backbone, encoder)
    for image in images_of(tiny_data, "train"):
        with torch.no_grad():
            wanted = backbone.encode_patches(encoder.encode_image(image)[None])[0]
        assert cache(image).dtype == torch.float32
        torch.testing.assert_close(cache(image), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("store", ["bfloat16", "float16"])
def test_half_precision_takes_half_the_disk_and_stays_near(
    made_blip2: Made, tiny_data: DataConfig, tmp_path: Path, store: str
) -> None:
    backbone, encoder, _ = made_blip2
    losses = stage_1_losses(backbone, encoder, tiny_data)
    images = images_of(tiny_data, "train")
    make_cache(tmp_path / "half", images, backbone, encoder, store=store)
    stored = sum(path.stat().st_size for path in (tmp_path / "half").glob(FILES))
    planned = cache_bytes(len(set(images)), features_shape(backbone, encoder), store)
    assert planned < stored < 1.05 * planned
    assert planned * 2 == cache_bytes(len(set(images)), features_shape(backbone, encoder), "float32")
    use_visual_cache(replace(tiny_data, visual_cache=str(tmp_path / "half")), backbone, encoder)
    assert encoder.encode_image(images[0]).dtype == getattr(torch, store)
    assert stage_1_losses(backbone, encoder, tiny_data) == pytest.approx(losses, abs=2e-2)


def test_features_that_float16_cannot_hold_are_refused(tiny_tokenizer, tiny_data: DataConfig, tmp_path: Path) -> None:
    backbone, encoder = blip2(tiny_tokenizer)
    backbone.model.vision_model.post_layernorm.weight.data.fill_(1e6)
    with pytest.raises(UserError, match=r"--store float16.*bfloat16"):
        make_cache(tmp_path / "cache", images_of(tiny_data, "test"), backbone, encoder, store="float16")
    assert not (tmp_path / "cache" / INDEX).exists()


def test_shapes_that_are_neither_pixels_nor_features_are_refused(made: Made) -> None:
    backbone, _, _ = made
    for shape in ((1, 5, 7), (3, SIZE), (1, 1, 3, SIZE, SIZE)):
        with pytest.raises(ValueError, match="pixel_values"):
            backbone.encode_patches(torch.zeros(shape))


def test_features_enter_a_model_in_its_own_precision(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    backbone = blip2(tiny_tokenizer)[0].to(torch.bfloat16)
    width = backbone.model.config.vision_config.hidden_size
    assert backbone.encode_patches(torch.zeros(2, 17, width)).dtype == torch.bfloat16


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_an_image_is_kept_once(made: Made, tiny_data: DataConfig, tmp_path: Path) -> None:
    backbone, encoder, _ = made
    images = images_of(tiny_data, "test")
    make_cache(tmp_path / "twice", [*images, *images], backbone, encoder)
    assert len(VisualCache(tmp_path / "twice", backbone, encoder)) == len(set(images))


def test_files_are_of_a_bounded_size(made_blip2: Made) -> None:
    sizes = [path.stat().st_size for path in made_blip2[2].glob(FILES)]
    assert len(sizes) > 2
    assert max(sizes) < SMALL_FILES + 4096


def test_an_image_that_is_not_in_the_cache_is_an_error_until_it_is_added(made: Made, tiny_data: DataConfig) -> None:
    backbone, encoder, directory = made
    image = images_of(tiny_data, "test")[0]
    with pytest.raises(UserError, match="lacks an image"):
        VisualCache(directory, backbone, encoder)(image)
    before = on_disk(directory)
    make_cache(directory, [image], backbone, encoder)
    assert VisualCache(directory, backbone, encoder)(image).dim() == 2
    assert all(on_disk(directory)[name] == content for name, content in before.items() if name != INDEX)


def test_an_image_that_does_not_decode_is_left_out_and_told(made_blip2: Made, tiny_data: DataConfig) -> None:
    backbone, encoder, directory = made_blip2
    broken = images_of(tiny_data, "test")[0][:-40]
    make_cache(directory, [b"no image", broken], backbone, encoder)
    cache = VisualCache(directory, backbone, encoder)
    for image in (b"no image", broken):
        with pytest.raises(BadSample, match="could not be decoded"):
            cache(image)


def test_another_process_can_be_given_a_cache(made_blip2: Made, tiny_data: DataConfig) -> None:
    cache = VisualCache(made_blip2[2], made_blip2[0], made_blip2[1])
    image = images_of(tiny_data, "train")[0]
    here = cache(image)
    assert torch.equal(pickle.loads(pickle.dumps(cache))(image), here)


# --- staleness -------------------------------------------------------------------------------------------------------


def test_a_cache_of_other_weights_is_stale(made: Made) -> None:
    backbone, encoder, directory = made
    next(backbone.model.vision_model.parameters()).data.flatten()[0] += 1
    with pytest.raises(UserError, match=r"stale: weights was"):
        VisualCache(directory, backbone, encoder)


def test_a_cache_of_another_resolution_is_stale_and_the_setting_is_named(made: Made) -> None:
    backbone, encoder, directory = made
    encoder.image_processor = new_image_processor(2 * SIZE)
    with pytest.raises(UserError, match=rf"stale: .*processor\.size\.height was {SIZE}, the backbone has {2 * SIZE}"):
        VisualCache(directory, backbone, encoder)


def test_a_cache_of_another_norm_is_stale(made_blip2: Made) -> None:
    backbone, encoder, directory = made_blip2
    backbone.model.config.vision_config.layer_norm_eps = 1e-3
    with pytest.raises(UserError, match=r"stale: vision_config\.layer_norm_eps was"):
        VisualCache(directory, backbone, encoder)


def test_a_stale_cache_is_not_added_to(made: Made, tiny_data: DataConfig) -> None:
    backbone, encoder, directory = made
    before = on_disk(directory)
    encoder.image_processor = new_image_processor(2 * SIZE)
    with pytest.raises(UserError, match="stale"):
        make_cache(directory, images_of(tiny_data, "test"), backbone, encoder)
    assert on_disk(directory) == before


def test_a_cache_is_not_continued_in_another_type(made: Made) -> None:
    with pytest.raises(UserError, match=r"--store float16: .*holds float32"):
        CacheMaker(made[2], made[0], made[1], store="float16")


def test_a_cache_of_the_former_format_is_refused(made: Made) -> None:
    (made[2] / INDEX).write_text(json.dumps({"source": {}, "images": []}))
    with pytest.raises(UserError, match="another version"):
        VisualCache(made[2], made[0], made[1])


def test_the_hash_does_not_depend_on_the_type_that_weights_are_loaded_in(
    tiny_tokenizer, tiny_data: DataConfig, tmp_path: Path
) -> None:
    backbone, encoder = blip2(tiny_tokenizer)
    save_backbone(backbone, encoder, tmp_path / "backbone")
    loaded, encoder = load_pretrained(str(tmp_path / "backbone"))
    make_cache(tmp_path / "cache", images_of(tiny_data, "test"), loaded, encoder)
    half, encoder = load_pretrained(str(tmp_path / "backbone"), dtype=torch.bfloat16)
    VisualCache(tmp_path / "cache", half, encoder)
    next(half.model.vision_model.parameters()).data.flatten()[0] += 1
    with pytest.raises(UserError, match="stale: weights"):
        VisualCache(tmp_path / "cache", half, encoder)


# --- crashes and damage ----------------------------------------------------------------------------------------------


class Killed(Exception):
    """What stands for a process that ends here."""


def test_an_interrupted_cache_is_no_cache_and_goes_on_where_it_stopped(
    tiny_tokenizer: PreTrainedTokenizerBase, tiny_data: DataConfig, tmp_path: Path
) -> None:
    backbone, encoder = blip2(tiny_tokenizer)
    images = images_of(tiny_data, "train")
    directory = tmp_path / "cache"

    def until(count: int) -> Iterator[bytes]:
        yield from images[:count]
        raise Killed

    with pytest.raises(Killed):
        make_cache(directory, until(20), backbone, encoder, shard_bytes=SMALL_FILES)
    with pytest.raises(MissingFileError, match="cache_vision"):
        VisualCache(directory, backbone, encoder)
    before = on_disk(directory)
    assert before
    (directory / ".000.safetensors.123.tmp").write_bytes(b"half a file")

    seen: list[int] = []
    encode_patches = backbone.encode_patches
    backbone.encode_patches = lambda pixels: seen.append(len(pixels)) or encode_patches(pixels)
    make_cache(directory, images, backbone, encoder, shard_bytes=SMALL_FILES)
    assert sum(seen) == len(images) - 15  # three files of five had been written
    assert {name: content for name, content in on_disk(directory).items() if name in before} == before
    assert len(VisualCache(directory, backbone, encoder)) == len(images)
    assert not list(directory.glob(".*"))


def test_parts_together_are_the_whole(made_blip2: Made, tiny_data: DataConfig, tmp_path: Path) -> None:
    backbone, encoder, whole = made_blip2
    images = images_of(tiny_data, "train")
    for part in range(3):
        CacheMaker(tmp_path / "parts", backbone, encoder).add(images, part=(part, 3))
    maker = CacheMaker(tmp_path / "parts", backbone, encoder)
    assert maker.known == {image_digest(image) for image in images}
    maker.finish()
    ours, theirs = (VisualCache(path, backbone, encoder) for path in (tmp_path / "parts", whole))
    for image in images:
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)


def test_a_damaged_cache_is_refused_and_mended(made_blip2: Made, tiny_data: DataConfig) -> None:
    backbone, encoder, directory = made_blip2
    path = sorted(directory.glob(FILES))[1]
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(UserError, match=f"{path.name} is missing or cut short"):
        VisualCache(directory, backbone, encoder)
    path.write_bytes(content[:-4] + bytes(4))
    assert damaged_files(directory) == [path.name]
    path.unlink()
    assert damaged_files(directory) == [path.name]
    make_cache(directory, images_of(tiny_data, "train"), backbone, encoder)
    assert damaged_files(directory) == []
    assert path.read_bytes() == content


# --- recipe and launcher ---------------------------------------------------------------------------------------------


def test_a_recipe_cannot_train_or_move_what_is_cached() -> None:
    data = DataConfig(visual_cache="cache")
    for settings in (
        FinetuneConfig(train=["all"]),
        FinetuneConfig(train=["vision"]),
        FinetuneConfig(start=UNTRAINED_BACKBONE),
        FinetuneConfig(augment_images=True),
    ):
        with pytest.raises(ConfigError, match="visual_cache"):
            check_recipe(Recipe(data=data, finetune=settings))
    check_recipe(Recipe(data=data))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_share_that_is_saved_is_that_of_operations_counted_in_a_real_step(
    name: str, tiny_tokenizer, tiny_data: DataConfig, tmp_path: Path
) -> None:
    backbone, encoder = BACKBONES[name](tiny_tokenizer)
    save_backbone(backbone, encoder, tmp_path / "backbone")
    # As many tokens as the plan takes a row to have.
    work = workload(DataConfig(tasks={"caption": 1.0}), {"exits": {"train_micro_batch_size_per_gpu": 8}}, world_size=1)
    text = torch.full((8, work.text_tokens), 7)
    batch = replace(
        encoder.collate(split_samples(tiny_data, "test", "caption")),
        input_ids=torch.cat((torch.tensor([backbone.layout.opening] * 8), text), 1),
    )
    batch = replace(batch, targets=torch.full_like(batch.input_ids, IGNORE))
    batch.targets[:, -work.answer_tokens :] = 7
    backbone.model.language_projection.requires_grad_(True)

    def operations(pixel_values: torch.Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            answer_loss(backbone, replace(batch, pixel_values=pixel_values)).backward()
        return counter.get_total_flops()

    with torch.no_grad():
        features = backbone.encode_patches(batch.pixel_values)
    wanted = 1 - operations(features) / operations(batch.pixel_values)
    recipe = Recipe(
        data=DataConfig(tasks={"caption": 1.0}),
        finetune=FinetuneConfig(train=["projection"]),
        exits=ExitsConfig(exit_layers=[1]),
    )
    shares = vision_share(tmp_path / "backbone", recipe)
    assert shares[1] == pytest.approx(wanted, rel=0.02)
    assert 0 < shares[2] < 1
    recipe.exits.exit_layers = [99]
    assert list(vision_share(tmp_path / "backbone", recipe)) == [1]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cache_vision.py", *arguments])
    cache_vision.main()


def test_the_launcher_tells_what_is_saved_then_writes_checks_and_goes_on(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"data.root={tiny_data.root}", f"data.visual_cache={tmp_path / 'cache'}"]
    run(monkeypatch, "--dry-run", *settings)
    told = capsys.readouterr().out
    assert "stage 1: the cache saves" in told
    assert "stage 2: the cache saves" in told
    assert "40 images of 65 x 128 float32: at most 0.001 GB" in told
    assert not (tmp_path / "cache").exists()

    run(monkeypatch, "--part", "1/2", *settings)
    assert not (tmp_path / "cache" / INDEX).exists()
    run(monkeypatch, *settings)
    assert "40 images" in capsys.readouterr().out.splitlines()[-1]
    run(monkeypatch, "--check", *settings)
    assert "every file is as it was written" in capsys.readouterr().out
    for wrong in ("0/2", "3/2", "half"):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, "--part", wrong, *settings)
        assert stopped.value.code == 2
