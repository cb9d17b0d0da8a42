"""Which process this is, as its launcher says: the only reader of launchers' environment variables.

Understood are ``RANK`` and its kin (``deepspeed``, ``torchrun``), OpenMPI's ``mpirun``, ``srun``, and nothing at all (one
process).  The innermost launcher counts: ``mpirun`` inside a Slurm job starts its own helpers with ``srun``.  Imports no torch.
Does not open connections, except that ``mpirun`` without ``MASTER_ADDR`` lets MPI tell every process where rank 0 is.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from free_dist.config import UserError

IDENTITY = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What ``deepspeed`` and ``torchrun`` say about a process."""

MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
"""Where rank 0 waits for the others."""

MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
"""The same of ``mpirun`` and ``srun``."""

NODE_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""Set where ``torchrun`` or ``deepspeed`` started this process, and may itself have been started once per machine by another."""

FIRST_PORT, PORTS = 12_000, 20_000
"""Ports to choose from: above those of services, below those that systems give to whoever asks for any."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process among all of them, and where they meet."""

    rank: int
    """0 .. size - 1."""
    size: int
    """Number of processes."""
    local_rank: int
    """Number of this process on its machine."""
    master_addr: str
    """Machine of rank 0."""
    master_port: int
    """Port on which rank 0 waits."""
    launcher: str = "python"
    """Who started it, for messages."""

    def variables(self) -> dict[str, str]:
        """The environment by which torch and DeepSpeed know this place."""
        values = (self.rank, self.size, self.local_rank, self.master_addr, self.master_port)
        return dict(zip((*IDENTITY, *MEETING_POINT), map(str, values), strict=True))


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process, so that it has to join others; one process may do without DeepSpeed."""
    return any(name in environment for name in IDENTITY) or _outer(environment) is not None


def read_environment(environment: Mapping[str, str]) -> Place:
    """This process's place, or a world of one on a free port where no launcher says anything.

    Raises UserError for variables that are missing, no numbers, or contradict each other.
    """
    outer = _outer(environment)
    if any(name in environment for name in IDENTITY):
        place = _from_identity(environment)
        _check_agrees(place, outer, environment)
        return place
    if outer is None or outer[1] == 1:
        return Place(rank=0, size=1, local_rank=0, master_addr="127.0.0.1", master_port=free_port())
    names, size = outer
    launcher = "srun" if names is SLURM else "mpirun"
    rank, local_rank = _number(environment, names[0], below=size), _number(environment, names[2], below=size)
    address, port = _meeting_point(environment, launcher, rank)
    return Place(
        rank=rank, size=size, local_rank=local_rank, master_addr=address, master_port=port, launcher=launcher
    )  # fmt: skip


def is_restarted(environment: Mapping[str, str]) -> bool:
    """Whether Slurm or torchrun starts this command once more, on its own."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(_number(environment, name) > 0 for name in counts if name in environment)


def free_port() -> int:
    """A port of this machine that nobody listens on.

    Seconds may go by until it is used, in which no other program is given it by its system.
    """
    chance = random.SystemRandom()  # a seed would lead programs to the same port
    with socket.socket() as probe:
        for port in (*(chance.randrange(FIRST_PORT, FIRST_PORT + PORTS) for _ in range(100)), 0):
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                return int(probe.getsockname()[1])
    raise UserError("this machine has no free port")


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port that all tasks of a Slurm step compute alike, and that neighbouring jobs, steps and restarts do not share."""
    job = _number(environment, "SLURM_JOB_ID")
    step = _number(environment, "SLURM_STEP_ID") if "SLURM_STEP_ID" in environment else 0
    restart = _number(environment, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environment else 0
    return FIRST_PORT + (31 * job + 7 * step + restart) % PORTS


def _outer(environment: Mapping[str, str]) -> tuple[tuple[str, str, str], int] | None:
    """Variables and number of processes of mpirun or srun; None where neither started this process."""
    if MPI[0] in environment:
        return MPI, _number(environment, MPI[1], least=1)
    # A batch script itself has SLURM_PROCID, too, but is no task of a step.
    if "SLURM_STEP_ID" in environment and SLURM[0] in environment:
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else SLURM[1]
        return SLURM, _number(environment, tasks, least=1)
    return None


def _from_identity(environment: Mapping[str, str]) -> Place:
    names = (*IDENTITY, *MEETING_POINT)
    missing = [name for name in names if name not in environment]
    if missing:
        there = ", ".join(name for name in names if name in environment)
        raise UserError(
            f"the environment lacks {', '.join(missing)} but has {there}: start with `deepspeed`, `torchrun`, `srun` or "
            f"`mpirun`, which set what they need, or with plain `python`, and unset {there}"
        )
    size = _number(environment, "WORLD_SIZE", least=1)
    return Place(
        rank=_number(environment, "RANK", below=size),
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", below=size),
        master_addr=environment["MASTER_ADDR"],
        master_port=_number(environment, "MASTER_PORT", least=1, below=65_536),
        launcher="torchrun or deepspeed",
    )


def _check_agrees(place: Place, outer: tuple[tuple[str, str, str], int] | None, environment: Mapping[str, str]) -> None:
    """Variables left over in a shell would make every process of mpirun or srun rank 0 of a run of its own."""
    if outer is None or outer[1] == 1 or any(name in environment for name in NODE_LAUNCHERS):
        return
    names, size = outer
    rank = _number(environment, names[0])
    if (place.rank, place.size) != (rank, size):
        raise UserError(
            f"the environment says both RANK={place.rank} of WORLD_SIZE={place.size} and {names[0]}={rank} of {size} "
            f"processes: unset {', '.join(IDENTITY)} before {'srun' if names is SLURM else 'mpirun'}"
        )


def _meeting_point(environment: Mapping[str, str], launcher: str, rank: int) -> tuple[str, int]:
    if all(name in environment for name in MEETING_POINT):
        return environment["MASTER_ADDR"], _number(environment, "MASTER_PORT", least=1, below=65_536)
    if launcher == "mpirun":
        return _by_mpi(rank, is_local=environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environment[MPI[1]])
    port = slurm_port(environment)
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT", least=1, below=65_536)
    return environment.get("MASTER_ADDR") or _first_slurm_host(environment), port


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((environment[name] for name in names if name in environment), None)
    if nodes is None:
        raise UserError("srun started this process, but SLURM_STEP_NODELIST is not set: export MASTER_ADDR")
    if re.fullmatch(r"[\w.-]+", nodes):
        return nodes
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"the machine of rank 0 is the first of {nodes}, but `{' '.join(command)}` failed ({error}): export MASTER_ADDR "
            "before srun, as slurm/preamble.sh does"
        ) from error
    return found.stdout.split()[0]


def _by_mpi(rank: int, *, is_local: bool) -> tuple[str, int]:
    """Rank 0's machine and a free port of it, told by MPI, which is closed again at once.

    Left open, MPI would hold back a process that ends until all others end, too.
    """
    try:
        import mpi4py
    except ImportError as error:
        raise UserError(
            "mpirun started this process, and without MASTER_ADDR and MASTER_PORT mpi4py must find rank 0: "
            "pip install 'free_dist[mpi]', or give both with `mpirun -x MASTER_ADDR=... -x MASTER_PORT=...`"
        ) from error
    mpi4py.rc.initialize = False
    from mpi4py import MPI as mpi

    mpi.Init()
    own = ("127.0.0.1" if is_local else socket.gethostname(), free_port()) if rank == 0 else None
    address, port = mpi.COMM_WORLD.bcast(own, root=0)
    mpi.Finalize()
    return address, port


def _number(environment: Mapping[str, str], name: str, *, least: int = 0, below: int | None = None) -> int:
    text = environment.get(name)
    if text is None:
        raise UserError(f"the environment lacks {name}, which the launcher of this process should have set")
    if not text.isdecimal() or int(text) < least or (below is not None and int(text) >= below):
        limit = f"at least {least}" if below is None else f"from {least} to {below - 1}"
        raise UserError(f"the environment has {name}={text}: want a number, {limit}")
    return int(text)
