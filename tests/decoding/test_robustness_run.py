"""Robustness on a tiny random model and real shards: clean level, opinions, carried thresholds, and both launchers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.config import BackboneConfig, DataConfig, DecodingConfig, EvaluationConfig, Recipe
from free_dist.data.samples import IGNORE, SampleEncoder
from free_dist.data.stream import split_samples
from free_dist.evaluation.calibration import harm
from free_dist.evaluation.evaluate import evaluate_exits
from free_dist.evaluation.report_traces import TRACES, read_traces
from free_dist.evaluation.robustness import Corruption, measure_corruptions
from free_dist.evaluation.robustness_confidence import answer_transfer_rows, record_opinions
from free_dist.evaluation.tasks import find_task
from free_dist.exits import ExitBank
from free_dist.exits.export import backbone_hash, save_exits
from free_dist.recipe_io import save_recipe
from free_dist.training.finetune import save_backbone

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("quality", "quality_full", "agreement", "mean_blocks", "n")
"""Columns that rows of an evaluation and of the clean level have in common, times left out."""


@pytest.fixture(scope="module")
def lively() -> Blip2Backbone:
    """Four blocks that say different things, and with confidence."""
    model = new_model(width=32, n_blocks=4, n_heads=2)
    for name, parameter in model.language_model.named_parameters():
        if "layers." in name and parameter.ndim == 2:
            parameter.data.mul_(12.0)
    backbone = Blip2Backbone(model.eval().requires_grad_(False))
    backbone.shared_modules()[0].weight.data.mul_(30.0)
    return backbone


@pytest.fixture(scope="module")
def exits(lively: Blip2Backbone) -> ExitBank:
    return ExitBank(lively, [1, 3], init="next").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def recipe(tiny_data: DataConfig) -> Recipe:
    settings = EvaluationConfig(max_samples=6, thresholds=[0.05, 1.1], timing_samples=0, tasks=["vqa", "caption"])
    return Recipe(data=tiny_data, decoding=DecodingConfig(max_new_tokens=4), evaluation=settings)


@pytest.fixture(scope="module")
def measured(lively, exits, tiny_encoder: SampleEncoder, recipe: Recipe):
    corruptions = [Corruption(kind=kind, level=level) for kind in ("noise", "blur") for level in (0.0, 0.5)]
    return measure_corruptions(
        lively, tiny_encoder, {"exits": exits}, recipe, corruptions=corruptions, thresholds=[0.05], quiet=True
    )


def test_the_clean_level_is_the_evaluation_exactly(lively, exits, tiny_encoder, recipe, measured) -> None:
    rows, _ = measured
    evaluated = evaluate_exits(lively, tiny_encoder, {"exits": exits}, recipe, quiet=True)
    for kind in ("noise", "blur"):
        for wanted in evaluated:
            if wanted.threshold == 1.1:
                continue
            key = (wanted.task, kind, 0.0, wanted.method, wanted.threshold)
            (found,) = [r for r in rows if (r["task"], r["kind"], r["level"], r["method"], r["threshold"]) == key]
            assert {name: found[name] for name in SHARED} == {name: getattr(wanted, name) for name in SHARED}


def test_every_level_is_answered_by_full_depth_and_exits_on_the_same_pictures(measured) -> None:
    rows, clean = measured
    assert [(r["kind"], r["level"], r["method"]) for r in rows if r["task"] == "vqa"] == [
        (kind, level, method) for kind in ("noise", "blur") for level in (0.0, 0.5) for method in ("full", "exits")
    ]
    for row in rows:
        assert row["quality_interval"][0] <= row["quality"] <= row["quality_interval"][1]
        if row["method"] == "full":
            assert (row["quality"], row["speed"], row["mean_blocks"]) == (row["quality_full"], 1.0, 4.0)
    assert all(("tokenizer" in row) == (row["task"] == "caption") for row in rows)
    assert [(task.task, len(task.samples), len(task.results)) for task in clean] == [("vqa", 6, 6), ("caption", 6, 6)]


def test_spoilt_pictures_reach_the_model(lively, exits, tiny_encoder, recipe) -> None:
    """Were the encoder given the clean bytes, quality would not tell: an untrained model is never right."""
    (sample,) = split_samples(recipe.data, "test", "vqa", max_samples=1)
    from free_dist.evaluation.robustness import corrupted

    spoilt = corrupted(sample, Corruption(kind="noise", level=0.5))
    clean_pixels, pixels = tiny_encoder.encode_image(sample.image), tiny_encoder.encode_image(spoilt.image)
    assert (clean_pixels - pixels).abs().mean() > 0.2
    prefixes = [lively.encode_prefix(one[None]) for one in (clean_pixels, pixels)]
    assert not torch.allclose(*prefixes)


def test_opinions_are_those_of_hugging_face_and_of_the_exits(lively, exits, tiny_encoder, recipe) -> None:
    found = record_opinions(
        lively, tiny_encoder, exits, recipe, "vqa", split="test", max_samples=5, batch_size=2
    )  # fmt: skip
    samples = split_samples(recipe.data, "test", "vqa", max_samples=5)
    batch = tiny_encoder.collate(samples)
    output = lively.model(
        pixel_values=batch.pixel_values[batch.image_index],
        input_ids=batch.input_ids,
        attention_mask=torch.ones_like(batch.input_ids),
    )
    kept = batch.targets != IGNORE
    logits, targets = output.logits[kept].double(), batch.targets[kept]
    assert found.layers == (1, 3, 4)
    assert found.confidences[:, -1] == pytest.approx(logits.softmax(-1).amax(-1).numpy(), rel=1e-4)
    assert found.right[:, -1].tolist() == (logits.argmax(-1) == targets).tolist()
    assert found.agreeing[:, 1:].all()  # the exit after block 3 is a copy of block 4
    assert not found.agreeing[:, 0].all()
    places = {image: i for i, image in enumerate(dict.fromkeys(sample.image for sample in samples))}
    rows = kept.nonzero()[:, 0].tolist()
    assert found.images.tolist() == [places[samples[row].image] for row in rows]


def test_carried_answers_are_judged_by_their_harm(lively, exits, tiny_encoder, recipe, measured) -> None:
    _, clean = measured
    # An untrained model is never right at VQA: nothing can harm it, and a loose promise is certified with few images.
    rows = answer_transfer_rows(
        lively, tiny_encoder, exits, recipe, clean, "exits", calibration_samples=12, epsilon=0.45, delta=0.2, quiet=True
    )
    assert [(row["from"], row["to"]) for row in rows] == [
        (f"{a}/calibration", f"{b}/test") for b in ("vqa", "caption") for a in ("vqa", "caption")
    ]
    chosen = {row["from"]: row["threshold"] for row in rows}
    assert chosen["vqa/calibration"] < 1
    from free_dist.evaluation.benchmark import exits_arm
    from free_dist.evaluation.robustness import answer_all

    for task in clean:
        arm = exits_arm(lively, exits, threshold=chosen["vqa/calibration"], max_new_tokens=4)
        answers = answer_all(lively, tiny_encoder, [arm], task.samples, what="", quiet=True)
        references = [sample.references for sample in task.samples]
        own, full = (
            np.array(find_task(task.task).score([r.texts[0] for r in results], references).per_sample)
            for results in (answers, task.results)
        )
        losses = harm(full, own, relative=task.task == "caption")
        images = list(dict.fromkeys(sample.image for sample in task.samples))
        by_image = [np.mean([v for v, s in zip(losses, task.samples, strict=True) if s.image == i]) for i in images]
        (row,) = [r for r in rows if (r["from"], r["task"]) == ("vqa/calibration", task.task)]
        assert row["got"] == pytest.approx(np.mean(by_image))


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return finished


@pytest.mark.slow
def test_a_real_run_is_evaluated_spoilt_and_reported(
    lively, exits, tiny_encoder, recipe, tiny_root, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    save_backbone(lively, tiny_encoder, tmp_path / "backbone")
    save_exits(exits, run / "export", backbone_hash=backbone_hash(lively), thresholds=0.9)
    settings = replace(recipe.evaluation, max_samples=3)
    config = BackboneConfig(path=str(tmp_path / "backbone"))
    save_recipe(replace(recipe, backbone=config, evaluation=settings, run_dir=str(run)), run / "recipe.yaml")
    launch("launch/evaluate.py", "--exits", str(run / "export"), "--config", str(run / "recipe.yaml"))
    assert "Not measured: robustness" in (run / "report.md").read_text()
    levels = ["--noise", "0.2", "--blur", "0.05", "--calibration-samples", "3"]
    printed = launch("launch/robustness.py", str(run), *levels).stdout
    assert str(run / "robustness.json") in printed
    content = json.loads((run / "robustness.json").read_text())
    assert content["format"] == 1
    assert content["command"].startswith("python launch/robustness.py ")
    assert content["provenance"]["torch"] == torch.__version__
    assert {row["exit"] for row in content["transfer"]} == {1, 3, "all"}
    clean = {(r["task"], r["method"], r["threshold"]): r["quality"] for r in content["corruptions"] if r["level"] == 0}
    results = json.loads((run / "results.json").read_text())
    rows = results if isinstance(results, list) else results["rows"]
    shared = [r for r in rows if (r["task"], r["method"], r["threshold"]) in clean]
    assert len(shared) == len(clean) == 4
    assert all(r["quality"] == clean[r["task"], r["method"], r["threshold"]] for r in shared)
    for row in content["costs"]:
        assert all(seconds >= 0 for seconds in row["parts"].values())
        assert row["parts"]["checks"] > 0 or row["method"] == "full"
    traces = read_traces(run / TRACES)
    assert traces.n_blocks == 4
    for one in traces.answers:
        spoken = [token.text for token in one.tokens if token.word != "end" or not token.text.startswith("<")]
        assert "".join(spoken).strip().startswith(one.text[:1])
    assert sum(one.picture is not None for one in traces.answers) == 6
    printed = launch("launch/report.py", str(run)).stdout
    assert "Not measured: placement under a budget; make it with: python launch/place_exits.py" in printed
    text = (run / "report.md").read_text()
    assert "Not measured: robustness" not in text
    ratio = next(row for row in content["length"] if row["threshold"] == 0.05)
    assert f"{ratio['ratio']:.3f} \\[" in text
