"""What a backbone is given to read: our ids against transformers' processors, templates, older conventions, several turns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import IMAGE_CLOSING, IMAGE_OPENING, INSTRUCTED, QUERIES
from hugging_face import load_reference
from PIL import Image
from transformers import AutoTokenizer, Blip2Processor, InstructBlipProcessor

from free_dist.config import UserError
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import IGNORE, Turn
from free_dist.decoding.pipeline import answer, read_image

PROMPTS = ("Question: what color is the shape? Answer:", "a photo of")
CURRENT = ("blip2-opt", "blip2-flan-t5", *INSTRUCTED)
MINIGPT4 = ("minigpt4-vicuna", "minigpt4-llama2")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(0, 256, (48, 80, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("checkpoint", CURRENT, indirect=True)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_and_pixels_equal_those_of_the_processor_saved_with_the_checkpoint(
    checkpoint, picture, prompt: str
) -> None:
    is_instructed = checkpoint.name in INSTRUCTED
    processor = (InstructBlipProcessor if is_instructed else Blip2Processor).from_pretrained(checkpoint.directory)
    assert processor.num_query_tokens == QUERIES
    theirs = processor(images=picture, text=prompt, return_tensors="pt")
    turns = [Turn(prompt=prompt, answer="")]
    assert [checkpoint.encoder.encode_prompt(turns)] == theirs["input_ids"].tolist()
    assert torch.equal(checkpoint.encoder.encode_image(read_image(picture))[None], theirs["pixel_values"])
    found = checkpoint.encoder.encode_instructions([turns])
    assert (found is not None) == is_instructed
    if found is not None:
        assert torch.equal(found.input_ids, theirs["qformer_input_ids"])
        assert torch.equal(found.mask.long(), theirs["qformer_attention_mask"])


@pytest.mark.parametrize("checkpoint", CURRENT, indirect=True)
def test_an_answer_from_a_picture_and_a_text_is_what_the_processor_and_generate_make_of_them(
    checkpoint, picture
) -> None:
    is_instructed = checkpoint.name in INSTRUCTED
    processor = (InstructBlipProcessor if is_instructed else Blip2Processor).from_pretrained(checkpoint.directory)
    model = load_reference(checkpoint)
    theirs = processor(images=picture, text=PROMPTS[0], return_tensors="pt")
    tokens = model.generate(**theirs, max_new_tokens=8, do_sample=False, eos_token_id=-1)[0].tolist()[-8:]
    settings = {"max_new_tokens": 8, "eos_token_id": -1}
    (ours,) = answer(checkpoint.backbone, checkpoint.encoder, None, [picture], PROMPTS[0], **settings)
    assert ours.result.tokens == tokens
    assert ours.text == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_the_older_convention_puts_the_image_before_the_text_of_the_tokenizer(checkpoint_named) -> None:
    checkpoint = checkpoint_named("blip2-opt-older")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    layout = checkpoint.backbone.layout
    assert checkpoint.backbone.model.config.image_token_id is None
    assert layout.image_token_id == len(tokenizer) == checkpoint.backbone.vocab_size, (
        "no token may be taken for an image"
    )
    found = checkpoint.encoder.encode_prompt([Turn(prompt=PROMPTS[0], answer="")])
    assert found == [layout.image_token_id] * QUERIES + tokenizer.encode(PROMPTS[0])


@pytest.mark.parametrize("checkpoint", MINIGPT4, indirect=True)
@pytest.mark.parametrize("question", ["what color is the shape?", "Describe this image in detail."])
def test_minigpt4_reads_the_segments_around_the_image_as_its_authors_tokenise_them(checkpoint, question: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    text = f"{IMAGE_OPENING}<ImageHere>{IMAGE_CLOSING} {question} ###Assistant:"
    before, after = text.split("<ImageHere>")
    image = checkpoint.backbone.layout.image_token_id
    wanted = tokenizer.encode(before) + [image] * QUERIES + tokenizer.encode(after, add_special_tokens=False)
    assert tokenizer.encode(before)[0] == tokenizer.bos_token_id
    prompt = checkpoint.data.question_prompt.format(question=question)
    assert checkpoint.encoder.encode_prompt([Turn(prompt=prompt, answer="")]) == wanted


@torch.no_grad()
def test_a_text_that_names_the_placeholder_of_images_is_letters(checkpoint) -> None:
    turn = Turn(prompt="<image>\nwhat color is the circle?", answer="a <image> of red")
    sample = replace(checkpoint.samples("vqa", 1)[0], turns=(turn,))
    batch = checkpoint.encoder.collate([sample])
    assert (batch.input_ids == checkpoint.backbone.layout.image_token_id).sum() == QUERIES
    assert not (batch.targets == checkpoint.backbone.layout.image_token_id).any()
    states = checkpoint.backbone(
        batch.pixel_values, batch.image_index, batch.input_ids, exit_layers=(), decoder_ids=batch.decoder_ids,
        instruction=batch.instruction,
    )  # fmt: skip
    assert states.final.isfinite().all()


def test_rows_line_up_with_targets_in_every_layout(checkpoint) -> None:
    encoder, layout = checkpoint.encoder, checkpoint.backbone.layout
    for task in ("vqa", "caption", "dialogue"):
        for sample in checkpoint.samples(task, 4):
            ids, targets = encoder.encode_text(sample.turns)
            prompt = encoder.encode_prompt(sample.turns)
            last = [*encoder.tokenizer.encode(sample.turns[-1].answer, add_special_tokens=False), layout.eos_token_id]
            assert ids[: len(prompt)] == prompt
            assert sum(token == layout.image_token_id for token in ids) == QUERIES
            if checkpoint.has_encoder:
                assert (ids, targets) == (prompt, last)
                continue
            assert targets[len(prompt) - 1 : -1] == ids[len(prompt) :]
            assert all(wanted in (IGNORE, ids[t + 1]) for t, wanted in enumerate(targets[:-1]))
            # A word within a row carries its space in the first token, so the text rather than the ids must be equal.
            assert encoder.decode(ids[len(prompt) :]) == sample.turns[-1].answer
            answers = [turn for turn in sample.turns if task == "dialogue"] or sample.turns
            ends = sum(wanted == layout.eos_token_id for wanted in targets)
            assert ends == (1 if encoder.qformer_tokenizer else len(answers))


def test_answers_that_are_targets_are_not_shown_to_an_encoder_or_a_q_former(checkpoint) -> None:
    (sample,) = checkpoint.samples("dialogue", 1)
    *earlier, last = sample.turns
    assert earlier
    encoder, backbone = checkpoint.encoder, checkpoint.backbone
    other = (*earlier, Turn(prompt=last.prompt, answer="no yes no"))
    batches = [encoder.collate([type(sample)(**vars(sample) | {"turns": turns})]) for turns in (sample.turns, other)]
    first, second = batches
    assert not torch.equal(first.targets, second.targets[:, : first.targets.shape[1]])
    answers = (first.targets != IGNORE).nonzero()[:, 1]
    if checkpoint.has_encoder or first.instruction is not None:
        assert len(answers) == len(encoder.tokenizer.encode(last.answer, add_special_tokens=False)) + 1
    if first.instruction is not None:
        assert torch.equal(first.instruction.input_ids, second.instruction.input_ids)
        words = encoder.qformer_tokenizer.decode(first.instruction.input_ids[0], skip_special_tokens=True)
        text = " ".join([*(f"{turn.prompt} {turn.answer}" for turn in earlier), last.prompt])
        assert words.replace(" ", "") == text.lower().replace(" ", "")
    with torch.no_grad():
        found = [backbone(**batch.inputs(), exit_layers=()).final for batch in batches]
    # Wherever a target is predicted, what follows it must have no influence; the first target of the last answer is enough.
    start = 0 if checkpoint.has_encoder else len(encoder.encode_prompt(sample.turns)) - 1
    torch.testing.assert_close(found[0][:, : start + 1], found[1][:, : start + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpoint", INSTRUCTED, indirect=True)
def test_a_prompt_beyond_the_q_former_s_positions_is_refused_clearly(checkpoint) -> None:
    with pytest.raises(UserError, match=r"exceeds the 128 that the Q-Former reads: lower data\.max_turns"):
        checkpoint.encoder.encode_instructions([[Turn(prompt="what color is it? " * 60, answer="")]])


def test_an_instruction_is_asked_for_and_refused_clearly(checkpoint_named) -> None:
    pixels = torch.zeros(1, 3, 64, 64)
    told = checkpoint_named("instructblip-vicuna")
    plain = checkpoint_named("blip2-opt")
    with pytest.raises(ValueError, match=r"encode_instructions"):
        told.backbone.encode_prefix(pixels)
    instruction = told.encoder.encode_instructions([[Turn(prompt="what?", answer="")]])
    with pytest.raises(ValueError, match="reads no text"):
        plain.backbone.encode_prefix(pixels, None, instruction)


def test_a_missing_q_former_tokenizer_is_named(checkpoint_named, tmp_path) -> None:
    source = checkpoint_named("instructblip-vicuna").directory
    for path in source.iterdir():
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match=r"qformer_tokenizer does not exist.*InstructBlipProcessor\.save_pretrained"):
        load_pretrained(str(tmp_path))
