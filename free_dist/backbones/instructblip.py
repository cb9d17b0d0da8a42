"""InstructBLIP on transformers' own classes: BLIP-2 whose Q-Former also reads the prompt.

So a visual prefix belongs to an image *and* a prompt.  Everything behind the prefix is BLIP-2's.  Does not know how a prompt
becomes an instruction.

Shape letters: I images, B rows, Q query tokens, S tokens of an instruction, D width of the language model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from free_dist.backbones.base import Instruction
from free_dist.backbones.blip2 import Blip2Backbone


class InstructBlipBackbone(Blip2Backbone):
    """Adapter over ``InstructBlipForConditionalGeneration`` whose language model is LLaMA (Vicuna) or T5."""

    model_type = "instructblip"
    prefix_reads_prompt = True

    def encode_prefix(
        self, pixel_values: Tensor, image_index: Tensor | None = None, instruction: Instruction | None = None
    ) -> Tensor:
        if instruction is None:
            raise ValueError(
                "instruction: InstructBLIP's Q-Former reads the prompt; give SampleEncoder.encode_instructions"
            )
        patches = self.encode_patches(pixel_values)
        if image_index is not None:
            patches = patches[image_index]
        model = self.model
        n_rows = len(patches)
        queries = model.query_tokens.expand(n_rows, -1, -1)
        seen = torch.ones(queries.shape[:2], dtype=torch.bool, device=patches.device)
        features = model.qformer(
            input_ids=instruction.input_ids,
            attention_mask=torch.cat((seen, instruction.mask), dim=1),
            query_embeds=queries,
            encoder_hidden_states=patches,
        ).last_hidden_state[:, : queries.shape[1]]
        return model.language_projection(features.to(patches.dtype))
