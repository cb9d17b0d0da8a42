"""Likelihoods of candidates through the exits: against transformers' logits, the training forward, and the decoder itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hugging_face import forward, load_reference

from free_dist.config import UserError
from free_dist.data.samples import IGNORE
from free_dist.decoding import generate
from free_dist.decoding.policy import MaxProbPolicy
from free_dist.evaluation.ranking import CandidateScorer
from free_dist.exits import ExitBank

CANDIDATES = ("yes", "no", "a red circle", "blue", "there is no shape in this image", "red")
"""Answers of different lengths, two of which begin alike."""
THRESHOLDS = (0.05, 0.2, 0.6, 1.1)


@pytest.fixture(params=["blip2-opt", "blip2-flan-t5", "instructblip-vicuna", "minigpt4-vicuna"])
def asked(request, checkpoint_named):
    """A backbone, an exit bank that says other things than the model, and a question with candidates."""
    checkpoint = checkpoint_named(request.param)
    torch.manual_seed(7)
    bank = ExitBank(checkpoint.backbone, (1, 3)).eval().requires_grad_(False)
    return checkpoint, bank, checkpoint.samples("vqa", 1)[0]


def scored(checkpoint, bank, sample, answers, *, together=4, thresholds=THRESHOLDS):
    """What the scorer says of candidates, given as ids."""
    encoder, backbone = checkpoint.encoder, checkpoint.backbone
    pixels = encoder.encode_image(sample.image)[None]
    with torch.inference_mode():
        prefix = backbone.encode_prefix(pixels, None, encoder.encode_instruction(sample.turns, "cpu"))
    scorer = CandidateScorer(backbone, {"exits": bank}, thresholds, together=together)
    return scorer, scorer.score(prefix, encoder.encode_prompt(sample.turns), answers)


def rows_of(sample):
    """The sample once per candidate, its last answer replaced."""
    turns = [(*sample.turns[:-1], replace(sample.turns[-1], answer=text)) for text in CANDIDATES]
    return [replace(sample, turns=own, key=str(i)) for i, own in enumerate(turns)]


def test_full_depth_likelihood_is_that_of_the_librarys_logits(asked) -> None:
    checkpoint, bank, sample = asked
    rows = rows_of(sample)
    batch = checkpoint.encoder.collate(rows)
    checkpoint = replace(checkpoint, test_split={"vqa": rows})  # where the reference looks up how long rows are
    logits = forward(checkpoint, load_reference(checkpoint), batch).logits[:, -batch.targets.shape[1] :]
    logits = torch.log_softmax(logits.double(), -1)
    kept = batch.targets != IGNORE
    own = logits.gather(-1, batch.targets.clamp(min=0)[..., None]).squeeze(-1)
    wanted = (own * kept).sum(1)
    _, found = scored(checkpoint, bank, sample, [checkpoint.encoder.encode_answer(text) for text in CANDIDATES])
    np.testing.assert_allclose(found.sums[0], wanted.numpy(), rtol=2e-4, atol=2e-4)
    assert found.tokens.tolist() == kept.sum(1).tolist()
    assert np.ptp(found.sums[0] / found.tokens) > 0.1, "candidates that are all alike compare nothing"


@torch.inference_mode()
def reference(checkpoint, bank, sample):
    """Per candidate and token (full, exit 1, exit 3) log-probabilities, and the exits' confidences, by the training forward."""
    batch = checkpoint.encoder.collate(rows_of(sample))
    features = checkpoint.backbone(**batch.inputs(), exit_layers=bank.exit_layers)
    everywhere = torch.ones_like(batch.targets, dtype=torch.bool)
    exits = bank(features.exits, everywhere, memory=features.memory, span=features.span)
    exits = exits.view(len(bank.exit_layers), *batch.targets.shape, -1)
    logits = torch.stack([checkpoint.backbone.lm_head(features.final), *bank.logits(exits)])
    logs = torch.log_softmax(logits.double(), -1)
    own = logs.gather(-1, batch.targets.clamp(min=0)[None, ..., None].expand(3, -1, -1, 1)).squeeze(-1)
    return own, logs.exp().amax(-1)[1:], batch.targets != IGNORE


def test_exits_and_thresholds_read_what_the_training_forward_reads(asked) -> None:
    checkpoint, bank, sample = asked
    own, confidence, kept = reference(checkpoint, bank, sample)
    answers = [checkpoint.encoder.encode_answer(text) for text in CANDIDATES]
    sure = confidence[:, kept].flatten().sort().values
    gaps = sure.diff()
    # In the widest gap near a quantile, so that no rounding decides.
    places = [first + int(gaps[first : first + 8].argmax()) for first in (int(0.25 * len(gaps)), int(0.7 * len(gaps)))]
    thresholds = [float(sure[i : i + 2].mean()) for i in places]
    scorer, found = scored(checkpoint, bank, sample, answers, thresholds=[*thresholds, 1.1])
    ways = [(reading.exit_layer, reading.threshold) for reading in scorer.readings]
    assert ways == [(None, None), (1, None), (3, None), *((None, threshold) for threshold in thresholds)]
    for a, (layer, threshold) in enumerate(ways):
        chosen = own[0] if layer is None else own[1 + bank.exit_layers.index(layer)]
        where = torch.full_like(kept, 4 if layer is None else layer, dtype=torch.long)
        if threshold is not None:
            for k in (1, 0):  # the shallowest that is sure has the last word
                chosen = torch.where(confidence[k] > threshold, own[1 + k], chosen)
                where = where.masked_fill(confidence[k] > threshold, bank.exit_layers[k])
        np.testing.assert_allclose(found.sums[a], (chosen * kept).sum(1).numpy(), rtol=2e-4, atol=2e-4)
        assert found.layers[a].tolist() == torch.bincount(where[kept], minlength=5).tolist()
    assert len(set(where[kept].tolist())) == 3, "tokens that all leave at one place decide nothing"


@pytest.mark.parametrize("together", [1, 2, 25])
def test_candidates_that_run_together_change_nothing(asked, together: int) -> None:
    checkpoint, bank, sample = asked
    answers = [checkpoint.encoder.encode_answer(text) for text in CANDIDATES]
    _, wanted = scored(checkpoint, bank, sample, answers)
    _, found = scored(checkpoint, bank, sample, answers, together=together)
    np.testing.assert_allclose(found.sums, wanted.sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.6])
def test_tokens_are_scored_where_the_decoder_emits_them(asked, threshold: float) -> None:
    checkpoint, bank, sample = asked
    encoder, backbone = checkpoint.encoder, checkpoint.backbone
    pixels = encoder.encode_image(sample.image)[None]
    (row,) = generate(
        backbone,
        bank,
        pixels,
        encoder.encode_prompt(sample.turns),
        thresholds=MaxProbPolicy(threshold, 2),
        instruction=encoder.encode_instruction(sample.turns, "cpu"),
        max_new_tokens=8,
        eos_token_id=-1,
    )
    scorer, found = scored(checkpoint, bank, sample, [row.tokens])
    a = next(a for a, reading in enumerate(scorer.readings) if reading.threshold == threshold)
    wanted = Counter(backbone.n_blocks if layer is None else layer for layer in row.exit_layers)
    assert {k: int(n) for k, n in enumerate(found.layers[a]) if n} == dict(wanted)


def test_a_candidate_without_tokens_and_one_that_is_too_long_are_refused(checkpoint_named) -> None:
    checkpoint = checkpoint_named("blip2-opt")
    sample = checkpoint.samples("vqa", 1)[0]
    bank = ExitBank(checkpoint.backbone, (1,)).eval()
    with pytest.raises(ValueError, match="none without tokens"):
        scored(checkpoint, bank, sample, [[5], []])
    with pytest.raises(UserError, match=r"a candidate of 300 tokens exceed the backbone's 256 positions"):
        scored(checkpoint, bank, sample, [[5] * 300])
