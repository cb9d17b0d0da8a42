"""How far a decoder with caches is from the same answer computed without any: drift of keys and values.

One forward pass over prompt and answer recomputes what every token was chosen from.  Exact caches give the same up to rounding;
wrong ones (a position off by one, a state that was faked) drift, as a rule the more the longer the answer.  Does not know when a
drift is a failure (``free_dist.training.alarms``).

Shape letters: N tokens of an answer, T positions of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from free_dist.backbones import Backbone, Instruction
from free_dist.decoding.policy import MaxProbPolicy, widened
from free_dist.decoding.result import GenerationResult
from free_dist.exits import ExitBank


@torch.inference_mode()
def answer_drift(
    backbone: Backbone,
    bank: ExitBank,
    pixel_values: Tensor,
    prompt: Tensor,
    result: GenerationResult,
    *,
    instruction: Instruction | None = None,
) -> list[float]:
    """Per token of a greedy answer under the maximum probability, how wrong its caches were, N values in [0, 1].

    Of a token that an exit emitted: the difference between the exit's confidence and the recomputed one.  Of one from full depth:
    how much more probable than it the recomputed best token is.  ``pixel_values`` [1, 3, h, w], ``prompt`` [1, T].
    """
    answer = torch.tensor([result.tokens], device=prompt.device)
    start = backbone.layout.decoder_start_token_id
    if start is None:
        ids, decoder_ids = torch.cat([prompt, answer[:, :-1]], dim=1), None
    else:
        ids, decoder_ids = prompt, torch.cat([answer.new_tensor([[start]]), answer[:, :-1]], dim=1)
    image = torch.zeros(1, dtype=torch.long, device=prompt.device)
    features = backbone(pixel_values, image, ids, bank.exit_layers, decoder_ids=decoder_ids, instruction=instruction)
    kept = torch.zeros(features.final.shape[:2], dtype=torch.bool, device=prompt.device)
    kept[:, -answer.shape[1] :] = True
    exits = bank(features.exits, kept, memory=features.memory, span=features.span)
    measured = (MaxProbPolicy.measure(widened(logits))[1] for logits in bank.exit_logits(exits))
    confidences = dict(zip(bank.exit_layers, measured, strict=True))
    final = torch.softmax(backbone.lm_head(features.final[kept]).float(), dim=-1)
    lost = (final.amax(dim=-1) - final.gather(1, answer.T)[:, 0]).tolist()
    return [
        lost[place] if record.exit_layer is None else abs(confidences[record.exit_layer][place] - record.confidence)  # type: ignore[operator]
        for place, record in enumerate(result.records)
    ]


def drift_checks(answers: Sequence[Sequence[float]]) -> dict[str, float]:
    """Values over the drifts of some answers.

    ``samples/kv_drift``: the largest; ``samples/kv_drift_growth``: mean of the answers' second halves less that of their first.
    """
    halves: tuple[list[float], list[float]] = ([], [])
    for drift in answers:
        middle = (len(drift) + 1) // 2
        halves[0].extend(drift[:middle])
        halves[1].extend(drift[middle:])
    first, second = (sum(half) / max(len(half), 1) for half in halves)
    return {"samples/kv_drift": max(max(drift) for drift in answers), "samples/kv_drift_growth": second - first}
