"""Deployed models as tables: `!llm models`, `status`, `model exists`, `model remove`.

They ask the cluster each time and so are true at any time; nothing is remembered here.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from runtime import cluster

if TYPE_CHECKING:
    from sqlext.connection import Connection

_MB = 1024 * 1024


def models(connection: Connection) -> pa.Table:
    """One row for each deployed model, and for each function that asks another model's workers."""
    functions = connection.session.functions.gateways()
    rows = [
        {
            "model": info.name,
            "state": info.state,
            "task": str(info.info.task) if info.info else None,
            "engine": info.info.engine if info.info else None,
            "device": info.info.device if info.info else None,
            "workers": len(info.workers),
            "busy": sum(1 for worker in info.workers if worker and worker.busy),
            "registered": info.name in functions,
            "path": info.spec.path if info.spec else None,
        }
        for info in _deployments(connection)
    ]
    rows += [
        {
            "model": name,
            "state": "ready" if any(row["model"] == pool.base.name for row in rows) else "removed",
            "task": str(pool.info.task),
            "engine": pool.info.engine,
            "device": pool.info.device,
            "workers": 0,
            "busy": 0,
            "registered": True,
            "path": pool.adapter,
        }
        for name, pool in ((name, gateway.pool) for name, gateway in functions.items())
        if isinstance(pool, cluster.AdaptedPool)
    ]
    return pa.Table.from_pylist(rows, _MODELS)


def status(connection: Connection, name: str | None = None) -> pa.Table:
    """One row for each worker of the model `name`, or of all models."""
    rows = [
        _worker_row(info, index, worker)
        for info in _deployments(connection)
        if name is None or info.name == name.lower()
        for index, worker in enumerate(info.workers)
    ]
    return pa.Table.from_pylist(rows, _STATUS)


def exists(connection: Connection, name: str) -> pa.Table:
    """One row with a boolean: whether `name` is deployed on the cluster."""
    return pa.table({"value": [_connected(connection) and cluster.exists(name.lower())]})


def remove(connection: Connection, name: str) -> pa.Table:
    """Unregister and undeploy `name`; one row with a boolean: whether there was one."""
    name = name.lower()  # SQL does not mind the case of a function's name
    gateway = connection.session.functions.remove(name)
    if gateway:
        gateway.close()
        if isinstance(gateway.pool, cluster.AdaptedPool):  # it has no workers of its own
            return pa.table({"value": [True]})
    return pa.table({"value": [_connected(connection) and cluster.remove(name)]})


def _connected(connection: Connection) -> bool:
    """Connect to the cluster the session uses; False when there is none, which is not started just to be asked."""
    address = connection.session.settings["ray_address"]
    if cluster.would_start(address):
        return False
    cluster.connect(address)
    return True


def _deployments(connection: Connection) -> list[cluster.DeploymentInfo]:
    return cluster.deployments() if _connected(connection) else []


def _worker_row(info: cluster.DeploymentInfo, index: int, worker: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"model": info.name, "worker": index, "state": "restarting"}
    if worker is None:
        return row
    last = worker.last_work
    return row | {
        "state": _state(worker),
        "engine": worker.spec.engine,
        "device": worker.info.device if worker.info else None,
        "node": worker.node,
        "pid": worker.pid,
        "requests": worker.requests,
        "rows": worker.rows,
        "prompt_tokens": worker.prompt_tokens,
        "completion_tokens": worker.completion_tokens,
        "memory_mb": worker.memory_bytes // _MB,
        "gpu_mb": worker.gpu_bytes // _MB,
        "last_work": datetime.fromtimestamp(last, UTC) if last else None,
        "notes": "; ".join(info.info.notes) if info.info else None,
    }


def _state(worker: cluster.WorkerInfo) -> str:
    if worker.busy:
        return "busy"
    return "idle" if worker.ready else "loading" if worker.loading or not worker.deployed else "unloaded"


_TEXT, _INT = pa.string(), pa.int64()
_MODELS = pa.schema(
    {
        "model": _TEXT,
        "state": _TEXT,
        "task": _TEXT,
        "engine": _TEXT,
        "device": _TEXT,
        "workers": _INT,
        "busy": _INT,
        "registered": pa.bool_(),
        "path": _TEXT,
    }
)
_STATUS = pa.schema(
    {
        "model": _TEXT,
        "worker": _INT,
        "state": _TEXT,
        "engine": _TEXT,
        "device": _TEXT,
        "node": _TEXT,
        "pid": _INT,
        "requests": _INT,
        "rows": _INT,
        "prompt_tokens": _INT,
        "completion_tokens": _INT,
        "memory_mb": _INT,
        "gpu_mb": _INT,
        "last_work": pa.timestamp("s", tz="UTC"),
        "notes": _TEXT,
    }
)
