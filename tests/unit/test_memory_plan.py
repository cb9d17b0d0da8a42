"""The memory plan against arithmetic: ZeRO's own formulas, matrix products counted by hand, and tensors that really exist."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.config import (
    EMBEDDED_BACKBONE,
    ConfigError,
    DataConfig,
    ExitsConfig,
    FinetuneConfig,
    MissingFileError,
    Recipe,
)
from free_dist.ds_config import read_ds_config
from free_dist.exits import ExitBank
from free_dist.planning.dry_run import META, DryRun, FusedAttention
from free_dist.planning.engine_memory import engine_memory
from free_dist.planning.memory import MemoryPlan, plan_memory
from free_dist.planning.workload import heaviest_task
from free_dist.recipe_io import load_recipe
from launch import plan as launcher

REPOSITORY = Path(__file__).parents[2]
DS_CONFIGS = REPOSITORY / "ds_configs"
RECIPES = REPOSITORY / "launch" / "recipes"
OPT = "blip2-opt-2.7b"


def section(stage: int, *, bf16: bool = True) -> dict[str, Any]:
    return {
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1, "stage3_param_persistence_threshold": 0},
    }


@pytest.fixture(scope="module")
def opt_plan() -> tuple[MemoryPlan, float]:
    """BLIP-2 OPT-2.7B, 32 queries and 10 text positions, seven exits; and the processor seconds it took."""
    started = time.process_time()
    recipe = Recipe(data=DataConfig(tasks={"caption": 1.0}), exits=ExitsConfig(exit_layers=[3, 6, 9, 12, 15, 18, 21]))
    made = plan_memory(
        OPT, recipe, read_ds_config(DS_CONFIGS / "eight_gpus_2.7b.json"), world_size=8, text_tokens=9, answer_tokens=10
    )
    return made, time.process_time() - started


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize(("stage", "sharded"), [(1, "o"), (2, "go"), (3, "pgo")])
def test_model_states_in_bfloat16_are_those_of_the_zero_paper(stage: int, sharded: str, world: int) -> None:
    """2 + 2 + 12 bytes a weight, of which each stage shares out one more kind (arXiv 1910.02054, figure 1)."""
    n = 8_000_000
    held = engine_memory(section(stage), [n // 2, n // 2], [], world_size=world)
    for kind, bytes_each, found in (
        ("p", 2, held.parameters),
        ("g", 2, held.gradients),
        ("o", 12, held.optimizer_states),
    ):
        assert found == bytes_each * n / (world if kind in sharded else 1)


def test_float32_training_keeps_float32_copies_too() -> None:
    held = engine_memory(section(1, bf16=False), [1000], [], world_size=1)
    assert (held.parameters, held.optimizer_states) == (4000, 12_000)


def test_a_frozen_module_has_weights_alone_and_sharding_divides_them() -> None:
    whole = engine_memory(section(0), [], [3000, 5000], world_size=4)
    assert (whole.resting, whole.backward, whole.gathered, whole.step) == (16_000, 0, 0, 0)
    shared = engine_memory(section(3), [], [3000, 5000], world_size=4)
    assert shared.resting == 4000
    assert shared.gathered > 16_000, "gathering passes through a second copy"


def test_small_tensors_stay_whole_under_sharding() -> None:
    kept = section(3)
    kept["zero_optimization"]["stage3_param_persistence_threshold"] = 3000
    assert engine_memory(kept, [], [3000, 5000], world_size=4).resting == 4000 + 6000


def test_gradients_wait_between_micro_batches_only_when_there_are_several() -> None:
    assert engine_memory(section(1), [1000], [], world_size=2).accumulated == 0
    assert engine_memory(section(1), [1000], [], world_size=2, accumulation=2).accumulated == 2000
    assert engine_memory(section(2), [1000], [], world_size=2, accumulation=2).accumulated == 1000


def test_a_dry_run_counts_bytes_alive_and_forgets_what_was_freed() -> None:
    weight = torch.empty(30, 50, device=META)
    with DryRun([weight]) as run:
        inputs = torch.empty(20, 30, device=META)
        with run.part("product"):
            first = inputs @ weight
            second = first.relu()
        assert run.live == 4 * (20 * 30 + 2 * 20 * 50)
        del first
        assert run.live == 4 * (20 * 30 + 20 * 50)
        view = second.T
        del second
        assert run.live == 4 * (20 * 30 + 20 * 50), "a view holds what it looks at"
        del view
    assert run.flops == {"product": 2 * 20 * 30 * 50}
    assert run.peaks["product"] == 4 * (20 * 30 + 2 * 20 * 50)


def test_a_dry_run_sees_what_autograd_keeps_until_the_backward_pass() -> None:
    weight = nn.Parameter(torch.empty(50, 50, device=META))
    with DryRun([weight]) as run:
        loss = (torch.empty(20, 50, device=META) @ weight).tanh().sum()
        assert run.live == 4 * (2 * 20 * 50 + 1), "the product's input and the tanh's output"
        loss.backward()
        del loss
        assert run.live == 4 * 50 * 50, "the gradient"


def step_of_exits(device: torch.device) -> DryRun:
    """Exits forward and backward in float32, on real tensors or on the meta device."""
    with device:
        backbone = Blip2Backbone(new_model(width=32, n_blocks=4, n_heads=2).eval().requires_grad_(False))
        bank = ExitBank(backbone, [1, 3])
        with DryRun([*backbone.parameters(), *backbone.buffers(), *bank.parameters()]) as run, FusedAttention():
            taps = [torch.zeros(3, 14, 32) for _ in bank.exit_layers]
            with run.part("forward"):
                features = bank(taps)
            with run.part("backward"):
                F.cross_entropy(bank.logits(features).flatten(0, 2), torch.zeros(84, dtype=torch.long)).backward()
    return run


def test_a_dry_run_counts_the_same_on_the_meta_device_as_on_real_tensors() -> None:
    real, dry = step_of_exits(torch.device("cpu")), step_of_exits(META)
    assert dry.flops == real.flops and dry.flops["backward"] > dry.flops["forward"] > 0
    for part in ("forward", "backward"):
        assert dry.peaks[part] == pytest.approx(real.peaks[part], rel=0.02)


def test_operations_of_opt_2_7b_are_those_of_its_matrices(opt_plan: tuple[MemoryPlan, float]) -> None:
    found = opt_plan[0].flops_per_sample
    width, patches, layers = 1408, 257, 39
    vision = layers * (2 * patches * (4 * width**2 + 2 * width * 6144) + 4 * patches**2 * width)
    vision += 2 * 256 * width * 3 * 14 * 14
    assert found["vision"] == pytest.approx(vision, rel=0.001)
    width, positions, blocks = 2560, 42, 32
    block = 2 * positions * 12 * width**2 + 4 * positions**2 * width
    assert opt_plan[0].positions == positions
    assert found["language model"] == pytest.approx(blocks * block, rel=0.001)
    assert found["exits forward"] == pytest.approx(7 * block, rel=0.001)
    # Gradients of weights and of what goes into each map, but of nothing below the exits: their input needs none.
    assert 1.8 * found["exits forward"] < found["exits backward"] < 2.1 * found["exits forward"]
    # Logits once forward and once backward, the head itself being frozen, at the 10 answer positions of each exit.
    assert found["heads"] == pytest.approx(7 * 10 * 2 * (2 * width * 50304), rel=0.01)


def test_weights_of_opt_2_7b_take_two_bytes_each_on_every_gpu_that_shares_none(
    opt_plan: tuple[MemoryPlan, float],
) -> None:
    plan = opt_plan[0]
    assert plan.backbone_bytes == plan.engines["backbone"].parameters == pytest.approx(2 * 3.74e9, rel=0.02)
    block = 12 * 2560**2 + 13 * 2560
    assert plan.trained["exits"] == 7 * block
    assert plan.engines["exits"].parameters == 2 * 7 * block, "the head is the backbone's own"


def test_every_moment_holds_at_least_what_rests_and_the_fullest_is_the_total(
    opt_plan: tuple[MemoryPlan, float],
) -> None:
    plan = opt_plan[0]
    resting = sum(engine.resting for engine in plan.engines.values())
    assert all(held > resting for held in plan.moments.values())
    assert plan.moments[plan.fullest] == plan.total == max(plan.moments.values())


def test_hours_are_operations_over_speed(opt_plan: tuple[MemoryPlan, float]) -> None:
    plan = opt_plan[0]
    hours = plan.hours(1000, tflops=100.0, mfu=0.5)
    assert hours == pytest.approx(1000 * sum(plan.flops_per_sample.values()) / (8 * 50e12) / 3600)


def test_a_plan_takes_less_than_ten_seconds(opt_plan: tuple[MemoryPlan, float]) -> None:
    """Of a processor, without the imports; the deepest backbone too."""
    started = time.process_time()
    recipe = Recipe(data=DataConfig(tasks={"vqa": 1.0}))
    plan = plan_memory(
        "instructblip-vicuna-13b", recipe, read_ds_config(DS_CONFIGS / "eight_gpus_13b.json"), world_size=8
    )
    assert max(opt_plan[1], time.process_time() - started) < 10
    assert plan.engines["backbone"].resting == pytest.approx(plan.backbone_bytes, rel=0.01), "replicated, as it fits"


def test_a_backbone_without_a_stage_is_planned_where_training_would_place_it() -> None:
    recipe = Recipe(data=DataConfig(tasks={"vqa": 1.0}))
    ds_config = read_ds_config(DS_CONFIGS / "eight_gpus_13b.json")
    plan = plan_memory("instructblip-vicuna-13b", recipe, ds_config, world_size=8, gpu_bytes=40e9)
    assert plan.engines["backbone"].resting < plan.backbone_bytes / 7, "shared by eight"


@pytest.mark.parametrize("stage", [1, 2])
def test_the_largest_backbone_on_the_longest_rows_fits_eighty_gigabytes(stage: int) -> None:
    name = "instructblip-vicuna-13b"
    recipe = load_recipe([RECIPES / "backbones" / f"{name}.yaml", RECIPES / "tasks" / "visdial.yaml"])
    plan = plan_memory(name, recipe, read_ds_config(DS_CONFIGS / "eight_gpus_13b.json"), world_size=8, stage=stage)
    assert plan.total < 80e9


def test_stage_one_trains_what_the_recipe_names() -> None:
    ds_config = read_ds_config(DS_CONFIGS / "cpu.json")
    model = new_model()
    wanted = model.query_tokens.numel()
    wanted += sum(p.numel() for part in (model.qformer, model.language_projection) for p in part.parameters())
    plan = plan_memory(EMBEDDED_BACKBONE, Recipe(), ds_config, world_size=1, stage=1)
    assert plan.trained == {"backbone": wanted}
    everything = Recipe(finetune=FinetuneConfig(train=["all"]))
    whole = plan_memory(EMBEDDED_BACKBONE, everything, ds_config, world_size=1, stage=1)
    assert whole.trained == {"backbone": sum(p.numel() for p in model.parameters())}
    assert whole.total > plan.total and whole.activations["heads"] > plan.activations["heads"]


def test_the_heaviest_task_is_planned_for() -> None:
    assert heaviest_task(DataConfig(max_turns=4)) == "dialogue"
    assert heaviest_task(DataConfig(tasks={"vqa": 1.0, "caption": 1.0, "dialogue": 0.0})) == "caption"


def test_exit_layers_beyond_the_backbone_are_refused() -> None:
    recipe = Recipe(exits=ExitsConfig(exit_layers=[2, 17]))
    with pytest.raises(ConfigError, match=r"exits\.exit_layers=\[2, 17\]"):
        plan_memory(EMBEDDED_BACKBONE, recipe, read_ds_config(DS_CONFIGS / "cpu.json"), world_size=1)


def test_an_unknown_backbone_is_told_with_the_known_ones() -> None:
    with pytest.raises(MissingFileError, match=r"--backbone blip3: .*blip2-opt-2\.7b"):
        plan_memory("blip3", Recipe(), read_ds_config(DS_CONFIGS / "cpu.json"), world_size=1)


def run_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["plan.py", "memory", *arguments])
    launcher.main()
    return capsys.readouterr().out


def test_the_launcher_prints_one_json_object_or_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a directory that holds nothing but a config.json."""
    with META:
        new_model(width=32, n_blocks=8, n_heads=2).config.save_pretrained(tmp_path)
    flags = ["--backbone", str(tmp_path), "--ds_config", str(DS_CONFIGS / "cpu.json"), "--world", "2"]
    found = json.loads(run_launcher(monkeypatch, capsys, *flags, "--samples", "1000", "--json"))
    assert set(found) >= {
        *("backbone", "stage", "world", "task", "rows_per_step", "positions", "answer_tokens", "trained_parameters"),
        *("engines", "activations", "moments", "total_bytes", "fits", "flops_per_sample", "hours_per_epoch"),
    }
    assert set(found["engines"]) == {"backbone", "exits", "discriminators"}
    assert set(found["engines"]["exits"]) >= {"parameters", "gradients", "optimizer_states", "buffers", "gathered"}
    assert found["rows_per_step"] == 64 and found["total_bytes"] == max(found["moments"].values())
    text = run_launcher(monkeypatch, capsys, *flags)
    assert "32 rows x 1 x 2 = 64 rows per step" in text and "TFLOP per sample" in text


def test_a_distribution_that_gives_other_rows_than_the_recipe_wants_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--backbone", EMBEDDED_BACKBONE, "--ds_config", str(DS_CONFIGS / "cpu.json"), "--world", "2"]
    with pytest.raises(SystemExit) as stopped:
        run_launcher(monkeypatch, capsys, *flags, "--config", str(RECIPES / "backbones" / f"{OPT}.yaml"))
    assert stopped.value.code == 2
    assert "training.expected_rows_per_step=256" in capsys.readouterr().err
