"""The whole way with every backbone: train on two processes, calibrate, generate, evaluate, audit, export, reload elsewhere.

Real launchers on a real checkpoint directory.  Training and reloading have processes of their own, as users' have; what comes
between shares one, because imports take longer than the work.
"""

from __future__ import annotations

import json

import pytest
from checkpoints import COMBINATIONS, FEATURE_LM, overrides

from free_dist.launchers import free_port
from tests.programs import ROOT, SCRIPTS, launchers, started

pytestmark = pytest.mark.backbones

STEPS = 3
NEW_TOKENS = 4


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("checkpoint", [*COMBINATIONS, FEATURE_LM], indirect=True)
def test_train_calibrate_generate_evaluate_audit_export_and_reload(checkpoint, tmp_path, tiny_root) -> None:
    ds_config = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    for section in ds_config.values():
        section["train_micro_batch_size_per_gpu"] = 4
    # Sharded, and without the threshold below which tensors as small as these would be replicated.
    ds_config["backbone"]["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "two.json").write_text(json.dumps(ds_config))
    (sample,) = checkpoint.samples("vqa", 1)
    picture, run_dir, shared = tmp_path / "picture.png", tmp_path / "run", tmp_path / "shared"
    picture.write_bytes(sample.image)
    recipe = [
        f"backbone.path={checkpoint.directory}",
        f"data.root={tiny_root}",
        *overrides(checkpoint.name),
        "data.max_turns=2",
        "exits.exit_layers=[1,3]",
        f"training.max_steps={STEPS}",
        "training.log_every=1",
        "training.sample_every=2",
        f"decoding.max_new_tokens={NEW_TOKENS}",
        "decoding.confidence_threshold=0.5",
    ]
    deepspeed = [SCRIPTS / "deepspeed", "--num_gpus", 2, "--master_port", free_port()]
    started([*deepspeed, "launch/train.py", "--ds_config", tmp_path / "two.json", f"run_dir={run_dir}", *recipe])
    logged = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert len(logged) == STEPS
    assert all(entry["step/stepped"] == 1 for entry in logged)

    exits, config = run_dir / "export", ["--config", run_dir / "recipe.yaml"]
    ask = ["launch/generate.py", picture, "--backbone", checkpoint.directory, "--prompt", sample.turns[0].prompt]
    ask += ["--threshold", "0.02", "--max-new-tokens", NEW_TOKENS, "--json"]
    few = ["evaluation.max_samples=3", "evaluation.timing_samples=1", "evaluation.thresholds=[0.02]"]
    printed = launchers(
        ["launch/calibrate.py", "--exits", exits, *config, "--task", "vqa", "--epsilon", "0.5", "--delta", "0.4",
         "evaluation.max_samples=16"],
        [*ask, "--exits", exits],
        [*ask, "--exits", exits, "--lossless"],
        ["launch/evaluate.py", "--exits", exits, *config, f"run_dir={tmp_path / 'evaluation'}", *few],
        ["launch/fit_checks.py", "--exits", exits, *config, "--samples", 40, "--steps", 5],
        ["launch/audit_lossless.py", "--exits", exits, *config, "--samples", 4, "--threshold", "0.02"],
        ["launch/export.py", "--run", run_dir, "--out", shared],
    )  # fmt: skip
    early, lossless, audit = json_lines(printed)
    assert any(layer is not None for layer in early["exits"]), "no token left early"
    for task, counts in audit["tasks"].items():
        assert counts["identical"] == counts["samples"] == 4, (task, audit["differences"])
    assert sum(counts["drafted"] for counts in audit["tasks"].values()) > 0
    assert json.loads((exits / "calibration-vqa.json").read_text())["n_samples"] == 16
    assert (tmp_path / "evaluation" / "results.json").is_file()

    assert json_lines(launchers([*ask, "--exits", shared], [*ask, "--exits", shared, "--lossless"])) == [
        early,
        lossless,
    ]
