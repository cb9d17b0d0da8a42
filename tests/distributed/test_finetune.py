"""Stage 1 in a real DeepSpeed engine on gloo ranks: against plain PyTorch, killed and resumed, and what it leaves behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import stage1_scene as scene
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from free_dist.config import Recipe, UserError
from free_dist.data.pretrained import load_pretrained
from free_dist.launchers import free_port
from free_dist.recipe_io import save_recipe
from free_dist.training.run_directory import CHECKPOINTS, left_nothing
from free_dist.training.stage1_run import BACKBONE, check_run, write_run
from free_dist.training.trainer import Interrupted


@pytest.fixture(scope="module")
def starts(tmp_path_factory, tiny_tokenizer) -> dict[str, Path]:
    """Kind of backbone -> its Hugging Face directory; ``dropout`` is OPT with dropout."""
    found = {kind: tmp_path_factory.mktemp(kind) for kind in ("opt", "dropout", "llama", "t5", "instructblip")}
    for kind, directory in found.items():
        scene.save_new(kind, tiny_tokenizer, directory)
    return found


ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
PARTS = {
    "vision": ("vision_model.",),
    "qformer": ("qformer.", "query_tokens"),
    "projection": ("language_projection.",),
}


def entries(recipe: Recipe) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(recipe.run_dir) / "log.jsonl").read_text().splitlines()]


def losses(recipe: Recipe) -> list[float]:
    return [entry["loss"] for entry in entries(recipe) if "loss" in entry]


def samples(recipe: Recipe) -> list[str]:
    return (Path(recipe.run_dir) / "samples.jsonl").read_text().splitlines()


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize(
    ("size", "stage", "accumulation", "train"),
    [
        (1, 1, 2, ["all"]),
        (2, 2, 1, ["vision", "qformer"]),
        (2, 1, 2, ["qformer", "projection", "lora"]),
        (2, 3, 2, ["qformer", "projection", "lora"]),
        (2, 3, 1, ["all"]),
    ],
)
def test_the_engine_trains_like_one_process_of_plain_pytorch(
    starts, tiny_data, tmp_path, size, stage, accumulation, train
):
    recipe = scene.recipe(tiny_data, tmp_path / "run", starts["opt"], train=train, lora_dropout=0.0)
    section = scene.section(recipe, stage=stage, accumulation=accumulation, size=size)
    run_ranks(size, scene.stage1, recipe, section, starts["opt"])
    wanted, wanted_steps = scene.reference(recipe, starts["opt"])
    for entry, (loss, norm) in zip(entries(recipe), wanted_steps, strict=True):
        assert entry["loss"] == pytest.approx(loss, rel=1e-5)
        # Clipping and Adam hide the scale of a gradient from the weights.
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-4)
    found, before = weights(tmp_path / "run" / BACKBONE), weights(starts["opt"])
    assert found.keys() == before.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    moved = max((before[name] - weight).abs().max().item() for name, weight in wanted.items())
    assert moved > 1e-3, "a comparison of weights that never moved proves nothing"


def with_a_bad_pixel(recipe: Recipe, section: dict[str, Any], start: Path, steps: tuple[int, ...]) -> str:
    """Stage 1 whose rank 1 sees a picture that is not a number at some steps."""
    import free_dist.training.finetune as module

    good = module.training_batches

    def bad(*arguments: Any, **options: Any):
        for step, batch in enumerate(good(*arguments, **options), start=1):
            if step in steps and torch.distributed.get_rank() == 1:
                batch = replace(batch, pixel_values=batch.pixel_values * float("nan"))
            yield batch

    module.training_batches = bad
    return scene.stage1(recipe, section, start)


@pytest.mark.fault
@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_told(starts, tiny_data, tmp_path, stage: int):
    recipe = scene.recipe(tiny_data, tmp_path / "run", starts["opt"])
    section = scene.section(recipe, stage=stage, size=2)
    run_ranks(2, with_a_bad_pixel, recipe, section, starts["opt"], (2, 4))
    told = [entry for entry in entries(recipe) if entry.get("event") == "skipped_step"]
    assert [entry["step"] for entry in told] == [2, 4]
    assert all("rank 1: not finite: pixels" in entry["message"] for entry in told)
    trained = weights(tmp_path / "run" / BACKBONE)
    assert all(weight.isfinite().all() for weight in trained.values())
    moved = max((trained[name] - weight).abs().max().item() for name, weight in weights(starts["opt"]).items())
    assert moved > 1e-3


@pytest.mark.fault
def test_too_many_such_steps_in_a_row_end_the_run(starts, tiny_data, tmp_path):
    recipe = scene.recipe(tiny_data, tmp_path / "run", starts["opt"])
    recipe = replace(recipe, training=replace(recipe.training, max_skipped_in_a_row=2))
    with pytest.raises(
        AssertionError, match=r"3 steps in a row were skipped, more than training\.max_skipped_in_a_row=2"
    ):
        run_ranks(2, with_a_bad_pixel, recipe, scene.section(recipe, size=2), starts["opt"], (2, 3, 4))


@pytest.mark.parametrize(
    ("train", "stage", "bf16"),
    [(["projection"], 1, True), (["qformer", "projection"], 3, True), (["vision"], 2, False), (["lora"], 3, False)],
)
def test_exactly_the_named_parts_move_and_all_else_is_unchanged_bit_by_bit(
    starts, tiny_data, tmp_path, train, stage, bf16
):
    recipe = scene.recipe(tiny_data, tmp_path / "run", starts["opt"], train=train)
    run_ranks(2, scene.stage1, recipe, scene.section(recipe, stage=stage, size=2, bf16=bf16), starts["opt"])
    before, after = weights(starts["opt"]), weights(tmp_path / "run" / BACKBONE)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    prefixes = tuple(prefix for part in train for prefix in PARTS.get(part, ()))
    named = {name for name in before if name.startswith(prefixes)}
    if train == ["lora"]:
        named = {
            name for name in before if name.endswith(("q_proj.weight", "v_proj.weight")) and "language_model" in name
        }
    # Gradients of key biases are zero in exact arithmetic, and padding positions of embeddings have none.
    assert changed <= named
    assert {name for name in named - changed if "key.bias" not in name and "position" not in name} == set()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


def test_a_checkpoint_in_bfloat16_stays_one(starts, tiny_data, tmp_path) -> None:
    start = tmp_path / "start"
    backbone, encoder = load_pretrained(str(starts["opt"]))
    scene.save(backbone.model.to(torch.bfloat16), encoder, start)
    recipe = scene.recipe(tiny_data, tmp_path / "run", start, train=["projection", "lora"])
    run_ranks(1, scene.stage1, recipe, scene.section(recipe, bf16=True), start)
    assert {tensor.dtype for tensor in weights(tmp_path / "run" / BACKBONE).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["opt", "llama", "t5", "instructblip"])
def test_every_backbone_trains_lora_and_projection_and_its_result_loads_anywhere(
    starts, tiny_data, tmp_path, kind: str
):
    recipe = scene.recipe(tiny_data, tmp_path / "run", starts[kind], train=["projection", "lora"], steps=12)
    run_ranks(2, scene.stage1, recipe, scene.section(recipe, stage=3, size=2), starts[kind])
    found = losses(recipe)
    assert sum(found[-3:]) < sum(found[:3])
    result = tmp_path / "run" / BACKBONE
    changed = {name for name, before in weights(starts[kind]).items() if not torch.equal(before, weights(result)[name])}
    adapted = {name for name in changed if not name.startswith("language_projection.")}
    assert adapted and all(name.startswith("language_model.") and ".weight" in name for name in adapted)
    assert scene.is_adapted(kind, adapted)
    configs = [json.loads((directory / "config.json").read_text()) for directory in (starts[kind], result)]
    assert configs[0] == configs[1]
    backbone, _ = load_pretrained(str(result))
    own, info = type(backbone.model).from_pretrained(result, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, backbone.model.state_dict()[name])


@pytest.mark.parametrize(("size", "stage"), [(1, 1), (2, 2), (2, 3)])
def test_a_run_killed_at_any_moment_goes_on_to_the_losses_and_weights_of_an_uninterrupted_one(
    starts, tiny_data, tmp_path, size: int, stage: int
):
    start = starts["dropout"]
    recipe = scene.recipe(
        tiny_data,
        tmp_path / "whole",
        start,
        train=["qformer", "projection", "lora"],
        steps=9,
        augment=True,
    )
    recipe = replace(recipe, training=replace(recipe.training, save_every=2))
    section = scene.section(recipe, stage=stage, size=size, accumulation=2)
    run_ranks(size, scene.stage1, recipe, section, start)
    cut = replace(recipe, run_dir=str(tmp_path / "cut"))
    for lines in (4, 7):  # once after the first checkpoint, once after one made by a resumed run
        run_until_killed(size, lines, cut, section, start)
        assert not (tmp_path / "cut" / BACKBONE).exists()
    assert len(losses(cut)) >= 7
    run_ranks(size, scene.stage1, cut, section, start)
    assert losses(cut) == losses(recipe)
    whole, resumed = (weights(tmp_path / name / BACKBONE) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert samples(cut) == samples(recipe) and len(samples(cut)) == 9


def run_until_killed(size: int, lines: int, recipe: Recipe, *arguments: Any) -> None:
    """Start the ranks and kill them all with SIGKILL once so many lines are logged."""
    log = Path(recipe.run_dir) / "log.jsonl"
    port = free_port()
    processes = []
    for rank in range(size):
        _, sender = multiprocessing.Pipe(duplex=False)
        processes.append(
            ranks._context.Process(
                target=ranks._rank, args=(rank, size, port, sender, scene.stage1, (recipe, *arguments)), daemon=True
            )
        )
    for process in processes:
        process.start()
    try:
        wait_for_lines(log, lines, lambda: all(process.is_alive() for process in processes))
    finally:
        for (
            process
        ) in processes:  # all before any is waited for: a rank whose peer is gone ends by itself, with another code
            process.kill()
        for process in processes:
            process.join()
    assert all(process.exitcode == -signal.SIGKILL for process in processes)


def interrupted(recipe: Recipe, section: dict[str, Any], start: Path) -> str:
    log = Path(recipe.run_dir) / "log.jsonl"

    def send() -> None:
        while not (log.exists() and log.read_text().count("\n") >= 2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if torch.distributed.get_rank() == 1:
        threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Interrupted) as stop:
        scene.stage1(recipe, section, start)
    return str(stop.value)


def test_sigterm_to_one_rank_leaves_a_checkpoint_of_the_step_that_was_running(starts, tiny_data, tmp_path) -> None:
    recipe = scene.recipe(tiny_data, tmp_path / "run", starts["opt"], steps=400)
    recipe = replace(recipe, training=replace(recipe.training, save_every=1000))
    section = scene.section(recipe, size=2)
    messages = run_ranks(2, interrupted, recipe, section, starts["opt"])
    assert messages[0] == messages[1]
    (checkpoint,) = (tmp_path / "run" / CHECKPOINTS).glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert f"stopped after step {step} of 400" in messages[0]
    assert len(losses(recipe)) == step
    with pytest.raises(AssertionError, match="was made with steps of 4 rows, and this start has 2"):
        run_ranks(1, scene.stage1, recipe, section, starts["opt"])


def test_a_run_with_other_settings_is_refused_by_name_and_a_finished_one_too(
    starts, tiny_data, tmp_path, monkeypatch
) -> None:
    recipe = scene.recipe(tiny_data, tmp_path / "run", starts["opt"])
    section = scene.section(recipe)
    check_run(recipe, section)
    write_run(recipe, section)
    check_run(recipe, section)
    check_run(replace(recipe, training=replace(recipe.training, log_every=7)), section)
    other = replace(recipe, finetune=replace(recipe.finetune, lora_rank=3))
    check_run(other, section)  # nothing was learnt with the former settings, which may not even have loaded
    (tmp_path / "run" / "log.jsonl").touch()
    with pytest.raises(UserError, match=r"other settings \(finetune.lora_rank is 4 there, 3 here\)"):
        check_run(other, section)
    check_run(recipe, scene.section(recipe, stage=3, accumulation=2))  # how work is spread is free
    with pytest.raises(UserError, match=r"--ds_config: bf16 is .*False.* there, .*True.* here"):
        check_run(recipe, scene.section(recipe, bf16=True))
    (tmp_path / "run" / BACKBONE).mkdir()
    with pytest.raises(UserError, match="already holds a finished run"):
        left_nothing(lambda: check_run(recipe, section))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(UserError, match="already holds a finished run"):
        left_nothing(lambda: check_run(recipe, section))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert left_nothing(lambda: check_run(recipe, section))


def test_an_untrained_backbone_is_made_trained_and_grown_without_a_ds_config(tiny_data, tmp_path) -> None:
    shallow = scene.recipe(
        tiny_data, tmp_path / "shallow", Path("untrained"), steps=2, train=["all"], n_blocks=2, vision_steps=2,
        augment=True, batch_size=8, eval_every=1,
    )  # fmt: skip
    (told,) = run_ranks(1, scene.made_and_trained, shallow)
    backbone, _ = load_pretrained(str(tmp_path / "shallow" / BACKBONE))
    assert backbone.n_blocks == 2
    assert f"{sum(parameter.numel() for parameter in backbone.parameters()):,}" in told[0]
    evaluations = [entry for entry in entries(shallow) if "calibration_accuracy_vqa" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    assert evaluations[0]["calibration_loss_caption"] != evaluations[1]["calibration_loss_caption"]

    deep = scene.recipe(
        tiny_data, tmp_path / "deep", tmp_path / "shallow" / BACKBONE, steps=2, train=["all"], n_blocks=4, batch_size=8
    )
    run_ranks(1, scene.made_and_trained, deep)
    assert load_pretrained(str(tmp_path / "deep" / BACKBONE))[0].n_blocks == 4


@pytest.mark.slow
def test_the_launcher_goes_on_after_ctrl_c_with_the_same_command(starts, tiny_data, tmp_path) -> None:
    recipe = scene.recipe(tiny_data, tmp_path / "run", starts["opt"], steps=25, train=["projection", "lora"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    section = scene.section(recipe, size=2, stage=2)
    (tmp_path / "ds.json").write_text(json.dumps(section))
    command = [SCRIPTS / "deepspeed", "--num_gpus", 2, "--master_port", free_port(), "launch/finetune.py"]
    command += ["--ds_config", tmp_path / "ds.json", "--config", tmp_path / "recipe.yaml"]
    path = os.pathsep.join((str(SCRIPTS), os.environ["PATH"]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}
    log = tmp_path / "run" / "log.jsonl"
    with open(tmp_path / "output", "w") as output:
        for part in ("interrupted", "whole"):
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=environment,
                start_new_session=True,  # a terminal sends Ctrl-C to the whole group; this makes one of our own
                stdout=output,
                stderr=output,
            )
            try:
                if part == "interrupted":
                    wait_for_lines(log, 3, lambda process=process: process.poll() is None)
                    os.killpg(process.pid, signal.SIGINT)
                code = process.wait(timeout=600)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            assert (code == 0) == (part == "whole"), (tmp_path / "output").read_text()
    told = (tmp_path / "output").read_text()
    assert "LoRA" in told and "2 processes on cpu, 4 rows per step" in told
    assert "goes on after step" in told and f"saved: {tmp_path / 'run' / BACKBONE}" in told
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 26))
    load_pretrained(str(tmp_path / "run" / BACKBONE))


def wait_for_lines(log: Path, lines: int, is_alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= lines):
        assert time.monotonic() < deadline, "training did not start"
        assert is_alive(), "training ended by itself"
        time.sleep(0.005)
