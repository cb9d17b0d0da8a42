"""The log of a run: everything that TensorBoard shows can be redrawn from ``log.jsonl``; what watching counts and costs."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

from free_dist.config import AlarmsConfig, MissingFileError
from free_dist.decoding.cache import PendingCache
from free_dist.decoding.generate import generate
from free_dist.evaluation.training_curves import draw_training_curves, read_log, training_curves
from free_dist.exits import ExitBank
from free_dist.flops import CountedOperations, FlopMeter, measured_peak
from free_dist.gradients import GradientNorms
from free_dist.monitor import LOG, Monitor
from free_dist.training.alarms import AlarmRules
from free_dist.training.cache_drift import answer_drift, drift_checks
from free_dist.training.frozen_weights import FrozenWeights, fingerprint
from free_dist.training.sample_checks import sample_checks


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of six logged steps, with an alarm, a value that is not finite, and a torn last line."""
    with Monitor(tmp_path, total_steps=60, description="test") as monitor:
        for step in range(10, 70, 10):
            monitor.advance(samples=8)
            values = {"loss_vqa/exit_2": 3.0 / step, "loss_vqa/exit_4": 2.0 / step, "grad_norm/exits": float(step)}
            monitor.scalars(step, values | {"throughput/mfu": math.nan if step == 20 else 0.3}, tokens=100)
        monitor.event(40, "mode_collapse", "exit 2 gives the features of another exit")
    with (tmp_path / LOG).open("a") as log:
        log.write('{"step": 70, "loss_vqa')
    return tmp_path


def test_every_curve_of_tensorboard_is_redrawn_from_the_log_alone(run_dir: Path) -> None:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    shown = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
    assert {"loss_vqa/exit_2", "throughput/samples_per_second", "memory/gib"} <= set(shown)
    figure = training_curves(read_log(run_dir / LOG))
    drawn = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            if not line.get_label().startswith("_"):
                drawn[f"{axes.get_title()}/{line.get_label()}"] = line.get_xydata().tolist()
    assert set(drawn) == set(shown)
    for tag, points in shown.items():
        wanted = [[point.step, point.value] for point in points if math.isfinite(point.value)]
        torch.testing.assert_close(
            torch.tensor(drawn[tag]), torch.tensor(wanted, dtype=torch.float64).float(), rtol=1e-6, atol=0
        )
    assert "mode_collapse x 1" in figure.get_suptitle()


def test_an_event_is_in_tensorboard_and_in_the_log(run_dir: Path) -> None:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    assert "events/mode_collapse/text_summary" in accumulator.Tags()["tensors"]
    assert read_log(run_dir / LOG).events == [(40, "mode_collapse", "exit 2 gives the features of another exit")]


def test_the_picture_is_written_and_a_missing_log_is_told(run_dir: Path, tmp_path_factory) -> None:
    picture = draw_training_curves(run_dir, run_dir / "curves.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    with pytest.raises(MissingFileError, match=r"log.jsonl does not exist"):
        draw_training_curves(tmp_path_factory.mktemp("empty"), picture)


def test_alarms_can_be_found_again_from_the_log_of_a_run(tmp_path: Path) -> None:
    config = AlarmsConfig(window=3)
    first, again = (AlarmRules(config, exit_layers=(2,), total_steps=8) for _ in range(2))
    raised = []
    with Monitor(tmp_path, total_steps=8, description="test") as monitor:
        for step in range(1, 9):
            kl = 0.1 if step < 4 else 3.0
            values = {"kl_to_full_vqa/exit_2": kl, "feature_rank_ratio/exit_2": 0.01 if step > 2 else 1.0}
            monitor.scalars(step, values, tokens=1)
            raised += first.look(step, values)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    found = [alarm for line in lines for alarm in again.look(line["step"], line)]
    assert found == raised
    assert [(alarm.step, alarm.name) for alarm in found] == [(5, "mode_collapse"), (6, "forgetting")]


def test_the_adversarial_weight_is_only_blamed_where_there_is_one() -> None:
    said = []
    for more in ({}, {"discriminator_accuracy_real/exit_2": 0.5, "discriminator_accuracy_fake/exit_2": 0.5}):
        rules = AlarmRules(AlarmsConfig(window=1), exit_layers=(2,), total_steps=8)
        said += [alarm.message for alarm in rules.look(1, {"feature_rank_ratio/exit_2": 0.01} | more)]
    assert [message.partition("; ")[2] for message in said] == [
        "lower the learning rates",
        "lower loss.adversarial_weight or the learning rates",
    ]


def test_one_odd_step_raises_nothing_and_a_failure_is_told_once() -> None:
    rules = AlarmRules(AlarmsConfig(window=3), exit_layers=(2,), total_steps=100)
    ratios = [1.0, 0.01, 1.0, 0.01, 0.01, 0.01, 0.01, 0.01, 1.0, 0.01, 0.01, 0.01]
    steps = [s for s, ratio in enumerate(ratios) if rules.look(s, {"token_entropy_ratio/exit_2": ratio})]
    assert steps == [5, 11], "when a window is full, not again while it lasts, and again after it had ended"


def test_counted_operations_are_those_of_the_formulas() -> None:
    linear = nn.Linear(32, 64, bias=False)
    inputs = torch.randn(10, 32, requires_grad=True)
    query = torch.randn(2, 4, 16, 8, requires_grad=True)
    with CountedOperations() as counted:
        linear(inputs).sum().backward()
    assert counted.total == 3 * 2 * 10 * 32 * 64, "a product forward, and one for each of its two gradients"
    with CountedOperations() as counted:
        F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    assert counted.total == (2 + 5) * 2 * 2 * 4 * 16 * 16 * 8, "two products forward, five backward"


def test_operations_are_scaled_by_positions() -> None:
    meter = FlopMeter()
    weight = torch.randn(8, 8)
    with meter.counting("vqa", positions=5):
        torch.randn(5, 8) @ weight
    meter.add("vqa", 5)
    meter.add("vqa", 10)
    meter.add("caption", 100)  # never counted
    assert meter.take() == 3 * 2 * 5 * 8 * 8
    assert meter.take() == 0
    assert measured_peak(torch.device("cpu"), torch.float32) > 1e8


def test_gradients_are_watched_by_name() -> None:
    module = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    norms = GradientNorms({"exits": module}, "cpu")
    module["used"](torch.ones(2, 3)).sum().backward()
    assert bool(norms.finite())
    norms.close_step()
    still = [name for name, value in zip(norms.names, norms.last.tolist(), strict=True) if value == 0]
    assert still == ["exits: unused.weight", "exits: unused.bias"]
    torch.testing.assert_close(norms.last[0], module["used"].weight.grad.norm())
    (module["used"](torch.full((2, 3), float("nan"))).sum()).backward()
    assert not bool(norms.finite())
    norms.close_step()
    assert norms.not_finite() == ["exits: used.weight"], "a bias's gradient does not depend on the input"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_one_bit_changes_a_fingerprint(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 11, dtype=dtype)
    before = fingerprint(weight)
    assert fingerprint(weight.clone()) == before
    for place in (0, 38, 76):
        changed = weight.clone()
        changed.view(-1)[place] = torch.nextafter(changed.view(-1)[place].float(), torch.tensor(99.0)).to(dtype) * 2
        assert fingerprint(changed) != before
    swapped = weight.clone()
    swapped[0, 0], swapped[0, 1] = weight[0, 1], weight[0, 0]
    assert fingerprint(swapped) != before


def test_frozen_weights_are_all_looked_at_in_turn() -> None:
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6))).requires_grad_(False)
    frozen = FrozenWeights({"backbone": module})
    module[4].bias.data[1] += 1
    looks = [frozen.look() for _ in range(24)]
    found = looks.index(["backbone: 4.bias"])
    assert looks == [[]] * found + [["backbone: 4.bias"]] * (24 - found), "what was found stays told"
    assert frozen.look_at_all() == ["backbone: 4.bias"]


def test_an_honest_decoder_executes_the_blocks_it_claims_and_another_is_told(tiny_backbone) -> None:
    bank = ExitBank(tiny_backbone, (1, 3)).eval()
    torch.manual_seed(0)
    pixels = torch.randn(3, 3, 64, 64)
    prompt = torch.tensor([[tiny_backbone.layout.image_token_id] * tiny_backbone.layout.num_query_tokens + [7, 8]] * 3)
    options = {"max_new_tokens": 6, "eos_token_id": -1}
    early = generate(tiny_backbone, bank, pixels, prompt, thresholds=1e-4, **options)
    full = generate(tiny_backbone, None, pixels, prompt, **options)
    assert {record.exit_layer for result in early for record in result.records} != {None}
    honest = sample_checks(early.rows, full.rows)
    assert honest == {"samples/blocks_over_claimed": 1.0, "samples/length_ratio": 1.0}
    # Every block runs before an exit is asked, as in a decoder that computes all hidden states first.
    late = [replace(r, records=tuple(record._replace(blocks=r.n_blocks) for record in r.records)) for r in early]
    short = [replace(r, records=r.records[:3]) for r in early]
    rules = AlarmRules(AlarmsConfig(), exit_layers=(1, 3), total_steps=100)
    assert rules.look(1, honest) == []
    assert [alarm.name for alarm in rules.look(2, sample_checks(late, full.rows))] == ["fake_speed_up"]
    assert [alarm.name for alarm in rules.look(3, sample_checks(short, full.rows))] == ["length_bias"]


def test_wrong_caches_drift_from_an_exact_recomputation_and_exact_ones_do_not(tiny_backbone, monkeypatch) -> None:
    backbone = copy.deepcopy(tiny_backbone)
    bank = ExitBank(backbone, (1, 3)).eval()
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 64, 64)
    prompt = torch.tensor([[backbone.layout.image_token_id] * backbone.layout.num_query_tokens + [7, 8]])
    # Confidences of an untrained head are all alike; a sharper one makes some tokens leave and some not.
    bank.lm_head.weight = nn.Parameter(20 * bank.lm_head.weight.data, requires_grad=False)

    def drift(threshold: float) -> dict[str, float]:
        result = generate(backbone, bank, pixels, prompt, thresholds=threshold, max_new_tokens=12, eos_token_id=-1)[0]
        return drift_checks([answer_drift(backbone, bank, pixels, prompt, result)])

    confidences = generate(backbone, bank, pixels, prompt, thresholds=0.0, max_new_tokens=12, eos_token_id=-1)[
        0
    ].confidences
    threshold = sorted(confidences)[6]
    exact = drift(threshold)
    assert exact["samples/kv_drift"] < 1e-5
    rules = AlarmRules(AlarmsConfig(), exit_layers=(1, 3), total_steps=100)
    assert rules.look(1, exact) == []

    honest = PendingCache._run_segment

    def forgetful(
        self: PendingCache, segment: int, rows: list, starts: list, stops: list, *, last_only: bool
    ) -> Tensor:
        """States that waited before a deeper segment are forgotten: their keys and values become those of nothing."""
        if segment:
            for row in rows:
                self._inputs[segment][row, starts[row] : stops[row] - 1] = 0
        return honest(self, segment, rows, starts, stops, last_only=last_only)

    monkeypatch.setattr(PendingCache, "_run_segment", forgetful)
    wrong = drift(threshold)
    (alarm,) = rules.look(2, wrong)
    assert alarm.name == "kv_drift"
    assert f"up to {wrong['samples/kv_drift']:.2f}" in alarm.message
