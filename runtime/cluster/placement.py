"""Placement: whether the cluster has room for a pool, said before anything is started.

Ray itself waits in silence for resources that may never come.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from runtime.cluster.connection import Resources, free, nodes_available, nodes_total
from runtime.errors import DeployError, UserError
from runtime.spec import PoolSpec

SETTLE_S = 2.0  # Ray's books follow the end of a worker with a short delay
POLL_S = 0.05


def decided(pool: PoolSpec) -> PoolSpec:
    """`pool` with what it leaves open decided by the cluster.

    Raises:
        UserError: a setting is out of range.
    """
    for name, value, least in (
        ("num_workers", pool.num_workers, 1),
        ("worker_concurrency", pool.worker_concurrency, 1),
        ("gpus_per_worker", pool.gpus_per_worker or 0, 0),
        ("cpus_per_worker", pool.cpus_per_worker, 0),
    ):
        if value < least:
            raise UserError(f"{name} must be at least {least}, not {value:g}.", code="option_value")
    if pool.gpus_per_worker is not None:
        return pool
    return replace(pool, gpus_per_worker=1.0 if free().total.get("GPU") else 0.0)


def require_room(model: str, pool: PoolSpec) -> None:
    """Check that every worker of `pool` fits on the cluster now.

    Raises:
        DeployError: it does not; says what was asked, what is there and free, and what to type.
    """
    need = demand(pool)
    if fitting(need, nodes_total(), pool.num_workers) < pool.num_workers:
        raise _no_room(model, pool, "The cluster is too small", _smaller(pool, fitting(need, nodes_total(), 10**6)))
    deadline = time.monotonic() + SETTLE_S
    while (present := fitting(need, nodes_available(), pool.num_workers)) < pool.num_workers:
        if time.monotonic() > deadline:
            hint = 'Remove a model that is not needed (`!llm models;`, then `!llm model remove "name";`), or '
            raise _no_room(model, pool, "Too little is free", hint + _smaller(pool, present, start="t"))
        time.sleep(POLL_S)


def demand(pool: PoolSpec) -> dict[str, float]:
    """What one worker reserves."""
    wanted = {"CPU": pool.cpus_per_worker, "GPU": pool.gpus_per_worker or 0.0, **dict(pool.resources)}
    return {name: amount for name, amount in wanted.items() if amount}


def fitting(need: dict[str, float], nodes: Sequence[dict[str, float]], enough: int) -> int:
    """How many workers fit on these nodes, counted up to `enough`."""
    if not need:
        return enough
    return min(
        enough,
        sum(min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in need.items()) for node in nodes),
    )


def _no_room(model: str, pool: PoolSpec, what: str, hint: str) -> DeployError:
    now: Resources = free()
    each = demand(pool)
    asked = _amounts({name: amount * pool.num_workers for name, amount in each.items()})
    per_worker = f" ({_amounts(each)} each)" if pool.num_workers > 1 else ""
    return DeployError(
        f'{what} for {_workers(pool.num_workers)} of "{model}": asked {asked}{per_worker}; '
        f"there: {_amounts({name: now.total.get(name, 0.0) for name in each})}; "
        f"free: {_amounts({name: now.available.get(name, 0.0) for name in each})}.",
        code="no_room",
        hint=hint,
    )


def _smaller(pool: PoolSpec, workers: int, start: str = "T") -> str:
    """What to type to ask for less."""
    if workers:
        return f'{start}ype `!llm setup "num_workers={workers}";`.'
    settings = ["cpus_per_worker"] if pool.cpus_per_worker else []
    settings += ["gpus_per_worker"] if pool.gpus_per_worker else []
    less = " ".join(f'"{name}={_less(getattr(pool, name))}"' for name in settings)
    custom = ", ".join(f"resource.{name}" for name, _ in pool.resources)
    parts = [f"{start}ype `!llm setup {less};`"] if less else []
    parts += [f"check {custom} against the nodes (`ray status`)"] if custom else []
    return ", or ".join(parts) + "."


def _less(amount: float) -> str:
    return "0" if amount >= 1 else f"{amount / 2:g}"


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
