"""Where stage 1 begins: a published checkpoint as it is, or a backbone that one process makes first.

Making one (random weights, a tokenizer, growth to more blocks, visual pre-training) is for the embedded backbone.  Knows recipes
and directories; does not know engines or ranks.
"""

from __future__ import annotations

from pathlib import Path

from free_dist.backbones import Blip2Backbone, FeatureLmBackbone
from free_dist.backbones.blip2 import load_image_processor, load_tokenizer
from free_dist.backbones.embedded import grown, new_image_processor, new_model, resolve_backbone, train_tokenizer
from free_dist.backbones.loading import load_model, read_config
from free_dist.config import UNTRAINED_BACKBONE, Recipe, UserError
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import SampleEncoder
from free_dist.data.stream import corpus
from free_dist.data.visual_cache import use_visual_cache
from free_dist.training.connector import pretrain_connector
from free_dist.training.stage1_result import save_backbone
from free_dist.training.stage1_run import MADE
from free_dist.training.vision import pretrain_vision


def start_directory(recipe: Recipe) -> Path:
    """The Hugging Face directory that stage 1 starts from; it exists unless :func:`make_start` has yet to make it."""
    if _must_be_made(recipe):
        return Path(recipe.run_dir) / MADE
    return resolve_backbone(recipe.finetune.start or recipe.backbone.path)


def make_start(recipe: Recipe) -> None:
    """Make the backbone that :func:`start_directory` names, unless it exists; in one process, in plain PyTorch.

    Raises UserError when ``finetune.start`` cannot be grown to ``finetune.n_blocks``, or for shards that do not fit.
    """
    directory = start_directory(recipe)
    if not _must_be_made(recipe) or directory.is_dir():
        return
    settings = recipe.finetune
    if settings.start == UNTRAINED_BACKBONE:
        depth = {} if settings.n_blocks is None else {"n_blocks": settings.n_blocks}
        backbone = Blip2Backbone(new_model(**depth, seed=recipe.training.seed))
        tokenizer = train_tokenizer(corpus(recipe.data), vocab_size=backbone.vocab_size)
        image_processor = new_image_processor()
    else:
        former = resolve_backbone(settings.start or recipe.backbone.path)
        if read_config(former).get("model_type") == FeatureLmBackbone.model_type:
            _make_connected(recipe, former, directory)
            return
        model = load_model(former, allow_pickle=recipe.backbone.allow_pickle)
        backbone = Blip2Backbone(model if settings.n_blocks is None else grown(model, settings.n_blocks))
        tokenizer, image_processor = load_tokenizer(former), load_image_processor(former)
    encoder = SampleEncoder(tokenizer, image_processor, backbone.layout, backbone.max_positions)
    if settings.vision_steps:
        pretrain_vision(backbone, encoder, recipe, steps=settings.vision_steps)
    save_backbone(backbone, encoder, directory)


def _make_connected(recipe: Recipe, former: Path, directory: Path) -> None:
    """The backbone of ``former`` with a connector that has learnt words."""
    if recipe.finetune.n_blocks is not None:
        raise UserError("finetune.n_blocks: a pretrained language model is not grown; leave the field out")
    backbone, encoder = load_pretrained(str(former))
    use_visual_cache(recipe.data, backbone, encoder)
    pretrain_connector(backbone, encoder, recipe, steps=recipe.finetune.vision_steps)
    save_backbone(backbone, encoder, directory)


def _must_be_made(recipe: Recipe) -> bool:
    settings = recipe.finetune
    return settings.start == UNTRAINED_BACKBONE or settings.n_blocks is not None or settings.vision_steps > 0
