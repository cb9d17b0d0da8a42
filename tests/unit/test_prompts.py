"""Prompts and targets: templates, the history of a dialogue within its budget, captions of people and of models."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from free_dist.backbones.blip2 import load_tokenizer
from free_dist.backbones.embedded import resolve_backbone
from free_dist.config import EMBEDDED_BACKBONE, DataConfig, UserError
from free_dist.data.lavis_text import caption_text, question_text
from free_dist.data.records import DialogueTurn, Question, Record, SyntheticCaption
from free_dist.data.samples import IGNORE, Sample, SampleEncoder, evaluation_samples, training_samples
from free_dist.data.shards import write_split
from free_dist.data.stream import global_batches, records, split_samples
from free_dist.recipe_io import load_recipe

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
PNG = b"\x89PNG"
QUESTIONS = (
    "is it outside?",
    "what color is the horse?",
    "Is anyone riding (it)?",
    "how old is the man?",
    "any trees?",
)
ANSWERS = ("yes it is", "brown", "no", "about 40, i think", "yes, 2 of them")
DIALOGUE = Record(
    key="d",
    image=PNG,
    captions=("A man stands near a horse.",),
    dialogue=tuple(DialogueTurn(question=q, answer=a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)),
)


def synthetic(*texts: str) -> tuple[SyntheticCaption, ...]:
    return tuple(SyntheticCaption(text=text, model="m", score=0.9, threshold=0.5) for text in texts)


@pytest.fixture(scope="module")
def encoder(tiny_encoder: SampleEncoder) -> SampleEncoder:
    """With the tokenizer of the embedded backbone, a trained byte-level one."""
    tokenizer = load_tokenizer(resolve_backbone(EMBEDDED_BACKBONE))
    return SampleEncoder(tokenizer, tiny_encoder.image_processor, tiny_encoder.layout, 512)


def prompts(samples: list[Sample], encoder: SampleEncoder) -> list[str]:
    return [encoder.prompt_text(sample.turns[-1]) for sample in samples]


def test_the_caption_opens_a_history_and_the_turns_follow(encoder: SampleEncoder) -> None:
    config = DataConfig(question_prompt="Question: {question} Short answer:", max_turns=10)
    found = prompts(evaluation_samples(DIALOGUE, "dialogue", config), encoder)
    assert found[:3] == [
        "Dialog history: A man stands near a horse.\nQuestion: is it outside? Short answer:",
        "Dialog history: A man stands near a horse. q: is it outside? a: yes it is\n"
        "Question: what color is the horse? Short answer:",
        "Dialog history: A man stands near a horse. q: is it outside? a: yes it is q: what color is the horse? a: brown\n"
        "Question: Is anyone riding (it)? Short answer:",
    ]
    bare = replace(DIALOGUE, captions=())
    first, second, *_ = prompts(evaluation_samples(bare, "dialogue", config), encoder)
    assert first == "Question: is it outside? Short answer:"  # no history, no frame
    assert second.startswith("Dialog history: q: is it outside? a: yes it is\n")


def test_only_the_last_answer_of_a_recorded_dialogue_is_a_target(encoder: SampleEncoder) -> None:
    for sample, answer in zip(evaluation_samples(DIALOGUE, "dialogue", DataConfig()), ANSWERS, strict=True):
        assert sample.references == (answer,)
        ids, targets = encoder.encode_text(sample.turns)
        wanted = [target for target in targets if target != IGNORE]
        assert wanted[-1] == encoder.layout.eos_token_id
        assert encoder.tokenizer.decode(wanted[:-1]).strip() == answer
        assert ids[: len(encoder.encode_prompt(sample.turns))] == encoder.encode_prompt(sample.turns)


@pytest.mark.parametrize("spaced", [False, True])
def test_a_history_fills_its_budget_and_loses_the_oldest_turns_first(encoder: SampleEncoder, spaced: bool) -> None:
    template = "Dialog history: {history}\n" if spaced else "{history} "
    whole_config = DataConfig(max_turns=10, history_prompt=template)
    whole = evaluation_samples(DIALOGUE, "dialogue", whole_config)[-1].turns[0]
    caption, *said = whole.history.parts
    assert len(said) == 4

    def length(text: str) -> int:
        return len(encoder.tokenizer.encode(text, add_special_tokens=False))

    kept_lengths, seen = [], set()
    for budget in range(length(encoder.prompt_text(whole)) + 2):
        config = replace(whole_config, max_history_tokens=budget)
        turn = evaluation_samples(DIALOGUE, "dialogue", config)[-1].turns[0]
        text = encoder.prompt_text(turn)
        assert length(text) - length(turn.prompt) <= budget
        candidates = [[caption, *said[n:]] for n in range(len(said) + 1)] + [[]]
        written = [template.replace("{history}", " ".join(c)) + turn.prompt if c else turn.prompt for c in candidates]
        kept = written.index(text)  # nothing else may come out
        if kept > 0:
            assert length(written[kept - 1]) - length(turn.prompt) > budget, "one part more would have fitted"
        kept_lengths.append(kept)
        seen.add(kept)
    assert kept_lengths == sorted(kept_lengths, reverse=True) and seen == set(range(6))
    unlimited = replace(whole_config, max_history_tokens=None)
    assert prompts(evaluation_samples(DIALOGUE, "dialogue", unlimited), encoder)[-1] == written[0]


def test_max_turns_bounds_a_history_and_its_question_together(encoder: SampleEncoder) -> None:
    found = prompts(evaluation_samples(DIALOGUE, "dialogue", DataConfig(max_turns=2)), encoder)
    assert "q: how old is the man? a: about 40, i think\n" in found[-1] and "horse?" not in found[-1]
    alone = prompts(evaluation_samples(DIALOGUE, "dialogue", DataConfig(max_turns=1)), encoder)
    assert all("q: " not in text and "A man stands near a horse." in text for text in alone)


def test_training_draws_turns_of_a_dialogue_with_the_history_they_had(encoder: SampleEncoder) -> None:
    config = DataConfig(max_turns=10, questions_per_image=2)
    everything = evaluation_samples(DIALOGUE, "dialogue", config)
    drawn = [training_samples(DIALOGUE, "dialogue", config, random.Random(seed)) for seed in range(40)]
    assert all(len(rows) == 2 and all(row in everything for row in rows) for rows in drawn)
    assert {row.key for rows in drawn for row in rows} == {f"d-t{i}" for i in range(5)}


def test_a_withheld_answer_gives_no_sample() -> None:
    last = replace(DIALOGUE.dialogue[-1], answer=None)
    record = replace(DIALOGUE, dialogue=(*DIALOGUE.dialogue[:-1], last))
    assert len(evaluation_samples(record, "dialogue", DataConfig())) == len(QUESTIONS) - 1


def test_a_q_former_reads_the_same_cut_history(encoder: SampleEncoder, tiny_encoder: SampleEncoder) -> None:
    reading = SampleEncoder(
        encoder.tokenizer, encoder.image_processor, encoder.layout, 512, qformer_tokenizer=encoder.tokenizer
    )
    samples = evaluation_samples(DIALOGUE, "dialogue", DataConfig(max_turns=10, max_history_tokens=60))
    instruction = reading.encode_instructions([sample.turns for sample in samples])
    for sample, ids, mask in zip(samples, instruction.input_ids, instruction.mask, strict=True):
        assert encoder.tokenizer.decode(ids[mask]) == encoder.prompt_text(sample.turns[0])


def test_a_row_that_is_too_long_names_the_budget(encoder: SampleEncoder) -> None:
    short = SampleEncoder(encoder.tokenizer, encoder.image_processor, encoder.layout, 60)
    sample = evaluation_samples(DIALOGUE, "dialogue", DataConfig(max_turns=10))[-1]
    with pytest.raises(UserError, match=r"data\.max_history_tokens"):
        short.encode_text(sample.turns)
    cut = evaluation_samples(DIALOGUE, "dialogue", DataConfig(max_turns=10, max_history_tokens=20))[-1]
    short.encode_text(cut.turns)


def test_questions_without_a_recorded_dialogue_stay_one_row_of_turns(tiny_root: Path) -> None:
    record = next(iter(records(tiny_root, "train")))
    (sample,) = training_samples(record, "dialogue", DataConfig(), random.Random(0))
    assert len(sample.turns) == 4 and all(turn.history is None for turn in sample.turns)


def test_all_ten_answers_are_references_and_training_draws_them_by_frequency() -> None:
    answers = ("red", "red", "maroon", "red", "dark red", "red", "red", "maroon", "red", "red")
    record = Record(key="v", image=PNG, questions=(Question(question="What color?", answers=answers),))
    (sample,) = evaluation_samples(record, "vqa", DataConfig())
    assert sample.references == answers and sample.turns[0].answer == "red"
    drawn = Counter(
        training_samples(record, "vqa", DataConfig(), random.Random(seed))[0].turns[0].answer for seed in range(1000)
    )
    assert set(drawn) == set(answers)
    assert all(abs(drawn[a] - 100 * answers.count(a)) < 75 for a in drawn)  # standard deviation at most 14.5


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_synthetic_captions_are_drawn_by_their_share(share: float) -> None:
    record = Record(key="c", image=PNG, captions=("h1", "h2"), synthetic_captions=synthetic("s1", "s2", "s3"))
    config = DataConfig(synthetic_share=share)
    drawn = []
    for seed in range(1000):
        (sample,) = training_samples(record, "caption", config, random.Random(seed))
        assert sample == training_samples(record, "caption", config, random.Random(seed))[0]
        assert sample.references == record.captions
        drawn.append(sample.turns[0].answer)
    found = sum(text.startswith("s") for text in drawn) / len(drawn)
    assert abs(found - share) < 0.06  # standard deviation 0.0145
    kinds = {"h1", "h2"} if share == 0 else {"s1", "s2", "s3"} if share == 1 else {"h1", "h2", "s1", "s2", "s3"}
    assert set(drawn) == kinds


def test_an_image_with_one_kind_of_caption_uses_it_unless_the_share_excludes_it() -> None:
    human = Record(key="h", image=PNG, captions=("h",))
    machine = Record(key="s", image=PNG, synthetic_captions=synthetic("s"))
    counts = {}
    for share in (0.0, 0.5, 1.0):
        config = DataConfig(synthetic_share=share)
        counts[share] = [len(training_samples(r, "caption", config, random.Random(0))) for r in (human, machine)]
    assert counts == {0.0: [1, 0], 0.5: [1, 1], 1.0: [0, 1]}
    assert training_samples(machine, "caption", DataConfig(), random.Random(0))[0].references == ("s",)
    assert (
        evaluation_samples(machine, "caption", DataConfig()) == []
    )  # what people wrote is what captions are judged by


def test_without_synthetic_captions_the_share_draws_no_random_number() -> None:
    record = Record(key="c", image=PNG, captions=tuple("abcdefgh"))
    for seed in range(50):
        rng = random.Random(seed)
        drawn = training_samples(record, "caption", DataConfig(), rng)[0].turns[0].answer
        plain = random.Random(seed)
        assert drawn == plain.choice(record.captions) and rng.random() == plain.random()


def test_the_share_is_kept_over_a_stream(tiny_root: Path, tmp_path: Path) -> None:
    given = [replace(r, synthetic_captions=synthetic("made")) for r in records(tiny_root, "train")]
    write_split(tmp_path, dataset="easyvqa", split="train", records=given, total=len(given))
    data = DataConfig(root=str(tmp_path), tasks={"caption": 1.0}, synthetic_share=0.25)
    batches = global_batches(data, seed=0, rows=len(given))
    answers = [sample.turns[0].answer for _ in range(25) for sample in next(batches)]
    assert abs(answers.count("made") / len(answers) - 0.25) < 0.08  # 600 draws: standard deviation 0.018


def test_clean_text_is_lavis_form_in_prompts_and_targets_and_not_in_references(encoder: SampleEncoder) -> None:
    config = DataConfig(clean_text=True, max_turns=10)
    (caption,) = evaluation_samples(DIALOGUE, "caption", config)
    assert caption.turns[0].answer == "a man stands near a horse" and caption.references == DIALOGUE.captions
    asked = evaluation_samples(DIALOGUE, "dialogue", config)
    text = encoder.prompt_text(asked[2].turns[0])
    assert text.startswith("Dialog history: a man stands near a horse q: is it outside? a: yes it is q:")
    assert text.endswith("Question: is anyone riding it? Answer:")
    assert asked[3].turns[0].answer == "about 40, i think"  # answers are scored as people gave them


def test_text_forms() -> None:
    assert caption_text('A "Red"  circle. (left), isn\'t it?\n') == "a red circle left , isn't it?"
    assert question_text("What's this (Really)?") == "what's this really?"
    assert caption_text("a.b") == "a b" and question_text("a.b") == "ab"
    assert len(caption_text("word " * 60).split()) == len(question_text("word " * 60).split()) == 50


@pytest.mark.parametrize("task", ["coco", "nocaps", "vqav2", "visdial"])
def test_recipes_of_tasks_state_the_fields_of_lavis(task: str) -> None:
    assert load_recipe([RECIPES / "tasks" / f"{task}.yaml"]).data.clean_text
    assert not load_recipe(None).data.clean_text


def test_the_dialogue_recipe_has_a_budget_that_the_shortest_q_former_reads(encoder: SampleEncoder) -> None:
    data = load_recipe([RECIPES / "tasks" / "visdial.yaml"]).data
    assert data.max_history_tokens is not None and data.max_history_tokens < 512 - 40
    assert data.max_turns == 10 and data.questions_per_image == 10


def test_evaluation_of_a_split_with_dialogues(tmp_path: Path, tiny_root: Path) -> None:
    shown = replace(DIALOGUE, image=next(records(tiny_root, "test")).image)
    write_split(tmp_path, dataset="visdial", split="test", records=[shown], total=1)
    data = DataConfig(root=str(tmp_path), max_turns=10)
    found = split_samples(data, "test", "dialogue")
    assert [sample.references for sample in found] == [(answer,) for answer in ANSWERS]
