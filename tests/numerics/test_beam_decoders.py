"""Beam search on every decoder type against transformers' own."""

from __future__ import annotations

import pytest
import torch

from free_dist.decoding import MaxProbPolicy, generate
from free_dist.decoding.beam import BeamOptions, beam_search
from free_dist.exits import ExitBank
from free_dist.exits.gate import ExitChecks, FullHead

N_TOKENS = 12


@pytest.mark.parametrize("length_penalty", [1.0, -0.5])
def test_beams_of_mixed_lengths_equal_hugging_face_one_by_one(case, length_penalty: float) -> None:
    backbone, model = case.backbone, case.backbone.model
    settings = {"max_new_tokens": N_TOKENS, "num_beams": 5, "length_penalty": length_penalty}
    eos = generate(backbone, None, case.pixels, case.prompts, eos_token_id=-1, **settings)[0].tokens[5]
    ours = generate(backbone, None, case.pixels, case.prompts, eos_token_id=eos, **settings)
    for row, prompt in enumerate(case.prompts):
        output = model.generate(
            pixel_values=case.pixels[row : row + 1],
            input_ids=torch.tensor([prompt]),
            eos_token_id=eos,
            pad_token_id=1,
            do_sample=False,
            use_cache=False,  # its cache is sized by the encoder, which is shallower here
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        n_shown = 1 if model.language_model.config.is_encoder_decoder else len(prompt)
        tokens = output.sequences[0, n_shown:].tolist()
        assert ours[row].tokens == (tokens[: tokens.index(eos) + 1] if eos in tokens else tokens)
        assert ours[row].score == pytest.approx(output.sequences_scores.item(), rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5])
@torch.inference_mode()
def test_beams_that_exit_do_not_depend_on_how_their_common_positions_are_run(case, threshold: float) -> None:
    backbone, bank = case.backbone, ExitBank(case.backbone, (1, 2)).eval()
    policy, checks = MaxProbPolicy(threshold, 2), ExitChecks(FullHead(bank.lm_head))
    answers = []
    for min_shared in (1, 8, 1000):
        options = BeamOptions(num_beams=5, max_new_tokens=N_TOKENS, eos=-1, min_shared=min_shared)
        start = backbone.start(case.prompts, backbone.encode_prefix(case.pixels))
        rows, _ = beam_search(backbone, bank, policy, checks, start, options)
        answers.append([(row.tokens, row.exit_layers) for row in rows])
    assert answers[0] == answers[1] == answers[2]
