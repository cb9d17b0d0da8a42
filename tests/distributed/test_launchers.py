"""Which process this is under every launcher: variables read, contradictions told, and the same run started by all of them."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import stage1_scene
import stage2_scene

from free_dist.config import DataConfig, UserError
from free_dist.launchers import FIRST_PORT, PORTS, free_port, is_launched, read_environment, slurm_port
from free_dist.recipe_io import save_recipe

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent

TORCH = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29731"}
MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "a",
}  # fmt: skip
MEETING = {"MASTER_ADDR": "a", "MASTER_PORT": "29731"}


@pytest.mark.parametrize("variables", [TORCH, MPI | MEETING, SLURM | MEETING, TORCH | SLURM, TORCH | MPI])
def test_every_launcher_names_the_same_place(variables: dict[str, str]) -> None:
    place = read_environment(variables)
    assert (place.rank, place.size, place.local_rank) == (3, 8, 1)
    assert place.variables() == TORCH
    assert is_launched(variables)


def test_mpirun_inside_a_slurm_job_counts_and_not_the_helpers_that_it_starts_with_srun() -> None:
    helper = SLURM | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    assert read_environment(helper | MPI | MEETING).rank == 3


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP")},  # a batch script
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # a shell that srun gives
        MEETING,
    ],
)
def test_a_process_that_nobody_launched_as_one_of_many_is_a_world_of_one(variables: dict[str, str]) -> None:
    place = read_environment(variables)
    assert (place.rank, place.size, place.local_rank, place.master_addr) == (0, 1, 0, "127.0.0.1")


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "CROSS_RANK"])
def test_a_launcher_that_srun_starts_once_per_machine_names_the_ranks(launcher: str) -> None:
    nodes = SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    assert read_environment(TORCH | nodes | {launcher: "0"}).rank == 3


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        (SLURM | TORCH | {"RANK": "0"}, "both RANK=0 of WORLD_SIZE=8 and SLURM_PROCID=3 of 8 processes: unset RANK"),
        (MPI | TORCH | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "both RANK=0 of WORLD_SIZE=1 and OMPI_"),
        (TORCH | {"RANK": "8"}, "RANK=8: want a number, from 0 to 7"),
        (TORCH | {"WORLD_SIZE": "many"}, "WORLD_SIZE=many: want a number, at least 1"),
        (TORCH | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000: want a number, from 1 to 65535"),
        (SLURM | {"SLURM_PROCID": "9"}, "SLURM_PROCID=9: want a number, from 0 to 7"),
        ({name: SLURM[name] for name in SLURM if name != "SLURM_LOCALID"}, "lacks SLURM_LOCALID"),
        (SLURM | {"WORLD_SIZE": "8"}, "lacks RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT but has WORLD_SIZE"),
        (SLURM | {"SLURM_STEP_NODELIST": "a[1-2"}, "export MASTER_ADDR"),
    ],
)
def test_contradictions_and_gaps_are_told_by_the_variable(variables: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError) as told:
        read_environment(variables)
    assert complaint in str(told.value)


def test_ports_of_slurm_steps_are_agreed_on_and_differ_from_job_to_job_step_to_step_and_restart_to_restart() -> None:
    others = [{}, {"SLURM_JOB_ID": "8"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}]
    ports = [slurm_port(SLURM | other) for other in others]
    assert len(set(ports)) == len(ports) and all(FIRST_PORT <= port < FIRST_PORT + PORTS for port in ports)
    assert (
        read_environment(SLURM | {"SLURM_PROCID": "0"}).master_port == read_environment(SLURM).master_port == ports[0]
    )


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join((str(SCRIPTS), os.environ["PATH"]))
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "MASTER", "RANK"))
    }
    return ours | {"PATH": path, "PYTHONPATH": str(ROOT)} | variables


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        script = (
            "import argparse\n"
            "from free_dist.recipe_io import fail_clearly\n"
            "from free_dist.distributed import distributed_session\n"
            "with fail_clearly(argparse.ArgumentParser(prog='x')), distributed_session(): pass\n"
        )
        variables = environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        finished = subprocess.run(
            [sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=120, check=False
        )
    assert finished.returncode == 2
    (line,) = [line for line in finished.stderr.splitlines() if "error:" in line]
    assert line.startswith(f"x: error: MASTER_PORT={port} of MASTER_ADDR=127.0.0.1 is in use by another program")
    assert "Traceback" not in finished.stderr


MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2", sys.executable]


def has_mpi() -> bool:
    return (SCRIPTS / "mpirun").is_file()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("launchers")
    stage1_scene.save_new("opt", tiny_tokenizer, directory / "start")
    return directory


def arguments(workplace: Path, data: DataConfig, program: str, name: str, steps: int) -> list[str]:
    directory, start = workplace / program / name, workplace / "start"
    if program == "finetune":
        recipe = stage1_scene.recipe(data, directory, start, steps=steps, train=["projection", "lora"])
        distribution = stage1_scene.section(recipe, size=2)
    else:
        recipe = stage2_scene.recipe(data, directory, start, steps=steps)
        distribution = stage2_scene.sections(recipe, size=2)
    config, ds_config = directory.with_suffix(".yaml"), workplace / program / "ds.json"
    ds_config.parent.mkdir(exist_ok=True)
    save_recipe(recipe, config)
    ds_config.write_text(json.dumps(distribution))
    return [f"launch/{program}.py", "--config", str(config), "--ds_config", str(ds_config)]


def logged(directory: Path) -> list[dict[str, float]]:
    log = directory / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module", params=["finetune", "train"])
def by_torchrun(request, workplace: Path, tiny_data: DataConfig) -> tuple[str, list[list[float]]]:
    """Program, and the losses of every step as torchrun's processes find them."""
    started = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    return request.param, losses(workplace, tiny_data, request.param, "torchrun", started)


def losses(workplace: Path, data: DataConfig, program: str, name: str, starter: list[str]) -> list[list[float]]:
    """Everything of every step that is a loss: stage 2 has those of its exits and discriminators."""
    finished = subprocess.run(
        [*starter, *arguments(workplace, data, program, name, 4)], cwd=ROOT, env=environment(), capture_output=True,
        text=True, timeout=400, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    entries = [entry for entry in logged(workplace / program / name) if "loss" in entry or "step/loss" in entry]
    found = [[value for key, value in sorted(entry.items()) if "loss" in key] for entry in entries]
    assert len(found) == 4
    return found


@pytest.mark.slow
def test_deepspeed_starts_the_run_that_torchrun_starts(workplace, tiny_data, by_torchrun) -> None:
    program, expected = by_torchrun
    starter = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    assert losses(workplace, tiny_data, program, "deepspeed", starter) == expected


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.skipif(not has_mpi(), reason="no mpirun: pip install -c constraints.txt -e '.[mpi]'")
def test_mpirun_starts_the_run_that_torchrun_starts(workplace, tiny_data, by_torchrun) -> None:
    program, expected = by_torchrun
    assert losses(workplace, tiny_data, program, "mpirun", MPIRUN) == expected


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.skipif(not has_mpi(), reason="no mpirun: pip install -c constraints.txt -e '.[mpi]'")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 85), (signal.SIGKILL, None)])
def test_mpirun_ends_when_one_of_its_processes_is_signalled(workplace, tiny_data, number, code) -> None:
    name = f"mpirun-{number.name}"
    command = [*MPIRUN, *arguments(workplace, tiny_data, "finetune", name, 100_000)]
    told = workplace / f"{name}.out"
    with open(told, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 200
            while len(logged(workplace / "finetune" / name)) < 2:
                assert process.poll() is None and time.monotonic() < deadline, told.read_text()
                time.sleep(0.1)
            ranks = [
                p for p in psutil.Process(process.pid).children(recursive=True) if "launch/finetune.py" in p.cmdline()
            ]
            ranks[-1].send_signal(number)
            found = process.wait(timeout=100)
        finally:
            process.kill()
    assert found == code if code else found not in (0, 85)


def test_a_free_port_is_none_that_systems_give_away_and_differs_from_the_last() -> None:
    random.seed(3)
    ports = [free_port() for _ in range(20)]
    random.seed(3)
    ports += [free_port() for _ in range(20)]
    assert all(port in range(FIRST_PORT, FIRST_PORT + PORTS) for port in ports)
    assert len(set(ports)) > 30
