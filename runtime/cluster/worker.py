"""The worker: the Ray actor that holds one engine.

Knows nothing of pools and other workers; everything it is told comes with its creation, as Ray creates it anew, with
the same arguments, after its process has died. The class is plain Python: `actors.py` makes it an actor.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import cast

import psutil

from runtime.cluster.failure import Failure, failure
from runtime.cluster.parcels import Parcel, parcels
from runtime.engines import Engine, loader
from runtime.engines.probes import probe
from runtime.errors import DeployError, EngineLost, ErrorInfo
from runtime.spec import Answers, Batch, Delta, EngineInfo, ModelSpec, PoolSpec

GATHER_S = 0.02
IDLE_POLL_S, MAX_IDLE_POLL_S = 0.05, 5.0
REMEMBERED_CANCELS = 256  # cancels that came before their batch had begun

RUN_GROUP = "run"  # Ray concurrency groups: batches, one more than run, so that the next is there when one ends,
CONTROL_GROUP = "control"  # and questions that are answered while batches run and while the model loads
CONTROL_THREADS = 4


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself.

    Attributes:
        deployed: its deployment was completed; False while models are still being loaded.
        ready: the engine is loaded; a worker that was restarted loads it at its first batch.
        loading: it is being loaded now.
        info: None while not ready.
        busy: batches running now.
        requests: batches ended, since the process started; likewise `rows`, `prompt_tokens`, `completion_tokens`.
        last_work: end of the last batch, seconds since the epoch; None before the first.
        memory_bytes: resident memory of the process without Ray's shared object store.
        gpu_bytes: memory torch holds on its GPUs.
    """

    index: int
    generation: int
    spec: ModelSpec
    pool: PoolSpec
    info: EngineInfo | None
    deployed: bool
    ready: bool
    loading: bool
    pid: int
    node: str
    busy: int
    requests: int
    rows: int
    prompt_tokens: int
    completion_tokens: int
    last_work: float | None
    memory_bytes: int
    gpu_bytes: int


class Worker:
    """One engine behind the calls of a Ray actor.

    Args:
        spec: the model.
        pool: the pool this worker is part of, with every setting decided.
        index: number of this worker in the pool, from 0.
        generation: number of the deployment under this name.
    """

    def __init__(self, spec: ModelSpec, pool: PoolSpec, index: int, generation: int) -> None:
        self._spec = spec
        self._pool = pool
        self._index = index
        self._generation = generation
        self._engine: Engine | None = None
        self._info: EngineInfo | None = None
        self._deployed = _restarted()
        self._loading = threading.Lock()
        self._threads = ThreadPoolExecutor(pool.worker_concurrency, thread_name_prefix="engine")
        self._lock = threading.Lock()  # guards everything below
        self._stops: dict[str, threading.Event] = {}
        self._cancelled: deque[str] = deque(maxlen=REMEMBERED_CANCELS)
        self._due: dict[str, float] = {}  # monotonic time at which what is under way counts as hung
        self._requests = self._rows = self._prompt_tokens = self._completion_tokens = 0
        self._last_work: float | None = None
        self._idle_since = 0.0  # monotonic time of the last end of anything
        os.environ["OMP_NUM_THREADS"] = str(_threads(pool))

    # -- the default group: one at a time -----------------------------------------------------------------------

    def load(self) -> EngineInfo | Failure:
        """Load the engine and let it answer one row; again when it is loaded already does nothing."""
        with self._loading:
            if self._engine is None:
                self._begin("load")
                self._count_down("load", self._pool.load_timeout_s)
                try:
                    self._engine, self._info = self._loaded()
                except BaseException as error:  # SystemExit too: Ray would take the actor down for good
                    return failure(error, self._spec)
                finally:
                    self._end("load")
                if self._pool.idle_timeout_s is not None:
                    threading.Thread(target=self._unload_when_idle, name="idle", daemon=True).start()
            return cast(EngineInfo, self._info)

    def count_tokens(self, batch: Batch) -> list[int] | Failure | None:
        """Tokens of each prompt, without waiting for batches; None when the engine cannot know."""
        loaded = self.load()
        if isinstance(loaded, Failure):
            return Failure("Fatal", loaded.info)
        count = getattr(self._engine, "count_tokens", None)
        try:
            return count(batch) if count else None
        except BaseException as error:
            return failure(error, self._spec, batch)

    # -- RUN_GROUP ----------------------------------------------------------------------------------------------

    def run(self, key: str, batch: Batch) -> Iterator[Parcel | Failure]:
        """Answer a batch in parcels; a failure of the whole batch comes last, as data.

        Args:
            key: name of this run, for `cancel`.
        """
        loaded = self.load()
        if isinstance(loaded, Failure):
            yield Failure("Fatal", loaded.info)
            return
        if batch.adapter and not loaded.adapters:  # the base was deployed anew, otherwise
            yield Failure("Fatal", ErrorInfo("adapter_unsupported", "The base was deployed anew, without adapters."))
            return
        engine = cast(Engine, self._engine)
        stop = self._begin(key)

        def pieces() -> Iterator[Answers | Delta]:
            self._count_down(key, self._pool.batch_timeout_s)
            return engine.run(batch, stop)

        try:
            if stop.is_set():
                return
            for parcel in parcels(pieces, self._threads, GATHER_S):
                self._count(parcel)
                yield parcel
        except GeneratorExit:
            raise
        except EngineLost:  # no ping would tell; a new process loads it again, and the batch is sent to that
            _end_process()
        except BaseException as error:
            yield failure(error, self._spec, batch)
        finally:
            stop.set()
            self._end(key)

    # -- CONTROL_GROUP ------------------------------------------------------------------------------------------

    def ping(self) -> int:
        """The process id."""
        return os.getpid()

    def commit(self) -> None:
        """The deployment this worker belongs to is complete."""
        self._deployed = True

    def cancel(self, key: str) -> None:
        """Ask the engine to end that run soon; one that has not begun will end before it begins."""
        with self._lock:
            if key in self._stops:
                self._stops[key].set()
            else:
                self._cancelled.append(key)

    def patience(self) -> float:
        """Seconds until something here counts as hung; 0 or less: it does now."""
        with self._lock:
            return min(self._due.values(), default=time.monotonic() + self._pool.batch_timeout_s) - time.monotonic()

    def describe(self) -> WorkerInfo:
        """The state of this worker, now."""
        with self._lock:
            return WorkerInfo(
                index=self._index,
                generation=self._generation,
                spec=self._spec,
                pool=self._pool,
                info=self._info,
                deployed=self._deployed,
                ready=self._info is not None,
                loading="load" in self._due,
                pid=os.getpid(),
                node=socket.gethostname(),
                busy=len(self._due) - ("load" in self._due),
                requests=self._requests,
                rows=self._rows,
                prompt_tokens=self._prompt_tokens,
                completion_tokens=self._completion_tokens,
                last_work=self._last_work,
                memory_bytes=_memory_bytes(),
                gpu_bytes=_gpu_bytes(),
            )

    # -- inside -------------------------------------------------------------------------------------------------

    def _loaded(self) -> tuple[Engine, EngineInfo]:
        load = loader(self._spec.engine)
        keep_to_share(self._pool)
        engine = load(self._spec)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(_threads(self._pool))
        tokens = _probe(engine, self._spec)
        return engine, replace(engine.info, overhead_tokens=tokens, notes=(*self._spec.notes, *engine.info.notes))

    def _unload_when_idle(self) -> None:
        """End this process when nobody has asked for long enough; Ray starts a fresh one, which loads at its first
        batch. Nothing else gives all memory back, of a GPU's context too. A batch that comes in this very moment is
        lost and sent again.
        """
        limit_s = cast(float, self._pool.idle_timeout_s)
        while True:
            with self._lock:
                left_s = self._idle_since + limit_s - time.monotonic()
                if not self._stops and self._deployed and left_s <= 0:
                    break
            time.sleep(min(max(left_s, IDLE_POLL_S), MAX_IDLE_POLL_S))
        _end_process()

    def _begin(self, key: str) -> threading.Event:
        with self._lock:
            stop = self._stops[key] = threading.Event()
            if key in self._cancelled:
                self._cancelled.remove(key)
                stop.set()
            return stop

    def _count_down(self, key: str, limit_s: float) -> None:
        """The work begins, and counts as hung after `limit_s`."""
        with self._lock:
            if key in self._stops:
                self._due[key] = time.monotonic() + limit_s

    def _end(self, key: str) -> None:
        with self._lock:
            del self._stops[key]
            self._due.pop(key, None)
            self._idle_since = time.monotonic()
            if key != "load":
                self._requests += 1
                self._last_work = time.time()

    def _count(self, parcel: Parcel) -> None:
        with self._lock:
            for answers in parcel:
                if isinstance(answers, Delta):
                    continue
                self._rows += len(answers.rows)
                self._prompt_tokens += int(sum(answers.prompt_tokens))
                self._completion_tokens += int(sum(answers.completion_tokens))


def _probe(engine: Engine, spec: ModelSpec) -> int:
    """Answer one row, so that a model that loads and cannot run is found when it is deployed; its prompt's tokens."""
    options, prompt = probe(engine.info.task)
    batch = Batch(0, options.over(spec.defaults), [prompt])
    pieces = [piece for piece in engine.run(batch, threading.Event()) if isinstance(piece, Answers)]
    for piece in pieces:
        for error in piece.errors.values():
            if error.code == "truncated":  # a model that thinks first has no room for it in one token
                continue
            raise DeployError(
                f"It loaded but failed on a first row: {error.message}", code=error.code, hint=error.hint
            )
    if [row for piece in pieces for row in piece.rows] != [0]:
        raise DeployError("It loaded but gave no answer to a first row.", code="probe_failed")
    return int(sum(sum(piece.prompt_tokens) for piece in pieces))


def _end_process() -> None:
    """End this process and its children, of engines that work in processes of their own; Ray starts a new one."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _restarted() -> bool:
    ray = sys.modules.get("ray")  # not there when the class is used without Ray
    return bool(ray and ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed)


def _threads(pool: PoolSpec) -> int:
    return max(1, int(pool.cpus_per_worker))


def keep_to_share(pool: PoolSpec) -> None:
    """A worker that reserves a part of a GPU takes no more than that part of its memory."""
    torch, share = sys.modules.get("torch"), pool.gpus_per_worker or 0.0
    if torch and 0 < share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


def _memory_bytes() -> int:
    """Resident memory; Linux tells apart what is shared with Ray's object store, mapped into every worker."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            sizes = dict(line.split(":", 1) for line in status)
        return 1024 * (int(sizes["VmRSS"].split()[0]) - int(sizes["RssShmem"].split()[0]))
    except (OSError, KeyError):
        return int(psutil.Process().memory_info().rss)


def _gpu_bytes() -> int:
    torch = sys.modules.get("torch")
    if not torch or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_reserved(device) for device in range(torch.cuda.device_count()))
