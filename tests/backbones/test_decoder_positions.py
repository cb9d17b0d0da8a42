"""What the cost model takes for a prompt's length: positions of the decoder's blocks, not of what an encoder reads."""

from __future__ import annotations

import pytest

from free_dist.evaluation.recording import record_answers
from free_dist.exits import ExitBank


@pytest.mark.parametrize("checkpoint", ["blip2-opt", "blip2-flan-t5"], indirect=True)
def test_a_recorded_prompt_is_as_long_as_the_blocks_see_it(checkpoint) -> None:
    backbone, encoder = checkpoint.backbone, checkpoint.encoder
    bank = ExitBank(backbone, (1,)).eval().requires_grad_(False)
    samples = checkpoint.samples("vqa", 3)
    recorded = record_answers(backbone, encoder, bank, "vqa", samples, max_new_tokens=2)
    for sample, found in zip(samples, recorded.prompts, strict=True):
        assert found == (len(encoder.encode_prompt(sample.turns)) if not checkpoint.has_encoder else 1)
