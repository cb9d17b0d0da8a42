"""One adversarial step of stage 2 (FREE, arXiv 2506.06884, section 3), readable on one screen.

Knows the order of forward and backward passes and how losses are weighted; does not know where batches come from, what is
logged when, or how modules are sharded.

Shape letters: K exits, B batch, T positions, N answer positions of this rank's micro-batch, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from free_dist.backbones.packed import Packing
from free_dist.config import CostConfig, LossConfig
from free_dist.data.samples import IGNORE, Batch
from free_dist.distributed import all_reduce_mean
from free_dist.engines import DeepSpeedEngine, Engines, frozen, joint_step
from free_dist.exits import ExitBank
from free_dist.losses import (
    cross_entropy_loss,
    discriminator_loss,
    distillation_loss,
    generator_loss,
    head_parts,
    in_parts,
)
from free_dist.training.exit_health import ExitHealth


def adversarial_step(
    engines: Engines,
    batch: Batch,
    config: LossConfig,
    *,
    cost: CostConfig | None = None,
    measure: bool = False,
    mean_tokens: Tensor | None = None,
    health: ExitHealth | None = None,
) -> dict[str, Tensor]:
    """Train exits and discriminators on one micro-batch; the weights move at the accumulation boundary.

    Both players' gradients are taken at the same weights and both step afterwards, or neither does; with
    ``discriminator_steps`` above 1, discriminators have stepped by themselves before.  Returns detached
    tensors: [K] per exit ``task_loss, g_loss, d_loss, d_accuracy_real, d_accuracy_fake`` (the last four when adversarial)
    and, with ``measure``, what :func:`agreement_metrics` gives; what ``health`` measures, if given; scalars ``loss`` and
    ``answer_tokens``; at a boundary also ``stepped`` (1 or 0) and ``grad_norm/exits``, ``grad_norm/discriminators``.

    A mean is taken over the answer tokens of the micro-batch on *all* ranks: every rank weights its own mean by its share
    of the tokens, so the mean of a returned value over ranks (``all_reduce_mean``) is the global value.  ``mean_tokens``: the
    mean number of answer tokens over all micro-batches of the step and all ranks; with it the mean is over the whole step.
    """
    bank, cost = engines.exits.module, cost or CostConfig()
    weights = exit_weights(bank.exit_layers, config.exit_weighting).to(engines.device)
    answers = batch.targets != IGNORE  # [B, T]
    targets = batch.targets[answers]  # [N]
    share = token_share(answers, mean_tokens)
    parts = head_parts(len(bank.exit_layers) * engines.most_positions(len(targets)), cost.head_chunk)

    with torch.no_grad():  # one forward for both players
        features = engines.backbone(**batch.inputs(), exit_layers=bank.exit_layers, packing=packing_of(cost, answers))
    final = features.final if cost.packs else features.final[answers]
    final = final.to(engines.dtype)  # [N, D]
    taps = [tap.to(engines.dtype) for tap in features.exits]
    fake = engines.exits(taps, answers, memory=features.memory, span=features.span)  # [K, N, D]
    real = final.expand_as(fake)

    # D step: one engine forward over real and fake, so that the engine sees one forward per backward.
    report: dict[str, Tensor] = {}
    generator = torch.zeros(len(fake), device=engines.device)
    if engines.discriminators is not None:
        for _ in range(config.discriminator_steps - 1):  # updates of their own, before the one that both players make
            discriminator_pass(engines.discriminators, real, fake.detach(), share)
            engines.discriminators.step()
        report |= discriminator_pass(engines.discriminators, real, fake.detach(), share)

    # G step: through the bare, frozen classifiers.  Through their engine, ZeRO would count this backward pass as theirs.
    classifiers = torch.nn.Identity() if engines.discriminators is None else engines.discriminators.module
    with frozen(classifiers):
        if engines.discriminators is not None:
            generator = share * generator_loss(classifiers(fake).float())
            report["g_loss"] = generator
        task = share * task_loss(bank, fake, final, targets, config, parts=parts)
        loss = (weights * (config.adversarial_weight * generator + config.task_weight * task)).sum()
        engines.exits.backward(loss)

    report |= {"task_loss": task, "loss": loss, "answer_tokens": answers.sum().float()}
    if measure:
        metrics = agreement_metrics(bank, fake, final, targets, parts=parts)
        report |= {name: share * value for name, value in metrics.items()}
    if health is not None:
        report |= health.measure(bank, fake, final)
    losses = torch.cat([loss.reshape(1), *(report[name] for name in ("d_loss",) if name in report)])
    moved = joint_step(engines, losses.detach())
    if moved is not None:
        report["stepped"] = torch.tensor(float(moved), device=engines.device)
        report |= {f"grad_norm/{name}": norm for name, norm in engines.grad_norms().items()}
    return {name: value.detach() for name, value in report.items()}


def discriminator_pass(engine: DeepSpeedEngine, real: Tensor, fake: Tensor, share: Tensor) -> dict[str, Tensor]:
    """Forward and backward pass of the discriminators over real and fake features [K, N, D]; their losses and accuracies, [K]."""
    d_real, d_fake = engine(torch.cat([real, fake], dim=1)).float().chunk(2, dim=1)
    d_loss = share * discriminator_loss(d_real, d_fake)
    engine.backward(d_loss.sum())
    return {
        "d_loss": d_loss,
        "d_accuracy_real": share * (d_real > 0).float().mean(-1),
        "d_accuracy_fake": share * (d_fake <= 0).float().mean(-1),
    }


def packing_of(cost: CostConfig, answers: Tensor) -> Packing | None:
    """What a recipe lets blocks leave out of a batch with these answer positions [B, T]; None for padded rows."""
    if not cost.packs:
        return None
    return Packing(
        answers=answers,
        drop_padding=cost.drop_padding,
        share_prefix=cost.share_prefix,
        answer_queries=cost.answer_queries,
    )


def task_loss(
    bank: ExitBank, fake: Tensor, final: Tensor, targets: Tensor, config: LossConfig, *, parts: int | None = None
) -> Tensor:
    """CE to ``targets`` [N] (supervised) or KL to the frozen model at ``final`` [N, D] (unsupervised), [K].

    Without weight it is still measured, but takes no part in the backward pass.
    """
    with torch.set_grad_enabled(config.task_weight != 0):
        if config.mode == "supervised":
            return cross_entropy_loss(bank, fake, targets, parts=parts)
        if config.mode == "unsupervised":
            return distillation_loss(bank, fake, final, config.temperature, parts=parts)
    raise ValueError(f"loss.mode={config.mode!r}: want supervised or unsupervised")


def exit_weights(exit_layers: Sequence[int], weighting: str) -> Tensor:
    """Weight of each exit's loss, [K], with mean 1."""
    if weighting == "uniform":
        return torch.ones(len(exit_layers))
    if weighting == "depth":
        depth = torch.tensor(exit_layers, dtype=torch.float32)
        return depth / depth.mean()
    raise ValueError(f"loss.exit_weighting={weighting!r}: want uniform or depth")


def token_share(answers: Tensor, mean_tokens: Tensor | None = None) -> Tensor:
    """This rank's number of answer tokens over the mean of all ranks', or over ``mean_tokens``; scalar.

    With it the average over ranks of per-rank means is the mean over all tokens, whatever their distribution.
    """
    count = answers.sum().float()
    return count / (all_reduce_mean(count) if mean_tokens is None else mean_tokens)


@torch.no_grad()
def agreement_metrics(
    bank: ExitBank, fake: Tensor, final: Tensor, targets: Tensor, *, parts: int | None = None
) -> dict[str, Tensor]:
    """How near the exits [K, N, D] are to the full model [N, D], as means over this rank's answer tokens.

    ``agreement``: same most likely token as the full model, [K]; ``accuracy``: the target's, [K]; ``accuracy_full``: the
    full model's own, scalar; ``cosine``: between exit and final feature, [K].
    """
    pieces = in_parts(fake, final, head_parts(fake.shape[0] * fake.shape[1]) if parts is None else parts)
    predicted = [(bank.exit_logits(part).argmax(-1), bank.logits(rest).argmax(-1)) for part, rest in pieces]
    exits = torch.cat([exit_tokens for exit_tokens, _ in predicted], dim=1)  # [K, N]
    full = torch.cat([full_tokens for _, full_tokens in predicted])  # [N]
    return {
        "agreement": (exits == full).float().mean(-1),
        "accuracy": (exits == targets).float().mean(-1),
        "accuracy_full": (full == targets).float().mean(),
        "cosine": F.cosine_similarity(fake.float(), final.float().expand_as(fake), dim=-1).mean(-1),
    }
