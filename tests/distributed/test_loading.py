"""``from_pretrained`` into ZeRO-3 partitions: what it gives, and how much memory a rank ever holds."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest
import scene
import torch
from ranks import run_ranks
from transformers import Blip2ForConditionalGeneration

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.backbones.loading import load_model
from free_dist.config import DataConfig, LossConfig, UserError
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import Batch, SampleEncoder
from free_dist.data.stream import split_samples
from free_dist.ds_config import REPLICATED_SHARE, fits, zero_stage
from free_dist.engines import (
    build_engines,
    device_memory,
    gathered_parameters,
    place_backbone,
    sharded_loading,
)
from free_dist.exits import ExitBank
from free_dist.training.step import adversarial_step
from tests.backbones.checkpoints import write_checkpoint

TEXTS = ["what colour is the circle? red", "is there a blue square? yes", "a photo of a red circle"] * 4
SHARDED = ("blip2-opt", "blip2-flan-t5", "instructblip-vicuna", "minigpt4-llama2")
"""Tied head, head of its own, a Q-Former that reads text, shared key-value heads."""


def batch(encoder: SampleEncoder, data: DataConfig) -> Batch:
    return encoder.collate(split_samples(data, "test", "vqa", max_samples=3))


def exits_of(backbone: Blip2Backbone) -> ExitBank:
    parts = [*backbone.shared_modules(), *(backbone.block(k) for k in scene.EXIT_LAYERS)]
    with gathered_parameters(*parts):
        return ExitBank(backbone, scene.EXIT_LAYERS, init="same", copy_frozen=True)


def sharded_run(directory: str, data: DataConfig, bf16: bool) -> dict[str, Any]:
    """What one rank has after loading and what it computes: nothing of it may depend on the model being sharded."""
    sections = scene.sections(backbone_stage=3, world_size=2, bf16=bf16)
    dtype = torch.bfloat16 if bf16 else torch.float32
    torch.manual_seed(3)
    backbone, encoder = load_pretrained(directory, dtype=dtype, sharding=sharded_loading(sections["backbone"]))
    drawn = torch.rand(())
    held = {name for name, parameter in backbone.named_parameters() if parameter.numel()}
    bank = exits_of(backbone)
    weights = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    engines = build_engines(backbone, bank, None, sections, scene.factor)
    inputs = batch(encoder, data).inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    for _ in range(2):  # the second forward prefetches what the first one recorded
        with torch.no_grad():
            out = engines.backbone(**inputs, exit_layers=scene.EXIT_LAYERS)
    return {
        "held": held,
        "weights": weights,
        "features": [*out.exits, out.final],
        "said": said(backbone),
        "drawn": drawn,
    }


def said(backbone: Blip2Backbone) -> tuple[Any, ...]:
    """What a loaded model tells of itself besides its weights."""
    model = backbone.model
    return model.name_or_path, model.config.to_dict(), model.generation_config.to_dict(), model.dtype, model.training


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded") / request.param
    model = write_checkpoint(request.param, directory, TEXTS)
    (directory / "model.safetensors").unlink()
    torch.manual_seed(0)
    model.generation_config.max_new_tokens = 7  # a setting that config.json does not hold
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # many begin as zeros, which a rank could have without loading them
            parameter.data.normal_(std=0.3)
    config = (directory / "config.json").read_bytes()
    model.save_pretrained(directory, max_shard_size="100KB")
    (directory / "config.json").write_bytes(config)
    return directory


@pytest.mark.parametrize(
    ("checkpoint", "bf16"), [*((name, False) for name in SHARDED), ("blip2-opt", True)], indirect=["checkpoint"]
)
def test_a_backbone_loaded_into_partitions_is_the_one_loaded_whole(checkpoint: Path, bf16: bool, tiny_data) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    torch.manual_seed(3)
    backbone, encoder = load_pretrained(str(checkpoint), dtype=dtype)
    drawn = torch.rand(())
    weights = exits_of(backbone).state_dict()
    inputs = batch(encoder, tiny_data).inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    out = backbone(**inputs, exit_layers=scene.EXIT_LAYERS)  # with gradients, which keeps the lean vision path out
    for rank in run_ranks(2, sharded_run, str(checkpoint), tiny_data, bf16):
        # Set on a module that was finished before, which DeepSpeed's loading context does not see.
        assert all(name.endswith("self_attn.qkv.bias") for name in rank["held"]), rank["held"]
        assert rank["drawn"] == drawn, "a run's random numbers must not depend on how its backbone was loaded"
        assert rank["weights"].keys() == weights.keys() and rank["said"] == said(backbone)
        for name, weight in weights.items():
            assert torch.equal(rank["weights"][name], weight), name
        for mine, wanted in zip(rank["features"], [*out.exits, out.final], strict=True):
            assert torch.equal(mine, wanted)


def peak_growth(small: str, large: str, sharded: bool) -> float:
    """Most memory that this rank gains while it loads ``large`` and touches what it keeps, in bytes, mapped files included."""
    # glibc would keep freed blocks for later, which are not held by anybody.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    section = scene.sections(backbone_stage=3 if sharded else 0, world_size=2)["backbone"]
    kept = [load_model(small, sharding=sharded_loading(section))]  # what loading imports is paid before
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory("VmRSS")
    kept.append(load_model(large, sharding=sharded_loading(section)))
    for parameter in kept[1].parameters():
        parameter.sum()
    return memory("VmHWM") - before


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def deep_model() -> Blip2ForConditionalGeneration:
    """Most of its weights are in blocks, of which a rank gathers a few tensors at a time, as in a published model."""
    config = new_model(width=32, n_blocks=2).config
    text = config.text_config
    text.vocab_size, text.hidden_size, text.word_embed_proj_dim, text.ffn_dim = 512, 512, 512, 2048
    text.num_hidden_layers, text.num_attention_heads = 10, 8
    return Blip2ForConditionalGeneration(config)


def test_no_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    small, large = str(tmp_path / "small"), str(tmp_path / "large")
    new_model(width=32, n_blocks=2).save_pretrained(small)
    model = deep_model()
    nbytes = sum(4 * parameter.numel() for parameter in model.parameters())
    assert nbytes > 120e6
    model.save_pretrained(large, max_shard_size="25MB")
    del model
    control = min(run_ranks(2, peak_growth, small, large, False))
    assert control > 0.95 * nbytes, "the measurement does not see a whole model"
    largest = max(run_ranks(2, peak_growth, small, large, True))
    assert nbytes / 2 < largest < 0.8 * nbytes, f"{largest / nbytes:.2f} of the model's {nbytes / 1e6:.0f} MB"


def exits_on_a_narrower_backbone() -> list[Any]:
    sections = scene.sections() | {"backbone": scene.sections(backbone_stage=3, bf16=True)["backbone"]}
    backbone, _, classifiers = scene.modules()
    backbone.to(torch.bfloat16)
    engines = build_engines(backbone, exits_of(backbone), classifiers, sections, scene.factor)
    report = adversarial_step(engines, scene.batch(0), LossConfig(adversarial_weight=0.3))
    return [{parameter.dtype for parameter in engines.exits.module.parameters()}, bool(report["stepped"])]


def test_exits_have_the_precision_of_their_section_whatever_they_were_copied_from() -> None:
    assert run_ranks(1, exits_on_a_narrower_backbone) == [[{torch.float32}, True]]


CPU = torch.device("cpu")


def sections_without_stage() -> dict[str, dict[str, Any]]:
    sections = scene.sections()
    return sections | {"backbone": {k: v for k, v in sections["backbone"].items() if k != "zero_optimization"}}


def test_a_backbone_without_a_stage_is_replicated_where_it_fits_and_sharded_where_it_does_not() -> None:
    room = int(REPLICATED_SHARE * device_memory(CPU))
    assert zero_stage(place_backbone(sections_without_stage(), room, CPU)["backbone"]) == 0
    assert zero_stage(place_backbone(sections_without_stage(), room + 1, CPU)["backbone"]) == 3
    eighty = 80 * 2**30
    sizes = {"blip2-flan-t5-xxl": 12.1e9, "instructblip-vicuna-13b": 14.2e9}  # parameters
    assert all(fits(int(2 * count), eighty) for count in sizes.values())
    assert not fits(int(4 * sizes["instructblip-vicuna-13b"]), eighty)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_stage_that_is_named_is_kept_and_an_impossible_one_told_with_numbers(stage: int) -> None:
    sections = scene.sections(backbone_stage=stage)
    assert place_backbone(sections, 1000, CPU) == sections
    advice = "zero_optimization.stage to 3" if stage == 0 else "start more processes"
    with pytest.raises(
        UserError, match=rf"section 'backbone': zero_optimization.stage {stage} .* 9000.0 GB .*{advice}"
    ):
        place_backbone(sections, 9 * 10**12, CPU)


def placed_together(rank_bytes: list[int]) -> int:
    rank = torch.distributed.get_rank()
    return zero_stage(place_backbone(sections_without_stage(), rank_bytes[rank], CPU)["backbone"])


def test_ranks_of_unlike_devices_choose_the_same_stage() -> None:
    room = int(REPLICATED_SHARE * device_memory(CPU)) // 2
    assert run_ranks(2, placed_together, [1000, room + 1]) == [3, 3]
