"""Three real DeepSpeed engines on gloo ranks, against plain PyTorch and against each other."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import scene
import torch
from ranks import run_ranks
from reference import reference_weights

from free_dist.config import LossConfig
from free_dist.distributed import all_reduce_mean
from free_dist.training.step import adversarial_step

LOSS = LossConfig(adversarial_weight=0.3)


def train(
    size: int, stage: int, backbone_stage: int, accumulation: int, mode: str, steps: int, **players: Any
) -> dict[str, torch.Tensor]:
    ds_config = scene.sections(stage=stage, backbone_stage=backbone_stage, accumulation=accumulation, world_size=size)
    engines = scene.engines(ds_config, **players)
    rank = torch.distributed.get_rank()
    config = LossConfig(adversarial_weight=0.3, mode=mode, discriminator_steps=players.get("discriminator_steps", 1))
    for micro in range(steps * accumulation):
        adversarial_step(engines, scene.batch(micro, rank=rank, world_size=size), config)
    return scene.gathered(engines.exits.module) | scene.gathered(engines.discriminators.module)


@pytest.mark.parametrize(
    ("size", "stage", "backbone_stage", "accumulation", "mode"),
    [
        (1, 1, 0, 2, "unsupervised"),
        (2, 1, 3, 2, "supervised"),
        (2, 2, 0, 1, "unsupervised"),
        (2, 2, 3, 2, "supervised"),
        (2, 3, 3, 2, "supervised"),
    ],
)
def test_three_engines_train_like_one_process_of_plain_pytorch(size, stage, backbone_stage, accumulation, mode):
    results = run_ranks(size, train, size, stage, backbone_stage, accumulation, mode, scene.STEPS)
    compare(results, reference_weights(steps=scene.STEPS, accumulation=accumulation, mode=mode), scene.modules())


def train_players(size: int, stage: int, players: dict[str, Any]) -> dict[str, torch.Tensor]:
    return train(size, stage, 0, 1, "supervised", scene.STEPS, **players)


@pytest.mark.parametrize(
    ("size", "stage", "players"),
    [
        (1, 1, {"shared": True}),
        (2, 3, {"shared": True}),
        (1, 1, {"discriminator_steps": 3}),
        (2, 2, {"discriminator_steps": 2, "shared": True}),
    ],
)
def test_one_discriminator_for_all_and_several_updates_of_them_train_like_plain_pytorch(size, stage, players):
    results = run_ranks(size, train_players, size, stage, players)
    wanted = reference_weights(steps=scene.STEPS, accumulation=1, mode="supervised", **players)
    assert wanted["weight_in"].shape[0] == (1 if players.get("shared") else len(scene.EXIT_LAYERS))
    compare(results, wanted, scene.modules(shared=players.get("shared", False)))


def compare(results: list[dict[str, torch.Tensor]], wanted: dict[str, torch.Tensor], modules: tuple) -> None:
    initial = dict(modules[1].named_parameters()) | dict(modules[2].named_parameters())
    for result in results:
        assert result.keys() == wanted.keys()
        for name, weight in wanted.items():
            torch.testing.assert_close(result[name], weight, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    moved = max((initial[name] - weight).abs().max().item() for name, weight in wanted.items())
    assert moved > 1e-3, "a comparison of weights that never moved proves nothing"


def sharded_features(size: int) -> tuple[list[torch.Tensor], int]:
    rank = torch.distributed.get_rank()
    engines = scene.engines(scene.sections(backbone_stage=3, world_size=size))
    batch = scene.batch(0, rank=rank, world_size=size)
    held = sum(parameter.numel() for parameter in engines.backbone.parameters())
    for _ in range(2):  # the second forward prefetches what the first one recorded
        with torch.no_grad():
            out = engines.backbone(batch.pixel_values, batch.image_index, batch.input_ids, scene.EXIT_LAYERS)
    return [*out.exits, out.final], held


def test_backbone_sharded_over_two_ranks_gives_the_unsharded_features_exactly():
    backbone, _, _ = scene.modules()
    for rank, (features, held) in enumerate(run_ranks(2, sharded_features, 2)):
        batch = scene.batch(0, rank=rank, world_size=2)
        whole = backbone(batch.pixel_values, batch.image_index, batch.input_ids, scene.EXIT_LAYERS)
        for mine, wanted in zip(features, [*whole.exits, whole.final], strict=True):
            assert torch.equal(mine, wanted)
        assert held == 0, "the weights are not sharded"


def global_reports(size: int) -> dict[str, torch.Tensor]:
    rank = torch.distributed.get_rank()
    engines = scene.engines(scene.sections(world_size=size))
    report = {}
    for step in range(2):
        report = adversarial_step(engines, scene.batch(step, rank=rank, world_size=size), LOSS, measure=True)
    return {name: all_reduce_mean(value) for name, value in report.items()}


def test_two_processes_report_the_losses_of_one_process_on_the_same_global_batch():
    (one,) = run_ranks(1, global_reports, 1)
    two, other = run_ranks(2, global_reports, 2)
    tokens = [int((scene.batch(1, rank=rank, world_size=2).targets >= 0).sum()) for rank in (0, 1)]
    assert one["answer_tokens"] == 2 * two["answer_tokens"] == sum(tokens)
    assert tokens[0] != tokens[1], "equal shares would hide a wrong weighting"
    for name in one.keys() - {"answer_tokens"}:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(two[name], other[name])


def watched_step() -> dict[str, Any]:
    engines = scene.engines(scene.sections())
    exits, discriminators = engines.exits.module, engines.discriminators.module
    largest: dict[str, float] = {}
    calls: dict[str, int] = {}
    for name, parameter in [*exits.named_parameters(), *discriminators.named_parameters()]:
        if parameter.requires_grad:

            def look(gradient: torch.Tensor, name: str = name) -> None:
                largest[name] = max(largest.get(name, 0.0), gradient.abs().max().item())
                calls[name] = calls.get(name, 0) + 1

            parameter.register_hook(look)
    trainable = [name for name, p in [*exits.named_parameters(), *discriminators.named_parameters()] if p.requires_grad]
    before = digest(engines.backbone), digest(exits.final_norm), digest(exits.lm_head)
    for step in range(3):
        adversarial_step(engines, scene.batch(step), LOSS)
    after = digest(engines.backbone), digest(exits.final_norm), digest(exits.lm_head)
    still = [name for name, p in discriminators.named_parameters() if p.requires_grad]
    return {"largest": largest, "calls": calls, "trainable": trainable, "unchanged": before == after, "still": still}


def digest(module: torch.nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        state.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


@pytest.fixture(scope="module")
def watched() -> dict[str, Any]:
    return run_ranks(1, watched_step)[0]


def test_every_trainable_parameter_gets_a_gradient(watched):
    assert len([name for name in watched["trainable"] if name.startswith("transformers.")]) == 16 * len(
        scene.EXIT_LAYERS
    )
    for name in watched["trainable"]:
        # A key bias shifts all scores of a softmax alike: its gradient is zero up to rounding.
        floor = 0.0 if name.endswith("k_proj.bias") else 1e-7
        assert watched["largest"][name] > floor, f"{name} gets no gradient"


def test_discriminators_get_a_gradient_in_the_discriminator_step_only(watched):
    names = ["weight_in", "bias_in", "weight_out", "bias_out"]
    assert {name: watched["calls"][name] for name in names} == dict.fromkeys(names, 3), "three steps, one backward each"
    assert watched["still"] == names, "frozen() must restore requires_grad"


def test_training_leaves_every_frozen_weight_untouched(watched):
    assert watched["unchanged"]


def spoil_backward(module: torch.nn.Module) -> Any:
    """Make the next backward passes through a training ``module`` give NaN, while its output stays finite."""

    def hook(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        if any(parameter.requires_grad for parameter in module.parameters()):
            output.register_hook(lambda gradient: gradient * float("nan"))

    return module.register_forward_hook(hook)


def with_nan(size: int, stage: int, where: str) -> list[Any]:
    rank = torch.distributed.get_rank()
    engines = scene.engines(scene.sections(stage=stage, accumulation=2, world_size=size))
    exits, discriminators = engines.exits.module, engines.discriminators.module
    seen: list[Any] = []
    for step in range(3):
        before = scene.gathered(exits), scene.gathered(discriminators)
        for micro in range(2):
            bad = step == 1 and micro == 0 and rank == 1  # a micro-batch that only accumulates
            handle = (
                spoil_backward(discriminators if where == "discriminators" else exits.transformers[0]) if bad else None
            )
            report = adversarial_step(engines, scene.batch(2 * step + micro, rank=rank, world_size=size), LOSS)
            assert torch.isfinite(report["loss"])
            if handle is not None:
                handle.remove()
        after = scene.gathered(exits), scene.gathered(discriminators)
        moved = [any(not torch.equal(b[n], a[n]) for n in b) for b, a in zip(before, after, strict=True)]
        seen.append((*moved, report["stepped"].item()))
    return [*seen, engines.exits.lr_scheduler.last_epoch, engines.discriminators.lr_scheduler.last_epoch]


@pytest.mark.parametrize(("stage", "where"), [(1, "discriminators"), (2, "exits"), (3, "discriminators")])
def test_a_nan_in_one_engine_of_one_rank_makes_both_engines_skip_on_all_ranks(stage, where):
    moves = (True, True, 1.0)
    for seen in run_ranks(2, with_nan, 2, stage, where):
        assert seen == [moves, (False, False, 0.0), moves, 2, 2]


def losses_in_bf16() -> list[float]:
    engines = scene.engines(scene.sections(bf16=True, backbone_stage=3))
    assert engines.dtype == torch.bfloat16
    return [adversarial_step(engines, scene.batch(0), LOSS, measure=True)["loss"].item() for _ in range(6)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_bf16_training_lowers_the_loss(world_size: int):
    for losses in run_ranks(world_size, losses_in_bf16):
        assert all(torch.isfinite(torch.tensor(losses)))
        assert losses[-1] < losses[0]


def without_adversary() -> dict[str, torch.Tensor]:
    engines = scene.engines(scene.sections(), adversarial=False)
    return adversarial_step(engines, scene.batch(0), LossConfig(adversarial_weight=0.0))


def test_without_adversarial_weight_no_discriminator_exists():
    (report,) = run_ranks(1, without_adversary)
    assert report["stepped"] == 1 and not {"d_loss", "g_loss", "grad_norm/discriminators"} & report.keys()


def shared_with_sharded() -> None:
    backbone, bank, classifiers = scene.modules(copy_frozen=False)
    with pytest.raises(ValueError, match="copy_frozen=True"):
        scene.build_engines(backbone, bank, classifiers, scene.sections(backbone_stage=3), scene.factor)


def test_a_bank_that_shares_a_sharded_backbones_head_is_refused():
    run_ranks(1, shared_with_sharded)
