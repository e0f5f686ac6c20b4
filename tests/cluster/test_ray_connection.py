"""The connection: one per process, on loopback, with clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from runtime import cluster
from runtime.errors import UserError


def test_connecting_again_changes_nothing(ray_cluster):
    """Any address that means this cluster is the same connection."""
    assert cluster.connect() == cluster.connect("auto") == cluster.connect(ray_cluster.address) == ray_cluster


def test_a_second_cluster_is_refused(ray_cluster):
    """Ray has one per process; both addresses are named."""
    with pytest.raises(
        UserError, match=r'connected to the Ray cluster ".*" and cannot use "10\.0\.0\.5:6379"'
    ) as raised:
        cluster.connect("10.0.0.5:6379")
    assert raised.value.code == "ray_other_cluster"


def test_ray_client_addresses_are_refused(ray_cluster):
    """With the reason and what to type."""
    with pytest.raises(UserError, match="Ray Client") as raised:
        cluster.connect("ray://head:10001")
    assert "auto" in raised.value.hint


def test_free_resources(ray_cluster):
    """Totals are the cluster's, and no more is available than there is."""
    resources = cluster.free()
    assert (resources.total["CPU"], resources.total["GPU"], resources.total["master"]) == (4, 4, 1)
    assert all(resources.available.get(name, 0) <= total for name, total in resources.total.items())


def test_importing_is_light():
    """The package loads neither ray nor torch nor pandas."""
    program = "import sys, runtime.cluster; print({'ray', 'torch', 'pandas'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "head:"])
def test_an_unreachable_address_fails_soon(address):
    """As the user's error, with a hint, not a hang and not the end of the process."""
    program = f"""
from runtime import cluster
from runtime.errors import UserError
try:
    cluster.connect({address!r})
except UserError as error:
    print(error.code, bool(error.hint))
"""
    out = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=30)
    assert out.strip() in ("ray_unreachable True", "ray_address True")


def test_a_cluster_of_ones_own(tmp_path):
    """Started from any thread, quiet, listening on loopback only; a second process attaches; it ends with the first."""
    program = """
import json, os, signal, subprocess, sys, threading
import psutil
from runtime import cluster
from runtime.spec import *
thread = threading.Thread(target=cluster.connect)
thread.start(); thread.join()
info = cluster.connect()
pool = cluster.deploy(ModelSpec("m", "echo"), PoolSpec(gpus_per_worker=0))
worker = cluster.deployments()[0].workers[0].pid
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C, as the terminal sends it to every process of the group
os.killpg(0, signal.SIGINT)
other = subprocess.run(
    [sys.executable, "-c", "import sys; from runtime import cluster; print(cluster.connect(sys.argv[1]).started_here)",
     info.address], capture_output=True, text=True)
assert [a.outputs for a in pool.run(0, Batch(1, CallOptions(), ["a"]))] == [["a"]]
assert cluster.deployments()[0].workers[0].pid == worker
os.kill(worker, signal.SIGKILL)  # Ray has something to say about it
try:
    list(pool.run(0, Batch(2, CallOptions(), ["a"])))
except Exception:
    list(pool.run(0, Batch(2, CallOptions(), ["a"])))
family = psutil.Process().children(recursive=True)
listening = [c.laddr.ip for p in [psutil.Process(), *family] for c in p.net_connections("tcp") if c.status == "LISTEN"]
print(json.dumps([info.address, info.started_here, other.stdout.strip(), listening, [p.pid for p in family]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr
    address, started_here, other, listening, pids = json.loads(done.stdout)
    assert (address.split(":")[0], started_here, other) == ("127.0.0.1", True, "False")
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert done.stderr == ""
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_a_cluster_of_ours_leaves_no_folder_behind():
    """Ray's folder of logs and sockets is gone when the process that started the cluster has ended."""
    program = (
        "from runtime.cluster import connection\n"
        "connection.connect('local')\n"
        "print(connection._session_folder(), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    folder = Path(done.stdout.split()[-1])
    assert folder.name.startswith("session_")
    assert not folder.exists()
