"""Calibration end to end on a tiny random model and real shards: the loss table, the launcher, and the file it writes."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.config import ConfigError, DataConfig, DecodingConfig, EvaluationConfig, MissingFileError, Recipe
from free_dist.data.samples import Sample, SampleEncoder
from free_dist.decoding import generate
from free_dist.evaluation.calibration import (
    FORMAT_VERSION,
    OFF,
    Calibration,
    CalibrationSet,
    calibration_path,
    harm,
    load_calibration,
    read_calibration,
    write_calibration,
)
from free_dist.evaluation.tasks import TaskScorer
from free_dist.exits import ExitBank
from free_dist.exits.export import MANIFEST, WEIGHTS, ExportError, backbone_hash, read_exits_manifest, save_exits
from free_dist.training.finetune import save_backbone

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 4
GRID = [0.9, 0.6, 0.3]


@pytest.fixture(scope="module")
def backbone() -> Blip2Backbone:
    """Eight random blocks of which the last three say little, with confidences anywhere between 0.1 and 1."""
    model = new_model(width=32, n_blocks=8, n_heads=2)
    for number, block in enumerate(model.language_model.model.decoder.layers, start=1):
        for parameter in block.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(12.0 if number <= 5 else 2.0)
    model.language_model.model.decoder.final_layer_norm.weight.data.mul_(20.0)
    return Blip2Backbone(model.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def bank(backbone: Blip2Backbone) -> ExitBank:
    """Two untrained exits, of which the second is often right."""
    return ExitBank(backbone, [2, 5], init="next").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def recipe(tiny_data: DataConfig) -> Recipe:
    """Ten samples of short answers."""
    return Recipe(
        data=tiny_data,
        decoding=DecodingConfig(max_new_tokens=LIMIT),
        evaluation=EvaluationConfig(split="calibration", max_samples=10),
    )


def calibration_set(backbone, encoder, bank, recipe, task="vqa", loss="agreement") -> CalibrationSet:
    return CalibrationSet(backbone, encoder, bank, recipe, task, loss=loss, quiet=True)


def answer(backbone, encoder: SampleEncoder, bank, sample: Sample, thresholds: Sequence[float]):
    """What ``generate`` itself says, without any record."""
    pixels, prompt = encoder.encode_image(sample.image)[None], encoder.encode_prompt(sample.turns)
    return generate(backbone, bank, pixels, prompt, thresholds=thresholds, max_new_tokens=LIMIT)[0]


def test_a_recorded_answer_is_the_one_that_decoding_anew_gives(backbone, tiny_encoder, bank, recipe) -> None:
    samples = calibration_set(backbone, tiny_encoder, bank, recipe)
    images = range(4)
    rows = [samples.samples[s] for s in np.flatnonzero(np.isin(samples.images, images))]
    owners = samples.images[np.isin(samples.images, images)]
    candidates = list(itertools.product([OFF, *GRID], repeat=2))[1:]
    random.Random(0).shuffle(candidates)  # lower thresholds before higher ones too
    table = samples.tabulate(candidates, images)
    full = [answer(backbone, tiny_encoder, bank, sample, (OFF, OFF)) for sample in rows]
    for c, candidate in enumerate(candidates):
        anew = [answer(backbone, tiny_encoder, bank, sample, candidate) for sample in rows]
        changed = np.array([float(a.tokens != b.tokens) for a, b in zip(anew, full, strict=True)])
        assert table.losses[:, c].tolist() == [changed[owners == image].mean() for image in images]
        blocks = sum(sum(one.blocks_executed) + one.exit_calls for one in anew)
        assert table.blocks[c] == pytest.approx(blocks / sum(len(one.tokens) for one in anew))
    assert samples.decodes < 0.9 * len(rows) * (1 + len(candidates))
    assert len({tuple(column) for column in table.losses.T.tolist()}) > 3


def test_exits_that_are_off_cost_and_lose_nothing_and_images_are_the_units(
    backbone, tiny_encoder, bank, recipe
) -> None:
    samples = calibration_set(backbone, tiny_encoder, bank, recipe)
    table = samples.tabulate([(OFF, 1.0), (0.0, 0.0)])
    assert len({sample.image for sample in samples.samples}) == samples.n_images == len(table.losses) < table.n_samples
    assert table.losses[:, 0].max() == 0 < table.losses[:, 1].max()
    assert (table.blocks[0], table.costs[0]) == (8.0, table.full_cost)
    block, head = backbone.block(1), backbone.shared_modules()[1]
    share = sum(p.numel() for p in head.parameters()) / sum(p.numel() for p in block.parameters())
    assert table.full_cost == pytest.approx(8 + share)
    assert table.costs[1] == pytest.approx(2 + 1 + share)


@pytest.mark.parametrize("task", ["vqa", "caption", "dialogue"])
def test_harm_is_the_quality_lost_against_the_full_model(backbone, tiny_encoder, bank, recipe, task: str) -> None:
    samples = calibration_set(backbone, tiny_encoder, bank, recipe, task, "harm")
    # An untrained model is never right by itself: let its full-depth answers be the right ones.
    texts = [
        tiny_encoder.decode(answer(backbone, tiny_encoder, bank, sample, (OFF, OFF)).tokens)
        for sample in samples.samples
    ]
    samples.samples = [replace(sample, references=(text,)) for sample, text in zip(samples.samples, texts, strict=True)]
    table = samples.tabulate([(0.0, 0.0)])
    early = [
        tiny_encoder.decode(answer(backbone, tiny_encoder, bank, sample, (0.0, 0.0)).tokens)
        for sample in samples.samples
    ]
    scorer = TaskScorer(task, recipe.evaluation, only_quality=True)
    full, fast = (np.array(scorer.score(said, [(text,) for text in texts]).per_sample) for said in (texts, early))
    assert full.mean() > 0.9
    assert fast.mean() < full.mean()
    wanted = harm(full, fast, relative=task == "caption")
    assert table.losses[:, 0] == pytest.approx([wanted[samples.images == i].mean() for i in range(samples.n_images)])
    assert table.losses.mean() >= (table.full_quality - table.quality[0]) / (10 if task == "caption" else 1) > 0


def test_harm_counts_losses_only_and_is_relative_for_captions() -> None:
    full, exits = np.array([1.0, 0.3, 0.0]), np.array([0.6, 0.9, 0.5])
    assert harm(full, exits, relative=False) == pytest.approx([0.4, 0.0, 0.0])
    assert harm(10 * full, 5 * exits, relative=True) == pytest.approx([0.7, 0.0, 0.0])
    assert harm(np.array([[2.0]]), np.array([[-1.0, 3.0]]), relative=True).tolist() == [[1.0, 0.0]]


def test_candidates_per_exit_come_from_one_half_and_grow_cheaper(backbone, tiny_encoder, bank, recipe) -> None:
    samples = calibration_set(backbone, tiny_encoder, bank, recipe)
    search, test = samples.halves(seed=1)
    assert sorted(search + test) == list(range(samples.n_images))
    for s in np.flatnonzero(np.isin(samples.images, test)):
        samples.samples[s] = replace(samples.samples[s], image=b"unreadable: whoever decodes it fails")
    candidates = samples.candidates_per_exit(search)
    table = samples.tabulate(candidates, search)
    assert len(candidates) > 2
    assert any(first != second for first, second in candidates)
    assert all(a <= b for a, b in itertools.pairwise(table.losses.mean(axis=0)))
    assert len(set(table.costs)) > 2


def test_the_test_split_and_a_single_image_are_refused(backbone, tiny_encoder, bank, recipe) -> None:
    other = replace(recipe, evaluation=replace(recipe.evaluation, split="test"))
    with pytest.raises(ConfigError, match=r"^evaluation.split='test': .* use evaluation.split=calibration"):
        calibration_set(backbone, tiny_encoder, bank, other)
    lone = replace(recipe, evaluation=replace(recipe.evaluation, max_samples=1))
    with pytest.raises(ValueError, match=r"^evaluation.max_samples: .* two images"):
        calibration_set(backbone, tiny_encoder, bank, lone).halves()


@pytest.fixture(scope="module")
def workplace(backbone, bank, tiny_encoder, tmp_path_factory) -> Path:
    """A backbone directory and an export of its exits."""
    directory = tmp_path_factory.mktemp("calibrate")
    save_backbone(backbone, tiny_encoder, directory / "backbone")
    save_exits(bank, directory / "export", backbone_hash=backbone_hash(backbone), thresholds=0.9)
    return directory


def launch(workplace: Path, tiny_root: Path, *flags: str, without_torch: bool = False):
    """Run the launcher on ``workplace``, with ``flags`` after and therefore over the good ones."""
    command = [sys.executable, str(ROOT / "launch" / "calibrate.py")]
    if without_torch:
        blocked = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        command = [sys.executable, "-c", blocked + "runpy.run_path(sys.argv[0], run_name='__main__')", command[1]]
    good = [
        "--exits", str(workplace / "export"), "--task", "dialogue", f"backbone.path={workplace / 'backbone'}",
        f"data.root={tiny_root}", "data.max_turns=3", f"decoding.max_new_tokens={LIMIT}",
    ]  # fmt: skip
    return subprocess.run([*command, *good, *flags], capture_output=True, text=True, check=False, timeout=600)


def test_the_launcher_certifies_writes_beside_the_exits_and_leaves_them_alone(
    workplace, tiny_root, backbone, bank
) -> None:
    export = workplace / "export"
    before = {name: (export / name).read_bytes() for name in (WEIGHTS, MANIFEST)}
    # An untrained model is never right, so nothing can harm it: eight images without a loss are enough for 0.4.
    finished = launch(workplace, tiny_root, "--epsilon", "0.4", "--resplits", "5")
    assert finished.returncode == 0, finished.stderr
    assert "<- chosen" in finished.stdout
    assert "above epsilon=0.4: 0 of 5" in finished.stdout
    assert before == {name: (export / name).read_bytes() for name in before}
    assert sorted(path.name for path in export.iterdir()) == ["calibration-dialogue.json", MANIFEST, WEIGHTS]
    calibration = read_calibration(export, "dialogue")
    assert calibration.guarantee.startswith("with probability 0.95, the expected harm")
    assert (calibration.n_images, calibration.epsilon, calibration.delta) == (8, 0.4, 0.05)
    chosen = [row for row in calibration.candidates if tuple(row["thresholds"]) == calibration.thresholds]
    assert chosen[0]["certified"]
    assert chosen[0]["p_value"] <= 0.05
    thresholds = load_calibration(export, "dialogue")
    assert len(thresholds) == 2
    assert max(thresholds) < 1


def test_too_few_images_leave_the_model_at_full_depth_and_name_the_epsilon_they_allow(workplace, tiny_root) -> None:
    finished = launch(workplace, tiny_root, "--epsilon", "0.3", "--per-exit")
    assert finished.returncode == 0, finished.stderr
    assert "nothing cheaper than the full model could be certified: thresholds off" in finished.stdout
    wanted = 1 - 0.05 ** (1 / 4)  # zero loss on the four images of the second half
    assert f"with 4 images the smallest epsilon for an exit without any loss is {wanted:.4f}" in finished.stdout
    assert min(load_calibration(workplace / "export", "dialogue")) > 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["evaluation.split=test"], "evaluation.split='test': a split that chose thresholds cannot test them"),
        (["--exits", "nowhere"], "--exits nowhere: no such directory"),
        (["--epsilon", "1.5"], "--epsilon: 1.5: want a number between 0 and 1"),
        (["--delta", "nan"], "--delta: nan: want a number between 0 and 1"),
        (["--resplits", "0"], "--resplits: 0: want at least 1"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_torch_is_imported(workplace, tiny_root, flags, words) -> None:
    finished = launch(workplace, tiny_root, *flags, without_torch=True)
    assert finished.returncode == 2
    assert words in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr


def test_a_calibration_is_read_back_and_refused_when_missing_damaged_or_of_other_exits(workplace, tmp_path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    (export / MANIFEST).write_bytes((workplace / "export" / MANIFEST).read_bytes())
    with pytest.raises(MissingFileError, match=r"calibration-vqa.json does not exist: run launch/calibrate.py"):
        load_calibration(export, "vqa")
    manifest = read_exits_manifest(export)
    calibration = Calibration(
        format_version=FORMAT_VERSION, task="vqa", method="crc", loss="harm", epsilon=0.01, delta=None, guarantee="",
        thresholds=(0.5, OFF), n_images=9, n_samples=10, exit_layers=(2, 5), backbone_hash=manifest.backbone_hash,
        weights_sha256=manifest.weights_sha256, settings={}, full_quality=0.9, full_cost_per_token=8.5, candidates=(),
    )  # fmt: skip
    path = write_calibration(calibration, export)
    assert path == calibration_path(export, "vqa")
    assert read_calibration(export, "vqa") == calibration
    assert load_calibration(export, "vqa") == (0.5, OFF)
    content = json.loads(path.read_text())
    for change, words in (
        ({"weights_sha256": "0"}, "belongs to other exits"),
        ({"backbone_hash": "0"}, "belongs to other exits"),
        ({"exit_layers": [2, 6]}, "belongs to other exits"),
        ({"thresholds": [0.5]}, "1 thresholds for 2 exits"),
        ({"task": "caption"}, "task 'caption'"),
        ({"format_version": 0}, "format 0"),
        ({"surprise": 1}, "is not a calibration"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ExportError, match=words):
            load_calibration(export, "vqa")
    path.write_text("{")
    with pytest.raises(ExportError, match="is not a calibration"):
        load_calibration(export, "vqa")
