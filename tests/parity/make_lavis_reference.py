"""Make small random models of LAVIS's own classes, in its real file layout, and what they answer.

Run by the side environment (``make lavis-env``), which has salesforce-lavis 1.0.2 and neither transformers 5 nor free_dist:

    .venv-lavis/bin/python tests/parity/make_lavis_reference.py --out DIRECTORY

Every folder it writes holds what a user of LAVIS has (``checkpoint.pth`` as LAVIS's own runner saves it, frozen parameters
left out; ``eva_vit_g.pth``; a Hugging Face directory ``language_model``) and ``reference.safetensors`` with inputs and outputs
of LAVIS's ``forward`` and ``generate``, taken at the language model's input and output by hooks.  Only the sizes are
replaced: LAVIS's constructors have EVA-g's and BERT's built in and would download both.

The same seed gives the same weights and, up to rounding on other processors, the same outputs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from lavis.models.blip2_models import blip2
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.blip2_t5 import Blip2T5
from lavis.models.blip2_models.modeling_t5 import T5ForConditionalGeneration
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from lavis.models.blip_models.blip_caption import BlipCaption
from lavis.models.blip_models.blip_image_text_matching import BlipITM
from lavis.models.eva_vit import VisionTransformer
from lavis.models.med import XBertEncoder, XBertLMHeadDecoder
from lavis.models.vit import VisionTransformerEncoder
from lavis.runners.runner_base import RunnerBase
from safetensors.torch import save_file
from small_lavis import (
    CAPTIONS,
    IMAGE_SIZE,
    N_IMAGES,
    NEW_TOKENS,
    PROMPTS,
    QFORMER_WIDTH,
    QUERIES,
    TEXT_WIDTH,
    VISION_HEADS,
    VISION_WIDTH,
    save_gpt2_tokenizer,
    save_t5_tokenizer,
    small_sizes,
    spread,
)
from transformers import BertTokenizer, OPTConfig, OPTForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as PlainT5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    out = parser.parse_args().out
    make_blip2_opt(out / "blip2_opt")
    make_blip2_t5(out / "blip2_t5")
    make_instructblip(out / "instructblip_vicuna")
    make_blip(out / "blip_caption", BlipCaption)
    make_blip(out / "blip_itm", BlipITM)
    save_published_names(out / "published_names.json")


def make_blip2_opt(folder: Path) -> None:
    """``Blip2OPT``: logits of a training forward on three captions, tokens of greedy ``generate``."""
    language = folder / "language_model"
    language.mkdir(parents=True)
    vocabulary = save_gpt2_tokenizer(language)
    torch.manual_seed(1)
    config = OPTConfig(
        vocab_size=vocabulary + 11,  # published models have rows to spare as well
        hidden_size=TEXT_WIDTH,
        word_embed_proj_dim=TEXT_WIDTH,
        ffn_dim=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
        torch_dtype="float16",
    )
    save_language_model(OPTForCausalLM(config), language, torch.float16)
    with small_sizes(folder):
        model = Blip2OPT(
            img_size=IMAGE_SIZE, vit_precision="fp32", num_query_token=QUERIES, opt_model=str(language), max_txt_len=30
        )
    spread(model, "opt_model.")
    model = model.float().eval()
    save_checkpoints(model, folder)
    image = pixels()
    with torch.no_grad(), recorded(model.opt_model, model.opt_proj) as seen:
        model({"image": image, "text_input": list(CAPTIONS)})
    prefix, tensors = seen["prefix"], {"image": image, "image_embeds": model.ln_vision(model.visual_encoder(image))}
    tokens = model.opt_tokenizer([caption + "\n" for caption in CAPTIONS], return_tensors="pt", padding="longest")
    tensors |= {
        "prefix": prefix,
        "logits": seen["logits"],
        "input_ids": tokens.input_ids,
        "mask": tokens.attention_mask,
    }
    generated = [
        generated_ids(model, model.opt_tokenizer, {"image": image[i : i + 1], "prompt": prompt})
        for i, prompt in enumerate(PROMPTS)
    ]
    finish(folder, tensors, captions=CAPTIONS, prompts=PROMPTS, generated=generated, eos_token_id=model.eos_token_id)


def make_blip2_t5(folder: Path) -> None:
    """``Blip2T5``: logits of a training forward (teacher-forced decoder), tokens of greedy ``generate``."""
    language = folder / "language_model"
    language.mkdir(parents=True)
    vocabulary = save_t5_tokenizer(language)
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=vocabulary + 28,
        d_model=TEXT_WIDTH,
        d_kv=6,
        d_ff=40,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        torch_dtype="float32",
    )
    save_language_model(PlainT5(config), language, torch.bfloat16)
    with small_sizes(folder):
        model = Blip2T5(
            img_size=IMAGE_SIZE, vit_precision="fp32", num_query_token=QUERIES, t5_model=str(language), max_txt_len=30
        )
    assert isinstance(model.t5_model, T5ForConditionalGeneration)
    spread(model, "t5_model.")
    model = model.float().eval()
    save_checkpoints(model, folder)
    image, answers = pixels(), list(CAPTIONS[::-1])
    with torch.no_grad(), recorded(model.t5_model, model.t5_proj) as seen:
        model({"image": image, "text_input": list(CAPTIONS), "text_output": answers})
    prefix, tensors = seen["prefix"], {"image": image, "image_embeds": model.ln_vision(model.visual_encoder(image))}
    read = model.t5_tokenizer(list(CAPTIONS), return_tensors="pt", padding="longest")
    written = model.t5_tokenizer(answers, return_tensors="pt", padding="longest")
    tensors |= {"prefix": prefix, "logits": seen["logits"], "input_ids": read.input_ids, "mask": read.attention_mask}
    tensors |= {"labels": written.input_ids, "labels_mask": written.attention_mask}
    generated = [
        generated_ids(model, model.t5_tokenizer, {"image": image[i : i + 1], "prompt": prompt})[
            1:
        ]  # not the start token
        for i, prompt in enumerate(PROMPTS)
    ]
    finish(folder, tensors, captions=CAPTIONS, answers=answers, prompts=PROMPTS, generated=generated)


class InstructLayout(blip2.Blip2Base):
    """The modules of LAVIS's InstructBLIP before the language model, which version 1.0.2 has no class for.

    LAVIS's later ``Blip2VicunaInstruct`` puts them together in this way: the Q-Former keeps its text half and its word
    embeddings have a row more, for ``[DEC]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = self.init_tokenizer()
        self.visual_encoder, self.ln_vision = self.init_vision_encoder("eva_clip_g", IMAGE_SIZE, 0, False, "fp32")
        self.visual_encoder.requires_grad_(False)
        self.Qformer, self.query_tokens = self.init_Qformer(QUERIES, self.visual_encoder.num_features)
        self.Qformer.resize_token_embeddings(len(self.tokenizer))
        self.Qformer.cls = None
        self.llm_proj = torch.nn.Linear(QFORMER_WIDTH, TEXT_WIDTH)

    def forward(self, image: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = self.ln_vision(self.visual_encoder(image))
        queries = self.query_tokens.expand(len(image), -1, -1)
        output = self.Qformer.bert(
            input_ids,
            attention_mask=torch.cat([torch.ones(queries.shape[:2], dtype=torch.long), mask], dim=1),
            query_embeds=queries,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
            return_dict=True,
        )
        return self.llm_proj(output.last_hidden_state[:, :QUERIES])


def make_instructblip(folder: Path) -> None:
    """What InstructBLIP's Q-Former makes of images and prompts."""
    folder.mkdir(parents=True)
    torch.manual_seed(6)
    with small_sizes(folder):
        model = InstructLayout()
        BertTokenizer.from_pretrained("bert-base-uncased").save_pretrained(folder / "qformer_tokenizer")
    spread(model, "nothing.")
    model = model.float().eval()
    save_checkpoints(model, folder)
    tokens = model.tokenizer(list(CAPTIONS), return_tensors="pt", padding="longest")
    image = pixels()
    with torch.no_grad():
        prefix = model(image, tokens.input_ids, tokens.attention_mask)
    tensors = {"image": image, "prefix": prefix, "input_ids": tokens.input_ids, "mask": tokens.attention_mask}
    finish(folder, tensors, captions=CAPTIONS)


def make_blip(folder: Path, kind: type) -> None:
    """``BlipCaption`` (logits, greedy tokens) or ``BlipITM`` (matching logits, similarity)."""
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    vision = VisionTransformerEncoder(
        img_size=32, patch_size=8, embed_dim=VISION_WIDTH, depth=2, num_heads=VISION_HEADS, drop_path_rate=0.0
    )
    vision.vision_width = VISION_WIDTH
    with small_sizes(folder):
        tokenizer = kind.init_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=QFORMER_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=40,
        pad_token_id=0,
    )
    config.encoder_width, config.add_cross_attention, config.add_type_embeddings = VISION_WIDTH, True, False
    image, prompt = pixels(32), "a picture of "
    notes: dict[str, object] = {}
    with small_sizes(folder):
        if kind is BlipCaption:
            model = BlipCaption(vision, XBertLMHeadDecoder(config), prompt=prompt, max_txt_len=30)
        else:
            model = BlipITM(vision, XBertEncoder(config, add_pooling_layer=False), embed_dim=12, max_txt_len=30)
    spread(model, "nothing.")
    model = model.float().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    save_checkpoints(model, folder, vision=False)
    tokens = model.tokenizer(list(CAPTIONS), return_tensors="pt", padding="longest")
    tensors = {"image": image, "image_embeds": vision.forward_features(image), "mask": tokens.attention_mask}
    with torch.no_grad():
        if kind is BlipCaption:
            output = model({"image": image, "text_input": list(CAPTIONS)})
            tensors["logits"] = output.intermediate_output.decoder_output.logits
            notes["generated"] = [generated_ids(model, model.tokenizer, {"image": image[i : i + 1]}) for i in range(3)]
        else:
            tensors["itm"] = model({"image": image, "text_input": list(CAPTIONS)}, match_head="itm")
            tensors["itc"] = model({"image": image, "text_input": list(CAPTIONS)}, match_head="itc")
    tokens.input_ids[:, 0] = model.tokenizer.bos_token_id if kind is BlipCaption else model.tokenizer.enc_token_id
    tensors["input_ids"] = tokens.input_ids
    finish(
        folder, tensors, captions=CAPTIONS, prompt=prompt, **notes, **{key: getattr(config, key) for key in BERT_SIZES}
    )


def save_published_names(path: Path) -> None:
    """Name and shape of every tensor that LAVIS puts before the language model at the published sizes, without weights."""
    sizes = {"embed_dim": 1408, "depth": 39, "num_heads": 16, "mlp_ratio": 4.3637, "patch_size": 14, "img_size": 224}
    with (
        torch.device("meta"),
        mock.patch.object(torch, "linspace", partial(torch.linspace, device="cpu")),  # its values are read
        mock.patch.object(BertConfig, "from_pretrained", return_value=BertConfig()),  # bert-base-uncased
        mock.patch.object(BertLMHeadModel, "from_pretrained", lambda *_, config: BertLMHeadModel(config)),
    ):
        modules = torch.nn.Module()
        modules.visual_encoder = VisionTransformer(qkv_bias=True, use_mean_pooling=False, **sizes)
        modules.ln_vision = blip2.LayerNorm(1408)
        modules.Qformer, modules.query_tokens = blip2.Blip2Base.init_Qformer(32, 1408)
        modules.opt_proj = torch.nn.Linear(768, 2560)
    shapes = {name: list(tensor.shape) for name, tensor in modules.state_dict().items()}
    path.write_text("{" + ",\n".join(f"{json.dumps(name)}: {shape}" for name, shape in shapes.items()) + "}\n")


BERT_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def save_language_model(model: torch.nn.Module, folder: Path, precision: torch.dtype) -> None:
    """Save with values that ``precision`` holds exactly, because LAVIS's constructors round to it."""
    spread(model, "nothing.")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(precision).float()
    (model.half() if precision == torch.float16 else model).save_pretrained(folder)


def save_checkpoints(model: torch.nn.Module, folder: Path, *, vision: bool = True) -> None:
    """``checkpoint.pth`` by LAVIS's runner, which leaves out frozen parameters, and the vision tower as published."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    run = SimpleNamespace(to_dict=lambda: {"run": {"task": "captioning", "init_lr": 1e-5}})
    runner = SimpleNamespace(
        model=model, unwrap_dist_model=lambda m: m, optimizer=optimizer, config=run, scaler=None, output_dir=str(folder)
    )
    RunnerBase._save_checkpoint(runner, cur_epoch=0)
    (folder / "checkpoint_0.pth").rename(folder / "checkpoint.pth")
    if vision:
        torch.save(model.visual_encoder.state_dict(), folder / "eva_vit_g.pth")


@contextmanager
def recorded(language_model: torch.nn.Module, projection: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """``with recorded(...) as seen``: ``seen["prefix"]`` and ``seen["logits"]`` of the forward inside."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        projection.register_forward_hook(lambda _, __, out: seen.update(prefix=out)),
        language_model.register_forward_hook(lambda _, __, out: seen.update(logits=out.logits)),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def generated_ids(model: torch.nn.Module, tokenizer: object, samples: dict) -> list[int]:
    """Ids that LAVIS's greedy ``generate`` hands to its tokenizer for one image."""
    made: list[torch.Tensor] = []

    def remember(ids: torch.Tensor, **_: object) -> list[str]:
        made.append(ids)
        return []  # spare vocabulary rows have no text

    with mock.patch.object(tokenizer, "batch_decode", remember):
        model.generate(samples, num_beams=1, max_length=NEW_TOKENS, min_length=1)
    return made[0][0].tolist()


def pixels(size: int = IMAGE_SIZE) -> torch.Tensor:
    """Noise around another grey in every image: a small random model tells noise alone from noise only in the last digits."""
    noise = torch.randn(N_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(5))
    return noise + torch.linspace(-2, 2, N_IMAGES)[:, None, None, None]


def finish(folder: Path, tensors: dict, **notes: object) -> None:
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "reference.safetensors"
    )
    (folder / "reference.json").write_text(json.dumps(notes, indent=1) + "\n")


if __name__ == "__main__":
    main()
