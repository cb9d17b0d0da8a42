"""From published files to trained exits: each task's data set converted, linted, trained on and evaluated by the launchers."""

from __future__ import annotations

import json
from pathlib import Path

import official_files as official
import pytest

from free_dist.training.finetune import save_backbone
from tests.programs import ROOT, launchers

TASKS = ROOT / "launch" / "recipes" / "tasks"
STEPS = 2


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_backbone, tiny_encoder) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    save_backbone(tiny_backbone, tiny_encoder, directory / "backbone")
    content = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    for section in content.values():
        section["train_micro_batch_size_per_gpu"] = 4
    (directory / "cpu.json").write_text(json.dumps(content))
    return directory


def write_published(task: str, directory: Path) -> list[tuple[str, list[str]]]:
    """The official files; returns (data set, flags of its conversion), what is trained on first."""
    annotations, images = directory / "annotations", directory / "images"
    if task == "coco":
        official.karpathy(annotations)
        official.coco_images(images, "train2014", "val2014")
        official.nocaps(directory / "nocaps", directory / "nocaps-images")
        return [("coco", []), ("nocaps", ["--annotations", "nocaps", "--images", "nocaps-images"])]
    if task == "vqav2":
        official.vqa(annotations)
        official.coco_images(images, "train2014", "val2014", "test2015")
        return [("vqav2", ["--withheld"])]
    official.visdial(annotations, images)
    return [("visdial", ["--withheld"])]


@pytest.mark.parametrize("task", ["coco", "vqav2", "visdial"])
def test_shards_of_the_published_files_are_sound_and_train_and_evaluate(task: str, workplace: Path, tmp_path) -> None:
    commands: list[list[object]] = []
    data_sets = write_published(task, tmp_path)
    for name, flags in data_sets:
        folders = dict(zip(flags[::2], flags[1::2], strict=True)) if "--images" in flags else {}
        where = {"--annotations": "annotations", "--images": "images"} | folders
        words = [word for flag, folder in where.items() for word in (flag, tmp_path / folder)]
        switches = [] if folders else flags
        commands += [
            ["launch/prepare_data.py", name, *words, *switches, "--out", tmp_path / name],
            ["launch/inspect_data.py", tmp_path / name, "--lint"],
        ]
    recipe = [
        f"backbone.path={workplace / 'backbone'}",
        "exits.exit_layers=[1,3]",
        "training.log_every=1",
        "data.max_history_tokens=16",
        "data.questions_per_image=2",
        "decoding.max_new_tokens=3",
    ]
    run = tmp_path / "run"
    train = ["--ds_config", workplace / "cpu.json", "--config", TASKS / f"{task}.yaml"]
    steps = [f"training.max_steps={STEPS}", "training.warmup_steps=1", f"data.root={tmp_path / task}"]
    commands.append(["launch/train.py", *train, f"run_dir={run}", *recipe, *steps])
    few = ["evaluation.max_samples=4", "evaluation.timing_samples=1", "evaluation.thresholds=[0.05]"]
    for name, _ in data_sets:
        given = ["--exits", run / "export", "--config", TASKS / f"{name}.yaml", f"run_dir={tmp_path / 'of' / name}"]
        commands.append(["launch/evaluate.py", *given, f"data.root={tmp_path / name}", *recipe, *few])
    launchers(*commands)
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step/stepped"] for entry in logged] == [1.0] * STEPS
    assert not (run / "quarantine.jsonl").exists()
    for name, _ in data_sets:
        results = json.loads((tmp_path / "of" / name / "results.json").read_text())
        (exits,) = (entry for entry in results if entry["method"] == "exits")
        assert exits["n"] == {"coco": 2}.get(name, 4), exits  # two of the six val images are tests
