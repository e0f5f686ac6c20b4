"""A generation: the workers of one deployment of a model, found by their names.

A model that is deployed again runs twice for a while: the new generation loads while the old one still answers. Any
process may look, so everything is asked of the workers themselves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.cluster import actors
from runtime.cluster.actors import Handle
from runtime.cluster.worker import WorkerInfo

DESCRIBE_TIMEOUT_S = 2.0
RESTART_TIMEOUT_S = 15.0  # a restarted process answers long before
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Generation:
    """Attributes:
    name: the model.
    number: counts up with each deployment under this name.
    handles: its actors, in the order of the workers.
    workers: their word on themselves; None for one that is being restarted.
    """

    name: str
    number: int
    handles: tuple[Handle, ...]
    workers: tuple[WorkerInfo | None, ...]

    @property
    def witness(self) -> WorkerInfo | None:
        """A worker that answered, best one with its engine loaded."""
        answered = [worker for worker in self.workers if worker]
        return max(answered, key=lambda worker: worker.ready, default=None)

    @property
    def deployed(self) -> bool:
        """Whether every worker is there and its deployment was completed."""
        witness = self.witness
        return (
            witness is not None
            and witness.pool.num_workers == len(self.handles)
            and all(worker.deployed for worker in self.workers if worker)
        )


def generations(name: str | None = None) -> Iterator[Generation]:
    """The generations of one model, or of all, in the order of names and the newest first."""
    listed = actors.listed()
    for model, number in sorted(listed, key=lambda key: (key[0], -key[1])):
        if name is None or model == name:
            handles = tuple(actors.handles(listed[model, number]))
            workers = tuple(actors.describe(handles, DESCRIBE_TIMEOUT_S))
            yield Generation(model, number, handles, workers)


def newest(name: str) -> Generation | None:
    """The newest complete generation; waits, with a bound, for one whose workers are all being restarted."""
    deadline = time.monotonic() + RESTART_TIMEOUT_S
    while True:
        silent = False
        for generation in generations(name):
            if generation.deployed:
                return generation
            silent = silent or bool(generation.handles and not generation.witness)
        if not silent or time.monotonic() > deadline:
            return None
        time.sleep(POLL_S)
