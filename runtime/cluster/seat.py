"""A seat: one place in a pool, whose worker may die and be replaced while the seat stays.

Everything Ray says about a worker's life is turned into our errors here.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from runtime.cluster import actors, worker
from runtime.cluster.actors import Handle
from runtime.cluster.connection import ray
from runtime.cluster.failure import Failure
from runtime.cluster.parcels import Parcel
from runtime.errors import Fatal, OutOfMemory, RowError, WorkerLost
from runtime.spec import Answers, Batch, Delta, EngineInfo, PoolSpec

ANSWER_TIMEOUT_S = 5.0  # for questions that a healthy worker answers in milliseconds
START_TIMEOUT_S = 60.0  # for a process to be there again
MAX_DEATHS = 3
POLL_S = 0.05


class WorkerGone(Exception):
    """The actor has ended for good: a signal to look for the model anew."""


class Seat:
    """One worker of a pool, as this process sees it. Thread-safe.

    Args:
        model: the function's name, for messages.
        index: number of the worker.
        handle: its actor.
        pool: limits on time.
    """

    def __init__(self, model: str, index: int, handle: Handle, pool: PoolSpec) -> None:
        self._name = f'worker {index} of "{model}"'
        self._handle = handle
        self._pool = pool
        self._client = uuid.uuid4().hex[:12]  # batch ids are only unique within what sits here
        self._lost = threading.Event()  # died, and not seen alive since
        self._reviving = threading.Lock()

    def run(self, batch: Batch) -> Iterator[Answers | Delta]:
        """Answer a batch; first waits for the worker when it is being replaced.

        Raises:
            WorkerGone: nothing was begun, and never will be.
            WorkerLost: the worker died, or hung and was killed.
            SqlextError: what the engine raised.
        """
        self._revive()
        key = self._key(batch.id)
        run = self._handle.run.options(num_returns="streaming", concurrency_group=worker.RUN_GROUP)
        ended = False
        try:
            for parcel in self._stream(run.remote(key, batch)):
                if isinstance(parcel, Failure):
                    ended = True
                    raise parcel.error()
                yield from parcel
            ended = True
        except ray.exceptions.RayTaskError as error:
            ended = True
            kind = type(error.cause).__name__
            raise RowError(f"An answer of {self._name} could not be sent: {kind}.", code="engine_failed") from None
        except ray.exceptions.OutOfMemoryError as error:
            ended = True
            self._lost.set()
            raise OutOfMemory(f"The machine of {self._name} ran out of memory.") from error
        except ray.exceptions.RayError as error:
            ended = True
            self._lost.set()
            raise WorkerLost(f"The process of {self._name} ended while it worked.") from error
        finally:
            if not ended:  # the caller closed the iterator, or the worker hung
                self.cancel(batch.id)

    def count_tokens(self, batch: Batch) -> list[int] | None:
        """Tokens of each prompt, without waiting for batches; None when the engine cannot know. Raises as `run`."""
        self._revive()
        limit_s = self._pool.load_timeout_s + self._pool.batch_timeout_s  # a restarted worker loads first
        try:
            counted = ray.get(self._handle.count_tokens.remote(batch), timeout=limit_s)
        except ray.exceptions.GetTimeoutError as error:
            raise Fatal(f"Tokens were not counted in {limit_s:g} s by {self._name}.", code="worker_hung") from error
        except ray.exceptions.RayError as error:
            self._lost.set()
            raise WorkerLost(f"The process of {self._name} ended while it counted tokens.") from error
        if isinstance(counted, Failure):
            raise counted.error()
        found: list[int] | None = counted
        return found

    def cancel(self, batch_id: int) -> None:
        """Ask the worker to end that batch soon; returns at once."""
        actors.control(self._handle, "cancel", self._key(batch_id))

    def loaded(self) -> EngineInfo:
        """What the engine says of itself; waits for it to be loaded. Raises as `run`."""
        return self._revived()

    def _stream(self, stream: Any) -> Iterator[Parcel | Failure]:
        """The parcels of a run; kills the worker when something on it takes longer than it may."""
        deadline = time.monotonic() + self._pool.batch_timeout_s
        while True:
            ready, _ = ray.wait([stream], timeout=max(0.0, deadline - time.monotonic()))
            if ready:
                try:
                    reference = next(stream)
                except StopIteration:
                    return
                yield ray.get(reference)
            elif time.monotonic() >= deadline:
                # Waiting behind others is no reason to kill; only the worker knows what hangs.
                deadline = time.monotonic() + max(POLL_S, self._patience())

    def _patience(self) -> float:
        try:
            patience: float = ray.get(actors.control(self._handle, "patience"), timeout=ANSWER_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            patience = 0.0
        if patience <= 0:
            self._lost.set()
            actors.replace(self._handle)
            raise WorkerLost(
                f"A batch on {self._name} took longer than {self._pool.batch_timeout_s:g} s; the worker is replaced.",
                code="worker_hung",
                hint="Raise `timeout` if the model is only slow.",
            )
        return patience

    def _revive(self) -> None:
        if self._lost.is_set():
            with self._reviving:
                if self._lost.is_set():
                    self._revived()
                    self._lost.clear()

    def _revived(self) -> EngineInfo:
        """Wait until the worker's process is there and its model loaded and probed."""
        for _ in range(MAX_DEATHS):
            try:
                self._await_process()
                loaded = ray.get(self._handle.load.remote(), timeout=self._pool.load_timeout_s)
            except ray.exceptions.GetTimeoutError as error:
                actors.replace(self._handle)
                raise Fatal(
                    f"After a restart, {self._name} did not load its model in {self._pool.load_timeout_s:g} s.",
                    code="worker_hung",
                ) from error
            except ray.exceptions.RayError:
                continue
            if isinstance(loaded, Failure):
                raise Fatal(
                    f"After a restart, {self._name} could not load its model: {loaded.info.message}",
                    code=loaded.info.code,
                    hint=loaded.info.hint,
                )
            info: EngineInfo = loaded
            return info
        raise Fatal(
            f"The process of {self._name} ended {MAX_DEATHS} times in a row before it could answer a row.",
            code="worker_dies",
            hint="Often the machine runs out of memory: use a smaller model or fewer workers, then deploy it again.",
        )

    def _await_process(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                ray.get(actors.control(self._handle, "ping"), timeout=max(0.0, deadline - time.monotonic()))
                return
            except ray.exceptions.RayActorError:
                if actors.life(self._handle).state == "DEAD":
                    raise WorkerGone from None
            if time.monotonic() > deadline:
                raise ray.exceptions.GetTimeoutError
            time.sleep(POLL_S)

    def _key(self, batch_id: int) -> str:
        return f"{self._client}:{batch_id}"
