"""``generate``: images and prompts in, tokens and their trace out, with the argument names of Hugging Face's method.

With no active exit this is an ordinary full-depth decoder: nothing pending, no softmax.  Does not know how confidence is
computed, how exits were trained, text, or image files.

Shape letters: B rows, T prompt positions (image placeholders included), Q query tokens, D model width, K exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from free_dist.backbones import Backbone, Instruction
from free_dist.config import UserError
from free_dist.decoding.beam import BeamOptions, beam_search
from free_dist.decoding.decoder import Decoder, DecoderOptions
from free_dist.decoding.policy import ExitPolicy, MaxProbPolicy, Thresholds
from free_dist.decoding.result import Generation
from free_dist.decoding.runners import StaticRunner
from free_dist.decoding.sampling import Sampler
from free_dist.exits import ExitBank
from free_dist.exits.gate import ExitChecks, full_head

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]]
"""[B, T] without padding, one row of ids, or B rows of any lengths."""


@torch.inference_mode()
def generate(
    backbone: Backbone,
    bank: ExitBank | None,
    pixel_values: Tensor | None,
    prompt_ids: Prompts,
    *,
    max_new_tokens: int,
    thresholds: Thresholds | ExitPolicy | None = None,
    checks: ExitChecks | None = None,
    lossless: bool = False,
    max_draft_tokens: int = 16,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    eos_token_id: int | None = None,
    streamer: BaseStreamer | None = None,
    stopping_criteria: Sequence[StoppingCriteria] | None = None,
    instruction: Instruction | None = None,
    prefix: Tensor | None = None,
    runner: StaticRunner | None = None,
    state_propagation: bool = False,
) -> Generation:
    """Decode B images [B, 3, height, width] with B prompts, placeholders included; every row exits on its own.

    Without a bank, or with every threshold at 1 or above, this is the full model: the tokens of Hugging Face's ``generate``.
    ``thresholds`` is one confidence threshold, one per exit, one row of answer positions per exit, or a policy; it must be
    given with a bank.  ``checks`` makes asking an exit cheaper.  ``lossless`` verifies what exits emit, at most
    ``max_draft_tokens`` at a time: greedy tokens are those of the full model, sampled ones have its distribution.

    ``instruction`` is what InstructBLIP's Q-Former reads of the prompts (``SampleEncoder.encode_instructions``).  ``prefix``
    [B, Q, D] replaces it and ``pixel_values`` when the images are encoded already.  ``eos_token_id`` ends an answer (None:
    the backbone's own; negative: never).  A ``streamer`` gets the prompt and then the tokens of the one row as they become
    final; ``stopping_criteria`` see each row's prompt and tokens [1, n].  ``num_beams`` above 1 searches with so many beams,
    each exiting on its own, and returns the best hypothesis with its score; ``length_penalty`` and ``early_stopping`` (True,
    False, "never") are transformers' and matter only then.  ``top_k`` has no limit unless one is given.
    A ``runner`` made for this backbone, bank and checks keeps memory and programs of fixed shapes from call to call; it does not
    go with beams.  ``state_propagation`` fills the caches behind an exit from the state that left there, which is *not* what the
    full model would have written: a baseline to compare with (``free_dist.decoding.state_propagation``).

    Raises UserError for unusable thresholds, sampling arguments, ``max_new_tokens`` below 1 or more positions than the
    backbone has; plain ValueError for shapes that do not fit, a missing threshold, exits that do not fit the backbone, or
    blocks in training mode.
    """
    prompts = _prompts(prompt_ids)
    if prefix is None:
        if pixel_values is None or pixel_values.ndim != 4 or pixel_values.shape[0] != len(prompts):
            shape = None if pixel_values is None else list(pixel_values.shape)
            raise ValueError(
                f"want pixel_values [B, 3, h, w] with one image per prompt, got {shape} for {len(prompts)} prompts"
            )
        prefix = backbone.encode_prefix(pixel_values, None, instruction)
    if prefix.shape[0] != len(prompts):
        raise ValueError(f"prefix has {prefix.shape[0]} rows for {len(prompts)} prompts")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: want at least 1")
    if max_draft_tokens < 1:
        raise UserError(f"max_draft_tokens={max_draft_tokens}: want at least 1")
    if state_propagation and (lossless or num_beams != 1 or runner is not None):
        raise UserError("state_propagation=True does not go with lossless, beams or a runner: those need exact caches")
    beams = None
    if eos_token_id is not None and not isinstance(eos_token_id, int):
        raise UserError(
            f"eos_token_id={eos_token_id!r}: want one id, None for the backbone's own, or a negative one for none"
        )
    if num_beams != 1:
        if lossless or do_sample or streamer is not None or stopping_criteria is not None:
            raise UserError(
                f"num_beams={num_beams} does not go with lossless, do_sample, streamer or stopping_criteria: beams compete "
                "to the end, and no token is final before; drop those, or set num_beams=1"
            )
        beams = BeamOptions(
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            eos=backbone.layout.eos_token_id if eos_token_id is None else eos_token_id,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
    if streamer is not None and len(prompts) != 1:
        raise ValueError(f"a streamer follows one row, got {len(prompts)} prompts")
    policy = None if bank is None else _policy(backbone, bank, thresholds)
    if lossless and bank is None:
        raise ValueError("lossless decoding drafts with exits: give a bank, or lossless=False for the full model")
    if backbone.block(1).training:
        raise ValueError("the backbone is in training mode, where dropout makes decoding random: call backbone.eval()")
    start = backbone.start(prompts, prefix)
    longest = start.hidden.shape[1]
    if longest + max_new_tokens - 1 > backbone.max_positions:
        raise UserError(
            f"a prompt of {longest} positions and max_new_tokens={max_new_tokens} exceed the backbone's "
            f"{backbone.max_positions} positions; lower max_new_tokens or shorten the prompt"
        )
    sampler = None
    if do_sample:
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)

    def on_token(_row: int, token: int) -> None:
        assert streamer is not None
        streamer.put(torch.tensor([token]))

    # With an encoder, the decoder's ids are all that transformers shows, too.
    shown = prompts if start.start_token_id is None else [[start.start_token_id]] * len(prompts)
    criteria = None if stopping_criteria is None else StoppingCriteriaList(stopping_criteria)

    def should_stop(row: int, tokens: list[int]) -> bool:
        assert criteria is not None
        ids = torch.tensor([[*shown[row], *tokens]], device=start.hidden.device)
        return bool(criteria(ids, None)[0])

    options = DecoderOptions(
        max_new_tokens=max_new_tokens,
        eos=backbone.layout.eos_token_id if eos_token_id is None else eos_token_id,
        lossless=lossless,
        max_draft_tokens=max_draft_tokens,
        sampler=sampler,
        on_token=None if streamer is None else on_token,
        should_stop=None if stopping_criteria is None else should_stop,
        state_propagation=state_propagation,
    )
    if runner is not None:
        if runner.backbone is not backbone or runner.bank is not bank or checks not in (None, runner.checks):
            raise ValueError("the runner was made for another backbone, bank or checks; make one for these")
        if beams is not None:
            raise UserError(f"num_beams={num_beams}: beams decode without a runner; leave it out, or set num_beams=1")
        checks = runner.checks
    if bank is not None and checks is None:
        checks = ExitChecks(full_head(bank))
    if beams is not None:
        rows, calls = beam_search(backbone, bank, policy, checks, start, beams)
        return Generation(rows=rows, pad_token_id=backbone.layout.pad_token_id, calls=calls)
    if streamer is not None:
        streamer.put(
            torch.tensor([shown[0]])
        )  # first the prompt, as transformers does: skip_prompt drops what comes first
    decoder = Decoder(backbone, bank, policy, checks, start, options, runner)
    while decoder.rows_left:
        decoder.step()
    if streamer is not None:
        streamer.end()
    return Generation(
        rows=tuple(decoder.results()), pad_token_id=backbone.layout.pad_token_id, calls=decoder.cache.calls
    )


def _prompts(prompt_ids: Prompts) -> list[list[int]]:
    """Prompts as B non-empty lists of ids."""
    if isinstance(prompt_ids, Tensor):
        if prompt_ids.ndim != 2:
            raise ValueError(f"want prompt_ids [B, T], got {list(prompt_ids.shape)}")
        prompts = prompt_ids.tolist()
    elif prompt_ids and isinstance(prompt_ids[0], int):
        prompts = [list(prompt_ids)]
    else:
        prompts = [list(row) for row in prompt_ids]  # type: ignore[arg-type]
    if not prompts or any(not prompt for prompt in prompts):
        raise ValueError("want at least one prompt, and none of them empty")
    return prompts


def _policy(backbone: Backbone, bank: ExitBank, thresholds: Thresholds | ExitPolicy | None) -> ExitPolicy:
    """The policy behind ``thresholds``, after checking that the exits fit the backbone and are in evaluation mode."""
    # A fresh wrapper says "training" although its blocks do not: the blocks are what dropout listens to.
    if any(module.training for exit_transformer in bank.transformers for module in exit_transformer.children()):
        raise ValueError("the exits are in training mode, where dropout makes decoding random: call bank.eval()")
    theirs, ours = next(bank.transformers.parameters(), None), next(backbone.block(1).parameters())
    if theirs is not None and (theirs.dtype != ours.dtype or theirs.device != ours.device):
        raise ValueError(
            f"exits are {theirs.dtype} on {theirs.device}, the backbone's blocks {ours.dtype} on {ours.device}; "
            "convert one with .to()"
        )
    if thresholds is None:
        raise ValueError("thresholds: give one for all exits, one per exit, or a policy (1 or more never exits)")
    if isinstance(thresholds, (int, float, Real, Sequence)):
        return MaxProbPolicy(thresholds, len(bank.exit_layers))
    if isinstance(thresholds, Tensor):
        raise ValueError("thresholds: a tensor is neither numbers nor a policy; give thresholds.tolist()")
    return thresholds
