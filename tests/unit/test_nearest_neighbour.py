"""Baselines that see no language model answer exactly as their names say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from free_dist.data.samples import Sample, SampleEncoder, Turn
from free_dist.evaluation.nearest_neighbour import (
    FREQUENT,
    NEAREST_IMAGE,
    PROMPT_ONLY,
    baseline_answers,
    image_vectors,
)

VECTORS = {
    name: torch.tensor(vector) for name, vector in {b"a": [1.0, 0.0], b"b": [0.0, 1.0], b"c": [0.1, 1.0]}.items()
}


def asked(image: bytes, prompt: str, answer: str = "") -> Sample:
    return Sample(
        key="k", task="vqa", image=image, turns=(Turn(prompt="?", answer="-"), Turn(prompt=prompt, answer=answer))
    )


TRAINING = [
    asked(b"a", "what colour?", "red"),
    asked(b"a", "is it big?", "no"),
    asked(b"b", "what colour?", "blue"),
    asked(b"c", "what colour?", "blue"),
    asked(b"c", "is it big?", "no"),
    asked(b"c", "is it far?", "no"),
]


def answers(prompt: str, vector: list[float]) -> tuple[str, str, str]:
    found = baseline_answers(TRAINING, [asked(b"t", prompt)], VECTORS | {b"t": torch.tensor(vector)})
    return found[FREQUENT][0], found[PROMPT_ONLY][0], found[NEAREST_IMAGE][0]


def test_the_nearest_image_of_the_same_prompt_answers() -> None:
    assert answers("what colour?", [9.0, 1.0]) == ("no", "blue", "red")
    assert answers("what colour?", [0.0, 0.1]) == ("no", "blue", "blue")


def test_only_images_that_were_asked_the_question_can_answer() -> None:
    training = [*TRAINING, asked(b"b", "is it far?", "yes")]
    vectors = VECTORS | {b"t": torch.tensor([1.0, 0.0])}
    assert baseline_answers(training, [asked(b"t", "is it far?")], vectors)[NEAREST_IMAGE] == ["no"]


def test_a_question_never_asked_gets_the_most_frequent_answer() -> None:
    assert answers("why?", [1.0, 0.0]) == ("no", "no", "no")


def test_every_distinct_image_is_looked_at_once(
    tiny_backbone, tiny_encoder: SampleEncoder, tiny_data, monkeypatch
) -> None:
    from free_dist.data.stream import split_samples

    images = [sample.image for sample in split_samples(tiny_data, "test", "vqa")]
    looked = []
    encode = tiny_encoder.encode_image
    monkeypatch.setattr(tiny_encoder, "encode_image", lambda image: looked.append(image) or encode(image))
    vectors = image_vectors(tiny_backbone, tiny_encoder, images)
    assert sorted(looked) == sorted(set(images)) == sorted(vectors)
    for image, vector in vectors.items():
        with torch.no_grad():
            wanted = tiny_backbone.encode_patches(encode(image)[None]).mean((0, 1))
        assert torch.allclose(vector, wanted, atol=1e-5)


@pytest.mark.slow
def test_the_program_scores_what_evaluation_would_take(tiny_root: Path) -> None:
    command = [sys.executable, "launch/baselines.py", f"data.root={tiny_root}", "evaluation.max_samples=20"]
    printed = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(printed.stdout.splitlines()[-1])
    assert set(found) == {"vqa", "caption", "dialogue"}
    for qualities in found.values():
        assert set(qualities) == {FREQUENT, PROMPT_ONLY, NEAREST_IMAGE}
    assert 0 < found["vqa"][FREQUENT] < found["vqa"][PROMPT_ONLY] <= 1
    assert "VQA accuracy on 20 samples of" in printed.stdout
