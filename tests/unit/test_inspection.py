"""What is shown of records is what a backbone is trained on, and what is counted is there."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_image_processor
from free_dist.config import DataConfig, UserError
from free_dist.data.inspection import ShownRecord, show_record
from free_dist.data.inspection_page import COLOURS, html_page, png_sheet
from free_dist.data.pretrained import load_encoder, load_pretrained
from free_dist.data.records import DialogueTurn, Question, Record, SyntheticCaption
from free_dist.data.samples import IGNORE, SampleEncoder, evaluation_samples
from free_dist.data.shards import read_manifest
from free_dist.data.statistics import split_statistics, spread
from free_dist.data.stream import records
from free_dist.training.stage1_result import save_backbone
from launch import inspect_data

TASKS = ("vqa", "caption", "dialogue")


def first(data: DataConfig, split: str = "test") -> Record:
    return next(iter(records(Path(data.root), split)))


def shown(data: DataConfig, encoder: SampleEncoder | None) -> ShownRecord:
    return show_record("test", first(data), TASKS, data, encoder)


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_shown_targets_are_the_tokens_that_training_predicts(
    task: str, tiny_data: DataConfig, tiny_encoder: SampleEncoder
) -> None:
    found = next(sample for sample in shown(tiny_data, tiny_encoder).samples if sample.task == task)
    (sequence,) = found.sequences
    sample = evaluation_samples(first(tiny_data), task, tiny_data)[0]
    batch = tiny_encoder.collate([sample])
    wanted = tiny_encoder.tokenizer.decode([t for t in batch.targets[0].tolist() if t != IGNORE])
    assert "".join(token.text for token in sequence.tokens if token.is_target) == wanted
    ids = [token for token in batch.input_ids[0].tolist() if token != tiny_encoder.layout.image_token_id]
    assert "".join(token.text for token in sequence.tokens if not token.is_image) == tiny_encoder.tokenizer.decode(ids)
    images = [token.text for token in sequence.tokens if token.is_image]
    assert images == [f"<image> x {tiny_encoder.layout.num_query_tokens}"]
    assert len(found.turns) == sum(token.text == "</s>" and token.is_target for token in sequence.tokens)


def test_a_row_that_is_too_long_says_so(
    tiny_data: DataConfig, tiny_backbone: Blip2Backbone, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    short = SampleEncoder(tiny_tokenizer, new_image_processor(), tiny_backbone.layout, 30)
    found = {sample.task: sample for sample in shown(tiny_data, short).samples}
    assert found["dialogue"].sequences == () and "exceeds" in str(found["dialogue"].problem)
    assert found["vqa"].problem is None
    assert split_statistics([first(tiny_data)], tiny_data, short)["rows"]["dialogue"]["too_long"] == 1


def test_an_encoder_without_weights_makes_the_same_batches(
    tiny_backbone: Blip2Backbone, tiny_encoder: SampleEncoder, tiny_data: DataConfig, tmp_path: Path
) -> None:
    save_backbone(tiny_backbone, tiny_encoder, tmp_path / "backbone")
    whole = load_pretrained(str(tmp_path / "backbone"))[1]
    for path in (tmp_path / "backbone").glob("*.safetensors"):
        path.unlink()
    alone = load_encoder(str(tmp_path / "backbone"))
    for task in TASKS:
        samples = evaluation_samples(first(tiny_data), task, tiny_data)
        ours, theirs = alone.collate(samples), whole.collate(samples)
        for name in ("pixel_values", "input_ids", "targets"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    (tmp_path / "backbone" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="model_type 'bert'"):
        load_encoder(str(tmp_path / "backbone"))


# --- page and sheet ---------------------------------------------------------------------------------------------------


def test_the_page_holds_image_prompts_and_targets(tiny_data: DataConfig, tiny_encoder: SampleEncoder) -> None:
    found = shown(tiny_data, tiny_encoder)
    page = html_page("title", [["split"], ["test"]], [found])
    image = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert image is not None and base64.b64decode(image[1]) == found.record.image
    rows = re.findall(r'<div class="tokens">(.*?)</div>', page)
    assert len(rows) == len(found.samples)
    for row, sample in zip(rows, found.samples, strict=True):
        targets = html.unescape("".join(re.findall(r'<span class="target">(.*?)</span>', row)))
        assert targets == "".join(token.text for token in sample.sequences[0].tokens if token.is_target)


def test_texts_cannot_add_to_the_page(tiny_data: DataConfig) -> None:
    bad = "</div><script>alert(1)</script><img src=x onerror='a'>"
    record = Record(
        key='k"><b',
        image=b"no image",
        image_id=bad,
        questions=(Question(question=bad, answers=(bad,)),),
        captions=(bad,),
    )
    page = html_page(bad, [[bad], [bad]], [show_record(bad, record, TASKS, tiny_data, None)])
    assert "<script" not in page and "onerror='a'" not in page and 'k"' not in page
    assert "&lt;script&gt;" in page and "does not decode" in page


def test_the_sheet_shows_the_image_and_marks_targets(tiny_data: DataConfig, tiny_encoder: SampleEncoder) -> None:
    found = shown(tiny_data, tiny_encoder)
    sheet = np.asarray(Image.open(io.BytesIO(png_sheet([found]))).convert("RGB"))
    with Image.open(io.BytesIO(found.record.image)) as opened:
        colour = np.asarray(opened.convert("RGB"))[0, 0]
    assert (sheet[12:20, 12:20] == colour).all()
    greens = (sheet == COLOURS["target"]).all(-1).sum()
    assert greens > 200
    two = png_sheet([found, found])
    assert Image.open(io.BytesIO(two)).height == 2 * sheet.shape[0]
    text_only = png_sheet([show_record("test", found.record, ["vqa"], tiny_data, None)])
    assert (np.asarray(Image.open(io.BytesIO(text_only))) == COLOURS["target"]).all(-1).sum() > 20


def test_a_sheet_is_made_of_records_without_anything_to_show(tiny_data: DataConfig) -> None:
    empty = show_record("test", Record(key="a", image=b"no image"), TASKS, tiny_data, None)
    assert Image.open(io.BytesIO(png_sheet([empty]))).height > 0
    assert "nothing for these tasks" in html_page("t", [["split"]], [empty])


# --- statistics -------------------------------------------------------------------------------------------------------


def test_counts_lengths_and_answers_are_those_of_the_records(
    tiny_data: DataConfig, tiny_encoder: SampleEncoder
) -> None:
    rows = list(records(Path(tiny_data.root), "train"))
    found = split_statistics(rows, tiny_data, tiny_encoder)
    assert found["records"] == len(rows) == read_manifest(Path(tiny_data.root), "train").samples
    answers = Counter(answer for row in rows for question in row.questions for answer in question.answers)
    listed = found["answers"]["answer"]["most_frequent"]
    assert {entry["answer"]: entry["count"] for entry in listed} == dict(answers.most_common(20))
    assert listed[0]["share"] == answers.most_common(1)[0][1] / answers.total()
    words = np.array([len(question.question.split()) for row in rows for question in row.questions])
    spread_of_words = found["texts"]["question"]["words"]
    assert spread_of_words["mean"] == pytest.approx(words.mean())
    assert (spread_of_words["min"], spread_of_words["max"]) == (words.min(), words.max())
    for name, share in (("median", 0.5), ("p95", 0.95)):
        assert spread_of_words[name] == np.quantile(words, share, method="inverted_cdf")
    lengths = [
        len(tiny_encoder.encode_text(sample.turns)[0])
        for row in rows
        for sample in evaluation_samples(row, "vqa", tiny_data)
    ]
    assert found["rows"]["vqa"]["tokens"] == spread(lengths)
    assert found["images"]["width"] == {"min": 64, "mean": 64, "median": 64, "p95": 64, "max": 64}
    assert json.loads(json.dumps(found)) == found


def test_every_kind_of_text_is_counted_and_an_image_twice_is_one(tiny_data: DataConfig) -> None:
    record = Record(
        key="a",
        image=b"no image",
        captions=("a", "a"),
        synthetic_captions=(SyntheticCaption(text="b c", model="m", score=1.0, threshold=0.5),),
        dialogue=(DialogueTurn(question="d?", answer="yes it is"), DialogueTurn(question="e?", answer=None)),
    )
    found = split_statistics([record, record], tiny_data)
    counts = {kind: (text["count"], text["distinct"]) for kind, text in found["texts"].items()}
    assert counts == {
        "caption": (4, 1),
        "synthetic caption": (2, 1),
        "dialogue question": (4, 2),
        "dialogue answer": (2, 1),
    }
    assert found["images"] == {
        "distinct": 1, "formats": {"unreadable": 2}, "width": None, "height": None, "bytes": None
    }  # fmt: skip
    assert "tokens" not in found["texts"]["caption"] and found["rows"] == {}


# --- launcher ---------------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        inspect_data.main()
    return int(stopped.value.code or 0)


def test_the_launcher_shows_splits_records_and_numbers(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, tiny_root, "--count", 1, "--task", "vqa") == 0
    out = capsys.readouterr().out
    assert re.search(r"train +│ +easyvqa +│ +24 +│ +3 ", out)
    assert re.search(r"<image> x 8</s>Question: .*\? Answer:\[ \w+\]", out)

    assert run(monkeypatch, tiny_root / "test", "--backbone", "none", "data.question_prompt=Q {question} A") == 0
    out = capsys.readouterr().out
    assert "  Q " in out and "<image>" not in out and "train/" not in out

    assert run(monkeypatch, tiny_root, "--stats", "--json", tmp_path / "stats.json") == 0
    assert "tokens of a row: vqa" in capsys.readouterr().out
    assert {split: found["records"] for split, found in json.loads((tmp_path / "stats.json").read_text()).items()} == {
        "calibration": 8, "test": 8, "train": 24
    }  # fmt: skip

    assert run(monkeypatch, tiny_root, "--html", tmp_path / "page.html", "--png", tmp_path / "sheet.png") == 0
    assert (tmp_path / "page.html").read_text().count("<article>") == 9
    assert Image.open(tmp_path / "sheet.png").format == "PNG"


def test_the_launcher_tells_what_is_wrong_with_its_arguments(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, told in (
        ((tmp_path,), "no finished split"),
        ((tiny_root, "--split", "dev"), "no finished split 'dev'"),
        ((tiny_root, "--json", "x"), "give --stats too"),
        ((tiny_root, "--backbone", tmp_path), "config.json"),
    ):
        assert run(monkeypatch, *arguments) == 2
        assert told in capsys.readouterr().err
