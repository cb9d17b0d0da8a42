"""One micro-batch of stage 1 and of stage 2 on the meta device, in the order in which the real ones run.

The order is that of ``free_dist.training.step`` and ``free_dist.training.finetune``, the modules and losses are the real ones.
Gradients of weights are let go at once: engines own them, each ZeRO stage in its way.  Does not know engines.

Shape letters: K exits, B rows, I images, T positions, N answer tokens, D model width, Q query tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from free_dist.backbones import Blip2Backbone, InstructBlipBackbone, Instruction
from free_dist.config import LossConfig
from free_dist.exits import ExitBank, FeatureClassifiers
from free_dist.losses import cross_entropy_loss, discriminator_loss, distillation_loss, generator_loss
from free_dist.planning.dry_run import META, DryRun, FusedAttention
from free_dist.planning.workload import Workload, positions

VISION = "vision"
QFORMER = "q-former"
LANGUAGE_MODEL = "language model"
EXITS_FORWARD = "exits forward"
EXITS_BACKWARD = "exits backward"
DISCRIMINATORS = "discriminators"
HEADS = "heads"
BACKWARD = "backward"
OPTIMIZER_STEP = "optimizer step"


def dry_batch(backbone: Blip2Backbone, work: Workload) -> tuple[dict[str, Any], Tensor]:
    """(arguments of ``Backbone.forward`` without the exit layers, what selects the N answer positions of [B, T, D])."""
    rows, layout = work.rows, backbone.layout
    size = backbone.model.config.vision_config.image_size
    length = positions(layout, work)
    decoder_ids = None
    if layout.decoder_start_token_id is not None:
        decoder_ids = torch.zeros(rows, work.answer_tokens, dtype=torch.long, device=META)
    instruction = None
    if isinstance(backbone, InstructBlipBackbone):
        text = torch.zeros(rows, work.text_tokens, dtype=torch.long, device=META)
        instruction = Instruction(text, text.bool())
    inputs = {
        "pixel_values": torch.empty(work.images, 3, size, size, device=META),
        "image_index": torch.zeros(rows, dtype=torch.long, device=META),
        "input_ids": torch.zeros(rows, length, dtype=torch.long, device=META),
        "decoder_ids": decoder_ids,
        "instruction": instruction,
    }
    # A mask would have to be read to know N; the row and the column of each position select as much.
    where = (torch.zeros(work.answers, dtype=torch.long, device=META),) * 2
    return inputs, cast(Tensor, where)


def dry_exits_step(
    backbone: Blip2Backbone,
    bank: ExitBank,
    classifiers: FeatureClassifiers | None,
    work: Workload,
    loss: LossConfig,
    dtype: torch.dtype,
) -> DryRun:
    """One micro-batch of stage 2; ``dtype`` is that of exits and discriminators."""
    modules = [backbone, bank] if classifiers is None else [backbone, bank, classifiers]
    with _dry_run(modules) as run:
        inputs, where = dry_batch(backbone, work)
        with torch.no_grad():
            prefix = _dry_prefix(run, backbone, inputs)
            with run.part(LANGUAGE_MODEL):
                hidden, memory, span = backbone.training_start(inputs["input_ids"], prefix, inputs["decoder_ids"])
                del prefix
                taps: list[Tensor] = []
                for start, stop in zip((0, *bank.exit_layers), bank.exit_layers, strict=False):
                    hidden = backbone.run_blocks(hidden, start, stop, span=span, memory=memory)
                    taps.append(hidden)
                hidden = backbone.run_blocks(hidden, bank.exit_layers[-1], backbone.n_blocks, span=span, memory=memory)
                # Held until the end of the step, as the tuple of a real forward pass is.
                features = backbone.final_norm(hidden)
                del hidden
        final = features[where].to(dtype)  # [N, D]
        with run.part(EXITS_FORWARD):
            cast_taps = [tap.to(dtype) for tap in taps]
            fake = bank(cast_taps, where, memory=memory, span=span)  # [K, N, D]
        generator = torch.zeros(len(bank.exit_layers), device=META)
        if classifiers is not None:
            with run.part(DISCRIMINATORS), _released(classifiers.parameters()):
                judged = classifiers(torch.cat([final.expand_as(fake), fake.detach()], dim=1)).float()
                discriminator_loss(*judged.chunk(2, dim=1)).sum().backward()
                del judged
                classifiers.requires_grad_(False)
                generator = generator_loss(classifiers(fake).float())
                classifiers.requires_grad_(True)
        with run.part(HEADS), _released(bank.parameters()):
            # Where the gradient of the features is complete, the heads' part ends and the exits' own begins.
            if fake.requires_grad:  # of exit classifiers the heads are all that is trained
                fake.register_hook(lambda _: run.enter(EXITS_BACKWARD))
            targets = torch.zeros(work.answers, dtype=torch.long, device=META)
            with torch.set_grad_enabled(loss.task_weight != 0):
                if loss.mode == "supervised":
                    task = cross_entropy_loss(bank, fake, targets)
                else:
                    task = distillation_loss(bank, fake, final, loss.temperature)
            (loss.adversarial_weight * generator + loss.task_weight * task).sum().backward()
        run.enter(OPTIMIZER_STEP)
    return run


def dry_finetuning_step(backbone: Blip2Backbone, work: Workload) -> DryRun:
    """One micro-batch of stage 1; what requires a gradient in ``backbone`` is what is trained."""
    with _dry_run([backbone]) as run:
        inputs, where = dry_batch(backbone, work)
        with _released(backbone.parameters()):
            prefix = _dry_prefix(run, backbone, inputs)
            with run.part(LANGUAGE_MODEL):
                hidden, memory, span = backbone.training_start(inputs["input_ids"], prefix, inputs["decoder_ids"])
                del prefix
                hidden = backbone.run_blocks(hidden, 0, backbone.n_blocks, span=span, memory=memory)
                features = backbone.final_norm(hidden)
                del hidden
            with run.part(HEADS):
                logits = backbone.lm_head(features[where]).float()
                features.register_hook(lambda _: run.enter(BACKWARD))
                loss = F.cross_entropy(logits, torch.zeros(work.answers, dtype=torch.long, device=META))
                loss.backward()
        run.enter(OPTIMIZER_STEP)
    return run


def _dry_prefix(run: DryRun, backbone: Blip2Backbone, inputs: dict[str, Any]) -> Tensor:
    """The visual prefix [B, Q, D]; the vision tower and what follows it are two parts."""
    with run.part(VISION), torch.no_grad():
        backbone.encode_patches(inputs["pixel_values"])
    with run.part(QFORMER):
        prefix = backbone.encode_prefix(inputs["pixel_values"], inputs["image_index"], inputs["instruction"])
    run.flops[QFORMER] -= run.flops[VISION]
    return prefix


@contextmanager
def _dry_run(modules: Iterable[nn.Module]) -> Iterator[DryRun]:
    known = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    with DryRun(known) as run, FusedAttention():
        yield run


@contextmanager
def _released(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, a gradient is dropped as soon as it is complete."""
    hooks = []
    for parameter in parameters:
        if parameter.requires_grad:
            hooks.append(parameter.register_post_accumulate_grad_hook(_drop))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
