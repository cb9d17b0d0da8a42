"""launch/generate.py: mistakes told in one line, before torch where that is possible; answers as text, colours and JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import easy_vqa
import pytest
from PIL import Image

from free_dist.data.pretrained import load_pretrained
from free_dist.decoding.pipeline import answer
from free_dist.evaluation.calibration import FORMAT_VERSION, Calibration, write_calibration
from free_dist.exits import ExitBank
from free_dist.exits.export import backbone_hash, load_exits, read_exits_manifest, save_exits

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "generate.py"
IMAGES = [easy_vqa.get_test_image_paths()[i] for i in (0, 1)]
COLOURS = {8: "32", 14: "36", None: "31"}
"""Escape codes of the first and second exit's colour and of full depth."""

WITHOUT_TORCH = """
import contextlib, io, json, runpy, sys
sys.modules["torch"] = None  # makes any import of it an ImportError
script, *lines = json.load(sys.stdin)
found = []
for line in lines:
    sys.argv = [script, *line]
    told, said, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        except ImportError as error:
            code = str(error)
    found.append((code, told.getvalue(), said.getvalue()))
print(json.dumps(found))
"""

QUESTION = ["--question", "what color is the shape?"]
MISTAKES = [
    ([], "one of the arguments --question --prompt --caption is required"),
    ([*QUESTION, "--caption"], "--caption: not allowed with argument --question"),
    ([*QUESTION, "--max-new-tokens", "0"], "--max-new-tokens: 0: want at least 1"),
    ([*QUESTION, "--max-new-tokens", "many"], "--max-new-tokens: invalid positive_integer value: 'many'"),
    ([*QUESTION, "--threshold", "-1"], "--threshold: -1: want numbers from 0"),
    ([*QUESTION, "--threshold", "0.9,nan"], "--threshold: 0.9,nan: want numbers from 0"),
    ([*QUESTION, "--threshold", "0.9,"], "--threshold: invalid confidences value: '0.9,'"),
    ([*QUESTION, "nowhere.png"], "IMAGE nowhere.png: no such file"),
    ([*QUESTION, str(SCRIPT)], "generate.py: not a readable image"),
    ([*QUESTION, "--exits", "nowhere"], "--exits nowhere: no such directory; launch/train.py writes one"),
    ([*QUESTION, "--temperature", "0.5"], "--temperature has a meaning only with --do-sample"),
    ([*QUESTION, "--top-k", "5"], "--top-k has a meaning only with --do-sample"),
    ([*QUESTION, "--seed", "0"], "--seed has a meaning only with --do-sample"),
    ([*QUESTION, "--do-sample", "--temperature", "0"], "--temperature: 0: want a number above 0"),
    ([*QUESTION, "--do-sample", "--top-p", "1.5"], "--top-p: 1.5: want a number above 0 and at most 1"),
    ([*QUESTION, "--num-beams", "2", "--do-sample"], "--num-beams 2 does not go with --do-sample"),
    ([*QUESTION, "--num-beams", "2", "--lossless"], "--num-beams 2 does not go with --lossless"),
    ([*QUESTION, "--policy", "luck"], "--policy: invalid choice: 'luck'"),
    ([*QUESTION, "--policy", "entropy"], "--policy entropy: exported thresholds are for max_prob; give --threshold"),
    ([*QUESTION, "--patience", "2"], "--patience has a meaning only with --policy patience"),
    ([*QUESTION, "--calibrated", "vqa", "--threshold", "0.9"], "--calibrated brings its own thresholds"),
    ([*QUESTION, "--calibrated", "vqa", "--policy", "patience"], "for max_prob; drop --policy"),
]


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory):
    """Runs of the launcher in one process that has no torch -> (exit code or import error, standard error, output)."""
    folder = tmp_path_factory.mktemp("flags")
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    (folder / "broken.png").write_bytes((folder / "whole.png").read_bytes()[:1500])
    good = [str(folder / "whole.png"), "--exits", str(folder)]
    lines = [[*good, *flags] for flags, _ in MISTAKES]
    # The default directory is looked for in the working directory, which is an empty one here.
    lines += [[*good, *QUESTION, str(folder / "broken.png")], good[:1] + QUESTION, good + QUESTION, ["--help"]]
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=json.dumps([str(SCRIPT), *lines]),
        capture_output=True, text=True, check=True, cwd=folder, env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
    )  # fmt: skip
    return json.loads(finished.stdout)


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[words for _, words in MISTAKES])
def test_a_wrong_flag_is_told_in_one_line_before_torch_is_imported(without_torch, number: int) -> None:
    code, told, said = without_torch[number]
    assert code == 2
    assert MISTAKES[number][1] in told.splitlines()[-1]
    assert said == ""


def test_a_truncated_image_is_told_in_one_line(without_torch) -> None:
    code, told, _ = without_torch[-4]
    assert code == 2
    assert re.fullmatch(
        r"generate\.py: error: IMAGE \S*broken\.png: not a readable image; give a PNG or JPEG file\n", told
    )


def test_without_exits_in_the_default_place_the_user_is_told_how_to_make_them(without_torch) -> None:
    code, told, _ = without_torch[-3]
    assert code == 2
    assert "--exits runs/quickstart/exits/export: no such directory; make quickstart writes one" in told


def test_good_flags_get_as_far_as_torch(without_torch) -> None:
    assert "import of torch halted" in without_torch[-2][0]


def test_help_shows_no_default_that_is_none(without_torch) -> None:
    code, _, said = without_torch[-1]
    assert code == 0
    assert "(default: float32)" in said
    assert "default: None" not in said


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export for the embedded backbone: untrained exits after blocks 8 and 14, which still answer well."""
    backbone, _ = load_pretrained("embedded")
    folder = tmp_path_factory.mktemp("exits")
    save_exits(ExitBank(backbone, (8, 14)), folder, backbone_hash=backbone_hash(backbone), thresholds=(0.9, 0.5))
    return folder


@pytest.fixture
def launch(exits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the launcher in this process -> (exit code, output, standard error)."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def run(*flags: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--exits", str(exits), *flags])
        code: object = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--threshold", "0.9,0.8,0.7"], "--threshold: 3 values for 2 exits (after blocks 8, 14); give one for all"),
        (["--policy", "patience", "--patience", "3"], "patience=3: with 2 exits want 1 to 2"),
        (["--calibrated", "vqa"], "calibration-vqa.json does not exist: run launch/calibrate.py"),
        (["--backbone", "nowhere"], "backbone.path: nowhere has no config.json"),
        (["--exits", "."], "exits.json does not exist"),
        (["--max-new-tokens", "300"], "lower max_new_tokens"),
    ],
)
def test_what_only_the_exits_can_tell_is_told_in_one_line(launch, tmp_path: Path, monkeypatch, flags, words) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, told = launch(IMAGES[0], *QUESTION, *flags)
    assert code == 2
    assert words in told.splitlines()[-1]
    assert said == ""


def test_json_lines_say_what_answer_returns(exits: Path) -> None:
    flags = ["--exits", str(exits), "--caption", "--json", "--lossless", "--threshold", "0.3"]
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), *IMAGES, *flags], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    backbone, encoder = load_pretrained("embedded")
    bank = load_exits(backbone, exits)
    wanted = answer(backbone, encoder, bank, IMAGES, "a photo of", thresholds=0.3, lossless=True)
    full = answer(backbone, encoder, None, IMAGES, "a photo of")
    assert [line["image"] for line in lines] == IMAGES
    for line, found, whole in zip(lines, wanted, full, strict=True):
        assert line["text"] == "".join(line["pieces"]) == found.text == whole.text
        result = found.result
        assert (line["tokens"], line["exits"], line["blocks"]) == (
            result.tokens, result.exit_layers, result.blocks_executed
        )  # fmt: skip
        assert line["confidences"] == pytest.approx(result.confidences)
        assert (line["drafted"], line["accepted"]) == (result.drafted, result.accepted)
        assert line["accepted"] > 0


def coloured(line: str) -> list[tuple[str, str]]:
    """A line with escape codes -> (character, colour code) of everything visible."""
    found, code = [], ""
    for i, part in enumerate(re.split(r"\x1b\[([\d;]*)m", line)):
        if i % 2:
            code = part if part != "0" else ""
        else:
            found += [(character, code) for character in part]
    return found


def test_every_token_has_the_colour_of_its_exit(launch, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [IMAGES[0], "--caption", "--threshold", "0.95,0.999"]
    _, said, _ = launch(*flags, "--json")
    line = json.loads(said)
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, said, _ = launch(*flags)
    assert code == 0
    pairs = zip(line["pieces"], line["exits"], strict=True)
    assert coloured(said.splitlines()[0]) == [(char, COLOURS[layer]) for piece, layer in pairs for char in piece]
    assert set(line["exits"]) == {8, 14, None}
    legend = coloured(said.splitlines()[1])
    numbers = [pair for pair in legend if pair[0].isdigit()]
    assert numbers == [("8", "32"), ("1", "36"), ("4", "36"), ("1", "31"), ("6", "31")]
    plain = re.sub(r"\x1b\[[\d;]*m", "", said)
    for token_exit, confidence, blocks in zip(line["exits"], line["confidences"], line["blocks"], strict=True):
        words = ["full"] if token_exit is None else [str(token_exit), f"{confidence:.3f}"]
        assert re.search(r"\s+".join([*map(re.escape, words), str(blocks)]) + r"\s*\n", plain)
    assert f"mean backbone blocks {line['mean_backbone_blocks']:.2f} of 16" in plain


@pytest.mark.parametrize("how", ["pipe", "flag", "NO_COLOR"])
def test_no_escape_codes_in_a_pipe_or_when_they_are_switched_off(launch, monkeypatch, how: str) -> None:
    if how != "pipe":
        monkeypatch.setenv("FORCE_COLOR", "1")
    if how == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    code, said, _ = launch(IMAGES[0], *QUESTION, "--num-beams", "2", *(["--no-color"] if how == "flag" else []))
    assert code == 0
    assert "\x1b" not in said
    assert said.splitlines()[0] == "red"
    assert "; score -" in said


@pytest.mark.parametrize("flags", [["--policy", "margin", "--threshold", "0.8"], ["--policy", "patience"]])
def test_the_named_policy_decides(launch, flags) -> None:
    code, said, _ = launch(IMAGES[1], "--prompt", "Question: what color is the shape? Answer:", "--json", *flags)
    assert code == 0
    line = json.loads(said)
    assert line["text"] == "yellow"
    # Two exits that agree can be counted at the second one only.
    assert set(line["exits"]) <= ({14, None} if "patience" in flags else {8, 14, None})


def test_calibrated_thresholds_are_used_and_their_promise_is_made_only_where_it_holds(
    launch, exits: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(exits, tmp_path / "exits")
    manifest = read_exits_manifest(copied)
    calibration = Calibration(
        format_version=FORMAT_VERSION, task="caption", method="ltt", loss="harm", epsilon=0.01, delta=0.05,
        guarantee="the promise", thresholds=(1.1, 0.0), n_images=8, n_samples=8, exit_layers=manifest.exit_layers,
        backbone_hash=manifest.backbone_hash, weights_sha256=manifest.weights_sha256,
        settings={
            "decoding.max_new_tokens": 32, "data.caption_prompt": "a photo of",
            "data.question_prompt": "Question: {question} Answer:",
        },
        full_quality=1.0, full_cost_per_token=17.6, candidates=(),
    )  # fmt: skip
    write_calibration(calibration, copied)
    flags = [IMAGES[0], "--exits", str(copied), "--calibrated", "caption"]
    _, said, _ = launch(*flags, "--caption", "--json")
    assert set(json.loads(said)["exits"]) == {14}
    _, said, _ = launch(*flags, "--caption")
    assert said.splitlines()[-1] == "for images like those of the calibration split: the promise"
    for uncovered in (["--caption", "--max-new-tokens", "16"], ["--caption", "--num-beams", "2"], QUESTION):
        _, said, _ = launch(*flags, *uncovered)
        assert said.splitlines()[-1].startswith("nothing is promised: calibrated for caption prompts, greedy, with")


def test_prompts_and_length_are_those_the_exits_were_trained_with(launch, exits: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(exits, tmp_path / "exits")
    content = json.loads((copied / "exits.json").read_text())
    content["decoding"] = {
        "data.question_prompt": "Question: {question} Short answer:", "data.caption_prompt": "a picture of",
        "decoding.max_new_tokens": 3,
    }  # fmt: skip
    (copied / "exits.json").write_text(json.dumps(content))
    flags = [IMAGES[0], "--exits", str(copied), "--json", "--threshold", "1.1"]
    asked, described, longer = (
        json.loads(launch(*flags, *more)[1])
        for more in (QUESTION, ["--caption"], ["--caption", "--max-new-tokens", "5"])
    )
    assert asked["prompt"] == "Question: what color is the shape? Short answer:"
    assert described["prompt"] == "a picture of"
    assert (len(described["tokens"]), len(longer["tokens"])) == (3, 5)
    manifest = read_exits_manifest(copied)
    calibration = Calibration(
        format_version=FORMAT_VERSION, task="vqa", method="ltt", loss="harm", epsilon=0.01, delta=0.05,
        guarantee="the promise", thresholds=(1.1, 0.0), n_images=8, n_samples=8, exit_layers=manifest.exit_layers,
        backbone_hash=manifest.backbone_hash, weights_sha256=manifest.weights_sha256, settings=content["decoding"],
        full_quality=1.0, full_cost_per_token=17.6, candidates=(),
    )  # fmt: skip
    write_calibration(calibration, copied)
    _, said, _ = launch(IMAGES[0], "--exits", str(copied), "--calibrated", "vqa", *QUESTION)
    assert said.splitlines()[-1] == "for images like those of the calibration split: the promise"


def test_draws_of_one_seed_are_the_same_and_the_default_seed_is_zero(launch) -> None:
    flags = [*IMAGES, "--caption", "--json", "--do-sample", "--temperature", "3"]
    outputs = [launch(*flags, *seed)[1] for seed in ([], ["--seed", "0"], ["--seed", "1"])]
    assert outputs[0] == outputs[1] != outputs[2]


def test_on_a_terminal_the_answer_grows_before_it_is_printed_in_colours(exits: Path) -> None:
    reader, writer = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    command = [sys.executable, str(SCRIPT), IMAGES[0], "--caption", "--exits", str(exits), "--lossless"]
    with subprocess.Popen(
        command, stdout=writer, stderr=subprocess.PIPE, env=environment | {"TERM": "xterm", "COLUMNS": "100"}
    ) as process:
        os.close(writer)
        shown = b""
        try:
            while chunk := os.read(reader, 4096):
                shown += chunk
        except OSError:  # the terminal is gone with its last writer
            pass
        assert process.stderr is not None
        told = process.stderr.read().decode()
    os.close(reader)
    assert process.returncode == 0, told
    screen = shown.decode()
    frames = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", frame).strip() for frame in screen.split("\x1b[2K")]
    answered = "a red triangle and no circle or rectangle in the image."
    words = answered.split()
    grown = [" ".join(words[:n]) for n in range(1, len(words))]
    assert [frame for frame in frames if frame in grown] == grown
    final = next(line for line in reversed(screen.split("\r\n")) if "triangle" in line and "'" not in line)
    visible = coloured(re.sub(r"\x1b\[[\d;?]*[A-HJKhl]", "", final).lstrip("\r"))
    assert "".join(char for char, _ in visible) == answered
    assert len({code for _, code in visible}) > 1
    assert "drafted" in screen
