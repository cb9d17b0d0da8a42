"""The shipped recipes and distribution files: any backbone's with any task's loads, fits its model, and the rows add up."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from free_dist.backbones.published import PUBLISHED_BACKBONES, n_language_blocks, published_config
from free_dist.config import EMBEDDED_BACKBONE, ConfigError, Recipe
from free_dist.ds_config import gradient_accumulation_steps, micro_batch_size, read_ds_config, zero_stage
from free_dist.planning.workload import TRAINING_SAMPLES
from free_dist.recipe_checks import check_recipe, check_rows_per_step
from free_dist.recipe_io import load_recipe
from free_dist.training.stage1_run import engine_section

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "launch" / "recipes"
BACKBONES = {path.stem: path for path in sorted((RECIPES / "backbones").glob("*.yaml"))}
TASKS = {path.stem: path for path in sorted((RECIPES / "tasks").glob("*.yaml"))}
CLUSTERS = {"eight_gpus": 8, "four_nodes": 32}
SIZES = ("2.7b", "7b", "13b")


def test_every_backbone_with_a_vision_half_and_every_task_of_the_paper_has_its_recipe() -> None:
    # SmolLM2 is a language model alone, and the embedded backbone's recipe is the quickstart's.
    assert set(BACKBONES) == set(PUBLISHED_BACKBONES) - {EMBEDDED_BACKBONE, "smollm2-135m"}
    assert set(TASKS) == {"coco", "nocaps", "vqav2", "vqav2_vg", "visdial"}


@pytest.mark.parametrize(("backbone", "task"), list(product(BACKBONES, TASKS)))
def test_a_backbones_and_a_tasks_file_make_one_recipe(backbone: str, task: str) -> None:
    recipe = load_recipe([BACKBONES[backbone], TASKS[task]])
    check_recipe(recipe)
    assert recipe.backbone.path.endswith(backbone)
    assert recipe.data.root == f"data/{task}"
    assert recipe.exits.exit_layers[-1] < n_language_blocks(backbone), "an exit behind the last block saves nothing"
    assert len(recipe.data.tasks) == 1 and list(recipe.data.tasks) == recipe.evaluation.tasks
    assert any(threshold > 1 for threshold in recipe.evaluation.thresholds), "the sweep ends at full depth"


def test_no_field_is_set_by_both_a_backbone_and_a_task() -> None:
    """Or the order of the two files would matter."""
    default, first = load_recipe(None), next(iter(TASKS.values()))
    for (_, backbone), (_, task) in product(BACKBONES.items(), TASKS.items()):
        assert load_recipe([backbone, task]) == load_recipe([task, backbone])
    assert load_recipe([first]) != default


@pytest.mark.parametrize(("cluster", "size"), list(product(CLUSTERS, SIZES)))
def test_rows_per_step_of_a_cluster_are_those_that_every_recipe_is_meant_for(cluster: str, size: str) -> None:
    ds_config = read_ds_config(REPOSITORY / "ds_configs" / f"{cluster}_{size}.json")
    rows = micro_batch_size(ds_config) * gradient_accumulation_steps(ds_config) * CLUSTERS[cluster]
    for path in BACKBONES.values():
        assert load_recipe([path]).training.expected_rows_per_step == rows


@pytest.mark.parametrize("name", list(BACKBONES))
def test_stage_1_of_a_recipe_without_a_distribution_file_has_the_rows_that_the_recipe_is_meant_for(name: str) -> None:
    recipe = load_recipe([BACKBONES[name]])
    section = engine_section(recipe, None, world_size=4)
    check_rows_per_step(recipe, section["train_micro_batch_size_per_gpu"] * 4, "without --ds_config")


@pytest.mark.parametrize("name", list(BACKBONES))
def test_a_recipe_names_distribution_files_that_exist_and_suit_the_backbones_size(name: str) -> None:
    named = re.findall(r"ds_configs/(\w+\.?\w+)\.json", BACKBONES[name].read_text())
    assert {file.rpartition("_")[0] for file in named} == set(CLUSTERS)
    (size,) = {file.rpartition("_")[2] for file in named}
    for file in named:
        backbone = read_ds_config(REPOSITORY / "ds_configs" / f"{file}.json")["backbone"]
        assert zero_stage(backbone) == 0  # replicated where it fits, which at every size it does
    width = published_config(name).text_config.hidden_size
    assert (size == "13b") == (n_language_blocks(name) == 40 or (n_language_blocks(name) == 24 and width == 4096))


@pytest.mark.parametrize("task", [task for task in TASKS if task != "nocaps"])
def test_a_tasks_steps_are_the_epochs_its_first_line_states(task: str) -> None:
    text = TASKS[task].read_text()
    stated = re.search(r"(\d+) epochs? of ([\d,]+).*?(\d+) rows per step", text.splitlines()[0])
    assert stated is not None
    epochs, samples, rows = (int(part.replace(",", "")) for part in stated.groups())
    assert samples == TRAINING_SAMPLES[task]
    assert load_recipe([TASKS[task]]).training.max_steps == pytest.approx(epochs * samples / rows, rel=0.02)


def test_of_two_files_the_later_one_wins_and_overrides_win_over_both(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("training:\n  max_steps: 70\n  seed: 5\n")
    second.write_text("training:\n  max_steps: 80\n")
    recipe = load_recipe([first, second], ["training.log_every=3"])
    assert (recipe.training.max_steps, recipe.training.seed, recipe.training.log_every) == (80, 5, 3)
    assert load_recipe([second, first]).training.max_steps == 70
    assert load_recipe([]) == Recipe()


def test_a_mistake_in_the_second_file_names_it(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("training:\n  max_step: 70\n")
    with pytest.raises(ConfigError, match=r"wrong\.yaml: training\.max_step: no such field"):
        load_recipe([TASKS["coco"], wrong])
