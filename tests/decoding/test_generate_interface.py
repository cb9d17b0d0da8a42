"""``generate`` and ``answer`` under transformers' names do what transformers does: texts, streams, stops, draws and beams."""

from __future__ import annotations

import io
from pathlib import Path

import easy_vqa
import pytest
import torch
from PIL import Image
from transformers import MaxLengthCriteria, StoppingCriteriaList, StopStringCriteria, TextIteratorStreamer

from free_dist.config import MissingFileError, UserError
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import Turn
from free_dist.decoding import generate
from free_dist.decoding.pipeline import GrowingText, answer, token_pieces
from free_dist.exits import ExitBank

PROMPT = "a photo of"
QUESTION = "Question: what color is the shape? Answer:"
IMAGES = [easy_vqa.get_test_image_paths()[i] for i in range(3)]
N_TOKENS = 18


@pytest.fixture(scope="module")
def loaded():
    """The embedded backbone, its encoder, and exits as they are before training: copies of the next block."""
    backbone, encoder = load_pretrained("embedded")
    return backbone, encoder, ExitBank(backbone, (8, 14)).eval().requires_grad_(False)


def ids_of(encoder, prompt: str = PROMPT) -> torch.Tensor:
    return torch.tensor([encoder.encode_prompt([Turn(prompt=prompt, answer="")])])


def hugging_face(backbone, encoder, image, **arguments) -> list[int]:
    """What transformers generates, without the prompt."""
    ids = ids_of(encoder)
    arguments = {"do_sample": False, "max_new_tokens": N_TOKENS} | arguments
    pixels = encoder.encode_image(Path(image).read_bytes())[None]
    output = backbone.model.generate(
        pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), **arguments
    )
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_full_depth_answers_are_hugging_faces(loaded, num_beams: int) -> None:
    backbone, encoder, _ = loaded
    answers = answer(backbone, encoder, None, IMAGES, PROMPT, max_new_tokens=N_TOKENS, num_beams=num_beams)
    wanted = [hugging_face(backbone, encoder, image, num_beams=num_beams) for image in IMAGES]
    assert [found.text for found in answers] == [encoder.decode(tokens) for tokens in wanted]
    assert len({found.text for found in answers}) == len(IMAGES)


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_a_text_streamer_gets_what_it_gets_from_hugging_face(loaded, skip_prompt: bool) -> None:
    backbone, encoder, _ = loaded

    def new_streamer() -> TextIteratorStreamer:
        return TextIteratorStreamer(encoder.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)

    theirs, ours = new_streamer(), new_streamer()
    hugging_face(backbone, encoder, IMAGES[0], streamer=theirs)
    answer(backbone, encoder, None, IMAGES[0], PROMPT, max_new_tokens=N_TOKENS, streamer=ours)
    streamed = list(ours)
    assert streamed == list(theirs)
    assert len(streamed) > 5


@pytest.mark.parametrize("lossless", [False, True])
def test_a_stream_grows_by_final_tokens_up_to_the_answer(loaded, lossless: bool) -> None:
    backbone, encoder, bank = loaded
    shown: list[str] = []
    streamer = GrowingText(encoder, shown.append)
    settings = {"thresholds": 0.3, "lossless": lossless, "max_new_tokens": N_TOKENS}
    (found,) = answer(backbone, encoder, bank, IMAGES[0], PROMPT, streamer=streamer, **settings)
    assert shown == [encoder.decode(found.result.tokens[: n + 1]) for n in range(len(found.result.tokens))]
    assert shown[-1] == found.text
    assert set(found.result.exit_layers) & {8, 14}
    if lossless:
        assert found.result.tokens == hugging_face(backbone, encoder, IMAGES[0])
    first = list(shown)
    answer(backbone, encoder, bank, IMAGES[0], PROMPT, streamer=streamer, **settings)
    assert shown == first * 2  # a streamer that has ended starts anew


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("kind", ["string", "length", "either"])
def test_stopping_criteria_end_an_answer_where_hugging_face_ends_it(loaded, kind: str, lossless: bool) -> None:
    backbone, encoder, bank = loaded
    string = StopStringCriteria(encoder.tokenizer, ["and no circle", "rectangle"])
    length = MaxLengthCriteria(ids_of(encoder).shape[1] + 5)
    criteria = StoppingCriteriaList({"string": [string], "length": [length], "either": [string, length]}[kind])
    wanted = [hugging_face(backbone, encoder, image, stopping_criteria=criteria) for image in IMAGES]
    settings = {"thresholds": 0.3, "lossless": True} if lossless else {}
    answers = answer(
        backbone, encoder, bank if lossless else None, IMAGES, PROMPT,
        max_new_tokens=N_TOKENS, stopping_criteria=criteria, **settings,
    )  # fmt: skip
    assert [found.result.tokens for found in answers] == wanted
    free = [hugging_face(backbone, encoder, image) for image in IMAGES]
    assert all(len(tokens) < len(whole) for tokens, whole in zip(wanted, free, strict=True))
    if kind == "string":
        assert len(set(map(len, wanted))) > 1  # rows of one batch end at their own places


@pytest.mark.parametrize("warped", [{}, {"temperature": 1.7, "top_k": 20, "top_p": 0.9}])
def test_full_depth_draws_are_hugging_faces_draws_of_the_same_seed(loaded, warped) -> None:
    backbone, encoder, _ = loaded
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        wanted = hugging_face(backbone, encoder, IMAGES[0], do_sample=True, **({"top_k": 0} | warped))
        torch.manual_seed(seed)
        (ours,) = answer(backbone, encoder, None, IMAGES[0], PROMPT, max_new_tokens=N_TOKENS, do_sample=True, **warped)
        assert ours.result.tokens == wanted
        found.append(ours.text)
    assert len(set(found)) > 1


@pytest.mark.parametrize("lossless", [False, True])
def test_draws_repeat_with_their_seed_and_differ_between_seeds(loaded, lossless: bool) -> None:
    backbone, encoder, bank = loaded

    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        answers = answer(
            backbone, encoder, bank, IMAGES, PROMPT, thresholds=0.5, lossless=lossless, max_new_tokens=N_TOKENS,
            do_sample=True, temperature=2.0, generator=generator,
        )  # fmt: skip
        return [found.result.tokens for found in answers]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


@pytest.mark.parametrize("lossless", [False, True])
def test_draws_at_a_temperature_near_zero_are_greedy(loaded, lossless: bool) -> None:
    backbone, encoder, bank = loaded
    settings = {"thresholds": 0.5, "lossless": lossless, "max_new_tokens": N_TOKENS}
    greedy = answer(backbone, encoder, bank, IMAGES, PROMPT, **settings)
    cold = answer(backbone, encoder, bank, IMAGES, PROMPT, do_sample=True, temperature=1e-6, **settings)
    assert [found.result.tokens for found in cold] == [found.result.tokens for found in greedy]


def test_one_prompt_or_one_image_is_meant_for_all_of_the_others(loaded) -> None:
    backbone, encoder, bank = loaded
    settings = {"thresholds": 0.5, "max_new_tokens": N_TOKENS}
    prompts = [PROMPT, QUESTION]

    def one(image, prompt) -> str:
        return answer(backbone, encoder, bank, image, prompt, **settings)[0].text

    by_image = answer(backbone, encoder, bank, IMAGES, QUESTION, **settings)
    assert [found.text for found in by_image] == [one(image, QUESTION) for image in IMAGES]
    by_prompt = answer(backbone, encoder, bank, IMAGES[1], prompts, **settings)
    assert [found.text for found in by_prompt] == [one(IMAGES[1], prompt) for prompt in prompts]
    paired = answer(backbone, encoder, bank, IMAGES[:2], prompts, **settings)
    assert [found.text for found in paired] == [one(IMAGES[0], PROMPT), one(IMAGES[1], QUESTION)]
    for images, texts in [(IMAGES, prompts), ([], PROMPT), (IMAGES, [])]:
        with pytest.raises(UserError, match="give as many of both"):
            answer(backbone, encoder, bank, images, texts, **settings)


def test_an_answer_is_that_of_generate_on_encoded_pixels(loaded) -> None:
    backbone, encoder, bank = loaded
    pixels = encoder.encode_image(Path(IMAGES[2]).read_bytes())[None]
    (wanted,) = generate(backbone, bank, pixels, ids_of(encoder, QUESTION), thresholds=0.5, max_new_tokens=N_TOKENS)
    (found,) = answer(backbone, encoder, bank, IMAGES[2], QUESTION, thresholds=0.5, max_new_tokens=N_TOKENS)
    assert found.result == wanted
    dialogue = [Turn(prompt=QUESTION, answer="red"), Turn(prompt=QUESTION, answer="")]
    (second,) = answer(backbone, encoder, bank, IMAGES[2], [dialogue], thresholds=0.5, max_new_tokens=N_TOKENS)
    (wanted,) = generate(
        backbone, bank, pixels, encoder.encode_prompt(dialogue), thresholds=0.5, max_new_tokens=N_TOKENS
    )
    assert second.result == wanted


def test_an_image_is_a_file_its_bytes_or_an_opened_picture(loaded, tmp_path: Path) -> None:
    backbone, encoder, _ = loaded
    content = Path(IMAGES[0]).read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        images = [IMAGES[0], Path(IMAGES[0]), content, picture]
        answers = answer(backbone, encoder, None, images, QUESTION, max_new_tokens=3)
    assert len({found.text for found in answers}) == 1
    broken = tmp_path / "broken.png"
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"broken\.png: not a readable image"):
        answer(backbone, encoder, None, broken, QUESTION)
    with pytest.raises(UserError, match="not a readable image"):
        answer(backbone, encoder, None, b"no picture", QUESTION)
    with pytest.raises(MissingFileError, match=r"nowhere\.png: no such file"):
        answer(backbone, encoder, None, "nowhere.png", QUESTION)


def test_pieces_of_tokens_joined_are_the_text(loaded) -> None:
    _, encoder, _ = loaded
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        tokens = torch.randint(0, len(encoder.tokenizer), (12,), generator=generator).tolist()
        pieces = token_pieces(encoder, tokens)
        assert len(pieces) == len(tokens)
        assert "".join(pieces) == encoder.decode(tokens)
    tokens = encoder.tokenizer.encode(" a red shape", add_special_tokens=False)
    assert token_pieces(encoder, [*tokens, encoder.layout.eos_token_id]) == ["a", " red", " shape", ""]
    assert token_pieces(encoder, []) == []


def test_a_character_of_several_tokens_belongs_to_the_last_of_them(loaded) -> None:
    _, encoder, _ = loaded
    tokens = encoder.tokenizer.encode("\u20ac", add_special_tokens=False)
    assert len(tokens) > 1
    assert token_pieces(encoder, tokens) == [""] * (len(tokens) - 1) + ["\u20ac"]
    pieces = token_pieces(encoder, encoder.tokenizer.encode(" a caf\u00e9, 3 \u20ac", add_special_tokens=False))
    assert "".join(pieces) == "a caf\u00e9, 3 \u20ac"
    assert not any("\ufffd" in piece for piece in pieces)
