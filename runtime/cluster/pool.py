"""A pool: the deployed workers of one model, as the gateway uses them.

Holds no state of the model; several processes may each have a pool on the same workers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from runtime.cluster.actors import Handle
from runtime.cluster.generation import Generation, newest
from runtime.cluster.seat import Seat, WorkerGone
from runtime.errors import Fatal, WorkerLost
from runtime.spec import Answers, Batch, Delta, EngineInfo, ModelSpec, PoolSpec

COUNT_ATTEMPTS = 3  # nothing is lost by counting again: a worker may die, be found gone, and be found anew


class Pool:
    """Workers by number. Thread-safe; made by `deploy` and `attach`.

    Attributes:
        name: the model.
        generation: number of the deployment it began with.
        spec, pool, info: what was asked, how it is placed, what was loaded.
        workers: number of workers.
    """

    def __init__(
        self, generation: int, handles: Sequence[Handle], spec: ModelSpec, pool: PoolSpec, info: EngineInfo
    ) -> None:
        self.name = spec.name
        self.generation = generation
        self.spec = spec
        self.pool = pool
        self.info = info
        self.workers = len(handles)
        self._changing = threading.Lock()
        self._sit(handles)

    @classmethod
    def of(cls, generation: Generation) -> Pool:
        """A pool on a complete generation; waits for a worker that can say what is loaded.

        Raises:
            Fatal: it could not be loaded again after a restart.
            WorkerGone: the generation ended meanwhile.
        """
        witness = generation.witness
        if witness is None:
            raise WorkerGone
        info = witness.info
        if info is None:
            handle = generation.handles[witness.index]
            info = Seat(generation.name, witness.index, handle, witness.pool).loaded()
        return cls(generation.number, generation.handles, witness.spec, witness.pool, info)

    def run(self, worker: int, batch: Batch) -> Iterator[Answers | Delta]:
        """Answer a batch on a worker; blocks between pieces. Closing the iterator early cancels the batch.

        Raises:
            WorkerLost: the worker died, or hung and was killed; a replacement is on its way.
            OutOfMemory, Retryable, RowError, UserError: as the engine raised them.
            Fatal: so did the engine, or the model was removed, or its worker cannot be brought back.
        """
        seats = self._seats
        try:
            yield from self._seat(worker).run(batch)
        except WorkerGone:
            self._find_anew(seats)
            try:
                yield from self._seat(worker).run(batch)
            except WorkerGone:
                raise WorkerLost(f'The workers of "{self.name}" were replaced while it was asked.') from None

    def count_tokens(self, worker: int, batch: Batch) -> Sequence[int] | None:
        """Tokens of each prompt as the model reads it; None when the engine cannot know. Raises as `run`."""
        lost = WorkerLost(f'The workers of "{self.name}" were replaced while it was asked.')
        for _ in range(COUNT_ATTEMPTS):
            seats = self._seats
            try:
                return self._seat(worker).count_tokens(batch)
            except WorkerLost as error:
                lost = error
            except WorkerGone:
                self._find_anew(seats)
        raise lost

    def cancel(self, worker: int, batch_id: int) -> None:
        """Nobody wants the batch any more: best effort, returns at once."""
        if seats := self._seats:
            seats[worker % len(seats)].cancel(batch_id)

    def close(self) -> None:
        """Drop the handles; the workers stay deployed."""
        self._sit(())

    def handles(self) -> tuple[Handle, ...]:
        """The actors in use now."""
        return self._handles

    def _sit(self, handles: Sequence[Handle]) -> None:
        self._handles = tuple(handles)
        self._seats = tuple(Seat(self.name, index, handle, self.pool) for index, handle in enumerate(self._handles))

    def _seat(self, worker: int) -> Seat:
        seats = self._seats
        if not seats:
            raise Fatal(f'The pool of "{self.name}" is closed.')
        return seats[worker % len(seats)]  # another process may have deployed fewer workers since

    def _find_anew(self, seats: tuple[Seat, ...]) -> None:
        """Another process may have deployed the model again: use those workers, if they answer the same way."""
        with self._changing:
            if self._seats is not seats:
                return
            found = newest(self.name)
            witness = found.witness if found else None
            if found is None or witness is None:
                raise Fatal(
                    f'The model "{self.name}" was removed.',
                    code="model_removed",
                    hint='Deploy it again with `RUN command AS LLM.` WHERE action="infer" …`.',
                )
            info = witness.info or Pool.of(found).info
            if (info.task, info.dimension) != (self.info.task, self.info.dimension):
                raise Fatal(
                    f'The model "{self.name}" was deployed anew as another kind of model.',
                    code="model_changed",
                    hint='Register it again: `RUN command AS LLM.` WHERE action="infer" AND reconnect="true" …`.',
                )
            self.generation, self.spec, self.info = found.number, witness.spec, info
            self._sit(found.handles)
