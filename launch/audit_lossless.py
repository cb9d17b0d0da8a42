#!/usr/bin/env python
"""Compare lossless tokens with Hugging Face's greedy ones on a whole split, and explain every difference.

Lossless decoding reads several positions in one call, so its logits may differ from one-by-one decoding in the last bits; where
two tokens are equally likely within that, the answers may part. Every such place is listed with the gap between the two
tokens' logits in float32. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from free_dist.config import TASKS, MissingFileError
from free_dist.recipe_io import add_device_argument, add_recipe_arguments, fail_clearly, load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exits", type=Path, default=Path("runs/quickstart/exits/export"), metavar="DIR")
    parser.add_argument("--tasks", type=tasks, default=TASKS, metavar="TASK,...", help="default: all of %(default)s")
    parser.add_argument("--threshold", type=float, default=0.5, help="of drafts (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    add_device_argument(parser)
    parser.add_argument("--samples", type=int, default=0, help="per task; 0 for all (default)")
    add_recipe_arguments(parser)
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        if not (arguments.exits / "exits.json").is_file():
            raise MissingFileError(f"--exits {arguments.exits}: no trained exits there; `make quickstart` trains some")
        print(json.dumps(audit(arguments)))


def audit(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode every sample both ways; returns counts by task and the list of differences."""
    import torch
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from free_dist.data.pretrained import load_for_inference
    from free_dist.data.stream import split_samples
    from free_dist.decoding import generate
    from free_dist.evaluation.benchmark import hf_generate
    from free_dist.exits.export import load_exits

    disable_progress_bar()
    recipe = load_recipe(arguments.config, arguments.overrides)
    limit = recipe.decoding.max_new_tokens
    backbone, encoder = load_for_inference(recipe.backbone, device=arguments.device)
    bank = load_exits(backbone, arguments.exits)
    dtype = getattr(torch, arguments.dtype)
    exact = None
    if dtype != torch.float32:
        exact, _ = load_for_inference(recipe.backbone, device=arguments.device)
        backbone.to(dtype)
        bank.to(dtype)
    counts: dict[str, Any] = {}
    differences: list[dict[str, Any]] = []
    for task in arguments.tasks:
        samples = split_samples(recipe.data, recipe.evaluation.split, task, max_samples=arguments.samples)
        same = drafted = accepted = 0
        for i, sample in enumerate(tqdm(samples, desc=task, unit="sample", mininterval=5.0)):
            pixels = encoder.encode_image(sample.image)[None].to(arguments.device, dtype)
            ids = encoder.encode_prompt(sample.turns)
            told = encoder.encode_instruction(sample.turns, pixels.device)
            settings: dict[str, Any] = {"thresholds": arguments.threshold, "max_new_tokens": limit}
            ours = generate(backbone, bank, pixels, ids, instruction=told, lossless=True, **settings)[0]
            theirs = list(hf_generate(backbone, pixels, ids, told, max_new_tokens=limit).tokens)
            drafted, accepted = drafted + ours.drafted, accepted + ours.accepted
            if ours.tokens == theirs:
                same += 1
                continue
            pairs = zip(ours.tokens, theirs, strict=False)
            place = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
            assert place is not None, "answers that end alike are as long as each other"
            judge = backbone if exact is None else exact
            start = backbone.layout.decoder_start_token_id
            row = torch.tensor([[*(ids if start is None else [start]), *theirs[:place]]], device=pixels.device)
            encoded = torch.tensor([ids], device=pixels.device)
            read = {"input_ids": row} if start is None else {"input_ids": encoded, "decoder_ids": row}
            image = torch.zeros(1, dtype=torch.long, device=pixels.device)
            features = judge(pixels.float(), image, exit_layers=(), instruction=told, **read).final[:, -1]
            logits = judge.lm_head(features)[0]
            gap = float(logits[theirs[place]] - logits[ours.tokens[place]])
            tokens = [encoder.tokenizer.decode([token]) for token in (ours.tokens[place], theirs[place])]
            differences.append({"task": task, "sample": i, "position": place, "tokens": tokens, "logit_gap": gap})
        counts[task] = {"samples": len(samples), "identical": same, "drafted": drafted, "accepted": accepted}
    return {"dtype": arguments.dtype, "threshold": arguments.threshold, "tasks": counts, "differences": differences}


def tasks(text: str) -> tuple[str, ...]:
    """Names of tasks, separated by commas."""
    names = tuple(text.split(","))
    for name in names:
        if name not in TASKS:
            raise argparse.ArgumentTypeError(f"{name!r}: want some of {', '.join(TASKS)}, separated by commas")
    return names


if __name__ == "__main__":
    main()
