"""The batch scripts without a cluster: they are valid shell, share one preamble, and pick the values of a sweep."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
BATCH = [path for path in SCRIPTS if path.name != "preamble.sh"]
NEEDED = (
    "--signal=USR1@120",
    "--requeue",
    "--open-mode=append",
    "--nodes=1",
    "--ntasks-per-node=8",
    "--gpus-per-node=8",
)


def test_there_is_one_script_for_every_launcher_that_is_worth_a_cluster() -> None:
    assert [path.name for path in BATCH] == ["capfilt.sh", "evaluate.sh", "finetune.sh", "free_blip2.sh"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", "-x", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_batch_scripts_ask_for_a_signal_and_differ_in_name_time_launcher_and_description_alone(path: Path) -> None:
    text = path.read_text()
    directives = set(re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE))
    assert directives >= set(NEEDED)
    assert {directive.partition("=")[0] for directive in directives - set(NEEDED)} == {
        "--job-name", "--cpus-per-task", "--time", "--output",
    }  # fmt: skip
    launcher = re.search(r"^start (launch/\w+\.py) \"\$@\"$", text, re.MULTILINE)
    assert launcher is not None and (ROOT / launcher[1]).is_file()
    commands = [line for line in text.splitlines() if line and not line.startswith(("#", "start "))]
    others = [line for line in BATCH[0].read_text().splitlines() if line and not line.startswith(("#", "start "))]
    assert commands == others


def chosen(*arguments: str, element: int | None = 1) -> subprocess.CompletedProcess[str]:
    variables = {"SLURM_JOB_NAME": "job", "PATH": "/usr/bin:/bin"}
    if element is not None:
        variables["SLURM_ARRAY_TASK_ID"] = str(element)
    program = 'set -euo pipefail; source slurm/preamble.sh; choose_from_sweep "$@"; printf "%s\\n" "${ARGUMENTS[@]}"'
    return subprocess.run(
        ["bash", "-c", program, "job", *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )


def test_a_sweep_gives_every_element_of_an_array_its_value_and_its_own_directory() -> None:
    found = chosen("--sweep", "training.seed=5,6,7", "--config", "a b.yaml", "run_dir=runs/x")
    assert found.stdout.splitlines() == ["--config", "a b.yaml", "run_dir=runs/x/training.seed-6", "training.seed=6"]
    for out in (["--out", "d/e"], ["--out=d/e"]):
        found = chosen("--sweep", "--threshold=0.4,0.5", *out, "--source", "s")
        assert " ".join(found.stdout.split()).replace("--out=", "--out ") == (
            "--out d/e/threshold-0.5 --source s --threshold=0.5"
        )


def test_without_a_sweep_arguments_stay_as_they_are() -> None:
    assert chosen("run_dir=a", "x y", element=None).stdout.splitlines() == ["run_dir=a", "x y"]


@pytest.mark.parametrize(
    ("arguments", "element", "complaint"),
    [
        (["training.seed", "run_dir=d"], 0, "--sweep training.seed: want KEY=VALUE,VALUE,..."),
        (["training.seed=1,2", "run_dir=d"], None, "--sweep wants an array: sbatch --array=0-N"),
        (["training.seed=1,2", "run_dir=d"], 2, "has no value number 2: want --array=0-1"),
        (["training.seed=1,2", "--config", "d"], 0, "--sweep wants run_dir=DIR or --out DIR"),
    ],
)
def test_a_wrong_sweep_is_told_in_one_line(arguments: list[str], element: int | None, complaint: str) -> None:
    found = chosen("--sweep", *arguments, element=element)
    assert found.returncode == 2 and found.stderr.startswith("job: error: ") and found.stderr.count("\n") == 1
    assert complaint in found.stderr


def test_deepspeed_reads_the_hostfile_example() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(ROOT / "slurm" / "hostfile.example")) == {"node1": 8, "node2": 8}
