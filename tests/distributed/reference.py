"""The same training in one process of plain PyTorch, written without any of the code under test but the modules."""

from __future__ import annotations

import scene
import torch

from free_dist.data.samples import IGNORE


def reference_weights(
    *, steps: int, accumulation: int, mode: str, shared: bool = False, discriminator_steps: int = 1
) -> dict[str, torch.Tensor]:
    """Weights of exits and discriminators after ``steps`` optimizer steps on whole global batches."""
    backbone, bank, classifiers = scene.modules(shared=shared)
    exit_parameters = list(bank.transformers.parameters())
    settings = {"lr": scene.OPTIMIZER["lr"], "betas": (0.9, 0.99), "weight_decay": 0.01, "eps": scene.OPTIMIZER["eps"]}
    optimizers = [
        torch.optim.AdamW(exit_parameters, **settings),
        torch.optim.AdamW(classifiers.parameters(), **settings),
    ]

    def judge(fakes: list[torch.Tensor], final: torch.Tensor) -> torch.Tensor:
        real = torch.sigmoid(classifiers(final.expand(len(fakes), -1, -1)))
        fake = torch.sigmoid(classifiers(torch.stack(fakes).detach()))
        return -(real.log().mean(-1) + (1 - fake).log().mean(-1)).sum()

    def move(optimizer: torch.optim.Optimizer, gradient: tuple[torch.Tensor, ...], step: int) -> None:
        parameters = optimizer.param_groups[0]["params"]
        for parameter, value in zip(parameters, gradient, strict=True):
            parameter.grad = value
        torch.nn.utils.clip_grad_norm_(parameters, scene.CLIP)
        optimizer.param_groups[0]["lr"] = settings["lr"] * scene.factor(step)
        optimizer.step()

    for step in range(steps):
        g_total = d_total = 0.0
        for micro in range(accumulation):
            batch = scene.batch(step * accumulation + micro)
            kept = batch.targets != IGNORE
            wanted = batch.targets[kept]
            with torch.no_grad():
                prefix = backbone.encode_prefix(batch.pixel_values)
                hidden = [backbone.embed(batch.input_ids, prefix)]
                for k in range(backbone.n_blocks):
                    hidden.append(backbone.run_blocks(hidden[-1], k, k + 1))
                final = backbone.final_norm(hidden[-1])[kept]
                p_full = backbone.lm_head(final).softmax(-1)
            fakes = [
                bank.final_norm(exit_transformer(hidden[k])[kept])
                for k, exit_transformer in zip(bank.exit_layers, bank.transformers, strict=True)
            ]
            for features in fakes:
                probabilities = bank.lm_head(features).softmax(-1)
                if mode == "supervised":
                    task = -probabilities[torch.arange(len(wanted)), wanted].log().mean()
                else:
                    task = (p_full * (p_full.log() - probabilities.log())).sum(-1).mean()
                g_total = g_total + task / accumulation
            for _ in range(discriminator_steps - 1):
                move(optimizers[1], torch.autograd.grad(judge(fakes, final), list(classifiers.parameters())), step)
            judged = torch.sigmoid(classifiers(torch.stack(fakes)))
            g_total = g_total - 0.3 * judged.log().mean(-1).sum() / accumulation
            d_total = d_total + judge(fakes, final) / accumulation
        # Gradients of both players at the same weights, each for its own parameters alone.
        gradients = [
            torch.autograd.grad(g_total, exit_parameters, retain_graph=True),
            torch.autograd.grad(d_total, list(classifiers.parameters())),
        ]
        for optimizer, gradient in zip(optimizers, gradients, strict=True):
            move(optimizer, gradient, step)
    named = {f"transformers.{name}": p for name, p in bank.transformers.named_parameters()}
    return {name: p.detach() for name, p in (named | dict(classifiers.named_parameters())).items()}
