"""Evaluation, ranking of candidates and submissions on one and on two real processes: the same, and every sample once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_image_processor, new_model
from free_dist.config import DataConfig, DecodingConfig, EvaluationConfig, Recipe
from free_dist.data.records import DialogueTurn, Record
from free_dist.data.samples import SampleEncoder
from free_dist.data.shards import write_split
from free_dist.data.stream import records
from free_dist.exits import ExitBank

TIMES = ("wall_ratio", "wall_ratio_hf", "wall_ratio_interval", "wall_ratio_hf_interval", "seconds_per_sample")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Recipe:
    """Captions, questions and dialogues with candidates of five images: numbers that two ranks cannot share evenly."""
    root = tmp_path_factory.mktemp("dialogues")
    found = [with_dialogue(record) for _, record in zip(range(5), records(tiny_root, "test"), strict=False)]
    write_split(root, dataset="visdial", split="test", records=found, total=len(found))
    return Recipe(
        data=DataConfig(root=str(root), max_history_tokens=8),
        decoding=DecodingConfig(max_new_tokens=4),
        evaluation=EvaluationConfig(
            max_samples=0, thresholds=[0.01, 1.1], timing_samples=2, caption_tokenizer="ptb-like"
        ),
    )


def with_dialogue(record: Record) -> Record:
    """The record with its first questions as a dialogue, each answer among all of them as candidates."""
    answers = tuple(dict.fromkeys(question.answer for question in record.questions))
    turns = []
    for i, question in enumerate(record.questions[:3]):
        gold = answers.index(question.answer)
        shares = tuple(float(place == gold) for place in range(len(answers))) if i == 1 else ()
        turns.append(
            DialogueTurn(
                question=question.question, answer=question.answer, candidates=answers, gold=gold, relevance=shares
            )
        )
    return replace(record, dialogue=tuple(turns), image_id=str(int(record.key.rpartition("-")[2])))


def evaluated(recipe: Recipe, tokenizer: Any, directory: str) -> dict[str, Any]:
    """What this rank finds: rows without times, rankings, and the submission that rank 0 writes."""
    import torch

    from free_dist.distributed import all_gather, world_size
    from free_dist.evaluation.evaluate import evaluate_tasks
    from free_dist.evaluation.ranking import rank_candidates
    from free_dist.evaluation.submission import write_submissions

    torch.manual_seed(3)
    model = new_model(width=32, n_blocks=4, n_heads=2)
    backbone = Blip2Backbone(model.eval().requires_grad_(False))
    encoder = SampleEncoder(tokenizer, new_image_processor(), backbone.layout, backbone.max_positions)
    banks = {"exits": ExitBank(backbone, [1, 3]).eval().requires_grad_(False)}
    rank = torch.distributed.get_rank()
    where: dict[str, Any] = {"rank": rank, "world_size": world_size(), "gather": all_gather, "quiet": True}
    evaluations = evaluate_tasks(backbone, encoder, banks, recipe, **where)
    ranking = rank_candidates(backbone, encoder, banks, recipe, **where)
    assert ranking is not None
    if rank == 0:
        write_submissions(Path(directory), "visdial", evaluations, ranking)
    rows = [row.to_json() for evaluation in evaluations for row in evaluation.rows]
    return {
        "rows": [{name: value for name, value in row.items() if name not in (*TIMES, "world_size")} for row in rows],
        "ranking": [repr(row) for row in ranking.rows()],
        "indices": [one.index for one in ranking.ranked],
        "samples": {one.task: len(one.samples) for one in evaluations},
    }


def test_two_processes_find_what_one_finds_and_count_every_sample_once(
    recipe: Recipe, tiny_encoder: SampleEncoder, tmp_path: Path
) -> None:
    (alone,) = run_ranks(1, evaluated, recipe, tiny_encoder.tokenizer, str(tmp_path / "one"))
    both = run_ranks(2, evaluated, recipe, tiny_encoder.tokenizer, str(tmp_path / "two"))
    assert both[0] == both[1] == alone
    assert alone["samples"]["dialogue"] == 15 and alone["indices"] == list(range(15))
    assert {row["task"]: row["n"] for row in alone["rows"] if row["method"] == "full"} == alone["samples"]
    written = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.json"))
    assert Path("visdial/full.json") in written and Path("visdial/exits@3-normalized.json") in written
    for path in written:
        one, two = ((tmp_path / name / path).read_text() for name in ("one", "two"))
        assert one == two
        entries = json.loads(one)
        assert len({(entry["image_id"], entry["round_id"]) for entry in entries}) == len(entries) == 15
