"""launch/compare.py end to end on a tiny model: four trainings, one table, and what a second run reuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from free_dist.data.pretrained import load_pretrained
from free_dist.evaluation.comparison_report import COLUMNS
from free_dist.exits.export import load_exits, read_exits_manifest
from free_dist.training.finetune import save_backbone

ROOT = Path(__file__).resolve().parents[2]
TRAININGS = ("ce_gan", "ce", "kl", "classifier")


def compare(*words: str, source: str | Path = "launch/recipes/compare.yaml") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/compare.py", str(source), *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_backbone, tiny_encoder, tiny_root: Path) -> tuple[Path, list[str], str]:
    directory = tmp_path_factory.mktemp("compare")
    save_backbone(tiny_backbone, tiny_encoder, directory / "backbone")
    words = [
        f"run_dir={directory / 'run'}",
        f"backbone.path={directory / 'backbone'}",
        f"data.root={tiny_root}",
        "exits.exit_layers=[1,3]",
        "training.max_steps=3",
        "training.warmup_steps=1",
        "training.log_every=1",
        "training.sample_every=0",
        "evaluation.max_samples=4",
        "evaluation.thresholds=[0.01]",
        "evaluation.tasks=[vqa]",
        "decoding.max_new_tokens=4",
        "--calibration-samples=3",
        f"--reuse={directory / 'nothing'}",
    ]
    first = compare(*words)
    assert first.returncode == 0, f"{first.stdout}\n{first.stderr}"
    return directory / "run", words, first.stdout


def test_it_leaves_the_promised_file(finished) -> None:
    run_dir, words, printed = finished
    content = json.loads((run_dir / "comparison.json").read_text())
    assert content["format"] == 1
    assert (
        content["command"].startswith("python launch/compare.py launch/recipes/compare.yaml")
        and words[0] in content["command"]
    )
    assert {"git_commit", "torch", "threads"} <= set(content["provenance"])
    assert content["recipe"]["exits"]["exit_layers"] == [1, 3]
    assert set(content["training"]) == set(TRAININGS)
    for row in (*content["rows"], *content["sweep"]):
        assert set(COLUMNS) <= set(row) and row["task"] == "vqa" and row["n"] == 4
    assert {row["method"] for row in content["rows"]} >= {"full", "hf", "ce_gan", "pabee", "calm", "self_speculation"}
    report = (run_dir / "comparison.md").read_text()
    assert all(row["label"] in report for row in content["rows"])
    assert "LayerSkip" in printed and str(run_dir / "comparison.json") in printed


def test_trainings_differ_in_what_they_should(finished, tiny_backbone) -> None:
    run_dir = finished[0]
    content = json.loads((run_dir / "comparison.json").read_text())
    logs = {name: (run_dir / name / "log.jsonl").read_text() for name in TRAININGS}
    assert [name for name in TRAININGS if "loss_discriminator" in logs[name]] == ["ce_gan"]
    manifests = {name: read_exits_manifest(run_dir / name / "export") for name in TRAININGS}
    assert [name for name in TRAININGS if manifests[name].variant.name == "classifier"] == ["classifier"]
    assert [name for name in TRAININGS if manifests[name].extra["loss"]["mode"] == "unsupervised"] == ["kl"]
    costs = content["training"]
    assert all(costs[name]["training_seconds"] > 0 for name in TRAININGS)
    # Discriminators come on top of CE; a classifier has no exit transformer to compute.
    flops = {name: costs[name]["training_flops_per_sample"] for name in TRAININGS}
    assert flops["ce_gan"] > flops["ce"] > flops["classifier"] > 0


def test_exported_classifiers_are_reloaded_as_they_were_trained(finished) -> None:
    backbone = load_pretrained(finished[0].parent / "backbone")[0]
    bank = load_exits(backbone, finished[0] / "classifier" / "export")
    assert bank.has_own_heads
    head = backbone.shared_modules()[1].weight
    for exit_transformer in bank.transformers:
        (weight,) = exit_transformer.parameters()
        assert weight.shape == head.shape and 0 < (weight - head).abs().max() < 0.1


def test_a_second_run_reuses_everything_and_other_settings_measure_again(finished) -> None:
    run_dir, words, _ = finished
    before = {path: path.stat().st_mtime_ns for name in TRAININGS for path in (run_dir / name).rglob("*")}
    rows = json.loads((run_dir / "comparison.json").read_text())["rows"]
    second = compare(*words)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("reusing") == len(TRAININGS) + 1
    assert json.loads((run_dir / "comparison.json").read_text())["rows"] == rows
    # Trainings that learnt the same are found in another directory, although it is measured otherwise.
    other = [word for word in words if not word.startswith(("run_dir", "--reuse", "evaluation.max_samples"))]
    third = compare(*other, f"run_dir={run_dir.parent / 'other'}", f"--reuse={run_dir}", "evaluation.max_samples=3")
    assert third.returncode == 0, third.stderr
    assert third.stdout.count("reusing") == len(TRAININGS)
    assert {row["n"] for row in json.loads((run_dir.parent / "other" / "comparison.json").read_text())["rows"]} == {3}
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_reused_tasks_keep_the_provenance_of_when_they_were_measured(finished) -> None:
    run_dir, words, _ = finished
    part = run_dir / "comparison_parts" / "vqa.json"
    content = json.loads(part.read_text())
    content["provenance"]["git_commit"] = "an earlier one"
    part.write_text(json.dumps(content))
    again = compare(*words)
    assert again.returncode == 0, again.stderr
    found = json.loads((run_dir / "comparison.json").read_text())
    assert found["provenance"]["git_commit"] == "an earlier one"
    assert found["provenance_by_task"] == {"vqa": content["provenance"]}


def test_a_run_in_the_place_of_the_recipe_is_compared_with_its_own_trainings(finished, tmp_path: Path) -> None:
    made, words, _ = finished
    run = tmp_path / "run"
    shutil.copytree(made / "ce_gan", run / "exits")
    shutil.copytree(made / "ce", run / "exits_ce")
    shutil.copy(made / "ce_gan" / "recipe.yaml", run / "recipe.yaml")
    given = made / "kl" / "export"
    flags = [word for word in words if word.startswith("--calibration")]
    done = compare(*flags, f"--reuse={made}", f"--exits=kl={given}", source=run)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    content = json.loads((run / "comparison.json").read_text())
    exports = {name: Path(one["export"]) for name, one in content["training"].items()}
    assert exports == {
        "ce_gan": run / "exits" / "export", "ce": run / "exits_ce" / "export", "kl": given,
        "classifier": made / "classifier" / "export",
    }  # fmt: skip
    flops = {name: one["training_flops_per_sample"] for name, one in content["training"].items()}
    assert [name for name in TRAININGS if flops[name] is None] == ["kl"], "what was given was trained by another recipe"
    notes = [row["note"] for row in content["rows"] if row["method"] == "kl"]
    assert notes and all("operations not known" in note for note in notes)
    # Exits after other blocks are refused before anything is trained.
    other = compare("exits.exit_layers=[1,2]", f"--exits=kl={given}", source=run)
    assert other.returncode == 2 and len(other.stderr.strip().splitlines()) == 1
    assert str(given) in other.stderr and "[1, 3]" in other.stderr and "[1, 2]" in other.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--min-quality=0"], "--min-quality 0"),
        (["--exits=gan=x"], "want TRAINING=DIR with one of ce_gan"),
        (["--exits=ce=/nowhere"], "no exits.json there"),
        (["evaluation.split=calibration"], "evaluation.split=calibration: every method's setting is chosen there"),
        (["tests"], "tests launch/recipes/compare.yaml: give one run directory, or recipes, not both"),
        (["loss.adversarial_weight=0"], "loss.adversarial_weight=0: ours is trained with it"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, tiny_root: Path, words: list[str], said: str) -> None:
    failed = compare(f"run_dir={tmp_path}", f"data.root={tiny_root}", "--reuse=/nowhere", *words)
    assert failed.returncode == 2 and said in failed.stderr and len(failed.stderr.strip().splitlines()) == 1
