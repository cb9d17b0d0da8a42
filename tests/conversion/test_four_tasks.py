"""From published files to trained exits: each task's data set converted, linted, trained on and evaluated by the launchers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import official_files as official
import pytest
from pycocotools.coco import COCO

from free_dist.data import nocaps
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
        return [("coco", []), ("nocaps", ["--annotations", "nocaps", "--images", "nocaps-images", "--withheld"])]
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
        switches = [flag for flag in flags if flag == "--withheld"]
        pairs = [flag for flag in flags if flag != "--withheld"]
        where = {"--annotations": "annotations", "--images": "images"} | dict(zip(pairs[::2], pairs[1::2], strict=True))
        words = [word for flag, folder in where.items() for word in (flag, tmp_path / folder)]
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
    few = ["evaluation.timing_samples=1", "evaluation.thresholds=[0.05]"]
    for name, flags in data_sets:
        splits = ["test", "withheld"] if "--withheld" in flags or name == "nocaps" else ["test"]
        for split in splits:
            directory = tmp_path / "of" / name / split
            given = [
                "--exits",
                run / "export",
                "--config",
                TASKS / f"{name}.yaml",
                f"run_dir={directory}",
                *recipe,
                *few,
            ]
            to = ["--submission", tmp_path / "to" / split, f"data.root={tmp_path / name}", f"evaluation.split={split}"]
            # Starting METEOR takes half a minute: once is enough.
            quick = ["evaluation.caption_metrics=[BLEU,ROUGE-L]"] if name == "nocaps" else []
            commands.append(["launch/evaluate.py", *given, *to, "evaluation.max_samples=0", *quick])
    launchers(*commands)
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step/stepped"] for entry in logged] == [1.0] * STEPS
    assert not (run / "quarantine.jsonl").exists()
    for name, _ in data_sets:
        results = json.loads((tmp_path / "of" / name / "test" / "results.json").read_text())
        assert results["recipe"]["data"]["root"] == str(tmp_path / name)
        assert results["provenance"]["git_commit"] and "launch/evaluate.py" in results["command"]
        (exits,) = (entry for entry in results["rows"] if entry["method"] == "exits")
        check = {"coco": check_coco, "nocaps": check_nocaps, "vqav2": check_vqa, "visdial": check_visdial}[name]
        check(tmp_path, results, exits)


def submitted(directory: Path, dataset: str, split: str, name: str = "exits-0.05") -> list[dict[str, Any]]:
    """What was written for a server."""
    return json.loads((directory / "to" / split / dataset / f"{name}.json").read_text())


CAPTION_METRICS = {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"}


def check_coco(directory: Path, results: dict[str, Any], exits: dict[str, Any]) -> None:
    assert exits["n"] == results["samples"]["caption"] == 2  # two of the six val images are tests
    assert exits["metrics"].keys() | exits.get("unavailable", {}).keys() == CAPTION_METRICS | {"METEOR", "SPICE"}
    entries = submitted(directory, "coco", "test")
    assert {entry["image_id"] for entry in entries} == {n for n in official.part_ids("val") if n % 3 == 2}
    # The loader of the official evaluation takes them.
    annotations = official.place(
        directory / "annotated.json",
        {"info": official.INFO, "images": [{"id": entry["image_id"]} for entry in entries], "annotations": []},
    )
    truth = COCO(str(annotations))
    loaded = truth.loadRes(str(directory / "to" / "test" / "coco" / "exits-0.05.json"))
    assert sorted(loaded.getImgIds()) == sorted(truth.getImgIds())
    assert {entry["caption"] for entry in loaded.anns.values()} == {entry["caption"] for entry in entries}


def check_nocaps(directory: Path, results: dict[str, Any], exits: dict[str, Any]) -> None:
    parts = exits["breakdown"]["domain"]
    assert {name: part["n"] for name, part in parts.items()} == dict.fromkeys(nocaps.DOMAINS, 2)
    assert all(part["metrics"].keys() == exits["metrics"].keys() for part in parts.values())
    for split in ("test", "withheld"):
        entries = submitted(directory, "nocaps", split)
        assert [entry["image_id"] for entry in sorted(entries, key=lambda one: one["image_id"])] == list(range(6))
        assert all(entry.keys() == {"image_id", "caption"} for entry in entries)
    withheld = json.loads((directory / "of" / "nocaps" / "withheld" / "results.json").read_text())
    assert all(row["quality"] is None and row["n"] == (1 if row["method"] == "hf" else 6) for row in withheld["rows"])


def check_vqa(directory: Path, results: dict[str, Any], exits: dict[str, Any]) -> None:
    assert exits["breakdown"]["answer_type"]["other"]["n"] == exits["breakdown"]["question_type"]["what is"]["n"] == 12
    assert exits["metrics"]["accuracy"] == pytest.approx(exits["quality"])
    asked = [1000 * n + i for n in official.part_ids("test") for i in range(2)]
    entries = submitted(directory, "vqav2", "withheld")
    assert sorted(entry["question_id"] for entry in entries) == asked
    assert all(entry.keys() == {"question_id", "answer"} and isinstance(entry["answer"], str) for entry in entries)


def check_visdial(directory: Path, results: dict[str, Any], exits: dict[str, Any]) -> None:
    ranking = results["ranking"]
    ways = [(row["method"], row["exit_layer"], row["threshold"]) for row in ranking if not row["normalized"]]
    assert ways == [("full", None, None), ("exits", 1, None), ("exits", 3, None), ("exits", None, 0.05)]
    for row in ranking:
        assert (row["n"], row["metrics"]["n"], row["metrics"]["n_ndcg"]) == (60, 60, 6)  # one judged round a dialogue
        assert 1 <= row["metrics"]["mean_rank"] <= 100
    for split, rounds in (("test", range(1, 11)), ("withheld", [3])):
        for name in ("full", "exits@1", "exits-0.05-normalized"):
            entries = submitted(directory, "visdial", split, name)
            wanted = [(n, r) for n in official.part_ids("val" if split == "test" else "test") for r in rounds]
            assert sorted((entry["image_id"], entry["round_id"]) for entry in entries) == wanted
            assert all(sorted(entry["ranks"]) == list(range(1, 101)) for entry in entries)
