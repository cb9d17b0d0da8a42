"""The recipe: defaults <- YAML <- overrides, and every mistake told by its field before torch is imported."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from free_dist.config import TASKS, ConfigError, Recipe
from free_dist.data import samples
from free_dist.recipe_checks import check_recipe
from free_dist.recipe_io import (
    add_recipe_arguments,
    fail_clearly,
    load_recipe,
    recipe_fields,
    recipe_help,
    save_recipe,
)

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def write_yaml(directory: Path, text: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_are_a_valid_recipe() -> None:
    assert load_recipe(None) == Recipe()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_in_the_repository_loads(path: Path) -> None:
    load_recipe(path)


def test_overrides_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "training:\n  max_steps: 70\n  seed: 5\n")
    recipe = load_recipe(path, ["training.seed=6"])
    assert (recipe.training.max_steps, recipe.training.seed) == (70, 6)
    assert recipe.training.warmup_steps == Recipe().training.warmup_steps


def test_exponent_without_point_is_a_float_in_yaml_and_in_overrides(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "finetune:\n  learning_rate: 1e-5\n")
    assert load_recipe(path).finetune.learning_rate == 1e-5
    assert load_recipe(path, ["finetune.learning_rate=2e-6"]).finetune.learning_rate == 2e-6


def test_a_whole_mapping_replaces_and_a_dotted_key_changes_one_entry(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "data:\n  tasks: {vqa: 2}\n")
    assert load_recipe(path).data.tasks == {"vqa": 2.0}
    assert load_recipe(None, ["data.tasks={caption: 1}"]).data.tasks == {"caption": 1.0}
    assert load_recipe(None, ["data.tasks.vqa=0"]).data.tasks == {"vqa": 0.0, "caption": 1.0, "dialogue": 1.0}


def test_text_fields_take_an_override_literally() -> None:
    prompt = "Question: {question} Short answer:"
    assert load_recipe(None, [f"data.question_prompt={prompt}"]).data.question_prompt == prompt
    assert load_recipe(None, ["run_dir=a=b"]).run_dir == "a=b"


def test_none_is_a_value_of_an_optional_field(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "training:\n  expected_world_size: 2\n")
    assert load_recipe(path).training.expected_world_size == 2
    assert load_recipe(path, ["training.expected_world_size=null"]).training.expected_world_size is None


def test_empty_files_and_empty_sections_change_nothing(tmp_path: Path) -> None:
    assert load_recipe(write_yaml(tmp_path, "")) == Recipe()
    assert load_recipe(write_yaml(tmp_path, "training:\n")) == Recipe()


def test_saved_recipe_loads_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(None, ["finetune.learning_rate=1e-5", "data.tasks={vqa: 1}", "exits.exit_layers=[2,5]"])
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["saved.yaml"]


@pytest.mark.parametrize(
    ("override", "field", "suggestion"),
    [
        ("training.max_step=3", "training.max_step", "training.max_steps"),
        ("trainning.max_steps=3", "trainning.max_steps", "training.max_steps"),
        ("max_steps=3", "max_steps", "training.max_steps"),
        ("exits.layers=[3]", "exits.layers", "exits.exit_layers"),
        ("run_dir.name=x", "run_dir.name", "run_dir"),
    ],
)
def test_unknown_field_is_named_with_the_nearest_valid_one(override: str, field: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}: no such field; did you mean {suggestion}\?"):
        load_recipe(None, [override])


def test_unknown_field_in_yaml_names_the_file_too(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "loss:\n  temprature: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert "loss.temprature: no such field; did you mean loss.temperature?" in str(caught.value)


def test_misspelt_section_in_yaml_is_told_the_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainning: no such field; did you mean training\?"):
        load_recipe(write_yaml(tmp_path, "trainning:\n  max_steps: 3\n"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps=many", "training.max_steps='many': want int, found str"),
        ("training.max_steps=2.5", "training.max_steps=2.5: want int, found float"),
        ("finetune.learning_rate=true", "finetune.learning_rate=True: want float, found bool"),
        ("exits.exit_layers=3", "exits.exit_layers=3: want list[int], found int"),
        ("exits.exit_layers=[1,x]", "exits.exit_layers=[1, 'x']: want list[int], found list: Value 'x'"),
        ("training.seed=null", "training.seed=None: want int, found NoneType"),
        ("data.tasks=[vqa]", "data.tasks=['vqa']: want dict[str, float], found list"),
    ],
)
def test_wrong_type_names_field_value_and_wanted_type(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: 3\n", "training=3: this is a section"),
        ("- training\n", "want KEY: VALUE lines"),
        ("training: [\n", "not valid YAML"),
    ],
)
def test_malformed_yaml_is_told_clearly(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write_yaml(tmp_path, text))


def test_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load_recipe("absent.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps", "want KEY=VALUE"),
        ("training.max_steps=[1", "not a valid YAML value"),
        ("training=3", "training is a section"),
        ("data.root=${absent}", "data.root"),
    ],
)
def test_malformed_override_is_told_clearly(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, [override])


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["exits.exit_layers=[]"], "exits.exit_layers"),
        (["exits.exit_layers=[0,3]"], "exits.exit_layers"),
        (["exits.exit_layers=[3,3]"], "exits.exit_layers"),
        (["exits.exit_layers=[6,3]"], "exits.exit_layers"),
        (["exits.init=first"], "exits.init"),
        (["exits.variant=lorra"], "exits.variant"),
        (["exits.rank=0"], "exits.rank"),
        (["exits.bottleneck_size=0"], "exits.bottleneck_size"),
        (["exits.discriminator_hidden_size=0"], "exits.discriminator_hidden_size"),
        (["exits.discriminator=one"], "exits.discriminator"),
        (["loss.discriminator_steps=0"], "loss.discriminator_steps"),
        (["data.tasks.vqb=1"], "data.tasks='vqb'"),
        (["data.tasks.vqa=-1"], "data.tasks.vqa"),
        (["data.tasks.vqa=.nan"], "data.tasks.vqa"),
        (["data.tasks={}"], "data.tasks"),
        (["data.tasks={vqa: 0, caption: 0}"], "data.tasks"),
        (["data.question_prompt=Question:"], "data.question_prompt"),
        (["data.question_prompt={question} {answer}"], "data.question_prompt"),
        (["data.max_turns=0"], "data.max_turns"),
        (["data.history_prompt=Dialog history:"], "data.history_prompt"),
        (["data.history_turn={question}"], "data.history_turn"),
        (["data.history_turn={question} {answer} {turn}"], "data.history_turn"),
        (["data.max_history_tokens=-1"], "data.max_history_tokens"),
        (["data.synthetic_share=1.5"], "data.synthetic_share"),
        (["data.shuffle_buffer=0"], "data.shuffle_buffer"),
        (["data.bucket=-1"], "data.bucket"),
        (["data.workers=-1"], "data.workers"),
        (["data.read_timeout=0"], "data.read_timeout"),
        (["data.bad_sample_budget=1.5"], "data.bad_sample_budget"),
        (["data.bad_sample_budget=.nan"], "data.bad_sample_budget"),
        (["data.cache=''"], "data.cache"),
        (["data.root=pipe:cat shard"], "data.root"),
        (["data.root="], "data.root"),
        (["backbone.path="], "backbone.path"),
        (["run_dir="], "run_dir"),
        (["loss.mode=semisupervised"], "loss.mode"),
        (["loss.exit_weighting=deep"], "loss.exit_weighting"),
        (["loss.task_weight=-1"], "loss.task_weight"),
        (["loss.task_weight=0", "loss.adversarial_weight=0"], "loss.task_weight"),
        (["loss.temperature=0"], "loss.temperature"),
        (["cost.head_chunk=0"], "cost.head_chunk"),
        (["cost.share_prefix=true", "backbone.attn_implementation=flash_attention_2"], "cost.share_prefix"),
        (["training.max_steps=0"], "training.max_steps"),
        (["training.save_every=-1"], "training.save_every"),
        (["training.keep_last=0"], "training.keep_last"),
        (["training.keep_best=-1"], "training.keep_best"),
        (["training.max_steps=10", "training.warmup_steps=11"], "training.warmup_steps"),
        (["training.expected_world_size=0"], "training.expected_world_size"),
        (["training.max_skipped_in_a_row=-1"], "training.max_skipped_in_a_row"),
        (["training.hang_timeout=-1"], "training.hang_timeout"),
        (["training.stall_timeout=0"], "training.stall_timeout"),
        (["training.peak_tflops=0"], "training.peak_tflops"),
        (["alarms.action=die"], "alarms.action"),
        (["alarms.window=0"], "alarms.window"),
        (["alarms.collapse_cosine=2"], "alarms.collapse_cosine"),
        (["alarms.rising_kl=1"], "alarms.rising_kl"),
        (["alarms.slow_rank=.nan"], "alarms.slow_rank"),
        (["decoding.confidence_threshold=0"], "decoding.confidence_threshold"),
        (["decoding.max_new_tokens=0"], "decoding.max_new_tokens"),
        (["evaluation.thresholds=[]"], "evaluation.thresholds"),
        (["evaluation.thresholds=[0.5,0]"], "evaluation.thresholds"),
        (["evaluation.thresholds=[0.5,0.5]"], "evaluation.thresholds"),
        (["evaluation.tasks=[vqa,captoin]"], "evaluation.tasks"),
        (["evaluation.split=train"], "evaluation.split"),
        (["finetune.learning_rate=0"], "finetune.learning_rate"),
        (["finetune.weight_decay=-0.1"], "finetune.weight_decay"),
        (["finetune.grad_clip=.inf"], "finetune.grad_clip"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_impossible_value_or_combination_names_its_field(overrides: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, overrides)
    assert str(caught.value).startswith(field)


def test_wrong_choice_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'unsupervised'"):
        load_recipe(None, ["loss.mode=unsupervisd"])


def test_one_of_the_two_losses_is_enough() -> None:
    check_recipe(load_recipe(None, ["loss.task_weight=0"]))
    check_recipe(load_recipe(None, ["loss.adversarial_weight=0"]))


def test_task_names_of_recipe_and_samples_agree() -> None:
    assert samples.TASKS == TASKS


def test_recipe_is_read_and_refused_without_importing_torch() -> None:
    program = (
        "import sys\n"
        "from free_dist.recipe_io import load_recipe\n"
        "from free_dist.config import ConfigError\n"
        "load_recipe(None, ['training.max_steps=50'])\n"
        "try:\n"
        "    load_recipe(None, ['training.max_step=50'])\n"
        "except ConfigError:\n"
        "    assert 'torch' not in sys.modules, 'torch was imported'\n"
        "    print('refused')\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout == "refused\n"


def test_help_lists_every_field_with_type_default_and_docstring() -> None:
    listed = " ".join(recipe_help().split())
    for field in recipe_fields():
        assert field.doc, f"{field.name} has no docstring"
        doc = field.doc.replace("``", "'")
        assert f"{field.name}: {field.wanted} = {field.default!r} {doc}" in listed


def parser_with_recipe() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/any.py")
    parser.add_argument("--ds_config")
    add_recipe_arguments(parser)
    return parser


def test_overrides_may_stand_before_and_after_flags() -> None:
    line = ["training.seed=1", "--config", "r.yaml", "training.max_steps=30", "--ds_config", "d.json", "loss.mode=x"]
    arguments = parser_with_recipe().parse_intermixed_args(line)
    assert (arguments.config, arguments.ds_config) == (["r.yaml"], "d.json")
    assert arguments.overrides == ["training.seed=1", "training.max_steps=30", "loss.mode=x"]


def test_help_shows_flags_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser_with_recipe().parse_intermixed_args(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "--config FILE" in shown
    assert "\n  training.max_steps: int = 300\n" in shown


def test_user_errors_become_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, fail_clearly(parser_with_recipe()):
        load_recipe(None, ["training.max_step=3"])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("launch/any.py: error: override 'training.max_step=3'")
    assert shown.count("\n") == 1


def test_defects_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="not the user's"), fail_clearly(parser_with_recipe()):
        raise ValueError("not the user's")
