"""Made-up files of a run, in the formats that the launchers write, for tests of what is shown of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from free_dist.evaluation.ablation import ablation_rows

TASKS = ("vqa", "caption", "dialogue")
ABOUT: dict[str, Any] = {"format": 1, "provenance": {"git_commit": "0" * 40, "torch": "2.13.0"}, "recipe": {}}
METHODS = {
    "gan": "CE+GAN exit transformers",
    "ce": "CE-only exit transformers",
    "classifiers": "independent exit classifiers",
    "patience": "PABEE patience",
    "entropy": "DeeBERT entropy",
    "propagation": "CALM state propagation",
    "truncation": "fixed depth",
    "speculation": "LayerSkip self-speculation",
}


def comparison(seed: int = 0) -> dict[str, Any]:
    """``comparison.json``."""
    rng = random.Random(seed)
    rows = []
    for task in TASKS:
        for method, label in METHODS.items():
            for threshold in (0.5, 0.9):
                speed = rng.uniform(0.7, 2.8)
                quality = rng.uniform(0.7, 1.0)
                rows.append(
                    {
                        "task": task,
                        "method": method,
                        "label": label,
                        "threshold": None if method == "truncation" else threshold,
                        "policy": "max_prob",
                        "quality_name": "accuracy",
                        "quality": quality,
                        "quality_interval": [quality - 0.02, quality + 0.02],
                        "quality_full": 0.98,
                        "calibration_quality_ratio": quality / 0.98,
                        "agreement": rng.random(),
                        "speed": speed,
                        "speed_interval": [speed - 0.1, speed + 0.1],
                        "layer_ratio": 2 * speed,
                        "mean_blocks": 8 / speed,
                        "trainable_parameters": rng.randrange(100_000, 2_000_000),
                        "training_seconds": rng.uniform(50, 200),
                        "training_flops_per_sample": rng.uniform(1e9, 5e9),
                        "n": 130,
                        "note": "",
                    }
                )
    return {**ABOUT, "command": "python launch/compare.py runs/made_up", "rows": rows}


def placement(seed: int = 1) -> dict[str, Any]:
    """``placement.json``."""
    rng = random.Random(seed)

    def entry(layers: list[int]) -> dict[str, Any]:
        speed, quality = rng.uniform(1.2, 2.2), rng.uniform(0.97, 1.0)
        return {
            "layers": layers,
            "variant": "full",
            "thresholds": [rng.choice((0.5, 0.8, 0.9)) for _ in layers],
            "parameters": 200_000 * len(layers),
            "predicted_speed": speed * rng.uniform(0.95, 1.05),
            "measured_speed": speed,
            "measured_speed_interval": [speed - 0.1, speed + 0.1],
            "quality": 0.98 * quality,
            "quality_ratio": quality,
            "n": 120,
        }

    sets = [sorted(rng.sample(range(1, 16), 3)) for _ in range(20)]
    baselines = {"uniform": entry([4, 8, 12]), "authors": entry([2, 4, 7])}
    by_task = {"vqa": [0.625, 1.1], "caption": [0.5, 0.5]}
    return {
        **ABOUT,
        "command": "python launch/place_exits.py runs/made_up",
        "tasks": {"vqa": {"predicted": entry([3, 6]), "baselines": {"uniform": entry([4, 8])}}},
        "predicted": entry([2, 5]),
        "measured": entry([2, 5]) | {"thresholds": by_task},
        "baselines": baselines | {f"random {i}": entry(layers) for i, layers in enumerate(sets)},
        "budget": {"exits": 3, "parameters": 800_000},
        "search_seconds": 12.5,
        "points": [{"predicted_speed": 1 + i / 10, "quality_ratio": 1 - i * i / 2000} for i in range(15)],
    }


def mid_crisis(seed: int = 2) -> dict[str, Any]:
    """``mid_crisis.json``."""
    rng = random.Random(seed)

    def task() -> dict[str, Any]:
        curves = {}
        for name, blocks in (
            ("logit lens", range(1, 17)),
            ("tuned lens", range(1, 17)),
            ("CE-ET", (2, 4, 7)),
            ("GAN-ET", (2, 4, 7)),
        ):
            points = {}
            for k in blocks:
                accuracy = min(0.99, 0.5 + 0.03 * k + rng.uniform(-0.05, 0.05))
                bounds = [accuracy - 0.01, accuracy + 0.01]
                points[str(k)] = {"accuracy": accuracy, "interval": bounds, "agreement": accuracy}
            curves[name] = points
        return {
            "tokens": 1234,
            "curves": curves,
            "dips": {"logit lens": {"block": 5, "depth": 0.04, "interval": [0.02, 0.06]}, "CE-ET": None},
            "overthinking": {name: {"2": 0.01, "4": 0.02, "any": 0.03} for name in curves},
        }

    found = {name: task() for name in TASKS}
    command = "python launch/probe_depth.py runs/made_up"
    return {**ABOUT, "command": command, "tasks": found, "fine_tuned": {"tasks": {"vqa": task()}}}


def ablation() -> dict[str, Any]:
    """``ablation.json``."""
    accuracies = {
        "base": [{2: 0.9, 4: 0.95}, {2: 0.91, 4: 0.96}],
        "no_gan": [{2: 0.93, 4: 0.95}, {2: 0.94, 4: 0.955}],
        "seven_exits": [{1: 0.7, 2: 0.88, 4: 0.95}, {1: 0.6, 2: 0.89, 4: 0.96}],
    }
    sizes = {"base": 590_000, "no_gan": 590_000, "seven_exits": 1_380_000}
    rows = [
        row.to_json()
        for task in TASKS
        for row in ablation_rows(accuracies, task=task, full=0.99, tokens=500, parameters=sizes)
    ]
    return {**ABOUT, "command": "python launch/ablate.py --seeds 0,1", "seeds": [0, 1], "changes": {}, "rows": rows}


def write_all(run: Path) -> None:
    """Put all of them into a run directory."""
    made = {"comparison": comparison(), "placement": placement(), "mid_crisis": mid_crisis()}
    for name, content in made.items():
        (run / f"{name}.json").write_text(json.dumps(content))
    (run / "ablation").mkdir(exist_ok=True)
    (run / "ablation" / "ablation.json").write_text(json.dumps(ablation()))
