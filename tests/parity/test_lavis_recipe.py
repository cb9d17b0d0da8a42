"""LAVIS's run files as recipes: every value lands in a field or in the list of those that have none."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from free_dist.config import ConfigError, MissingFileError, UserError
from free_dist.data.lavis_recipe import SAME_ALREADY, import_recipe, read_lavis_recipe
from free_dist.recipe_io import load_recipe

CAPTIONING = """
model:
  arch: blip2_opt
  model_type: caption_coco_opt2.7b
  freeze_vit: False
datasets:
  coco_caption:
    vis_processor:
      train: {name: blip2_image_train, image_size: 364}
    text_processor:
      train: {name: blip_caption, prompt: "a photo of "}
run:
  task: captioning
  lr_sched: linear_warmup_cosine_lr
  init_lr: 1e-5
  min_lr: 0
  warmup_lr: 1e-8
  warmup_steps: 1000
  weight_decay: 0.05
  max_epoch: 5
  batch_size_train: 16
  accum_grad_iters: 2
  world_size: 8
  max_len: 30
  num_beams: 5
  seed: 42
  output_dir: output/caption
  amp: True
  resume_ckpt_path: null
  device: cuda
"""

QUESTIONS = """
model: {arch: blip2_t5, model_type: pretrain_flant5xl}
datasets:
  vg_vqa: {type: default}
  coco_vqa: {type: default}
run: {task: vqa, prompt: "Question: {} Short answer:", max_len: 10, seed: 7, min_lr: 1e-6, evaluate: True}
"""

REAL = Path(__file__).parents[2] / ".venv-lavis" / "lib"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "lavis.yaml"
    path.write_text(text)
    return path


def test_a_captioning_run_becomes_a_recipe_that_loads(tmp_path: Path) -> None:
    found = import_recipe(written(tmp_path, CAPTIONING), tmp_path / "out" / "recipe.yaml")
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.data.tasks == {"caption": 1.0} and recipe.evaluation.tasks == ["caption"]
    assert (recipe.data.root, recipe.data.caption_prompt) == ("data/coco", "a photo of")
    assert recipe.finetune.learning_rate == 1e-5 and isinstance(recipe.finetune.learning_rate, float)
    assert recipe.finetune.train == ["vision", "qformer", "projection"]
    assert (recipe.finetune.weight_decay, recipe.finetune.batch_size) == (0.05, 16 * 2 * 8)
    assert (recipe.training.seed, recipe.training.warmup_steps, recipe.training.expected_world_size) == (42, 1000, 8)
    assert recipe.training.max_steps == 5 * 566_747 // (16 * 2 * 8)
    assert (recipe.decoding.max_new_tokens, recipe.run_dir) == (30, "output/caption")
    assert found.ds_config == {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 2,
        "bf16.enabled": True,
    }


def test_a_question_run_keeps_its_prompt_with_our_placeholder(tmp_path: Path) -> None:
    found = import_recipe(written(tmp_path, QUESTIONS), tmp_path / "recipe.yaml")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.question_prompt == "Question: {question} Short answer:"
    assert (recipe.data.root, recipe.data.tasks) == ("data/vqav2", {"vqa": 1.0})
    listed = "\n".join(found.without_counterpart)
    assert "datasets.vg_vqa" in listed and "run.evaluate = True" in listed and "run.min_lr = 1e-06" in listed


@pytest.mark.parametrize("text", [CAPTIONING, QUESTIONS])
def test_no_value_of_the_file_is_lost(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    whole = read_lavis_recipe(path)
    for section, name in [(s, n) for s in ("model", "run") for n in OmegaConf.load(path)[s] if n != "task"]:
        less = OmegaConf.load(path)
        del less[section][name]
        OmegaConf.save(less, tmp_path / "less.yaml")
        asks_for_what_is_done = f"{section}.{name}" in SAME_ALREADY
        unlike = read_lavis_recipe(tmp_path / "less.yaml") != whole
        assert unlike or asks_for_what_is_done, f"{section}.{name} makes no difference"


def test_without_the_size_of_the_data_the_length_is_left_to_the_user(tmp_path: Path) -> None:
    text = CAPTIONING.replace("coco_caption", "textcaps_caption")
    found = read_lavis_recipe(written(tmp_path, text))
    assert "training.max_steps" not in found.fields and "training.warmup_steps" not in found.fields
    assert any("give --samples" in note and "warmup_steps=1000" in note for note in found.without_counterpart)
    found = read_lavis_recipe(written(tmp_path, text), samples=256_000)
    assert (found.fields["training.max_steps"], found.fields["training.warmup_steps"]) == (5000, 1000)


def test_mistakes_are_told_by_file_and_field(tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    with pytest.raises(MissingFileError, match=r"absent\.yaml does not exist"):
        import_recipe(tmp_path / "absent.yaml", out)
    with pytest.raises(UserError, match=r"run\.task='retrieval': only captioning"):
        import_recipe(written(tmp_path, CAPTIONING.replace("captioning", "retrieval")), out)
    with pytest.raises(UserError, match="want the sections model, datasets, run"):
        import_recipe(written(tmp_path, "a: 1"), out)
    with pytest.raises(UserError, match="not valid YAML"):
        import_recipe(written(tmp_path, "a: [1"), out)
    with pytest.raises(ConfigError, match=r"finetune\.learning_rate"):
        import_recipe(written(tmp_path, CAPTIONING.replace("1e-5", "-1")), out)
    with pytest.raises(ConfigError, match=r"training\.warmup_steps=1000: longer"):
        import_recipe(written(tmp_path, CAPTIONING), out, samples=256)
    assert not out.exists()


@pytest.mark.skipif(not REAL.exists(), reason="no .venv-lavis: make lavis-env builds it")
def test_lavis_own_files_are_either_recipes_or_refused_for_their_task(tmp_path: Path) -> None:
    made, refused = set(), {}
    for path in sorted(REAL.glob("python*/site-packages/lavis/projects/*/*/*.yaml")):
        try:
            import_recipe(path, tmp_path / "recipe.yaml")
            made.add(path.name)
        except UserError as error:
            refused[path] = str(error)
    # One file of LAVIS 1.0.2 is empty.
    assert all("have a counterpart" in told or path.stat().st_size == 0 for path, told in refused.items()), refused
    assert {"caption_coco_ft.yaml", "vqav2_ft.yaml", "nocaps_eval.yaml", "vqav2_zeroshot_flant5xl_eval.yaml"} <= made
