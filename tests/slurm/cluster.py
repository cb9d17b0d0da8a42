"""A real Slurm cluster on one machine, for tests: controller and nodes in namespaces of their own.

Every machine is a network, host name, mount and process namespace whose first process reaps; they meet on a bridge.  Nothing
leaves those namespaces, so any number of clusters run side by side with the same names, addresses and ports.  Killing the
first process takes its machine down like a power cut; the death of the test process does so to all of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

CONTROLLER = "ctl"
SUBNET = "10.77.0"
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "ip", "unshare", "nsenter", "setpriv")
PATHS = "/usr/sbin:/usr/bin:/sbin:/bin"
DEADLINE = 180
"""Seconds for the cluster to come up."""

REAP = "while :; do sleep 600 & wait $! || true; done"
"""The first process of a namespace inherits orphans; bash reaps them while it waits."""

CONFIGURATION = """
ClusterName=test
SlurmctldHost=ctl
SlurmUser=root
AuthInfo=socket={root}/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/run/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=2
ReturnToService=2
SlurmdTimeout=8
KillWait={kill_wait}
UnkillableStepTimeout=30
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
NodeName=n[1-{nodes}] CPUs=16 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=40 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
"""Credentials expire soon because a requeued job waits for that; GPUs are character devices that nothing opens."""


def why_not() -> str | None:
    """Why no cluster can run here; None if one can."""
    if os.geteuid() != 0:
        return "namespaces and slurmd need root"
    missing = [name for name in NEEDED if shutil.which(name, path=PATHS) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (`make slurm-env`, or apt-get install slurmctld slurmd slurm-client munge)"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """A controller and some nodes; a context manager that leaves no process behind."""

    def __init__(self, nodes: int, *, kill_wait: int = 15) -> None:
        self.names = [f"n{i + 1}" for i in range(nodes)]
        self.kill_wait = kill_wait
        self._machines: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        # Munge's socket path must be short, and its directory open to others, which pytest's own are not.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        for machine in self._machines.values():
            machine.kill()
        for machine in self._machines.values():
            machine.wait()
        deadline = time.monotonic() + 20
        while self._leftovers() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not self._leftovers(), "a process of the cluster outlives it"
        shutil.rmtree(self.root, ignore_errors=True)

    def run(
        self, *command: object, on: str = CONTROLLER, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> str:
        """What a command prints on a machine, in the current directory."""
        return subprocess.run(
            self._inside(on, *command), env=self.environment(environment), capture_output=True, text=True, check=check,
            timeout=60,
        ).stdout.strip()  # fmt: skip

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Ours, without what a surrounding job or launcher has set."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "OMPI"))}
        ours["PATH"] = f"{ours['PATH']}:{PATHS}"
        return ours | {"SLURM_CONF": str(self.root / "slurm.conf")} | dict(more or {})

    def crash(self, name: str) -> None:
        """SIGKILL every process of a node at once."""
        machine = self._machines.pop(name)
        machine.kill()
        machine.wait()

    def boot(self, name: str) -> None:
        """Start a node, or start it again."""
        number = int(name[1:])
        self._begin(
            name,
            f"until ip link show eth0; do sleep 0.05; done; ip addr add {SUBNET}.{number}/24 dev eth0; ip link set eth0 up; "
            f"slurmd -D & {REAP}",
        )
        here = self._first_process(name)
        self._in_network("ip", "link", "del", f"v{number}", check=False)
        self._in_network("ip", "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", str(here))
        self._in_network("ip", "link", "set", f"v{number}", "master", "br0", "up")

    def _start(self) -> None:
        for directory in ("state", "log", "run"):
            (self.root / directory).mkdir()
        self.root.chmod(0o755)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        addresses = {CONTROLLER: f"{SUBNET}.254"} | {name: f"{SUBNET}.{name[1:]}" for name in self.names}
        hosts = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")
        configuration = CONFIGURATION.format(root=self.root, nodes=len(self.names), kill_wait=self.kill_wait)
        (self.root / "slurm.conf").write_text(configuration)
        for number in range(2):
            os.mknod(self.root / f"gpu{number}", 0o20666, os.makedev(1, 3))
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-1]\n")
        r = self.root
        self._begin(
            CONTROLLER,
            f"ip link add br0 type bridge; ip addr add {SUBNET}.254/24 dev br0; ip link set br0 up; "
            f"munged --force --socket={r}/munge.sock --key-file={r}/munge.key --pid-file={r}/run/munged.pid "
            f"--log-file={r}/log/munged.log --seed-file={r}/run/munged.seed; touch {r}/up; slurmctld -D & {REAP}",
        )
        self._wait((self.root / "up").exists)
        for name in self.names:
            self.boot(name)
        self._wait(
            lambda: self.run("sinfo", "-hNp", "main", "-o", "%T", check=False).split() == ["idle"] * len(self.names)
        )

    def _begin(self, name: str, script: str) -> None:
        own = f"hostname {name}; mount --bind {self.root}/hosts /etc/hosts; ip link set lo up; "
        flags = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self._machines[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *flags, "bash", "-c", own + script],
                env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _first_process(self, name: str) -> int:
        """A machine's process 1, by its number out here."""
        process = self._machines[name].pid
        children = Path(f"/proc/{process}/task/{process}/children")
        # Before bash runs, the namespaces may not all be there.
        self._wait(lambda: any(is_bash(int(child)) for child in children.read_text().split()))
        return int(children.read_text().split()[0])

    def _inside(self, name: str, *command: object) -> list[str]:
        target = str(self._first_process(name))
        return ["nsenter", "-t", target, "-n", "-u", "-m", "-p", f"--wd={os.getcwd()}", "--", *map(str, command)]

    def _in_network(self, *command: str, check: bool = True) -> None:
        target = str(self._first_process(CONTROLLER))
        subprocess.run(["nsenter", "-t", target, "-n", *command], check=check, capture_output=True)

    def _wait(self, is_done: object) -> None:
        assert callable(is_done)
        deadline = time.monotonic() + DEADLINE
        while not is_done():
            for name, machine in self._machines.items():
                assert machine.poll() is None, f"{name} died:\n{self.logs()}"
            assert time.monotonic() < deadline, f"the cluster does not come up:\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        """The last lines of every log of Slurm."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted((self.root / "log").iterdir())
        )

    def _leftovers(self) -> list[int]:
        """Processes that have this cluster's configuration in their environment."""
        marker = f"SLURM_CONF={self.root}/slurm.conf".encode()
        return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if marker in content(path)]


def is_bash(process: int) -> bool:
    return content(Path(f"/proc/{process}/comm")).strip() == b"bash"


def content(path: Path) -> bytes:
    """Of a file that may vanish while it is read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def kill(processes: list[int], number: signal.Signals) -> None:
    """Send a signal to processes that may be gone."""
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue
