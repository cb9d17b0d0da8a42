"""A LAVIS run's YAML (what its ``train.py`` and ``evaluate.py`` take as ``--cfg-path``) -> a recipe and ds_config values.

Every value either becomes a field of ours or is listed as having no counterpart.  OmegaConf reads the file, as LAVIS does:
``1e-5`` is a number (PyYAML alone would make it a string).  LAVIS fills what a file leaves open from its own defaults, which
are not known here; ours apply.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from free_dist.atomic import write_atomically
from free_dist.config import MissingFileError, UserError
from free_dist.recipe_io import load_recipe

TASKS = {"captioning": "caption", "vqa": "vqa", "dialogue": "dialogue"}
"""LAVIS's ``run.task`` -> ours."""

ROOTS = {
    "coco_caption": "data/coco",
    "coco_vqa": "data/vqav2",
    "vqa": "data/vqav2",
    "nocaps": "data/nocaps",
}
"""LAVIS's dataset builders -> the directories of our converters."""

ROWS = {"coco_caption": 566_747, "coco_vqa": 443_757, "vqa": 443_757}
"""Rows of one of LAVIS's epochs: captions of COCO's Karpathy training split, questions of VQAv2's training split."""

KINDS = {"blip2_opt": "blip2-opt", "blip2_t5": "blip2-t5", "blip2_vicuna_instruct": "instructblip-vicuna"}
KINDS |= {"blip2_t5_instruct": "instructblip-t5", "mini_gpt4": "minigpt4"}
"""LAVIS's ``model.arch`` -> ``launch/import_lavis.py --kind``."""

PLAIN = {
    "run.seed": "training.seed",
    "run.output_dir": "run_dir",
    "run.init_lr": "finetune.learning_rate",
    "run.weight_decay": "finetune.weight_decay",
    "run.warmup_steps": "training.warmup_steps",
    "run.max_len": "decoding.max_new_tokens",
    "run.batch_size_train": "finetune.batch_size",
}
"""Values that are taken over as they are."""

DS_CONFIG = {
    "run.batch_size_train": "train_micro_batch_size_per_gpu",
    "run.accum_grad_iters": "gradient_accumulation_steps",
    "run.amp": "bf16.enabled",
}
"""Values whose place is the ds_config."""

SAME_ALREADY = {
    "run.lr_sched": "linear_warmup_cosine_lr",
    "run.min_lr": 0,
    "run.distributed": True,
    "run.evaluate": False,
    "run.device": "cuda",
    "run.dist_url": "env://",
    "run.resume_ckpt_path": None,
}
"""Values that ask for what is done anyway; any other value has no counterpart."""


@dataclass(kw_only=True)
class ImportedRecipe:
    """A recipe's fields, and what of the LAVIS file is not among them."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Dotted name -> value, such as ``training.seed``."""
    ds_config: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed key -> value, for every section."""
    without_counterpart: list[str] = field(default_factory=list)
    """``name = value`` and, where there is one, what to do instead."""


def import_recipe(path: Path, out: Path, *, samples: int | None = None) -> ImportedRecipe:
    """Write the recipe ``out``; ``samples`` are the rows of an epoch, by which ``max_epoch`` becomes steps (None: ``ROWS``).

    Raises MissingFileError, UserError for a file that is not a LAVIS run's, and ConfigError for values that cannot be run.
    """
    found = read_lavis_recipe(path, samples=samples)
    nested = OmegaConf.create()
    for name, value in found.fields.items():
        OmegaConf.update(nested, name, value)
    text = f"# From LAVIS's {path.name}.\n{OmegaConf.to_yaml(nested)}"
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / out.name
        trial.write_text(text)
        load_recipe(trial)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text.encode())
    return found


def read_lavis_recipe(path: Path, *, samples: int | None = None) -> ImportedRecipe:
    """The fields of :func:`import_recipe`, without writing."""
    values = dict(_leaves(_load(path), ""))
    found = ImportedRecipe()
    processes = int(values.pop("run.world_size", 1))
    task = _task(values, path)
    # These take what they translate out of `values`; what is left at the end has no counterpart.
    _translate_model(values, found)
    used = _translate_data(values, found, task)
    _translate_length(values, found, processes, ROWS.get(used or "") if samples is None else samples)
    for name, target in DS_CONFIG.items():
        if name in values:
            found.ds_config[target] = values[name]
    for name, target in PLAIN.items():
        if name in values:
            found.fields[target] = values[name]
    if "finetune.batch_size" in found.fields:
        # LAVIS counts per process and micro-batch, the recipe all rows of an optimizer step.
        found.fields["finetune.batch_size"] *= int(values.get("run.accum_grad_iters", 1)) * processes
    for name in (*DS_CONFIG, *PLAIN):
        values.pop(name, None)
    for name, value in values.items():
        if name not in SAME_ALREADY or SAME_ALREADY[name] != value:
            found.without_counterpart.append(f"{name} = {value}")
    return found


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist")
    try:
        content = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    sections = ("model", "datasets", "run")
    if not isinstance(content, DictConfig) or not all(isinstance(content.get(name), DictConfig) for name in sections):
        raise UserError(f"{path}: want the sections {', '.join(sections)}, as in the files of LAVIS's lavis/projects")
    try:
        plain = OmegaConf.to_container(content, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def _leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        elif value is not None or prefix == "run.":
            yield f"{prefix}{name}", value


def _task(values: dict[str, Any], path: Path) -> str:
    name = values.pop("run.task", None)
    if name not in TASKS:
        raise UserError(f"{path}: run.task={name!r}: only {', '.join(TASKS)} have a counterpart")
    return TASKS[name]


def _translate_model(values: dict[str, Any], found: ImportedRecipe) -> None:
    arch, model_type = str(values.pop("model.arch", "")), str(values.pop("model.model_type", ""))
    found.fields["backbone.path"] = f"models/{arch}_{model_type}"
    how = f"make it with launch/import_lavis.py --kind {KINDS[arch]}" if arch in KINDS else "no such model here"
    found.without_counterpart.append(f"model = {arch} {model_type}: backbone.path is its Hugging Face directory; {how}")
    if values.pop("model.freeze_vit", True) is False:
        found.fields["finetune.train"] = ["vision", "qformer", "projection"]


def _translate_data(values: dict[str, Any], found: ImportedRecipe, task: str) -> str | None:
    builders = list(dict.fromkeys(name.split(".")[1] for name in values if name.startswith("datasets.")))
    used = next((name for name in builders if name in ROOTS), None)
    for name in builders:
        if name != used:
            found.without_counterpart.append(f"datasets.{name}: one data set a recipe, of {', '.join(ROOTS)}")
    if used is not None:
        found.fields["data.root"] = ROOTS[used]
    found.fields["data.tasks"] = {task: 1.0}
    found.fields["evaluation.tasks"] = [task]
    prompts = [values.pop(f"datasets.{used}.text_processor.train.prompt", None)]
    prompts += [values.pop(name, None) for name in ("run.prompt", "model.prompt")]
    prompt = next((str(text).strip() for text in prompts if text), None)
    if prompt and task == "caption":
        found.fields["data.caption_prompt"] = prompt
    elif prompt:
        found.fields["data.question_prompt"] = prompt.replace("{}", "{question}", 1)
    for name in [name for name in values if name.startswith("datasets.")]:
        if name.endswith((".image_size", "vis_processor.train", "vis_processor.eval")):
            size = values.pop(name)
            found.without_counterpart.append(
                f"{name} = {size}: belongs to the checkpoint (import_lavis.py --image-size)"
            )
    return used


def _translate_length(values: dict[str, Any], found: ImportedRecipe, processes: int, samples: int | None) -> None:
    epochs = values.pop("run.max_epoch", None)
    if processes > 1:
        found.fields["training.expected_world_size"] = processes
    if epochs is None:
        return
    rows = int(values.get("run.batch_size_train", 1)) * int(values.get("run.accum_grad_iters", 1)) * processes
    if samples is None:
        warmup = values.pop("run.warmup_steps", None)
        also = "" if warmup is None else f", and training.warmup_steps={warmup} with it"
        found.without_counterpart.append(f"run.max_epoch = {epochs}: give --samples, or set training.max_steps{also}")
    else:
        found.fields["training.max_steps"] = max(1, int(epochs) * samples // rows)
