"""The parts of stage 1 that need no engine: loss, trained parts, LoRA, what is saved, augmentation, visual pre-training."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Blip2ForConditionalGeneration

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.config import ConfigError, DataConfig, FinetuneConfig, Recipe, UserError
from free_dist.data.samples import IGNORE, Batch, SampleEncoder
from free_dist.data.stream import records, training_batches
from free_dist.ds_config import read_ds_config
from free_dist.recipe_io import load_recipe
from free_dist.training.finetune import answer_loss, augment_images, save_backbone
from free_dist.training.lora import target_pattern
from free_dist.training.run_directory import forget_log_after
from free_dist.training.schedule import warmup_cosine
from free_dist.training.stage1_result import save_trained
from free_dist.training.stage1_run import engine_section
from free_dist.training.stage1_start import make_start, start_directory
from free_dist.training.trained_parts import describe_parts, train_parts
from free_dist.training.vision import distinctive_answers, pretrain_vision


@pytest.mark.parametrize("kind", ["opt", "llama-grouped", "flan-t5"])
def test_the_answer_loss_is_the_librarys_own(make_case, kind: str) -> None:
    backbone = make_case(kind, torch.float32).backbone
    batch = hand_made_batch(backbone)
    labels = batch.targets
    if batch.decoder_ids is None:  # the library shifts by itself
        labels = torch.full_like(batch.targets, IGNORE)
        labels[:, 1:] = batch.targets[:, :-1]
    with torch.no_grad():
        wanted = backbone.model(
            pixel_values=batch.pixel_values[batch.image_index], input_ids=batch.input_ids, labels=labels
        ).loss
        torch.testing.assert_close(answer_loss(backbone, batch), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["opt", "llama", "flan-t5"])
def test_a_new_lora_changes_nothing_and_a_trained_one_is_merged_exactly(make_case, kind: str, tmp_path: Path) -> None:
    backbone = make_case(kind, torch.float32).backbone
    batch = hand_made_batch(backbone)
    backbone.model.save_pretrained(tmp_path / "start")
    before = answer_loss(backbone, batch)
    settings = FinetuneConfig(train=["lora", "projection"], lora_rank=3, lora_alpha=5, lora_dropout=0.0)
    train_parts(backbone.model, settings)
    torch.testing.assert_close(answer_loss(backbone, batch), before, rtol=1e-6, atol=1e-6)

    torch.manual_seed(0)
    trained = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    wanted = answer_loss(backbone, batch)
    assert abs(wanted - before) > 1e-3
    save_trained(
        tmp_path / "start", {n: p.detach() for n, p in trained.items()}, settings, tmp_path / "merged",
        adapter=tmp_path / "adapter",
    )  # fmt: skip
    merged = Blip2Backbone(Blip2ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval())
    torch.testing.assert_close(answer_loss(merged, batch), wanted, rtol=1e-5, atol=1e-5)

    alone = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "start")
    alone.language_projection.load_state_dict(merged.model.language_projection.state_dict())
    adapted = Blip2Backbone(PeftModel.from_pretrained(alone, tmp_path / "adapter").base_model.model.eval())
    torch.testing.assert_close(answer_loss(adapted, batch), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [["projection"], ["projection", "lora"]])
@pytest.mark.parametrize(
    ("stated", "head", "rest"),
    [
        ("float32", torch.float16, torch.float16),
        ("float16", torch.float16, torch.float16),
        ("float16", torch.float32, torch.float16),
        ("bfloat16", torch.float16, torch.bfloat16),
    ],
)
def test_every_weight_keeps_its_stored_type_whatever_the_configuration_states(
    make_case, tmp_path: Path, stated: str, head: torch.dtype, rest: torch.dtype, train: list[str]
) -> None:
    backbone, start = make_case("flan-t5", torch.float32).backbone, tmp_path / "start"
    backbone.model.save_pretrained(start)
    before = {
        name: weight.to(head if name.startswith(("language_projection.", "qformer.")) else rest)
        for name, weight in load_file(start / "model.safetensors").items()
    }
    save_file(before, start / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"dtype": stated}))

    settings = FinetuneConfig(train=train)
    train_parts(backbone.model, settings)
    trained = {name: p.detach() + 0.1 for name, p in backbone.model.named_parameters() if p.requires_grad}
    save_trained(start, trained, settings, tmp_path / "result")
    after = load_file(tmp_path / "result" / "model.safetensors")
    assert after.keys() == before.keys()
    assert {name for name in before if before[name].dtype != after[name].dtype} == set()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    moved = {name for name in trained if ".lora_" not in name}
    assert {name for name in changed if "language_model." not in name} == moved
    assert any("language_model." in name for name in changed) == ("lora" in train)
    for name in moved:
        assert torch.equal(after[name], trained[name].to(head))


def test_a_start_that_is_a_pickle_is_grown_if_the_recipe_allows_pickles(
    tiny_backbone, tiny_encoder, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    save_backbone(tiny_backbone, tiny_encoder, start)
    torch.save(tiny_backbone.model.state_dict(), start / "pytorch_model.bin")
    (start / "model.safetensors").unlink()
    recipe = Recipe(
        run_dir=str(tmp_path / "run"), finetune=FinetuneConfig(start=str(start), n_blocks=2 * tiny_backbone.n_blocks)
    )
    with pytest.raises(UserError, match="allow_pickle"):
        make_start(recipe)
    make_start(replace(recipe, backbone=replace(recipe.backbone, allow_pickle=True)))
    assert Blip2Backbone.from_pretrained(start_directory(recipe)).n_blocks == 2 * tiny_backbone.n_blocks


@pytest.mark.parametrize("kind", ["llama", "flan-t5"])
def test_a_start_that_cannot_be_grown_is_refused_by_field(make_case, tmp_path: Path, kind: str) -> None:
    make_case(kind, torch.float32).backbone.model.save_pretrained(tmp_path / "start")
    recipe = Recipe(run_dir=str(tmp_path / "run"), finetune=FinetuneConfig(start=str(tmp_path / "start"), n_blocks=6))
    with pytest.raises(UserError, match=r"finetune\.n_blocks=6: finetune\.start is .* only the embedded backbone"):
        make_start(recipe)


def test_lora_adapts_linear_maps_of_blocks_alone_and_names_what_there_is(make_case) -> None:
    for kind, per_block in (("opt", 2), ("llama", 2), ("flan-t5", 2)):
        model = make_case(kind, torch.float32).backbone.model
        found = [name for name, _ in model.named_modules() if re.fullmatch(target_pattern(model, []), name)]
        attentions = 2 + 2 * 3 if kind == "flan-t5" else 3  # encoder, decoder and cross-attention
        assert len(found) == per_block * attentions
        assert all(name.startswith("language_model.") for name in found)
    model = make_case("opt", torch.float32).backbone.model
    with pytest.raises(
        UserError, match=r"no linear map 'lm_head' .*; there are fc1, fc2, k_proj, out_proj, q_proj, v_proj"
    ):
        target_pattern(model, ["lm_head"])


@pytest.mark.parametrize("train", [["vision"], ["qformer", "projection"], ["lora"], ["vision", "lora"], ["all"]])
def test_exactly_the_named_parts_require_gradients_and_run_in_training_mode(make_case, train: list[str]) -> None:
    model = make_case("opt", torch.float32).backbone.model
    train_parts(model, FinetuneConfig(train=train))
    parts = {
        "vision": model.vision_model,
        "qformer": model.qformer,
        "projection": model.language_projection,
        "lora": model.language_model,
    }
    for part, module in parts.items():
        wanted = part in train or train == ["all"]
        assert module.training == wanted
        for name, parameter in module.named_parameters():
            assert parameter.requires_grad == (wanted and (part != "lora" or train == ["all"] or ".lora_" in name)), (
                name
            )
    assert model.query_tokens.requires_grad == ("qformer" in train or train == ["all"])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert describe_parts(model).startswith(f"trains {trained:,} of {sum(p.numel() for p in model.parameters()):,}")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("finetune.train=[qformers]", "did you mean 'qformer'"),
        ("finetune.train=[]", "at least one part"),
        ("finetune.train=[lora,lora]", "none twice"),
        ("finetune.train=[all,lora]", "'all' leaves nothing to add"),
        ("finetune.keep_adapter=true", "has no 'lora'"),
        ("finetune.lora_rank=0", "finetune.lora_rank"),
        ("finetune.lora_dropout=1", "finetune.lora_dropout"),
    ],
)
def test_settings_that_cannot_be_run_are_told_by_field(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_recipe(None, [override])


def test_the_engine_takes_its_distribution_from_the_file_and_its_rate_from_the_recipe() -> None:
    recipe = load_recipe(None, ["finetune.learning_rate=3e-5", "finetune.weight_decay=0.01", "finetune.batch_size=6"])
    ds_config = read_ds_config(Path(__file__).parents[2] / "ds_configs" / "one_gpu.json")
    section = engine_section(recipe, ds_config, 1)
    wanted = ds_config["exits"]["optimizer"]["params"] | {"lr": 3e-5, "weight_decay": 0.01}
    assert section["optimizer"]["params"] == wanted
    assert section | {"optimizer": None} == ds_config["exits"] | {"optimizer": None}
    assert engine_section(recipe, None, 3)["train_micro_batch_size_per_gpu"] == 2
    with pytest.raises(UserError, match=r"finetune\.batch_size=6: cannot be shared equally by 4"):
        engine_section(recipe, None, 4)


def hand_made_batch(backbone: Blip2Backbone) -> Batch:
    """Three rows of two images with answers of their own; without padding, which the library's loss would see."""
    generator = torch.Generator().manual_seed(1)
    layout = backbone.layout
    prompt = torch.randint(6, backbone.vocab_size, (3, 9), generator=generator)
    prompt[:, : layout.num_query_tokens] = layout.image_token_id
    answer = torch.randint(6, backbone.vocab_size, (3, 6), generator=generator)
    start = layout.decoder_start_token_id
    targets = answer
    if start is None:
        prompt = torch.cat([prompt, answer], 1)
        targets = torch.full_like(prompt, IGNORE)
        targets[:, 8:14] = answer
    return Batch(
        task="vqa",
        keys=("a", "b", "c"),
        pixel_values=torch.randn(2, 3, 16, 16, generator=generator),
        image_index=torch.tensor([0, 1, 0]),
        input_ids=prompt,
        targets=targets,
        decoder_ids=None if start is None else torch.cat([torch.full((3, 1), start), answer[:, :-1]], 1),
    )


def test_saving_replaces_the_former_checkpoint_and_a_failed_save_leaves_it(
    tiny_backbone, tiny_encoder, tmp_path: Path, monkeypatch
) -> None:
    directory = tmp_path / "backbone"
    directory.mkdir()
    (directory / "former").touch()
    with monkeypatch.context() as patch:
        patch.setattr(tiny_encoder, "image_processor", None)
        with pytest.raises(AttributeError):
            save_backbone(tiny_backbone, tiny_encoder, directory)
    assert [path.name for path in directory.iterdir()] == ["former"]
    save_backbone(tiny_backbone, tiny_encoder, directory)
    assert not (directory / "former").exists()
    assert Blip2Backbone.from_pretrained(directory).n_blocks == tiny_backbone.n_blocks
    assert list(tmp_path.iterdir()) == [directory]


def test_augmentation_moves_pixels_without_inventing_any(tiny_root: Path, tiny_encoder) -> None:
    batch = next(training_batches(DataConfig(root=str(tiny_root)), tiny_encoder, seed=0, micro_batch_size=8))
    moved = augment_images(batch.pixel_values, random.Random(1))
    assert moved.shape == batch.pixel_values.shape
    assert not torch.equal(moved, batch.pixel_values)
    for before, after in zip(batch.pixel_values, moved, strict=True):
        assert set(after[0].unique().tolist()) <= set(before[0].unique().tolist())


def test_vision_pretraining_lowers_the_loss_and_leaves_the_language_model_alone(
    tiny_root: Path, tiny_tokenizer, tiny_encoder
) -> None:
    backbone = Blip2Backbone(new_model(width=32, n_blocks=2, n_heads=2, seed=4).requires_grad_(False))
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    recipe = Recipe(data=DataConfig(root=str(tiny_root)), finetune=FinetuneConfig(batch_size=8, learning_rate=1e-3))
    encoder = SampleEncoder(tiny_tokenizer, tiny_encoder.image_processor, backbone.layout, backbone.max_positions)
    first = pretrain_vision(backbone, encoder, recipe, steps=1)
    assert pretrain_vision(backbone, encoder, recipe, steps=25) < 0.8 * first
    changed = {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not any(name.startswith("model.language_model.") for name in changed)


def test_answers_common_to_most_images_are_not_labels(tiny_root: Path) -> None:
    labels = distinctive_answers(records(tiny_root, "train"))
    assert {"circle", "rectangle", "triangle"} <= set(labels)
    assert not {"yes", "no"} & set(labels)


def test_schedule_warms_up_linearly_and_ends_at_zero() -> None:
    factor = warmup_cosine(warmup_steps=4, max_steps=20)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    values = [factor(step) for step in range(4, 21)]
    assert values == sorted(values, reverse=True) and abs(values[-1]) < 1e-12


def test_the_log_of_a_killed_run_keeps_whole_lines_of_steps_that_are_not_repeated(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    forget_log_after(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    forget_log_after(tmp_path / "none", 2)
