"""The directory that is shared: complete, described by its card, and decoding where nothing of training is installed."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from easy_vqa import get_test_image_paths
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from free_dist.backbones.embedded import new_image_processor, train_tokenizer
from free_dist.config import BackboneConfig, DataConfig, DecodingConfig, Recipe
from free_dist.data.pretrained import load_for_inference, load_pretrained
from free_dist.decoding import generate
from free_dist.decoding.early_exit_model import EarlyExitModel
from free_dist.decoding.pipeline import answer
from free_dist.evaluation.calibration import FORMAT_VERSION, Calibration, load_calibration, write_calibration
from free_dist.evaluation.rows import Row, write_results
from free_dist.exits import FeatureClassifiers
from free_dist.exits.check_files import FittedChecks, save_checks
from free_dist.exits.export import MANIFEST, WEIGHTS, backbone_hash, load_exits, read_exits_manifest, save_exits
from free_dist.exits.gate import CheckOptions
from free_dist.exits.hub import check_release
from free_dist.exits.manifest import decoding_settings
from free_dist.recipe_io import save_recipe

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "export.py"
IMAGES = [get_test_image_paths()[number] for number in (0, 1)]
QUESTION = "Q: {question} A:"
NOT_INSTALLED = ("deepspeed", "mpi4py", "webdataset", "tensorboard", "easy_vqa", "matplotlib", "pycocoevalcap")


@pytest.fixture(scope="module")
def checkpoint(backbone, tmp_path_factory) -> Path:
    """The decoding tests' backbone as a complete Hugging Face directory."""
    directory = tmp_path_factory.mktemp("models") / "tiny-blip2"
    backbone.model.save_pretrained(directory)
    words = ["what color is the shape? red", "a photo of a blue circle", QUESTION]
    train_tokenizer(words, vocab_size=backbone.vocab_size).save_pretrained(directory)
    new_image_processor().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def finished_run(backbone, bank, checkpoint, tmp_path_factory) -> Path:
    """A run directory after training, calibration, fitting of checks and evaluation."""
    run_dir = tmp_path_factory.mktemp("runs") / "mine"
    recipe = Recipe(
        run_dir=str(run_dir),
        backbone=BackboneConfig(path=str(checkpoint)),
        data=DataConfig(question_prompt=QUESTION),
        decoding=DecodingConfig(confidence_threshold=0.01, max_new_tokens=5),
    )
    run_dir.mkdir()
    save_recipe(recipe, run_dir / "recipe.yaml")
    model, _ = load_pretrained(str(checkpoint))
    manifest = save_exits(
        bank, run_dir / "export", backbone=model, thresholds=(0.01, 0.02, 0.03), calibration="set by hand",
        decoding=decoding_settings(recipe), git_commit="abc", extra={"backbone": str(checkpoint), "steps": 7},
    )  # fmt: skip
    calibration = Calibration(
        format_version=FORMAT_VERSION, task="vqa", method="ltt", loss="harm", epsilon=0.01, delta=0.05,
        guarantee="the promise", thresholds=(1.1, 0.0, 0.5), n_images=8, n_samples=8, exit_layers=manifest.exit_layers,
        backbone_hash=manifest.backbone_hash, weights_sha256=manifest.weights_sha256,
        settings={"decoding.max_new_tokens": 5}, full_quality=1.0, full_cost_per_token=17.6, candidates=(),
    )  # fmt: skip
    write_calibration(calibration, run_dir / "export")
    save_checks(run_dir / "export", fitted_checks(backbone), {"data": str(run_dir / "shards")})
    row = Row(
        task="vqa", method="exits", threshold=0.9, quality=0.75, quality_full=0.875, agreement=0.5, mean_blocks=4.25,
        layer_ratio=1.4, wall_ratio=1.2, wall_ratio_hf=None, n=16,
    )  # fmt: skip
    write_results([row], run_dir)
    return run_dir


def fitted_checks(backbone) -> FittedChecks:
    width, vocab = backbone.hidden_size, backbone.vocab_size
    return FittedChecks(
        gates=FeatureClassifiers(3, width, 4), gate_thresholds=(0.1, 0.1, 0.1),
        discriminators=FeatureClassifiers(3, width, 4), discriminator_thresholds=(0.1, 0.1, 0.1),
        token_order=torch.arange(vocab), pruned_size=20, down=torch.zeros(2, width), lift=torch.zeros(width, 2),
        screen_rank=2, thresholds=(0.1, 0.1, 0.1), worthwhile={},
    )  # fmt: skip


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the launcher in this process -> (exit code, output, standard error)."""

    def run(*flags: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        code: object = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def released(launch, finished_run: Path, tmp_path: Path) -> Path:
    """A complete directory, and nothing beside it."""
    out = tmp_path / "place" / "released"
    flags = ["--card-note", "Made by us.", "--base-model", "someone/tiny-blip2", "--license", "mit"]
    code, _, told = launch("--run", finished_run, "--out", out, "--results", finished_run / "results.json", *flags)
    assert code == 0, told
    assert [path.name for path in out.parent.iterdir()] == ["released"]
    return out


def test_the_directory_holds_everything_and_the_launcher_says_what(launch, finished_run, tmp_path) -> None:
    out = tmp_path / "out"
    code, said, _ = launch("--run", finished_run, "--out", out)
    assert code == 0
    names = {
        "README.md", "exits.json", "exits.safetensors", "checks.json", "checks.safetensors", "calibration-vqa.json"
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == {path.name for path in check_release(out)} == names
    assert all(name in said for name in names)
    assert "full exits after blocks 1, 3, 5 of backbone tiny-blip2" in said
    assert "vqa thresholds 1.1 0 0.5: the promise" in said


def test_what_is_loaded_from_it_answers_as_the_trained_bank_does(backbone, bank, checkpoint, released) -> None:
    model = EarlyExitModel.from_pretrained(released, checkpoint)
    for options, thresholds in (({}, (0.01, 0.02, 0.03)), ({"calibrated_for": "vqa"}, (1.1, 0.0, 0.5))):
        found = model.ask(IMAGES, "what color is the shape?", **options)
        prompt = QUESTION.replace("{question}", "what color is the shape?")
        wanted = answer(backbone, model.encoder, bank, IMAGES, prompt, thresholds=thresholds, max_new_tokens=5)
        assert found == wanted
        assert {layer for row in found for layer in row.result.exit_layers} & {1, 3, 5}
    assert load_calibration(released, "vqa") == (1.1, 0.0, 0.5)
    assert model.caption(IMAGES[0], thresholds=2.0)[0].result.exit_layers[0] is None


def test_checks_are_switched_on_by_name_and_do_not_go_with_calibrated_thresholds(checkpoint, released) -> None:
    model = EarlyExitModel.from_pretrained(released, checkpoint, checks=CheckOptions(head="pruned"))
    assert model.caption(IMAGES[0])[0].result.tokens[0] < 20
    for options in ({"calibrated_for": "vqa"}, {"calibrated_for": "vqa", "thresholds": 0.5}):
        with pytest.raises(ValueError, match="calibrated_for='vqa'"):
            model.caption(IMAGES[0], **options)


def test_a_task_without_calibration_and_a_backbone_that_is_not_named_are_told(checkpoint, released) -> None:
    model = EarlyExitModel.from_pretrained(released, checkpoint)
    with pytest.raises(ValueError, match="thresholds for vqa"):
        model.caption(IMAGES[0], calibrated_for="caption")
    with pytest.raises(ValueError, match="trained on someone/tiny-blip2: say where"):
        EarlyExitModel.from_pretrained(released)


def test_the_card_is_read_by_huggingface_hub_and_says_what_the_manifest_says(released) -> None:
    card = ModelCard.load(released / "README.md")
    assert card.data.to_dict() == {
        "license": "mit", "base_model": "someone/tiny-blip2", "library_name": "free_dist",
        "pipeline_tag": "image-text-to-text", "tags": ["early-exit", "vision-language", "free_dist"],
    }  # fmt: skip
    manifest = read_exits_manifest(released)
    for words in (
        "Made by us.", "| 3 of 6 | full block | 0.02 | 0 |", "| 1 of 6 | full block | 0.01 | off |", "set by hand",
        "the promise", manifest.weights_sha256, manifest.backbone_hash, "| optimizer steps | 7 |", "| code | abc |",
        "| vqa | exits | 0.9 | 0.7500 | 0.8750 | 50.0% | 4.25 | 16 |", 'calibrated_for="vqa"',
    ):  # fmt: skip
        assert words in card.text, words


def test_no_path_of_the_machine_is_published(released, checkpoint, finished_run) -> None:
    for path in released.iterdir():
        content = path.read_bytes()
        for place in (checkpoint, finished_run, Path.home(), ROOT):
            assert str(place).encode() not in content, path.name


def test_an_export_of_format_1_gets_the_hash_of_the_files(launch, backbone, bank, checkpoint, tmp_path) -> None:
    manifest = save_exits(bank, tmp_path / "old", backbone_hash=hash_in_float32(checkpoint), thresholds=0.5)
    fields = json.loads((tmp_path / "old" / MANIFEST).read_text())
    kept = {name: fields[name] for name in ("backbone_hash", "exit_layers", "thresholds", "weights_sha256")}
    old = kept | {"format_version": 1, "variant": "full", "extra": {}}
    (tmp_path / "old" / MANIFEST).write_text(json.dumps(old))
    code, _, told = launch("--exits", tmp_path / "old", "--backbone", checkpoint, "--out", tmp_path / "new")
    assert code == 0, told
    now = read_exits_manifest(tmp_path / "new")
    assert now.backbone_hash.startswith("files:") and now.weights_sha256 == manifest.weights_sha256
    EarlyExitModel.from_pretrained(tmp_path / "new", checkpoint, dtype=torch.bfloat16)


def hash_in_float32(checkpoint: Path) -> str:
    return backbone_hash(load_pretrained(str(checkpoint))[0])


def test_the_prompt_layout_is_compared(checkpoint, released) -> None:
    content = json.loads((released / MANIFEST).read_text())
    content["backbone"]["layout"]["opening"].append(9)
    (released / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="trained on prompts with opening"):
        EarlyExitModel.from_pretrained(released, checkpoint)
    backbone, _ = load_pretrained(str(checkpoint))
    with pytest.raises(ValueError, match="trained on prompts with opening"):
        load_exits(backbone, released)
    load_exits(backbone, released, verify=False)


def pickled(checkpoint: Path, directory: Path) -> Path:
    """The same checkpoint with a pickle in the place of safetensors."""
    shutil.copytree(checkpoint, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(checkpoint / "model.safetensors"), directory / "pytorch_model.bin")
    return directory


def test_exits_of_a_pickle_are_asked_and_released_where_the_pickle_is_allowed(
    launch, backbone, bank, checkpoint, tmp_path
) -> None:
    directory, run = pickled(checkpoint, tmp_path / "pickle"), tmp_path / "run"
    config = BackboneConfig(path=str(directory), allow_pickle=True)
    model, _ = load_for_inference(config)
    save_exits(bank, run / "export", backbone=model, thresholds=0.01)
    save_recipe(Recipe(run_dir=str(run), backbone=config), run / "recipe.yaml")
    with pytest.raises(ValueError, match=r"is a pickle.*--allow-pickle.*allow_pickle=True"):
        EarlyExitModel.from_pretrained(run / "export", directory)
    found = EarlyExitModel.from_pretrained(run / "export", directory, allow_pickle=True)
    assert found.bank.exit_layers == bank.exit_layers
    code, _, told = launch("--run", run, "--out", tmp_path / "out")
    assert code == 0, told
    flags = [IMAGES[0], "--caption", "--json", "--exits", run / "export", "--backbone", directory]
    assert "--allow-pickle" in generate_py(*flags, expect=2)
    line = json.loads(generate_py(*flags, "--allow-pickle"))
    assert line["tokens"] == found.caption(IMAGES[0])[0].result.tokens


def generate_py(*flags: object, expect: int = 0) -> str:
    """What launch/generate.py prints, or its complaint."""
    command = [sys.executable, str(ROOT / "launch" / "generate.py"), *map(str, flags)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == expect, finished.stderr
    return finished.stderr if expect else finished.stdout


def test_generate_answers_in_the_type_that_is_asked_for(checkpoint, released) -> None:
    flags = [IMAGES[0], "--caption", "--json", "--exits", released, "--backbone", checkpoint, "--threshold", "0.01"]
    line = json.loads(generate_py(*flags, "--dtype", "bfloat16"))
    model = EarlyExitModel.from_pretrained(released, checkpoint, dtype=torch.bfloat16)
    wanted = model.caption(IMAGES[0], thresholds=0.01)[0].result
    assert line["tokens"] == wanted.tokens
    assert line["confidences"] == pytest.approx(wanted.confidences)
    assert line["confidences"] != json.loads(generate_py(*flags))["confidences"]


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda run, out: (run / "export" / WEIGHTS).unlink(), "exits.safetensors does not exist"),
        (lambda run, out: (run / "export" / "checks.safetensors").unlink(), "checks.safetensors does not exist"),
        (lambda run, out: truncate(run / "export" / "checks.safetensors"), "checks.safetensors does not match"),
        (lambda run, out: shutil.copy(run / "export" / MANIFEST, run / "export" / "checks.json"), "not a checks manifest"),
        (lambda run, out: (run / "recipe.yaml").unlink(), "give the run_dir of launch/train.py"),
        (lambda run, out: (run / "results.json").write_text("{"), "is not a results.json"),
        (lambda run, out: out.mkdir(), "exists: give another directory, or --replace"),
        (lambda run, out: refit(run / "export" / "calibration-vqa.json"), "belongs to other exits"),
    ],
)  # fmt: skip
def test_what_is_missing_or_does_not_belong_is_told_and_nothing_is_left(
    launch, finished_run, tmp_path, break_it, words
) -> None:
    run, out = shutil.copytree(finished_run, tmp_path / "run"), tmp_path / "place" / "out"
    out.parent.mkdir()
    break_it(run, out)
    code, said, told = launch("--run", run, "--out", out, "--results", run / "results.json")
    assert code == 2
    assert words in told.splitlines()[-1]
    assert said == ""
    assert not list(out.parent.rglob("*.*"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def refit(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights_sha256": "0"}))


def test_another_backbone_is_refused_naming_both_unless_told_not_to_look(
    launch, finished_run, checkpoint, tmp_path
) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    save_file({"a": torch.zeros(1)}, other / "model.safetensors")
    flags = ["--run", finished_run, "--out", tmp_path / "out"]
    code, _, told = launch(*flags, "--backbone", other)
    assert code == 2
    assert "belongs to tiny-blip2 with hash files:" in told and f"{other} has files:" in told
    assert launch(*flags, "--backbone", other, "--no-verify")[0] == 0


def test_only_an_export_is_replaced_and_then_whole(launch, finished_run, released, tmp_path) -> None:
    (released / "stray.txt").write_text("old")
    assert launch("--run", finished_run, "--out", released, "--replace")[0] == 0
    assert not (released / "stray.txt").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("dear")
    code, _, told = launch("--run", finished_run, "--out", tmp_path / "letters", "--replace")
    assert code == 2 and "only replaces an export" in told
    assert (tmp_path / "letters" / "mine.txt").exists()


def test_pushing_without_the_hub_says_so_and_keeps_the_directory(launch, finished_run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what the variable of that name sets
    code, _, told = launch("--run", finished_run, "--out", tmp_path / "out", "--push", "someone/exits")
    assert code == 2
    assert "--push someone/exits: Cannot reach" in told.splitlines()[-1]
    assert len(check_release(tmp_path / "out")) == 6


# Where nothing of training is installed.


@pytest.fixture(scope="module")
def bare_packages(tmp_path_factory) -> Path:
    """All installed packages but those that only training needs."""
    directory = tmp_path_factory.mktemp("site") / "packages"
    directory.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.lower().replace("-", "_").startswith(NOT_INSTALLED):
            (directory / entry.name).symlink_to(entry)
    return directory


PROGRAM = """
import importlib.util, json, sys
assert not [name for name in json.loads(sys.argv[1]) if importlib.util.find_spec(name)]
from safetensors.torch import load_file
from transformers import Blip2ForConditionalGeneration
from free_dist.backbones import Blip2Backbone
from free_dist.decoding import generate
from free_dist.decoding.early_exit_model import EarlyExitModel
from free_dist.exits.export import load_exits
released, checkpoint, cases, image = sys.argv[2:]
hugging_face = Blip2ForConditionalGeneration.from_pretrained(checkpoint, local_files_only=True).eval()
backbone = Blip2Backbone(hugging_face)
bank = load_exits(backbone, released)
tokens = load_file(cases)
found = {"tokens": [], "full": [], "hugging_face": []}
for case in range(len(tokens) // 2):
    pixels, prompt = tokens[f"pixels{case}"], tokens[f"prompt{case}"]
    arguments = (backbone, bank, pixels, prompt)
    found["tokens"].append(generate(*arguments, thresholds=0.01, max_new_tokens=6, eos_token_id=-1)[0].tokens)
    found["full"].append(generate(*arguments, thresholds=2.0, max_new_tokens=6)[0].tokens)
    whole = hugging_face.generate(pixel_values=pixels, input_ids=prompt, max_new_tokens=6, do_sample=False)
    found["hugging_face"].append(whole[0, prompt.shape[1] :].tolist())
model = EarlyExitModel.from_pretrained(released, checkpoint)
found["answer"] = model.caption(image)[0].result.tokens
found["modules"] = sorted(name for name in sys.modules if name.startswith("free_dist"))
print(json.dumps(found))
"""


def test_a_plain_hugging_face_model_gives_the_same_tokens_where_nothing_of_training_is_installed(
    backbone, bank, cases, checkpoint, released, bare_packages, tmp_path
) -> None:
    tensors = {}
    for case, (pixels, prompt) in enumerate(cases):
        tensors |= {f"pixels{case}": pixels, f"prompt{case}": prompt}
    save_file(tensors, tmp_path / "cases.safetensors")
    arguments = [json.dumps(NOT_INSTALLED), released, checkpoint, tmp_path / "cases.safetensors", IMAGES[0]]
    finished = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(bare_packages)))},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    wanted = [
        generate(backbone, bank, pixels, prompt, thresholds=0.01, max_new_tokens=6, eos_token_id=-1)[0]
        for pixels, prompt in cases
    ]
    assert found["tokens"] == [result.tokens for result in wanted]
    assert {layer for result in wanted for layer in result.exit_layers} & {1, 3, 5}
    assert found["tokens"] != found["full"] == found["hugging_face"]
    assert found["answer"] == EarlyExitModel.from_pretrained(released, checkpoint).caption(IMAGES[0])[0].result.tokens
    rooms = {name.split(".")[1] for name in found["modules"] if "." in name}
    assert not rooms & {"engines", "distributed", "training", "evaluation", "monitor"}


def test_exits_on_a_backbone_in_memory_are_refused_where_files_were_promised(backbone, released) -> None:
    with pytest.raises(ValueError, match="not those of any files"):
        load_exits(backbone, released)
