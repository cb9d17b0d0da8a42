"""The test cluster itself: several side by side, and nothing left of one, however it ends."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, content, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


def processes_of(root: Path) -> list[bytes]:
    marker = f"SLURM_CONF={root}/slurm.conf".encode()
    found = [path.parent for path in Path("/proc").glob("[0-9]*/environ") if marker in content(path)]
    return [content(path / "cmdline") for path in found]


def test_two_clusters_do_not_see_each_other_and_a_node_comes_back() -> None:
    with Cluster(1) as one, Cluster(2) as two:
        number = one.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 100")
        assert two.run("squeue", "-h") == "" and number in one.run("squeue", "-h")
        assert two.run("hostname", on="n2") == "n2"
        two.crash("n2")
        two.boot("n2")
        assert two.run("hostname", on="n2") == "n2"
        assert len(processes_of(one.root)) >= 4
    assert not one.root.exists() and not processes_of(one.root) and not processes_of(two.root)


def test_a_failure_inside_leaves_no_process() -> None:
    with pytest.raises(ZeroDivisionError), Cluster(1) as cluster:
        raise ZeroDivisionError
    assert not processes_of(cluster.root) and not cluster.root.exists()


HOLDER = """
import sys, time
sys.path.insert(0, {here!r})
from cluster import Cluster
with Cluster(1) as cluster:
    cluster.run("sbatch", "--output=/dev/null", "--wrap=sleep 100")
    print(cluster.root, flush=True)
    time.sleep(100)
"""


def test_sigkill_to_whoever_holds_a_cluster_leaves_no_process() -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(here=str(Path(__file__).parent))], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    root = Path(holder.stdout.readline().strip())
    assert processes_of(root)
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 30
    while processes_of(root):
        assert time.monotonic() < deadline, processes_of(root)
        time.sleep(0.1)
    shutil.rmtree(root)
