"""transformers' own answer to what the adapters are asked: the reference of the tests here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration, PreTrainedModel

from free_dist.data.samples import IGNORE, Batch


def load_reference(checkpoint: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The directory as transformers loads it, without any of our code."""
    is_instructed = checkpoint.name.startswith("instructblip")
    model = InstructBlipForConditionalGeneration if is_instructed else Blip2ForConditionalGeneration
    return model.from_pretrained(checkpoint.directory, dtype=dtype).eval()


@dataclass(frozen=True, kw_only=True)
class Output:
    """What transformers computes for a batch."""

    states: tuple[Tensor, ...]
    """``h_0`` to ``h_(L-1)`` and the final feature, each [B, T, D], or [B, N, D] behind an encoder."""
    logits: Tensor
    loss: Tensor
    kept: Tensor
    """Bool [B, T] or [B, N], true where a position is no padding."""


@torch.no_grad()
def forward(checkpoint: Any, model: PreTrainedModel, batch: Batch) -> Output:
    """One forward of the library's model on a batch of ours, with a loss on its targets."""
    layout = checkpoint.backbone.layout
    # A row is as long as its own prompt and answer; ids alone do not tell, where padding is also the end of a text.
    lengths = [len(ids) for ids in row_ids(checkpoint, batch)]
    mask = torch.arange(batch.input_ids.shape[1]) < torch.tensor(lengths)[:, None]
    more: dict[str, Any] = {}
    if batch.instruction is not None:
        more = {
            "qformer_input_ids": batch.instruction.input_ids,
            "qformer_attention_mask": batch.instruction.mask.long(),
        }
    pixels = batch.pixel_values[batch.image_index].to(model.dtype)
    if checkpoint.has_encoder:
        kept = batch.targets != IGNORE
        output = model(
            pixel_values=pixels,
            input_ids=batch.input_ids,
            attention_mask=mask.long(),
            labels=batch.targets,
            output_hidden_states=True,
            **more,
        )
        states = output.language_model_outputs.decoder_hidden_states
        return Output(states=states, logits=output.logits, loss=output.loss, kept=kept)
    labels = torch.full_like(batch.targets, IGNORE)
    labels[:, 1:] = batch.targets[:, :-1]
    if model.config.image_token_id is None:
        images = model.get_image_features(pixels).pooler_output
        text = batch.input_ids[:, layout.num_query_tokens :]
        embedded = torch.cat([images, model.get_input_embeddings()(text)], dim=1)
        output = model.language_model(
            inputs_embeds=embedded, attention_mask=mask.long(), labels=labels, output_hidden_states=True
        )
        return Output(states=output.hidden_states, logits=output.logits, loss=output.loss, kept=mask)
    output = model(
        pixel_values=pixels,
        input_ids=batch.input_ids,
        attention_mask=mask.long(),
        labels=labels,
        output_hidden_states=True,
        **more,
    )
    states = output.language_model_outputs.hidden_states
    return Output(states=states, logits=output.logits, loss=output.loss, kept=mask)


def row_ids(checkpoint: Any, batch: Batch) -> list[list[int]]:
    """The rows of a batch without padding, from the encoder that made them."""
    found = {sample.key: sample for sample in checkpoint.test_split[batch.task]}
    return [checkpoint.encoder.encode_text(found[key].turns)[0] for key in batch.keys]


def generated(
    checkpoint: Any, model: PreTrainedModel, sample: Any, *, max_new_tokens: int, **options: Any
) -> list[int]:
    """New tokens of ``generate`` for one sample, alone in its batch."""
    return _generate(checkpoint, model, sample, max_new_tokens=max_new_tokens, **options)[0]


def generated_with_logits(
    checkpoint: Any, model: PreTrainedModel, sample: Any, *, max_new_tokens: int, **options: Any
) -> tuple[list[int], Tensor]:
    """:func:`generated`, and the logits that each greedy token was chosen by, float32 [N, V]."""
    tokens, logits = _generate(checkpoint, model, sample, max_new_tokens=max_new_tokens, output_logits=True, **options)
    return tokens, torch.cat(logits).float()


@torch.no_grad()
def _generate(
    checkpoint: Any, model: PreTrainedModel, sample: Any, *, max_new_tokens: int, **options: Any
) -> tuple[list[int], Any]:
    encoder, layout = checkpoint.encoder, checkpoint.backbone.layout
    pixels = encoder.encode_image(sample.image)[None].to(model.dtype)
    ids = torch.tensor([encoder.encode_prompt(sample.turns)])
    options |= {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": layout.pad_token_id}
    options |= {"return_dict_in_generate": True}
    instruction = encoder.encode_instructions([sample.turns])
    if instruction is not None:
        options |= {"qformer_input_ids": instruction.input_ids, "qformer_attention_mask": instruction.mask.long()}
    if model.config.image_token_id is None:
        images = model.get_image_features(pixels).pooler_output
        text = model.get_input_embeddings()(ids[:, layout.num_query_tokens :])
        # Without ids transformers returns the new tokens alone.
        embedded = torch.cat([images, text], dim=1)
        mask = torch.ones(embedded.shape[:2], dtype=torch.long)
        found, start = model.language_model.generate(inputs_embeds=embedded, attention_mask=mask, **options), 0
    else:
        found = model.generate(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        start = 1 if checkpoint.has_encoder else ids.shape[1]
    return found.sequences[0, start:].tolist(), found.logits
