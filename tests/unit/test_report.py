"""The report of a run: everything measured is in it, whatever is not is named, and nothing in it comes from elsewhere."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from free_dist.config import BackboneConfig, DataConfig, MissingFileError, Recipe, UserError
from free_dist.evaluation.html_report import code, escape, html_page, markdown_page
from free_dist.evaluation.report import run_report, write_report, write_run_report
from free_dist.evaluation.report_blocks import interval, number, percent, threshold_text
from free_dist.evaluation.report_sources import STEPS, RunDirectory
from free_dist.evaluation.report_traces import TRACES, Token, TracedAnswer, write_traces
from free_dist.evaluation.rows import Row, write_results
from free_dist.recipe_io import load_recipe, save_recipe
from tests.unit import made_up_measurements as made_up

ROOT = Path(__file__).resolve().parents[2]
NASTY = "a <script>alert(1)</script> | `dog` & *cat* [x](http://example.org)"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Page(HTMLParser):
    """Tables, links, texts and unbalanced tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.sources: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.problems: list[str] = []
        self.text: list[str] = []
        self._cell: list[str] | None = None
        self.feed(text)
        self.problems += [f"{tag} is never closed" for tag in self.tags]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "link"):
            self.tags.append(tag)
        self.sources += [
            (tag, value or "") for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if not self.tags or self.tags.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._cell is not None:
            self._cell.append(data)


def row(method: str, threshold: float | None, quality: float, speed: float) -> Row:
    return Row(
        task="vqa", method=method, threshold=threshold, quality=quality, quality_full=0.9, agreement=0.97, mean_blocks=4.2,
        layer_ratio=3.8, wall_ratio=speed, wall_ratio_hf=1.7 * speed, n=130,
        extras={"wall_ratio_interval": (speed - 0.1, speed + 0.1), "wall_ratio_hf_interval": (1.0, 2.0)},
    )  # fmt: skip


def robustness() -> dict:
    curve = {
        "quality": 0.87654,
        "quality_interval": [0.8, 0.91],
        "quality_full": 0.9,
        "speed": 1.5,
        "speed_interval": [1.3, 1.7],
        "mean_blocks": 5.125,
        "n": 130,
    }
    rows = [
        {"task": "vqa", "kind": kind, "level": level, "method": method, "threshold": threshold}
        | curve
        for kind in ("noise", "blur")
        for level in (0.0, 0.1)
        for method, threshold in (("full", None), ("exits", 0.5))
    ]  # fmt: skip
    bins = [{"low": 0.5, "high": 0.9, "n": 60, "confidence": 0.8, "accuracy": 0.7}]
    moved = {"task": "vqa", "exit": 2, "threshold": 0.91, "wanted": 0.05, "interval": [0.01, 0.03], "n": 130}
    parts = {"vision": 0.004, "prompt": 0.003, "blocks": 0.002, "checks": 0.001, "heads": 0.0005, "bookkeeping": 0.0001}
    return {
        **made_up.ABOUT,
        "command": "python launch/robustness.py runs/made_up",
        "corruptions": rows,
        "transfer": [
            moved | {"from": "vqa/calibration", "to": "vqa/test", "got": 0.0213},
            moved | {"from": "vqa/calibration", "to": "caption/test", "got": 0.0677},
        ],
        "ece": [{"task": "vqa", "exit": 2, "target": "labels", "ece": 0.0934, "interval": [0.08, 0.12], "bins": bins, "n": 60}],
        "length": [
            {"task": "vqa", "method": "exits", "threshold": 0.5, "mean_tokens": 2.125, "mean_tokens_full": 2.25, "ratio": 0.94444,
             "ratio_interval": [0.9, 1.0], "eos_by_exit": {"2": 0.75, "16": 0.25}}
        ],
        "costs": [{"task": "vqa", "method": "full", "threshold": None, "parts": parts, "measured": 0.0111, "n": 130}],
    }  # fmt: skip


def answer(method: str, threshold: float | None, layer: int, picture: str | None = None) -> TracedAnswer:
    tokens = (Token(text=" red|<b>", exit=layer, word="content word"), Token(text="</s>", exit=16, word="end"))
    return TracedAnswer(
        task="vqa", index=0, key="k-q0", question=NASTY, method=method, threshold=threshold, text="red", references=(NASTY,),
        tokens=tokens, picture=picture,
    )  # fmt: skip


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with every file."""
    run = tmp_path_factory.mktemp("runs") / "made_up"
    write_results([row("full", None, 0.9, 1.0), row("exits", 0.5, 0.7, 2.5), row("exits", 0.8, 0.895, 1.625)], run)
    made_up.write_all(run)
    (run / "robustness.json").write_text(json.dumps(robustness()))
    answers = [answer("full", None, 16, PIXEL), answer("exits", 0.5, 2)]
    write_traces(run / TRACES, answers, n_blocks=16, command="python launch/robustness.py runs/made_up", extra={})
    (run / "log.jsonl").write_text(
        '{"step": 1, "time": 0, "loss_vqa/exit_2": 2.5}\n{"step": 2, "time": 1, "loss_vqa/exit_2": 1.5}\n'
    )
    return run


@pytest.fixture(scope="module")
def pages(full_run: Path) -> tuple[Page, str, Path]:
    """The page parsed, the Markdown, and where both lie."""
    written, gaps = write_run_report(
        [RunDirectory.open(full_run)], full_run, command="python launch/report.py runs/made_up"
    )
    assert gaps == []
    assert [path.name for path in written] == ["report.html", "report.md", "report_plots"]
    return Page(written[0].read_text()), written[1].read_text(), full_run


def test_the_page_is_sound_and_loads_nothing_from_elsewhere(pages) -> None:
    page, _, run = pages
    assert page.problems == []
    assert {tag for tag, _ in page.sources} == {"a", "img"}
    assert all(value.startswith("#" if tag == "a" else "data:image/") for tag, value in page.sources)
    text = (run / "report.html").read_text()
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(", text)
    for tag, value in page.sources:
        if tag == "img" and "svg" in value:
            svg = base64.b64decode(value.partition("base64,")[2]).decode()
            assert svg.startswith("<svg")
            assert not re.search(r"(href|src)\s*=\s*[\"'](?!#)|<script|<!DOCTYPE|url\((?!#)", svg)


def test_every_link_of_the_contents_leads_to_a_section(pages) -> None:
    page, _, run = pages
    ids = set(re.findall(r'<section id="([^"]+)"', (run / "report.html").read_text()))
    assert {value.removeprefix("#") for tag, value in page.sources if tag == "a"} == ids
    assert len(ids) == 12


def cells(page: Page) -> set[str]:
    return {cell for table in page.tables for line in table for cell in line}


def test_numbers_of_the_tables_are_those_of_the_files(pages) -> None:
    page, _, run = pages
    shown = cells(page)
    compared, robust = (json.loads((run / f"{name}.json").read_text()) for name in ("comparison", "robustness"))
    for one in compared["rows"]:
        wanted = [
            one["label"], interval(one["quality"], one["quality_interval"]), interval(one["speed"], one["speed_interval"], 2),
            percent(one["agreement"]), f"{one['trainable_parameters']:,}", f"{one['training_seconds']:.0f}",
        ]  # fmt: skip
        assert any(set(wanted) <= set(line) for table in page.tables for line in table), wanted
    placed = json.loads((run / "placement.json").read_text())
    own = placed["tasks"]["vqa"]
    for one in (placed["predicted"], placed["measured"], own["predicted"], *placed["baselines"].values()):
        wanted = [" ".join(map(str, one["layers"])), interval(one["measured_speed"], one["measured_speed_interval"], 2)]
        assert any(set(wanted) <= set(line) for table in page.tables for line in table), wanted
    for found in json.loads((run / "mid_crisis.json").read_text())["tasks"].values():
        for curve in found["curves"].values():
            assert {interval(point["accuracy"], point["interval"]) for point in curve.values()} <= shown
    assert {"0.877 [0.800, 0.910]", "0.0213 [0.0100, 0.0300]", "0.0934 [0.0800, 0.1200]", "2: 75%, 16: 25%"} <= shown
    assert {number(1000 * value, 2) for value in robust["costs"][0]["parts"].values()} <= shown
    assert {
        "0.895",
        "99.4%",
        "1.62 [1.52, 1.73]",
        "0.935 ±0.064 (+0.030*)",
        "vqa 0.625 / off; caption 0.5 / 0.5",
    } <= shown


def test_promises_that_do_not_hold_are_said_so(pages) -> None:
    page, text, _ = pages
    held = [line for table in page.tables for line in table if "vqa/calibration" in line]
    assert [line[7] for line in held] == ["yes", "no"]
    assert "keep their promise on another task in 0 of 1 cases" in text


def test_every_claim_carries_the_command_that_makes_its_number(pages) -> None:
    _, text, _ = pages
    summary = text.partition("## Summary")[2].partition("\n## ")[0]
    claims = [line for line in summary.splitlines() if line.startswith("- ")]
    assert len(claims) > 10
    assert all(re.search(r"`python launch/\w+\.py [^`]+`$", claim) for claim in claims)


def test_markdown_has_the_same_tables_claims_and_pictures(pages) -> None:
    page, text, run = pages
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert len(tables) == len(page.tables)
    for lines, table in zip(tables, page.tables, strict=True):
        rows = lines.splitlines()
        del rows[1]
        assert rows == ["| " + " | ".join(escape(cell) for cell in line) + " |" for line in table]
    said = " ".join(" ".join(page.text).split())
    for line in text.splitlines():
        if line.startswith("- vqa: "):
            claim = line[2:].partition(" `python")[0].replace("\\", "")
            assert claim in said
    linked = re.findall(r"\]\((report_plots/[^)]+)\)", text)
    assert len(linked) == len(set(linked)) == sum(tag == "img" for tag, _ in page.sources)
    assert {path.name for path in (run / "report_plots").iterdir()} == {Path(link).name for link in linked}


def test_text_from_data_is_escaped_in_both(pages) -> None:
    page, text, run = pages
    html = (run / "report.html").read_text()
    assert "<script>alert" not in html + text
    assert NASTY in "".join(page.text)  # and the reader sees what it was
    assert escape(NASTY) == (
        "a &lt;script&gt;alert(1)&lt;/script&gt; \\| \\`dog\\` &amp; \\*cat\\* \\[x\\](http://example.org)"
    )
    assert escape(NASTY) in text


def test_tokens_carry_the_exit_that_emitted_them(pages) -> None:
    _, text, run = pages
    html = (run / "report.html").read_text()
    assert re.search(r"red\|&lt;b&gt;<sub>2</sub>", html)
    assert "red\\|&lt;b&gt;<sub>2</sub>" in text


def test_whatever_was_not_measured_is_named_with_its_command(tmp_path: Path) -> None:
    run = tmp_path / "bare"
    write_results([row("full", None, 0.9, 1.0)], run)
    report = run_report([RunDirectory.open(run)], command="x")
    html, text = html_page(report), markdown_page(report)
    for step in STEPS[1:]:
        assert f"<code>{RunDirectory(path=run).command(step)}</code>" in html
        assert f"`{RunDirectory(path=run).command(step)}`" in text
    titles = [section.title for section in report.runs[0].sections if section.missing]
    assert len(titles) == 10
    assert "Quality and speed" not in titles
    assert Page(html).problems == []


def test_several_runs_stand_on_one_page_without_sharing_plots(full_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_results([row("full", None, 0.9, 1.0), row("exits", 0.8, 0.9, 3.5)], other)
    written, gaps = write_run_report(
        [RunDirectory.open(full_run), RunDirectory.open(other)], tmp_path / "both", command="x"
    )
    page = Page(written[0].read_text())
    assert page.problems == []
    assert {"1.62 [1.52, 1.73]", "3.50 [3.40, 3.60]"} <= cells(page)
    assert {gap.command for gap in gaps} == {RunDirectory(path=other).command(step) for step in STEPS}
    names = [path.name for path in written[2].iterdir()]
    assert {"speed_quality_vqa.svg", "1_speed_quality_vqa.svg"} <= set(names)


def test_a_training_run_is_evaluated_and_any_other_directory_made_by_the_quickstart(tmp_path: Path) -> None:
    run = tmp_path / "with space"
    assert RunDirectory(path=run).command(STEPS[0]) == f"python launch/quickstart.py run_dir='{run}'"
    (run / "export").mkdir(parents=True)
    (run / "export" / "exits.json").write_text("{}")
    command = RunDirectory(path=run).command(STEPS[0])
    assert shlex.split(command)[1:5] == ["launch/evaluate.py", "--exits", f"{run}/export", "--config"]


def test_steps_of_a_run_that_lies_elsewhere_read_and_write_there_with_its_own_backbone_and_data(tmp_path: Path) -> None:
    place = tmp_path / "my run"
    run = RunDirectory(path=place)
    words = {step.file: shlex.split(run.command(step))[1:] for step in STEPS}
    assert words["comparison.json"] == ["launch/compare.py", str(place)]
    assert words["placement.json"] == ["launch/place_exits.py", str(place)]
    assert words["mid_crisis.json"] == ["launch/probe_depth.py", str(place), "--fine-tune", "80"]
    assert words["robustness.json"] == ["launch/robustness.py", str(place)]
    assert words["ablation/ablation.json"] == ["launch/ablate.py", f"run_dir={place}/ablation"]
    place.mkdir()
    save_recipe(
        Recipe(backbone=BackboneConfig(path="my models/blip"), data=DataConfig(root="/my data")), place / "recipe.yaml"
    )
    command = shlex.split(run.command(STEPS[-1]))
    assert command[2:] == [f"run_dir={place}/ablation", "backbone.path=my models/blip", "data.root=/my data"]
    assert load_recipe(ROOT / "launch/recipes/ablation.yaml", command[2:]).data.root == "/my data"


def test_commands_do_not_depend_on_where_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = RunDirectory(path=ROOT / "runs" / "mine").command(STEPS[1])
    assert command == "python launch/compare.py runs/mine"
    monkeypatch.chdir(tmp_path)
    assert RunDirectory(path=Path("mine")).command(STEPS[1]) == f"python launch/compare.py {tmp_path}/mine"
    monkeypatch.chdir(ROOT / "launch")
    assert RunDirectory(path=Path("../runs/mine")).command(STEPS[1]) == command


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("comparison.json", "{", r"comparison.json is no JSON .* python launch/compare.py"),
        ("comparison.json", '{"format": 2, "rows": []}', "comparison.json is not of format 1"),
        ("placement.json", '{"format": 1, "predicted": {}}', "placement.json lacks 'measured'"),
        ("comparison.json", '{"format": 1, "rows": [{"task": "vqa"}]}', "comparison.json lacks"),
        (
            "robustness.json",
            '{"corruptions": [1], "transfer": [], "ece": [], "length": []}',
            "robustness.json cannot be shown",
        ),
        ("results.json", '[{"task": "vqa"}]', "results.json"),
        ("probes.json", '[{"task": "vqa"}]', "probes.json holds no probes"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, file: str, content: str, words: str) -> None:
    write_results([row("full", None, 0.9, 1.0)], tmp_path)
    (tmp_path / TRACES).write_text('{"format": 1, "command": "x", "n_blocks": 16}\n')
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=words):
        run_report([RunDirectory.open(tmp_path)], command="x")


def test_a_foreign_runs_ablation_is_not_shown_as_ones_own(tmp_path: Path) -> None:
    write_results([row("full", None, 0.9, 1.0)], tmp_path / "mine")
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "ablation.json").write_text('{"format": 1, "rows": []}')
    assert RunDirectory.open(tmp_path / "mine").measured("ablation/ablation.json") is None
    alone = RunDirectory.open(tmp_path / "ablation")
    assert alone.measured("ablation/ablation.json") == {"format": 1, "rows": []}


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("ablation/ablation.json", "[{}]", "Not shown: ablations: {file} "),
        ("ablation.json", '{"format": 0}', "Not shown: ablations: {file} is not of format 1"),
        ("comparison.json", "{", "Not shown: comparison with other methods: {file} is no JSON"),
        ("probes.json", '[{"task": "vqa"}]', "Not shown: accuracy per block: {file} holds no probes"),
    ],
)
def test_an_evaluation_ends_well_beside_files_that_cannot_be_read_and_names_them(
    tmp_path: Path, file: str, content: str, words: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path))):  # the launcher that only reads says it aloud
        run_report([RunDirectory(path=tmp_path)], command="x")
    rows = [row("full", None, 0.9, 1.0), row("exits", 0.8, 0.895, 1.625)]
    for one in rows:
        one.extras["exit_shares"] = {"3": 0.75, "16": 0.25}
    paths = write_report(rows, [], tmp_path)
    html = paths.page.read_text()
    assert Page(html).problems == []
    assert words.format(file=path) in html
    assert words.format(file=path) in paths.report.read_text().replace("\\", "")


def test_a_directory_without_a_run_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds neither recipe.yaml nor anything measured: give the directory of a run"
    ):
        RunDirectory.open(tmp_path)
    with pytest.raises(MissingFileError, match="no trained exits"):
        RunDirectory(path=tmp_path).exports()
    for launcher in ("report", "robustness"):
        command = [sys.executable, f"launch/{launcher}.py", str(tmp_path / "nowhere")]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
        assert finished.returncode == 2
        assert "nowhere: no such directory" in finished.stderr.splitlines()[-1]
        assert "Traceback" not in finished.stderr


def test_complete_measures_nothing_again_and_the_launcher_writes_where_it_is_told(
    full_run: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in full_run.rglob("*.json*")}
    command = [sys.executable, "launch/report.py", str(full_run), "--complete", "--out", str(tmp_path / "out")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr
    names = ("report.html", "report.md", "report_plots")
    assert finished.stdout.splitlines() == [str(tmp_path / "out" / name) for name in names]
    assert {path: path.stat().st_mtime_ns for path in full_run.rglob("*.json*")} == before


def test_cells_are_short_and_say_when_there_is_nothing() -> None:
    assert [number(value) for value in (None, float("nan"), 1234567, 0.12345, "a")] == [
        "-",
        "-",
        "1,234,567",
        "0.123",
        "a",
    ]
    assert interval(1.5, None, 2) == "1.50"
    assert [threshold_text(value) for value in (None, 0.8, 1.1, [0.5, 1.1])] == ["-", "0.8", "off", "0.5 / off"]
    assert code("a `b` c") == "`` a `b` c ``"
