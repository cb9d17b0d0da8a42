"""Baselines that see no language model answer exactly as their names say."""

from __future__ import annotations

import torch

from free_dist.data.samples import Record
from free_dist.evaluation.nearest_neighbour import answer_baselines, mean_features

TRAINING = [
    Record(key="a", image=b"a", questions=(("what colour?", "red"), ("is it big?", "no"))),
    Record(key="b", image=b"b", questions=(("what colour?", "blue"),)),
    Record(key="c", image=b"c", questions=(("what colour?", "blue"), ("is it big?", "no"), ("is it far?", "no"))),
]
VECTORS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])


def scores(questions: tuple[tuple[str, str], ...], vector: list[float]) -> tuple[float, float, float]:
    asked = [Record(key="t", image=b"t", questions=questions)]
    found = answer_baselines(TRAINING, VECTORS, asked, torch.tensor([vector]))
    assert found.questions == len(questions)
    return found.always_yes, found.question_only, found.nearest_image


def test_the_nearest_image_answers_where_the_most_frequent_answer_is_wrong() -> None:
    assert scores((("what colour?", "red"),), [9.0, 1.0]) == (0.0, 0.0, 1.0)
    assert scores((("what colour?", "blue"),), [9.0, 1.0]) == (0.0, 1.0, 0.0)


def test_only_images_that_were_asked_the_question_can_answer() -> None:
    assert scores((("is it big?", "no"), ("is it big?", "yes")), [0.0, 1.0]) == (0.5, 0.5, 0.5)


def test_a_question_never_asked_gets_the_most_frequent_answer() -> None:
    assert scores((("why?", "no"), ("why?", "yes")), [1.0, 0.0]) == (0.5, 0.5, 0.5)


def test_mean_features_are_means_over_positions() -> None:
    maps = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert mean_features(maps).tolist() == [[1.5, 5.5, 9.5], [13.5, 17.5, 21.5]]
