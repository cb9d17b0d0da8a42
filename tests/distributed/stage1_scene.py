"""The tiny run of stage 1 that its tests share: start directories of every kind, a recipe, sections, and a plain reference."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
)

from free_dist.backbones.embedded import new_image_processor
from free_dist.config import DataConfig, FinetuneConfig, Recipe, TrainingConfig
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import IGNORE
from free_dist.data.stream import global_batches
from free_dist.distributed import World
from free_dist.training.schedule import warmup_cosine

ROWS = 4
"""Rows of one global micro-batch, over all ranks."""
STEPS = 6
WARMUP = 2
RATE, DECAY, BETAS, EPS, CLIP = 5e-3, 0.05, (0.9, 0.99), 1e-4, 0.5
"""The large eps keeps Adam from amplifying rounding where a gradient is zero in exact arithmetic (key biases)."""
QUERIES = 4
IMAGE = 4


def text_config(kind: str, vocab_size: int, dropout: float) -> Any:
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    if kind == "llama" or kind == "instructblip":
        return LlamaConfig(
            vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=12, max_position_embeddings=128, **ids,
        )  # fmt: skip
    if kind == "t5":
        return T5Config(
            vocab_size=vocab_size, d_model=32, d_kv=12, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
            dropout_rate=dropout, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            decoder_start_token_id=1, eos_token_id=2, pad_token_id=1,
        )  # fmt: skip
    return OPTConfig(
        vocab_size=vocab_size, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, dropout=dropout, attention_dropout=0.0, **ids,
    )  # fmt: skip


def new_model(kind: str, vocab_size: int) -> PreTrainedModel:
    """A random model of a kind; ``dropout`` is an OPT one that has some."""
    dropout = 0.1 if kind == "dropout" else 0.0
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 16, "initializer_range": 0.1,
    }  # fmt: skip
    qformer = {
        "vocab_size": vocab_size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "encoder_hidden_size": 16, "cross_attention_frequency": 1, "initializer_range": 0.1,
        "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "pad_token_id": 1,
    }  # fmt: skip
    instructed = kind == "instructblip"
    config = (InstructBlipConfig if instructed else Blip2Config)(
        vision_config=(InstructBlipVisionConfig if instructed else Blip2VisionConfig)(**vision),
        qformer_config=(InstructBlipQFormerConfig if instructed else Blip2QFormerConfig)(**qformer),
        text_config=text_config(kind, vocab_size, dropout),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    torch.manual_seed(5)
    model = (InstructBlipForConditionalGeneration if instructed else Blip2ForConditionalGeneration)(config)
    nn.init.normal_(model.query_tokens, std=0.5)
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if parameter.ndim == 2:  # initial weights are so small that every block is nearly the identity
                parameter.normal_(std=0.5 if "embed" in name or "shared" in name else 0.15)
    return model.eval().requires_grad_(False)


def save(model: PreTrainedModel, encoder: Any, directory: Path) -> None:
    """A Hugging Face directory with everything beside the weights."""
    model.save_pretrained(directory)
    encoder.tokenizer.save_pretrained(directory)
    encoder.image_processor.save_pretrained(directory)


def save_new(kind: str, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """A random backbone of a kind, as its users have it."""
    model = new_model(kind, len(tokenizer))
    if kind == "llama":  # as MiniGPT-4 has it
        model.config.image_opening, model.config.image_closing = "###Human: <Img>", "</Img>"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    new_image_processor().save_pretrained(directory)
    if kind == "instructblip":
        tokenizer.save_pretrained(directory / "qformer_tokenizer")


def is_adapted(kind: str, names: set[str]) -> bool:
    """Whether exactly the query and value maps of every attention are among ``names``."""
    per_type = {"t5": (2 + 2 * 3) * 2}
    ends = (".q.weight", ".v.weight") if kind == "t5" else ("q_proj.weight", "v_proj.weight")
    return len(names) == per_type.get(kind, 3 * 2) and all(name.endswith(ends) for name in names)


def recipe(
    data: DataConfig,
    run_dir: Path,
    start: Path,
    *,
    steps: int = STEPS,
    augment: bool = False,
    save_every: int = 500,
    **settings: Any,
) -> Recipe:
    settings = {"train": ["qformer", "projection"], "eval_every": 0} | settings
    return Recipe(
        run_dir=str(run_dir),
        data=data,
        training=TrainingConfig(max_steps=steps, warmup_steps=WARMUP, log_every=1, save_every=save_every),
        finetune=FinetuneConfig(
            start=str(start), learning_rate=RATE, weight_decay=DECAY, lora_rank=4, lora_alpha=8,
            augment_images=augment, **settings,
        ),
    )  # fmt: skip


def section(
    recipe: Recipe, *, stage: int = 1, accumulation: int = 1, size: int = 1, bf16: bool = False
) -> dict[str, Any]:
    """What a ds_config makes of the recipe, for ``size`` ranks that share ROWS rows."""
    from free_dist.training.stage1_run import engine_section

    # Without the threshold, tensors as small as these would be replicated and nothing tested.
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    exits = {
        "train_micro_batch_size_per_gpu": ROWS // size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 123.0, "betas": list(BETAS), "eps": EPS, "torch_adam": True}},
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
    }
    return engine_section(recipe, {"exits": exits}, size)


def stage1(recipe: Recipe, section: dict[str, Any], start: Path) -> str:
    """Stage 1 on this rank."""
    from free_dist.training.finetune import finetune

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    world = World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu"))
    return str(finetune(recipe, section, start, world, lambda _line: None))


def made_and_trained(recipe: Recipe) -> list[str]:
    """Stage 1 without a ds_config from a start that is made first; returns what was told."""
    from free_dist.training.finetune import finetune
    from free_dist.training.stage1_run import engine_section
    from free_dist.training.stage1_start import make_start, start_directory

    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    make_start(recipe)
    told: list[str] = []
    finetune(recipe, engine_section(recipe, None, 1), start_directory(recipe), world, told.append)
    return told


class LowRank(nn.Module):
    """LoRA, written from its paper."""

    def __init__(self, weight: torch.Tensor, first: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.first = nn.Parameter(first.clone())
        self.second = nn.Parameter(torch.zeros(weight.shape[0], first.shape[0]))
        self.scale = scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * self.second @ self.first


def reference(recipe: Recipe, start: Path) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    """The same training in one process of plain PyTorch, on whole global batches: weights (LoRA merged), and per step the
    loss and the norm of the gradient."""
    settings = recipe.finetune
    backbone, encoder = load_pretrained(str(start))
    model = backbone.model
    trained: list[nn.Parameter] = []
    if "lora" in settings.train:
        for module, first in zip(*_adapted(backbone, recipe, start), strict=True):
            update = LowRank(module.weight, first, settings.lora_alpha / settings.lora_rank)
            parametrize.register_parametrization(module, "weight", update)
            trained += update.parameters()
    owned = {"vision": [model.vision_model], "projection": [model.language_projection], "qformer": [model.qformer]}
    for part in settings.train:
        modules = [model] if part == "all" else owned.get(part, [])
        trained += [parameter for module in modules for parameter in module.parameters()]
        trained += [model.query_tokens] if part == "qformer" else []
    for parameter in trained:
        parameter.requires_grad_(True)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=RATE, betas=BETAS, eps=EPS)
    factor = warmup_cosine(warmup_steps=WARMUP, max_steps=recipe.training.max_steps)
    stream = global_batches(recipe.data, seed=recipe.training.seed, rows=ROWS)
    logged = []
    for step, samples in enumerate(itertools.islice(stream, recipe.training.max_steps)):
        batch = encoder.collate(samples)
        features = backbone(**batch.inputs(), exit_layers=()).final
        logits = backbone.lm_head(features)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor(step)
        optimizer.step()
        logged.append((loss.item(), norm.item()))
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    names = {name for name, _ in model.named_parameters()}
    return {n: t.detach() for n, t in model.state_dict().items() if n in names}, logged


def _adapted(backbone: Any, recipe: Recipe, start: Path) -> tuple[list[nn.Module], list[torch.Tensor]]:
    # The first factors are random: those that the run under test draws.
    from free_dist.distributed import seed_everything
    from free_dist.training.trained_parts import train_parts

    twin, _ = load_pretrained(str(start))
    seed_everything(recipe.training.seed)
    train_parts(twin.model, copy.deepcopy(recipe.finetune))
    firsts = {
        name.removesuffix(".lora_A.default.weight"): parameter.detach()
        for name, parameter in twin.model.named_parameters()
        if ".lora_A." in name
    }
    modules = dict(backbone.model.named_modules())
    return [modules[name] for name in firsts], list(firsts.values())
