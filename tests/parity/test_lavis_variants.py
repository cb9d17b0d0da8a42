"""InstructBLIP and MiniGPT-4 from LAVIS's files: LAVIS's own Q-Former is the reference, a small LLaMA made here the rest.

LAVIS 1.0.2 has no Vicuna, so what its Q-Former and projection make of images and prompts is compared, and for the language
model which ids it reads.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from free_dist.backbones import Instruction
from free_dist.backbones.lavis import LavisFiles, import_lavis
from free_dist.config import UserError
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import Turn
from free_dist.decoding import generate
from tests.backbones.checkpoints import llama_tokenizer
from tests.parity.committed import QFORMER_HEADS, REFERENCE, VISION_HEADS, Reference, read_reference

pytestmark = pytest.mark.parity

TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}
"""Float32 on another processor: sums in another order."""
LLAMA_VOCABULARY = 380


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory, opt: Reference) -> Path:
    """A small LLaMA as published: a row for every token of its tokenizer and none to spare."""
    folder = tmp_path_factory.mktemp("vicuna")
    tokenizer = llama_tokenizer([*opt.notes["captions"], "###Human: <Img></Img> Describe this image.###Assistant:"])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(8)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def instruct() -> Reference:
    return read_reference(REFERENCE / "instructblip_vicuna")


@pytest.fixture(scope="module")
def instruct_files(instruct: Reference, vicuna: Path) -> LavisFiles:
    return replace(instruct.files, language_model=vicuna, qformer_tokenizer=instruct.folder / "qformer_tokenizer")


@pytest.fixture(scope="module")
def instructblip(instruct_files: LavisFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_lavis(instruct_files, tmp_path_factory.mktemp("instructblip") / "model").directory


@torch.no_grad()
def test_instructblips_prefix_is_that_of_lavis(instruct: Reference, instructblip: Path) -> None:
    backbone, _ = load_pretrained(str(instructblip))
    tensors = instruct.tensors
    instruction = Instruction(tensors["input_ids"], tensors["mask"].bool())
    prefix = backbone.encode_prefix(tensors["image"], torch.arange(3), instruction)
    torch.testing.assert_close(prefix, tensors["prefix"], **TOLERANCE)
    silent = backbone.encode_prefix(
        tensors["image"], torch.arange(3), Instruction(*(t[:1].expand(3, -1) for t in instruction))
    )
    assert (silent[1:] - prefix[1:]).abs().max() > 0.1, "the prompt must matter, or it is not compared"


def test_qformer_reads_prompts_as_lavis_tokenizes_them(instruct: Reference, instructblip: Path) -> None:
    _, encoder = load_pretrained(str(instructblip))
    turns = [[Turn(prompt=text, answer="")] for text in instruct.notes["captions"]]
    instruction = encoder.encode_instructions(turns)
    assert torch.equal(instruction.mask.long(), instruct.tensors["mask"])
    assert torch.equal(
        instruction.input_ids * instruction.mask, instruct.tensors["input_ids"] * instruct.tensors["mask"]
    )


def test_vicuna_reads_the_special_tokens_that_lavis_gives_it(instructblip: Path, vicuna: Path) -> None:
    backbone, encoder = load_pretrained(str(instructblip))
    tokenizer, text = encoder.tokenizer, backbone.model.config.text_config
    n_plain = len(AutoTokenizer.from_pretrained(vicuna))
    assert tokenizer.convert_tokens_to_ids("[PAD]") == n_plain == backbone.layout.pad_token_id
    assert backbone.layout.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == n_plain + 1
    assert text.vocab_size == n_plain + 2 == backbone.model.language_model.lm_head.out_features
    assert backbone.layout.bos_token_id == backbone.layout.eos_token_id == tokenizer.convert_tokens_to_ids("</s>") == 2
    ids = encoder.encode_prompt([Turn(prompt="a photo", answer="")])
    assert ids[5] == 2, "LAVIS opens InstructBLIP's prompts with </s>"


def test_rows_added_to_the_vocabulary_change_no_answer(instructblip: Path, vicuna: Path) -> None:
    written = load_file(instructblip / "model.safetensors")
    plain = LlamaForCausalLM.from_pretrained(vicuna)
    for name, rows in (
        ("model.embed_tokens.weight", plain.model.embed_tokens.weight),
        ("lm_head.weight", plain.lm_head.weight),
    ):
        new = written[f"language_model.{name}"]
        assert torch.equal(new[: len(rows)], rows) and len(new) == len(rows) + 2
        assert torch.equal(new[len(rows) :], rows[:1].expand(2, -1))


def test_transformers_own_instructblip_opens_the_directory_and_answers_as_ours(
    instruct: Reference, instructblip: Path
) -> None:
    model, info = InstructBlipForConditionalGeneration.from_pretrained(instructblip, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = InstructBlipProcessor.from_pretrained(instructblip)
    assert len(processor.qformer_tokenizer) == model.config.qformer_config.vocab_size
    backbone, encoder = load_pretrained(str(instructblip))
    image = instruct.tensors["image"]
    for row, text in enumerate(instruct.notes["captions"]):
        read = processor(images=Image.new("RGB", (42, 42)), text=text, return_tensors="pt")
        turns = [[Turn(prompt=text, answer="")]]
        prompt = encoder.encode_prompt(turns[0])
        assert read["input_ids"][0].tolist() == prompt
        theirs = model.eval().generate(
            pixel_values=image[row : row + 1],
            input_ids=torch.tensor([prompt]),
            qformer_input_ids=read["qformer_input_ids"],
            qformer_attention_mask=read["qformer_attention_mask"],
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=-1,
        )
        (ours,) = generate(
            backbone,
            None,
            image[row : row + 1],
            [prompt],
            max_new_tokens=6,
            eos_token_id=-1,
            instruction=encoder.encode_instructions(turns),
        )
        assert ours.tokens == theirs[0].tolist()[-6:]


def test_instructblip_needs_the_tokenizer_of_its_qformer(
    instruct_files: LavisFiles, vicuna: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--qformer-tokenizer: instructblip-vicuna needs"):
        import_lavis(replace(instruct_files, qformer_tokenizer=None), tmp_path / "out")
    with pytest.raises(UserError, match=r"--qformer-tokenizer .* tokens with \[DEC\], the checkpoint's Q-Former"):
        import_lavis(replace(instruct_files, qformer_tokenizer=vicuna), tmp_path / "out")


def test_instructblip_with_t5_takes_the_exact_gelu_of_lavis(
    instruct_files: LavisFiles, instruct: Reference, t5: Reference, tmp_path: Path
) -> None:
    content = torch.load(instruct.folder / "checkpoint.pth", weights_only=True)
    for part in ("weight", "bias"):
        content["model"][f"t5_proj.{part}"] = content["model"].pop(f"llm_proj.{part}")
    torch.save(content, tmp_path / "instruct_t5.pth")
    files = replace(
        instruct_files,
        kind="instructblip-t5",
        checkpoints=(tmp_path / "instruct_t5.pth",),
        language_model=t5.files.language_model,
    )
    directory = import_lavis(files, tmp_path / "out").directory
    model, info = InstructBlipForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.text_config.dense_act_fn == "gelu"
    assert isinstance(model.language_model.encoder.block[0].layer[1].DenseReluDense.act, torch.nn.Module)
    backbone, _ = load_pretrained(str(directory))
    tensors = instruct.tensors
    instruction = Instruction(tensors["input_ids"], tensors["mask"].bool())
    prefix = backbone.encode_prefix(tensors["image"], torch.arange(3), instruction)
    torch.testing.assert_close(prefix, tensors["prefix"], **TOLERANCE)


def test_vicuna_as_it_was_first_published_a_pickle_with_constants_gives_the_same_model(
    minigpt4_files: LavisFiles, minigpt4: Path, vicuna: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(vicuna, old)
    weights = load_file(old / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    (old / "model.safetensors").unlink()
    torch.save(weights, old / "pytorch_model.bin")
    written = import_lavis(replace(minigpt4_files, language_model=old), tmp_path / "out").directory
    one, two = (load_file(folder / "model.safetensors") for folder in (written, minigpt4))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    weights["model.layers.0.self_attn.other.weight"] = torch.ones(4)
    del weights["model.norm.weight"]
    torch.save(weights, old / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"missing tensors: model\.norm\.weight; --language-model .* is not whole"):
        import_lavis(replace(minigpt4_files, language_model=old), tmp_path / "again")


@pytest.fixture(scope="module")
def minigpt4_files(t5: Reference, vicuna: Path, tmp_path_factory: pytest.TempPathFactory) -> LavisFiles:
    """As MiniGPT-4 is published: a projection alone; everything before it is FlanT5-XXL's, whose projection is not used."""
    source = torch.load(t5.folder / "checkpoint.pth", weights_only=True)["model"]
    projection = {f"llama_proj.{part}": source[f"t5_proj.{part}"] for part in ("weight", "bias")}
    path = tmp_path_factory.mktemp("minigpt4") / "pretrained_minigpt4.pth"
    torch.save({"model": projection}, path)
    return LavisFiles(
        kind="minigpt4",
        language_model=vicuna,
        checkpoints=(path,),
        vision=t5.folder / "eva_vit_g.pth",
        qformer=t5.folder / "checkpoint.pth",
        vision_heads=VISION_HEADS,
        qformer_heads=QFORMER_HEADS,
    )


@pytest.fixture(scope="module")
def minigpt4(minigpt4_files: LavisFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_lavis(minigpt4_files, tmp_path_factory.mktemp("imported") / "minigpt4").directory


@torch.no_grad()
def test_minigpt4s_prefix_is_that_of_lavis_through_its_own_projection(t5: Reference, minigpt4: Path) -> None:
    backbone, _ = load_pretrained(str(minigpt4))
    torch.testing.assert_close(backbone.encode_prefix(t5.tensors["image"]), t5.tensors["prefix"], **TOLERANCE)


def test_minigpt4_is_an_ordinary_blip2_directory_with_llama_and_its_template(minigpt4: Path) -> None:
    config = PreTrainedConfig.get_config_dict(minigpt4)[0]
    assert config["model_type"] == "blip-2" and config["text_config"]["model_type"] == "llama"
    assert (config["image_opening"], config["image_closing"]) == ("###Human: <Img>", "</Img>")
    model, info = Blip2ForConditionalGeneration.from_pretrained(minigpt4, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    _, encoder = load_pretrained(str(minigpt4))
    ids = encoder.encode_prompt([Turn(prompt="Describe this image.###Assistant:", answer="")])
    assert ids.count(model.config.image_token_id) == 5
    text = [token for token in ids if token != model.config.image_token_id]
    tokenizer = encoder.tokenizer
    pieces = ["###Human: <Img>", "</Img>", " Describe this image.###Assistant:"]
    assert text[0] == 1 and "".join(tokenizer.decode(text[1:]).split()) == "".join("".join(pieces).split())


def test_minigpt4_answers_as_transformers_with_the_image_inside_the_prompt(t5: Reference, minigpt4: Path) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(minigpt4).eval()
    backbone, encoder = load_pretrained(str(minigpt4))
    image = t5.tensors["image"]
    prompt = encoder.encode_prompt([Turn(prompt="Describe this image.###Assistant:", answer="")])
    ours = generate(backbone, None, image, [prompt] * 3, max_new_tokens=6, eos_token_id=-1)
    theirs = model.generate(
        pixel_values=image, input_ids=torch.tensor([prompt] * 3), max_new_tokens=6, do_sample=False, eos_token_id=-1
    )
    assert [row.tokens for row in ours] == theirs[:, -6:].tolist()


def test_minigpt4_without_the_files_of_its_qformer_names_what_lacks(minigpt4_files: LavisFiles, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"query_tokens .* --checkpoint or --qformer"):
        import_lavis(replace(minigpt4_files, qformer=None), tmp_path / "out")
