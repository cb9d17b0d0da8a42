"""Whether a recipe can be run: every value and every combination of values, before anything is loaded.

Imports neither torch nor anything that knows files, so a mistake in a recipe is told in a fraction of a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

from free_dist.config import (
    ALARM_ACTIONS,
    ATTENTIONS,
    CAPTION_METRICS,
    CAPTION_TOKENIZERS,
    EMBEDDED_BACKBONE,
    EXIT_VARIANTS,
    FINETUNE_PARTS,
    TASKS,
    UNTRAINED_BACKBONE,
    WITHHELD,
    AlarmsConfig,
    BackboneConfig,
    ConfigError,
    CostConfig,
    DataConfig,
    DecodingConfig,
    EvaluationConfig,
    ExitsConfig,
    FinetuneConfig,
    LossConfig,
    Recipe,
    TrainingConfig,
    nearest,
)


def check_recipe(recipe: Recipe) -> None:
    """Raise ConfigError, naming the dotted field, unless every value and every combination of values can be run."""
    _check_backbone(recipe.backbone)
    _check_data(recipe.data)
    _check_exits(recipe.exits)
    _check_loss(recipe.loss)
    _check_cost(recipe.cost, recipe.backbone)
    _check_training(recipe.training)
    _check_alarms(recipe.alarms)
    _check_decoding_and_evaluation(recipe.decoding, recipe.evaluation)
    _check_finetune(recipe.finetune)
    _require(
        recipe.exits.variant != "classifier" or recipe.loss.adversarial_weight == 0,
        "loss.adversarial_weight",
        recipe.loss.adversarial_weight,
        "exits.variant=classifier trains heads alone, so there is no feature to judge; set loss.adversarial_weight=0",
    )
    # Features are of a vision network that exists and stays as it is, and of unmoved images.
    trained = {"vision", "all"} & set(recipe.finetune.train) or recipe.finetune.start == UNTRAINED_BACKBONE
    moved = recipe.finetune.augment_images or trained
    cache = recipe.data.visual_cache
    _require(cache is None or not moved, "data.visual_cache", cache, "train no vision part, and do not augment images")
    _require(recipe.run_dir != "", "run_dir", recipe.run_dir, "want a directory")


def check_rows_per_step(recipe: Recipe, rows: int, distribution: str, fields: str = "") -> None:
    """Raise ConfigError if a step has other ``rows`` than the recipe was made for; ``fields``, or a ds_config's, set them."""
    wanted = recipe.training.expected_rows_per_step
    if wanted not in (None, rows):
        fields = (
            fields or "train_micro_batch_size_per_gpu or gradient_accumulation_steps there, the number of processes"
        )
        raise ConfigError(
            f"training.expected_rows_per_step={wanted}: {distribution} gives {rows} rows per step; change "
            f"{fields}, or this field"
        )


def check_discriminator_steps(recipe: Recipe, accumulation: int, distribution: str) -> None:
    """Raise ConfigError where discriminators would step between the micro-batches of one step."""
    steps = recipe.loss.discriminator_steps
    if steps > 1 and accumulation > 1:
        raise ConfigError(
            f"loss.discriminator_steps={steps}: {distribution} has gradient_accumulation_steps {accumulation}, and "
            "discriminators cannot step in the middle of a step: set that to 1, or this field"
        )


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value!r}: {wanted}")


def _one_of(name: str, value: str, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(
            f"{name}={value!r}: want one of {', '.join(choices)}; did you mean {nearest(value, choices)!r}?"
        )


def _at_least(least: int, name: str, value: int) -> None:
    _require(value >= least, name, value, f"want at least {least}")


def _weight(name: str, value: float) -> None:
    # Written so that NaN fails too.
    _require(0 <= value < math.inf, name, value, "want a finite number that is not negative")


def _positive(name: str, value: float) -> None:
    _require(0 < value < math.inf, name, value, "want a finite number above 0")


def _template(name: str, text: str, *places: str) -> None:
    bare = text
    for place in places:
        _require(f"{{{place}}}" in text, name, text, f"lacks {{{place}}}")
        bare = bare.replace(f"{{{place}}}", "")
    only = " and ".join(f"{{{place}}}" for place in places)
    _require(not {"{", "}"} & set(bare), name, text, f"only {only} may stand in braces")


def _check_backbone(backbone: BackboneConfig) -> None:
    _require(backbone.path != "", "backbone.path", backbone.path, f"want a directory, or {EMBEDDED_BACKBONE!r}")
    _one_of("backbone.attn_implementation", backbone.attn_implementation, ATTENTIONS)


def _check_data(data: DataConfig) -> None:
    _require(data.root != "", "data.root", data.root, "want the directory of the shards")
    is_command = data.root.startswith("pipe:")
    _require(not is_command or "{}" in data.root, "data.root", data.root, "a command wants {} where SPLIT/NAME belongs")
    for task, weight in data.tasks.items():
        _one_of("data.tasks", task, TASKS)
        _weight(f"data.tasks.{task}", weight)
    _require(
        any(data.tasks.values()), "data.tasks", data.tasks, "no task has a weight above 0, so there are no batches"
    )
    _at_least(1, "data.questions_per_image", data.questions_per_image)
    _at_least(1, "data.max_turns", data.max_turns)
    _at_least(1, "data.shuffle_buffer", data.shuffle_buffer)
    _template("data.question_prompt", data.question_prompt, "question")
    _template("data.history_prompt", data.history_prompt, "history")
    _template("data.history_turn", data.history_turn, "question", "answer")
    if data.max_history_tokens is not None:
        _at_least(0, "data.max_history_tokens", data.max_history_tokens)
    share = data.synthetic_share
    _require(0 <= share <= 1, "data.synthetic_share", share, "want a share from 0 (human alone) to 1 (synthetic alone)")
    _at_least(0, "data.bucket", data.bucket)
    _at_least(0, "data.workers", data.workers)
    _positive("data.read_timeout", data.read_timeout)
    budget = data.bad_sample_budget
    _require(0 <= budget <= 1, "data.bad_sample_budget", budget, "want a share from 0 to 1")
    _require(data.cache != "", "data.cache", data.cache, "want a directory, or null for the user's cache")
    _require(data.visual_cache != "", "data.visual_cache", data.visual_cache, "want a directory, or null for none")


def _check_exits(exits: ExitsConfig) -> None:
    layers = exits.exit_layers
    _require(
        len(layers) > 0 and layers[0] >= 1 and all(a < b for a, b in pairwise(layers)),
        "exits.exit_layers",
        layers,
        "want at least one block number, the first block being 1, in strictly increasing order",
    )
    _one_of("exits.variant", exits.variant, EXIT_VARIANTS)
    _one_of("exits.init", exits.init, ("same", "next", "last"))
    _at_least(1, "exits.rank", exits.rank)
    if exits.bottleneck_size is not None:
        _at_least(1, "exits.bottleneck_size", exits.bottleneck_size)
    _one_of("exits.discriminator", exits.discriminator, ("per_exit", "shared"))
    _at_least(1, "exits.discriminator_hidden_size", exits.discriminator_hidden_size)


def _check_loss(loss: LossConfig) -> None:
    _one_of("loss.mode", loss.mode, ("supervised", "unsupervised"))
    _one_of("loss.exit_weighting", loss.exit_weighting, ("uniform", "depth"))
    _weight("loss.task_weight", loss.task_weight)
    _weight("loss.adversarial_weight", loss.adversarial_weight)
    _require(
        loss.task_weight > 0 or loss.adversarial_weight > 0,
        "loss.task_weight",
        loss.task_weight,
        "loss.adversarial_weight is 0 as well, so the exits would learn nothing; set one of the two above 0",
    )
    _at_least(1, "loss.discriminator_steps", loss.discriminator_steps)
    _positive("loss.temperature", loss.temperature)


def _check_cost(cost: CostConfig, backbone: BackboneConfig) -> None:
    _at_least(1, "cost.head_chunk", cost.head_chunk)
    for name in ("drop_padding", "share_prefix", "answer_queries"):
        _require(
            not vars(cost)[name] or backbone.attn_implementation == "sdpa",
            f"cost.{name}",
            True,
            f"needs backbone.attn_implementation=sdpa, not {backbone.attn_implementation!r}",
        )


def _check_training(training: TrainingConfig) -> None:
    _at_least(1, "training.max_steps", training.max_steps)
    _at_least(1, "training.log_every", training.log_every)
    _at_least(0, "training.seed", training.seed)
    _at_least(0, "training.sample_every", training.sample_every)
    _at_least(0, "training.save_every", training.save_every)
    _at_least(1, "training.keep_last", training.keep_last)
    _at_least(0, "training.keep_best", training.keep_best)
    if training.warmup_steps is not None:
        _at_least(0, "training.warmup_steps", training.warmup_steps)
        _require(
            training.warmup_steps <= training.max_steps,
            "training.warmup_steps",
            training.warmup_steps,
            f"longer than training.max_steps={training.max_steps}; lower one or raise the other",
        )
    if training.expected_world_size is not None:
        _at_least(1, "training.expected_world_size", training.expected_world_size)
    if training.expected_rows_per_step is not None:
        _at_least(1, "training.expected_rows_per_step", training.expected_rows_per_step)
    _at_least(0, "training.max_skipped_in_a_row", training.max_skipped_in_a_row)
    _weight("training.hang_timeout", training.hang_timeout)
    _positive("training.stall_timeout", training.stall_timeout)
    if training.peak_tflops is not None:
        _positive("training.peak_tflops", training.peak_tflops)


def _check_alarms(alarms: AlarmsConfig) -> None:
    _one_of("alarms.action", alarms.action, ALARM_ACTIONS)
    _at_least(1, "alarms.window", alarms.window)
    shares = {
        "collapse_cosine": alarms.collapse_cosine,
        "collapse_ratio": alarms.collapse_ratio,
        "discriminator_wins": alarms.discriminator_wins,
        "discriminator_stuck": alarms.discriminator_stuck,
        "vanished_gradient": alarms.vanished_gradient,
        "calibration_error": alarms.calibration_error,
        "piled_share": alarms.piled_share,
        "eos_excess": alarms.eos_excess,
    }
    for name, share in shares.items():
        _require(0 <= share <= 1, f"alarms.{name}", share, "want a share from 0 to 1")
    for name, ratio in {"rising_kl": alarms.rising_kl, "slow_rank": alarms.slow_rank}.items():
        _require(1 < ratio < math.inf, f"alarms.{name}", ratio, "want a finite ratio above 1")


def _check_decoding_and_evaluation(decoding: DecodingConfig, evaluation: EvaluationConfig) -> None:
    _positive("decoding.confidence_threshold", decoding.confidence_threshold)
    _at_least(1, "decoding.max_new_tokens", decoding.max_new_tokens)
    _at_least(0, "evaluation.timing_samples", evaluation.timing_samples)
    _at_least(0, "evaluation.max_samples", evaluation.max_samples)
    _one_of("evaluation.split", evaluation.split, ("calibration", "test", WITHHELD))
    for metric in evaluation.caption_metrics:
        _one_of("evaluation.caption_metrics", metric, CAPTION_METRICS)
    _one_of("evaluation.caption_tokenizer", evaluation.caption_tokenizer, CAPTION_TOKENIZERS)
    for task in evaluation.tasks:
        _one_of("evaluation.tasks", task, TASKS)
    for threshold in evaluation.thresholds:
        _positive("evaluation.thresholds", threshold)
    for name, values in (("evaluation.tasks", evaluation.tasks), ("evaluation.thresholds", evaluation.thresholds)):
        _require(0 < len(values) == len(set(values)), name, values, "want at least one value, and none twice")


def _check_finetune(finetune: FinetuneConfig) -> None:
    _positive("finetune.learning_rate", finetune.learning_rate)
    _weight("finetune.weight_decay", finetune.weight_decay)
    _positive("finetune.grad_clip", finetune.grad_clip)
    _at_least(1, "finetune.batch_size", finetune.batch_size)
    _at_least(0, "finetune.eval_every", finetune.eval_every)
    _at_least(0, "finetune.vision_steps", finetune.vision_steps)
    if finetune.n_blocks is not None:
        _at_least(1, "finetune.n_blocks", finetune.n_blocks)
    trained = finetune.train
    for part in trained:
        _one_of("finetune.train", part, FINETUNE_PARTS)
    _require(0 < len(trained) == len(set(trained)), "finetune.train", trained, "want at least one part, and none twice")
    _require("all" not in trained or len(trained) == 1, "finetune.train", trained, "'all' leaves nothing to add to it")
    _at_least(1, "finetune.lora_rank", finetune.lora_rank)
    _at_least(1, "finetune.lora_alpha", finetune.lora_alpha)
    _require(0 <= finetune.lora_dropout < 1, "finetune.lora_dropout", finetune.lora_dropout, "want 0 <= dropout < 1")
    _require(
        "lora" in trained or not finetune.keep_adapter,
        "finetune.keep_adapter",
        finetune.keep_adapter,
        f"finetune.train={trained} has no 'lora', so there is no adapter to keep",
    )
