"""The connection of this process to Ray: started here or attached to, once, when first needed.

It stands alone because importing and starting Ray take seconds: whatever can be said without a cluster must not pay
for one. `ray` below is the library itself, imported at its first use.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import logging
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from runtime.errors import UserError

NAMESPACE = "sqlext"
"""Ray namespace of all our actors; always passed by name, as the program may have connected with another one."""

MIN_STORE_BYTES = 80 * 1024 * 1024  # Ray refuses less
MAX_STORE_BYTES = 1024 * 1024 * 1024
INLINE_BYTES = 1_000_000  # batches and answers up to this travel in the call itself: twice the rows at 150-500 KB
REACH_TIMEOUT_S = 5.0
START_HINT = "Start one with `ray start --head`, or leave ray_address out to run inside this process."


class _Library:
    def __getattr__(self, name: str) -> Any:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        return getattr(importlib.import_module("ray"), name)


ray: Any = _Library()


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """The cluster this process is connected to.

    Attributes:
        address: ``host:port``, what another process passes to `connect` to attach.
        started_here: True when this process started it; then it ends with this process.
        nodes: machines alive.
    """

    address: str
    started_here: bool
    nodes: int


@dataclass(frozen=True, slots=True)
class Resources:
    """Logical resources of the cluster by Ray's names: ``CPU``, ``GPU``, custom ones."""

    total: dict[str, float]
    available: dict[str, float]


_lock = threading.Lock()
_started_here = False


def would_start(address: str | None = None) -> bool:
    """Whether `connect` would start a cluster, on which nothing can be deployed yet."""
    wanted = address or os.environ.get("RAY_ADDRESS") or "local"
    return wanted == "local" and not ("ray" in sys.modules and ray.is_initialized())


def connect(address: str | None = None) -> ClusterInfo:
    """Connect this process to Ray; does nothing when it is connected already. Thread-safe.

    Args:
        address: None starts a cluster inside this process (or takes ``RAY_ADDRESS``, where that is set); ``local``
            always starts one; ``auto`` attaches to the one running on this machine; ``host:port`` to that one.

    Raises:
        UserError: the address cannot be used or reached, or this process is connected to another cluster.
    """
    global _started_here  # noqa: PLW0603 - Ray itself is one per process
    with _lock:
        wanted = address or os.environ.get("RAY_ADDRESS") or "local"
        _refuse_client(wanted)
        if ray.is_initialized():
            _require_same(address)
        elif wanted == "local":
            _on_lasting_thread(_start)
            _started_here = True
            atexit.register(shutdown)
        else:
            _attach(wanted)
            _started_here = False
        return ClusterInfo(cluster_address(), _started_here, len(live_nodes()))


def shutdown() -> None:
    """Leave the cluster; one that was started here ends, with every model on it."""
    global _started_here  # noqa: PLW0603
    with _lock:
        if ray.is_initialized():
            folder = _session_folder() if _started_here else None
            ray.shutdown()
            if folder:  # logs and sockets; Ray itself leaves a folder behind for each run
                shutil.rmtree(folder, ignore_errors=True)
        _started_here = False


def _session_folder() -> str:
    """Where a cluster of this machine keeps its logs; there is no public call for it."""
    worker = importlib.import_module("ray._private.worker")
    return str(worker.global_worker.node.get_session_dir_path())


def cluster_address() -> str:
    """``host:port`` of the connected cluster."""
    return str(ray.get_runtime_context().gcs_address)


def node_id() -> str:
    """Ray's id of the node this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def free() -> Resources:
    """What the cluster has and what of it is not reserved. Connects when needed."""
    connect()
    return Resources(_named(ray.cluster_resources()), _named(ray.available_resources()))


def nodes_total() -> list[dict[str, float]]:
    """Resources of each living node."""
    return [_named(node["Resources"]) for node in live_nodes()]


def nodes_available() -> list[dict[str, float]]:
    """Resources of each living node that are not reserved."""
    # Ray has no public call for this; `ray.available_resources()` only knows the sum.
    state = importlib.import_module("ray._private.state")
    return [_named(resources) for resources in state.available_resources_per_node().values()]


def live_nodes() -> list[dict[str, Any]]:
    """What Ray says of each node that is up."""
    return [node for node in ray.nodes() if node["Alive"]]


def _named(resources: dict[str, float]) -> dict[str, float]:
    """Without the entries by which Ray marks its nodes."""
    return {name: amount for name, amount in resources.items() if not name.startswith("node:")}


def _start() -> None:
    free_bytes = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else MAX_STORE_BYTES
    with _silence(), _loopback(True):
        ray.init(
            address="local",
            namespace=NAMESPACE,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=max(MIN_STORE_BYTES, min(MAX_STORE_BYTES, free_bytes // 2)),
            _node_ip_address="127.0.0.1",
            _system_config={"max_direct_call_object_size": INLINE_BYTES},
        )


def _on_lasting_thread(work: Callable[[], None]) -> None:
    """Run `work` on a thread that lives as long as the process.

    Ray asks Linux to end its processes with their parent, which to Linux is the thread that started them: a cluster
    started on a statement's thread would be gone after the statement.
    """
    done: Future[None] = Future()

    def live() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
            return
        done.set_result(None)
        threading.Event().wait()

    threading.Thread(target=live, name="sqlext-ray", daemon=True).start()
    try:
        done.result()
    finally:
        futures.wait([done])  # Ctrl-C: a half-started Ray is neither there nor not there


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep Ray from printing its messages on dead workers to stdout, which is for data: we raise them as errors.

    `log_to_driver=False` keeps the workers' output away, but not these.
    """
    module: Any = importlib.import_module("ray._private.worker")
    before = module.listen_error_messages
    module.listen_error_messages = lambda *_: None
    try:
        yield
    finally:
        module.listen_error_messages = before


def _attach(wanted: str) -> None:
    address = _running() if wanted == "auto" else wanted
    _require_reachable(address)
    try:
        with _silence(), _loopback(_only_on_loopback(address)):
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f'Could not attach to the Ray cluster "{address}": {str(error).splitlines()[0][:200]}',
            code="ray_unreachable",
            hint=START_HINT,
        ) from error


def _running() -> str:
    """``host:port`` of the cluster running on this machine."""
    services = importlib.import_module("ray._private.services")
    try:
        return str(services.get_ray_address_from_environment("auto", None))
    except ConnectionError as error:
        raise UserError("No Ray cluster runs on this machine.", code="ray_unreachable", hint=START_HINT) from error


@contextlib.contextmanager
def _loopback(on: bool) -> Iterator[None]:
    """Let Ray start or attach on 127.0.0.1 only.

    Ray asks nobody who they are, and on Linux puts the machine's outer address in the place of 127.0.0.1, so that
    the network could run code here. This switch is what keeps it on loopback on macOS and Windows (ray#18730).
    """
    constants: Any = importlib.import_module("ray._private.ray_constants")
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = before and not on
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def _only_on_loopback(address: str) -> bool:
    """Whether a cluster at 127.0.0.1 is one of ours, which the machine's outer address does not reach."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return False
    outer = importlib.import_module("ray._private.services").get_node_ip_address()
    try:
        socket.create_connection((outer, int(port)), timeout=REACH_TIMEOUT_S).close()
    except OSError:
        return True
    return False


def _refuse_client(address: str) -> None:
    if address.startswith("ray://"):
        raise UserError(
            f'"{address}" is a Ray Client address; answers cannot be streamed through it.',
            code="ray_client_address",
            hint='Run on a machine of the cluster with ray_address="auto", or give its head as host:6379.',
        )


def _require_same(address: str | None) -> None:
    """An explicit address must be the one this process is connected to: Ray allows one cluster per process."""
    current = cluster_address()
    if address in (None, "auto", "local") or _plain(str(address)) == _plain(current):
        return
    raise UserError(
        f'This process is connected to the Ray cluster "{current}" and cannot use "{address}" as well.',
        code="ray_other_cluster",
        hint="Set ray_address before the first statement that needs Ray, in a new session.",
    )


def _require_reachable(address: str) -> None:
    """Ray itself would try a dead address for a long time and then end the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f'"{address}" is not the address of a Ray cluster.',
            code="ray_address",
            hint='Use "auto", or host:port of the cluster\'s head, for example "10.0.0.5:6379".',
        )
    try:
        socket.create_connection((host, int(port)), timeout=REACH_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f'No Ray cluster answers at "{address}": {error.strerror or error}.',
            code="ray_unreachable",
            hint="Check host and port (`ray status` on the head shows them) and that the cluster is up.",
        ) from error


def _plain(address: str) -> str:
    return address.replace("localhost:", "127.0.0.1:")
