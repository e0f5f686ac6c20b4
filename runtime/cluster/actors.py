"""The Ray actors behind the workers: their names, their making, finding and ending.

A worker's actor is called ``chat#3/0``: model, generation, index. These names are the only registry of what is
deployed, so that every process on the cluster sees the same.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import psutil

from runtime.cluster import worker
from runtime.cluster.connection import NAMESPACE, node_id, ray
from runtime.cluster.worker import Worker, WorkerInfo
from runtime.errors import DeployError, UserError
from runtime.spec import ModelSpec, PoolSpec

Handle: TypeAlias = Any
"""A Ray actor handle of a `Worker`."""

NAME = re.compile(r"(?P<model>.+)#(?P<generation>\d+)/(?P<index>\d+)")
GRACE_S = 2.0  # for a process to end after Ray has killed it, before we do
END_TIMEOUT_S = 10.0
POLL_S = 0.02
CLAIM_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class Life:
    """Where Ray says an actor is: its state (``ALIVE``, ``RESTARTING``, ``DEAD``, …), node and process id."""

    state: str
    node_id: str
    pid: int


def create(spec: ModelSpec, pool: PoolSpec) -> tuple[int, list[Handle]]:
    """The actors of a new generation, started but not loaded; the generation is this caller's alone."""
    generation, first = _claim(spec, pool)
    return generation, [first, *(_create(spec, pool, generation, index) for index in range(1, pool.num_workers))]


def _claim(spec: ModelSpec, pool: PoolSpec) -> tuple[int, Handle]:
    """Ray gives a name once: who gets worker 0 has the generation."""
    generation = max((number for model, number in listed() if model == spec.name), default=0) + 1
    for number in range(generation, generation + CLAIM_ATTEMPTS):
        try:
            return number, _create(spec, pool, number, 0)
        except ValueError as error:
            if not handles([_name(spec, number, 0)]):  # not the name, then: Ray refuses the resources
                raise UserError(str(error).splitlines()[0], code="option_value") from error
    raise DeployError(f'Too many deployments of "{spec.name}" at once.', hint="Wait for them to end and try again.")


def _create(spec: ModelSpec, pool: PoolSpec, generation: int, index: int) -> Handle:
    groups = {worker.RUN_GROUP: pool.worker_concurrency + 1, worker.CONTROL_GROUP: worker.CONTROL_THREADS}
    actor = ray.remote(concurrency_groups=groups)(Worker).options(
        name=_name(spec, generation, index),
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=0,
        num_cpus=pool.cpus_per_worker,
        num_gpus=pool.gpus_per_worker or 0,
        resources=dict(pool.resources),
    )
    return actor.remote(spec, pool, index, generation)


def _name(spec: ModelSpec, generation: int, index: int) -> str:
    return f"{spec.name}#{generation}/{index}"


def listed() -> dict[tuple[str, int], list[str]]:
    """Actor names by model and generation, each in the order of the workers; loading and restarting ones too."""
    found: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and (parts := NAME.fullmatch(actor["name"])):
            found[parts["model"], int(parts["generation"])][int(parts["index"])] = actor["name"]
    return {key: [names[index] for index in sorted(names)] for key, names in sorted(found.items())}


def handles(names: Iterable[str]) -> list[Handle]:
    """The actors of these names; without those that ended meanwhile."""
    found = []
    for name in names:
        try:
            found.append(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:
            continue
    return found


def control(handle: Handle, method: str, *arguments: object) -> Any:
    """Ask a worker something that it answers even while it works; returns Ray's reference to the answer."""
    return getattr(handle, method).options(concurrency_group=worker.CONTROL_GROUP).remote(*arguments)


def describe(actors: Sequence[Handle], timeout_s: float) -> list[WorkerInfo | None]:
    """Each worker's word on itself; None for one that does not answer in time, as while it is restarted."""
    asked = [control(actor, "describe") for actor in actors]
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
    return [_answer(reference) for reference in asked]


def _answer(reference: Any) -> WorkerInfo | None:
    try:
        info: WorkerInfo = ray.get(reference, timeout=0)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return None
    return info


def life(actor: Handle) -> Life:
    """What Ray knows of the actor's process, without asking the process."""
    # The public state API needs the dashboard, which we do not start.
    state = importlib.import_module("ray._private.state")
    row = state.actors(actor._actor_id.hex())
    return Life(row["State"], row["Address"]["NodeID"], row["Pid"]) if row else Life("DEAD", "", 0)


def end(actors: Sequence[Handle]) -> None:
    """End these workers for good and wait until their processes, and what those started, are gone.

    Processes on other nodes are ended too, but only Ray's word is waited for.
    """
    lives = [life(actor) for actor in actors]
    processes = [process for one in lives for process in _family(one)]
    for actor in actors:
        ray.kill(actor, no_restart=True)
    _, alive = psutil.wait_procs(processes, timeout=GRACE_S)
    _kill(alive)
    psutil.wait_procs(alive, timeout=END_TIMEOUT_S)
    deadline = time.monotonic() + END_TIMEOUT_S
    while any(life(actor).state != "DEAD" for actor in actors) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def replace(actor: Handle) -> None:
    """End the process of a worker that hangs; Ray starts a new one in its place."""
    processes = _family(life(actor))
    ray.kill(actor, no_restart=False)
    _kill(processes)  # Ray asks first, and a process that hangs may not listen


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _family(one: Life) -> list[psutil.Process]:
    """The worker's process and its descendants, when they are on this node."""
    if one.state == "DEAD" or not one.pid or one.node_id != node_id():
        return []
    try:
        process = psutil.Process(one.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
