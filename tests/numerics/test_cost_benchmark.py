"""The plain path of the training benchmark is the training step's own arithmetic, and every option alone changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.data.samples import Batch, SampleEncoder
from free_dist.data.stream import training_batches
from free_dist.exits import ExitBank, FeatureClassifiers

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from plain_training import NEEDS, PlainTrainer, Savings  # noqa: E402

LENGTH = 120
OPTIONS = [
    name for name in vars(Savings()) if name != "visual_cache"
]  # which changes what batches bring, not what is done


@pytest.fixture(scope="module")
def backbone() -> Blip2Backbone:
    model = new_model(width=32, n_blocks=4, n_heads=2).eval().requires_grad_(False).double()
    model.language_model.model.decoder.embed_tokens.weight.mul_(20)
    return Blip2Backbone(model)


@pytest.fixture(scope="module")
def batches(tiny_data, tiny_encoder: SampleEncoder) -> list[Batch]:
    found = []
    for task in ("vqa", "caption", "dialogue"):
        data = replace(tiny_data, tasks={task: 1.0}, workers=0)
        batch = next(training_batches(data, tiny_encoder, seed=0, micro_batch_size=4))
        found.append(replace(batch, pixel_values=batch.pixel_values.double()))
    return found


def gradients(backbone: Blip2Backbone, batch: Batch, savings: Savings) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    bank, classifiers = ExitBank(backbone, (1, 3)).train(), FeatureClassifiers(2, 32, 16).double()
    trainer = PlainTrainer(backbone, bank, classifiers, fixed_length=LENGTH, savings=savings)
    exits, discriminators = trainer.backward(trainer.prepared(batch))
    found = {"exits": exits, "discriminators": discriminators}
    weights = [*bank.transformers.named_parameters(), *classifiers.named_parameters()]
    return found | {name: weight.grad for name, weight in weights if not name.endswith("k_proj.bias")}


@pytest.mark.parametrize("name", [*OPTIONS, "all of them"])
def test_every_option_gives_the_losses_and_gradients_of_the_plain_path(backbone, batches, name: str) -> None:
    chosen = OPTIONS if name == "all of them" else [name, *NEEDS.get(name, ())]
    for batch in batches:
        wanted = gradients(backbone, batch, Savings())
        found = gradients(backbone, batch, Savings(**dict.fromkeys(chosen, True)))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert (found[key] - value).abs().max() < 1e-10 * value.abs().max(), key


def test_the_plain_path_pads_to_its_length_and_gives_every_row_its_image(backbone, batches) -> None:
    bank = ExitBank(backbone, (1,))
    trainer = PlainTrainer(backbone, bank, FeatureClassifiers(1, 32, 8), fixed_length=LENGTH)
    prepared = trainer.prepared(batches[0])
    assert prepared.input_ids.shape == prepared.targets.shape == (4, LENGTH)
    assert len(prepared.pixel_values) == 4 > len(batches[0].pixel_values)
    with pytest.raises(ValueError, match="do not fit"):
        PlainTrainer(backbone, bank, FeatureClassifiers(1, 32, 8), fixed_length=10).prepared(batches[0])


def test_the_benchmark_prints_every_figure_as_json_last(tiny_root: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "training.py"), "--root", str(tiny_root), "--rounds", "1"]
    command += ["--process-rounds", "1", "--rows", "4"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=400).stdout
    figures = json.loads(printed.splitlines()[-1])
    assert {"gan_over_ce", "options", "all_over_plain", "two_process_efficiency"} <= figures.keys()
    assert figures["options"].keys() == vars(Savings()).keys()
    for name, option in figures["options"].items():
        assert option["ratio"] > 0 and option["max_gradient_error"] < 1e-6, name
    assert figures["gan_over_ce"] > 0 and figures["all_over_plain"] > 1 and figures["two_process_efficiency"] > 0
