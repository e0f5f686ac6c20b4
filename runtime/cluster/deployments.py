"""Deployments: bringing models up on the cluster, finding them, and taking them down.

A model comes up whole or not at all: whatever fails, the processes of the attempt are gone before the error is
raised, and an older generation under the same name was never touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.cluster import actors, placement
from runtime.cluster.actors import Handle
from runtime.cluster.connection import connect, ray
from runtime.cluster.failure import Failure
from runtime.cluster.generation import Generation, generations, newest
from runtime.cluster.pool import Pool
from runtime.cluster.seat import WorkerGone
from runtime.cluster.worker import WorkerInfo
from runtime.errors import DeployError, SqlextError, UserError, did_you_mean
from runtime.spec import EngineInfo, ModelSpec, PoolSpec

START_TIMEOUT_S = 60.0  # for worker processes to start on a busy machine; the model is not loaded yet
TICK_S = 0.25


@dataclass(frozen=True, slots=True)
class DeployProgress:
    """How far a deployment is: phase 'starting' or 'loading', workers ready of all, seconds since it began."""

    model: str
    phase: str
    workers_ready: int
    workers: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DeploymentInfo:
    """One generation of a deployed model, as its workers describe it.

    Attributes:
        state: 'ready'; 'loading' while it is being deployed; 'restarting' while no worker answers.
        spec, pool, info: None as long as no worker can say.
        workers: in their order; None for one that does not answer now.
    """

    name: str
    generation: int
    state: str
    spec: ModelSpec | None
    pool: PoolSpec | None
    info: EngineInfo | None
    workers: tuple[WorkerInfo | None, ...]


def deploy(spec: ModelSpec, pool_spec: PoolSpec, *, progress: Callable[[DeployProgress], None] | None = None) -> Pool:
    """Load a model on `pool_spec.num_workers` workers, as a new generation of its name.

    Older generations go on; `retire` them when nobody uses them any more.

    Args:
        progress: called some times a second from this thread.

    Raises:
        UserError: the engine, the files or an option must be corrected.
        DeployError: no room, or a worker did not load, died, hung or could not answer a first row.
    """
    connect()
    pool = placement.decided(pool_spec)
    placement.require_room(spec.name, pool)
    generation, handles = actors.create(spec, pool)
    try:
        info = _bring_up(spec, pool, handles, progress or _silent)
    except BaseException:  # Ctrl-C too
        actors.end(handles)
        raise
    return Pool(generation, handles, spec, pool, info)


def attach(name: str) -> Pool:
    """A pool on the newest complete deployment of `name`, whichever process made it.

    Raises:
        UserError: there is none.
    """
    connect()
    found = newest(name)
    if found:
        try:
            return Pool.of(found)
        except WorkerGone:
            pass
    known = sorted({model for model, _ in actors.listed()} - {name})
    near = did_you_mean(name, known)
    deployed = f"Deployed: {', '.join(known)}." if known else "No model is deployed."
    raise UserError(
        f'No model "{name}" is deployed.',
        code="model_unknown",
        hint=f'Did you mean "{near}"? {deployed}' if near else deployed,
    )


def exists(name: str) -> bool:
    """Whether `attach` would find it."""
    connect()
    return newest(name) is not None


def remove(name: str, generation: int | None = None) -> bool:
    """End the workers of a model, or of one of its generations, and wait for their processes to be gone.

    Returns:
        Whether there were any.
    """
    connect()
    names = [
        actor
        for (model, number), listed in actors.listed().items()
        if model == name and generation in (None, number)
        for actor in listed
    ]
    actors.end(actors.handles(names))
    return bool(names)


def retire(pool: Pool) -> None:
    """End the workers that `pool` uses; call it when its batches have ended."""
    actors.end(pool.handles())
    pool.close()


def retire_older(pool: Pool) -> None:
    """End the generations under `pool`'s name that are older than it, but for those still being deployed."""
    for generation in generations(pool.name):
        loading = generation.witness is not None and not generation.deployed
        if generation.number < pool.generation and not loading:
            actors.end(generation.handles)


def deployments() -> list[DeploymentInfo]:
    """Everything that is deployed or being deployed on the cluster, newest generation of a name first."""
    connect()
    return [_info(generation) for generation in generations() if generation.handles]


def _info(generation: Generation) -> DeploymentInfo:
    witness = generation.witness
    return DeploymentInfo(
        name=generation.name,
        generation=generation.number,
        state="ready" if generation.deployed else "loading" if witness else "restarting",
        spec=witness.spec if witness else None,
        pool=witness.pool if witness else None,
        info=witness.info if witness else None,
        workers=generation.workers,
    )


def _bring_up(
    spec: ModelSpec, pool: PoolSpec, handles: Sequence[Handle], progress: Callable[[DeployProgress], None]
) -> EngineInfo:
    began = time.monotonic()

    def tick(phase: str, ready: int) -> None:
        progress(DeployProgress(spec.name, phase, ready, len(handles), time.monotonic() - began))

    started = [actors.control(handle, "ping") for handle in handles]
    for _ in _arrivals(spec, started, START_TIMEOUT_S, lambda _: tick("starting", 0)):
        pass
    loads = [handle.load.remote() for handle in handles]
    infos = []
    for loaded in _arrivals(spec, loads, pool.load_timeout_s, lambda ready: tick("loading", ready)):
        if isinstance(loaded, Failure):
            raise _refusal(spec, loaded)
        infos.append(loaded)
    commits = [actors.control(handle, "commit") for handle in handles]
    for _ in _arrivals(spec, commits, START_TIMEOUT_S, lambda _: None):
        pass
    return infos[0]


def _arrivals(
    spec: ModelSpec, references: Sequence[Any], timeout_s: float, tick: Callable[[int], None]
) -> Iterator[Any]:
    """The answers of all workers as they come.

    Raises:
        DeployError: a worker died, or not all have answered in time.
    """
    waiting = list(references)
    deadline = time.monotonic() + timeout_s
    while waiting:
        tick(len(references) - len(waiting))
        ready, waiting = ray.wait(waiting, timeout=min(TICK_S, max(0.0, deadline - time.monotonic())))
        for reference in ready:
            yield _arrival(spec, reference)
        if waiting and not ready and time.monotonic() >= deadline:
            raise DeployError(
                f'The model "{spec.name}" was not loaded after {timeout_s:g} s '
                f"({len(references) - len(waiting)} of {len(references)} workers were ready).",
                code="load_timeout",
                hint="Raise the load timeout if the model is only large; otherwise look at the disk it is read from.",
            )
    tick(len(references))


def _arrival(spec: ModelSpec, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayActorError as error:
        raise DeployError(
            f'A worker of "{spec.name}" ended while its model was loaded.',
            code="worker_died",
            hint="Often the machine runs out of memory: use a smaller model, a smaller dtype or fewer workers. "
            "On a cluster, the same version of this package must be installed on every machine.",
        ) from error


def _refusal(spec: ModelSpec, failed: Failure) -> SqlextError:
    """The user's mistakes keep their own words; anything else says which model did not come up."""
    if isinstance(error := failed.error(), UserError):
        return error
    return DeployError(f'The model "{spec.name}" did not come up: {error.message}', code=error.code, hint=error.hint)


def _silent(progress: DeployProgress) -> None:
    pass
