"""Files that the official evaluation servers take, one per decoder: captions, VQA, GQA, VisDial.

* COCO and NoCaps: ``[{"image_id": int, "caption": str}]``
* VQAv2 and OK-VQA: ``[{"question_id": int, "answer": str}]``
* GQA: ``[{"questionId": str, "prediction": str}]``
* VisDial: ``[{"image_id": int, "round_id": int, "ranks": [int]}]``, a rank from 1 for every candidate in the published order

A server refuses a file that leaves samples out, so a submission takes the whole split.  Does not know models or metrics.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from free_dist.atomic import write_atomically
from free_dist.config import MissingFileError, Recipe, UserError
from free_dist.data.samples import Sample
from free_dist.data.shards import read_manifest
from free_dist.data.split_index import SplitIndex
from free_dist.evaluation.evaluate import TaskEvaluation
from free_dist.evaluation.ranking import Ranking

Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What an evaluation server wants."""

    task: str
    """Task of ours that makes the answers."""
    answer: Callable[[Sample, str], Entry]
    """(sample, text) -> its entry; VisDial's has ranks instead of a text."""
    field: str
    """Field of a sample's origin that the entry is known by."""


def _caption(sample: Sample, text: str) -> Entry:
    return {"image_id": int(sample.origin.image_id or ""), "caption": text}


def _vqa(sample: Sample, text: str) -> Entry:
    return {"question_id": int(sample.origin.question_id or ""), "answer": text}


def _gqa(sample: Sample, text: str) -> Entry:
    return {"questionId": sample.origin.question_id, "prediction": text}


def _visdial(sample: Sample, text: str) -> Entry:
    return {
        "image_id": int(sample.origin.image_id or ""),
        "round_id": sample.origin.round_id,
        "ranks": json.loads(text),
    }


_CAPTIONS = Layout(task="caption", answer=_caption, field="image_id")
_QUESTIONS = Layout(task="vqa", answer=_vqa, field="question_id")
LAYOUTS = {
    "coco": _CAPTIONS,
    "nocaps": _CAPTIONS,
    "vqav2": _QUESTIONS,
    "okvqa": _QUESTIONS,
    "gqa": Layout(task="vqa", answer=_gqa, field="question_id"),
    "visdial": Layout(task="dialogue", answer=_visdial, field="image_id"),
}
"""By the name of the data set in its shards' manifest."""


def check_submission(recipe: Recipe, *, part: bool = False) -> str:
    """The name of the data set, after raising UserError for a recipe whose answers no server would take.

    ``part``: not the whole split is submitted, so that some of its records may be unusable.
    """
    dataset = read_manifest(recipe.data.root, recipe.evaluation.split, timeout=recipe.data.read_timeout).dataset
    if dataset not in LAYOUTS:
        raise UserError(
            f"--submission: {recipe.data.root} holds {dataset!r}, which has no official layout; known: {', '.join(LAYOUTS)}"
        )
    if recipe.evaluation.max_samples:
        raise UserError(
            f"--submission: evaluation.max_samples={recipe.evaluation.max_samples} leaves samples out, and no server takes such "
            "a file: use evaluation.max_samples=0"
        )
    task = LAYOUTS[dataset].task
    if task not in recipe.evaluation.tasks:
        raise UserError(
            f"--submission: {dataset} asks for task {task!r}, and evaluation.tasks={recipe.evaluation.tasks}"
        )
    if dataset == "visdial" and not recipe.evaluation.rank_candidates:
        raise UserError("--submission: visdial asks for ranks, and evaluation.rank_candidates=false")
    if not part:
        index = SplitIndex.open(recipe.data, recipe.evaluation.split)
        _refuse_a_part(len(index.rows), index.manifest.samples)
    return dataset


def question_ids(path: Path) -> list[int]:
    """The ids in an official file of VQA questions; raises UserError for another file."""
    try:
        return [int(entry["question_id"]) for entry in json.loads(path.read_text())["questions"]]
    except FileNotFoundError as error:
        raise MissingFileError(f"--submission-questions: {path} does not exist") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--submission-questions: {path} is no official file of questions ({error})") from error


def write_submissions(
    directory: Path,
    dataset: str,
    evaluations: Sequence[TaskEvaluation],
    ranking: Ranking | None,
    *,
    questions: Sequence[int] | None = None,
    records: int | None = None,
) -> list[Path]:
    """One file per decoder, ``directory/dataset/full.json``, ``exits-0.9.json``, ...; returns their paths.

    Decoders that answer a part of the samples (Hugging Face's) or never exit are left out.  VisDial's are named after what
    scored the candidates, ``exits@4.json`` being the exit after block 4, with ``-normalized`` where likelihoods are per token.
    ``questions``: the ids to keep, of VQA's test-dev for example, which is a part of test2015.  ``records``: how many
    the split has by its manifest; without ``questions``, a sample of each must be there.  Raises UserError where one is not, for
    samples that the data set has no id of, or that are named twice, and questions without an answer.
    """
    layout = LAYOUTS[dataset]
    files: dict[str, list[Entry]] = {}
    if dataset == "visdial":
        if ranking is None:
            raise UserError(
                f"--submission: no dialogue of {dataset} has candidates to rank: convert the official files"
            )
        answered_samples = ranking.samples
        for a, reading in enumerate(ranking.readings):
            for normalized, ending in enumerate(("", "-normalized")):
                texts = [json.dumps(one.ranks[a, normalized].tolist()) for one in ranking.ranked]
                files[reading.name + ending] = _entries(layout, ranking.samples, texts)
    else:
        (evaluation,) = (one for one in evaluations if one.task == layout.task)
        answered_samples = evaluation.samples
        for i, arm in enumerate(evaluation.arms):
            if arm.method == "hf" or (arm.threshold is not None and arm.threshold >= 1):
                continue
            answered = [result.texts[i] or "" for result in evaluation.results]
            name = arm.method if arm.threshold is None else f"{arm.method}-{arm.threshold:g}"
            files[name] = _entries(layout, evaluation.samples, answered)
    if records is not None and questions is None:
        _refuse_a_part(len({sample.record_key for sample in answered_samples}), records)
    paths = []
    for name, entries in files.items():
        kept = entries if questions is None else _asked(entries, questions)
        path = directory / dataset / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(kept).encode())
        paths.append(path)
    return paths


def _refuse_a_part(found: int, wanted: int) -> None:
    if found < wanted:
        raise UserError(
            f"--submission: {wanted - found} of {wanted} records of the split gave no sample, and no server takes a file without "
            "them: find the unusable ones with python launch/inspect_data.py, and convert the official files again"
        )


def _entries(layout: Layout, samples: Sequence[Sample], texts: Sequence[str]) -> list[Entry]:
    entries, seen = [], set()
    for sample, text in zip(samples, texts, strict=True):
        try:
            entry = layout.answer(sample, text)
        except ValueError as error:
            raise UserError(
                f"--submission: sample {sample.key} has {layout.field}={getattr(sample.origin, layout.field)!r}, and the "
                "official layout wants a number"
            ) from error
        known_by = tuple(entry.get(name) for name in ("image_id", "question_id", "questionId", "round_id"))
        if not any(part is not None for part in known_by):
            raise UserError(f"--submission: sample {sample.key} has no {layout.field}: convert the official files")
        if known_by in seen:
            raise UserError(
                f"--submission: {layout.field} of sample {sample.key} comes twice: the shards hold it twice"
            )
        seen.add(known_by)
        entries.append(entry)
    return entries


def _asked(entries: Sequence[Entry], questions: Sequence[int]) -> list[Entry]:
    by_id = {entry.get("question_id"): entry for entry in entries}
    missing = [question for question in questions if question not in by_id]
    if missing:
        raise UserError(
            f"--submission-questions: {len(missing)} of {len(questions)} questions, {missing[0]} the first, are not in the split "
            "that was evaluated"
        )
    return [by_id[question] for question in questions]
