"""Training jobs on the cluster: one named actor for each, which outlives the statement that started it.

All that is told of a job stands in its folder. Ray is only needed to start one, and to end one that does not listen;
whether one still lives is seen from its process, or on another machine from the sign of life it gives, so that a job
of another program's cluster is told of truly.

The actor drives the job and holds the lock of its folder; the training itself runs in processes of its own.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import psutil

from runtime.cluster import actors
from runtime.cluster.connection import (
    NAMESPACE,
    ClusterInfo,
    cluster_address,
    connect,
    nodes_available,
    nodes_total,
    ray,
)
from runtime.cluster.failure import Failure, failure
from runtime.cluster.placement import demand, fitting
from runtime.cluster.training import END_S, release, train_on_ranks
from runtime.errors import Cancelled, DeployError, ErrorInfo, SqlextError, UserError
from runtime.spec import ModelSpec, PoolSpec
from runtime.training.folder import ENDING_S, JobFolder, JobRequest
from runtime.training.plan import TrainingPlan
from runtime.training.report import write_report
from runtime.training.whole import is_full

Status: TypeAlias = dict[str, Any]
"""What status.json says, and `state` as it is."""

OVER = ("finished", "failed", "cancelled", "lost")
START_TIMEOUT_S = 60.0
POLL_S = 0.1
CANCEL_S = END_S + 10.0  # its ranks have come to the end of their step and written a checkpoint, or are ended
BEAT_S = 5.0
LOST_AFTER_S = 120.0  # without a sign of life from another machine; clocks may differ by less


class TrainingJob:
    """The driver of one job, in an actor's process.

    Args:
        path: the job's folder.
    """

    def __init__(self, path: str) -> None:
        self._folder = JobFolder(Path(path))
        self._lock: BinaryIO

    def begin(self, request: JobRequest, train: Callable[[TrainingPlan], None]) -> None:
        """Train in a thread; the actor ends with it.

        Raises:
            UserError: job_running: another process has the job; nothing of it was touched.
            Fatal: job_folder: the folder is not on this machine.
        """
        self._folder.require()
        self._lock = self._folder.take()
        take_over(self._folder, request, cluster_address())
        self._folder.take_output()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        threading.Thread(target=self._beat, name="sqlext-beat", daemon=True).start()
        threading.Thread(target=self._run, args=(train,), name="sqlext-job").start()

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # a full disk, or a folder that somebody has removed
                self._folder.beat()
            time.sleep(BEAT_S)

    def _run(self, train: Callable[[TrainingPlan], None]) -> None:
        try:
            run(self._folder, train)
        finally:
            ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def take_over(folder: JobFolder, request: JobRequest, cluster: str) -> None:
    """Write down that this process drives the job from now on; what a killed one has left is cleared away."""
    folder.sweep()
    folder.uncancel()
    folder.ask(request)
    me, said = psutil.Process(), folder.status()
    killed_s = max(0.0, folder.last_beat - said["began"]) if said.get("began") else 0.0
    folder.update(
        state="queued",
        error=None,
        ended=None,
        began=None,
        seconds=round(said.get("seconds", 0.0) + killed_s, 3),
        host=socket.gethostname(),
        pid=me.pid,
        process_started=me.create_time(),
        cluster=cluster,
        queued=time.time(),
    )
    folder.beat()


def run(folder: JobFolder, train: Callable[[TrainingPlan], None]) -> None:
    """Train by the folder's request and write down how it went; raises nothing."""
    log = logging.getLogger("sqlext.training")
    began = time.time()
    try:
        folder.update(state="running", started=folder.status().get("started") or began, began=began)
        log.info("job %s begins", folder.id)
        train(folder.request().plan)
        if folder.cancelled and not folder.final.is_dir():
            raise Cancelled("The training was cancelled.")
        ended: Status = {"state": "finished", "model": str(folder.final), "seconds_left": 0}
    except Cancelled:
        ended = {"state": "cancelled"}
    except BaseException as error:  # whatever it is, the job's end is written down
        failed = _failure(folder, error)
        ended = {"state": "failed", "error": {"kind": failed.kind, **asdict(failed.info)}}
        log.error("%s\n%s", failed.info, "".join(traceback.format_tb(error.__traceback__)))
    _report(folder)
    spent = folder.status().get("seconds", 0.0) + time.time() - began
    _end_with(folder, {**ended, "began": None, "ended": time.time(), "seconds": round(spent, 3)})
    log.info("job %s: %s", folder.id, ended["state"])


def _end_with(folder: JobFolder, ended: Status) -> None:
    """Write down how a job has ended, also on a disk without room."""
    try:
        folder.update(**ended)
    except OSError:
        folder.update_in_place(**ended)


def free_cpus(ranks: int) -> float:
    """CPUs that each of `ranks` takes now; at least a half. Connects when needed.

    All that are free, but for half a CPU of each, so that a model can be deployed, or another job begin, beside them.
    """
    connect()
    return _whole_cpus(nodes_available(), ranks) - 0.5


def _whole_cpus(nodes: Sequence[dict[str, float]], ranks: int) -> int:
    """Whole CPUs that each of `ranks` can have on these nodes; at least 1."""
    most = int(max((node.get("CPU", 0.0) for node in nodes), default=0.0))
    return next((cpus for cpus in range(most, 1, -1) if fitting({"CPU": cpus}, nodes, ranks) >= ranks), 1)


def require_fit(plan: TrainingPlan, hint: str = "") -> None:
    """Check that the cluster is large enough for the ranks of a plan; whether they must wait is not asked.

    Args:
        hint: what to do instead; '' = to change the settings.

    Raises:
        DeployError: no_room.
    """
    pool = PoolSpec(
        num_workers=plan.ranks,
        gpus_per_worker=plan.gpus_per_rank,
        cpus_per_worker=plan.cpus_per_rank,
        resources=tuple(sorted(plan.resources.items())),
    )
    need = demand(pool)
    if (most := fitting(need, nodes_total(), plan.ranks)) >= plan.ranks:
        return
    each = ", ".join(f"{amount:g} {name}" for name, amount in need.items())
    less = '"num_gpus=0" "num_workers=' if plan.gpus_per_rank else '"num_workers='
    raise DeployError(
        f"The cluster is too small for a training in {plan.ranks} ranks with {each} each: {most} of them fit.",
        code="no_room",
        hint=hint or f'Type `!llm setup {less}{max(1, most)}";`, or lower cpus_per_worker.',
    )


def start(folder: JobFolder, request: JobRequest, ray_address: str | None) -> ClusterInfo:
    """Start the job of a folder that has its rows; returns when its process runs.

    Raises:
        UserError: the cluster cannot be reached; job_running.
        DeployError: the job's process does not start.
        Fatal: job_folder.
    """
    connected = connect(ray_address)
    job = ray.remote(TrainingJob).options(
        name=_actor_name(folder), namespace=NAMESPACE, lifetime="detached", num_cpus=0, max_restarts=0
    )
    begun, actor = False, None
    try:
        actor = _made(job, folder)
        ray.get(actor.begin.remote(request, train_on_ranks), timeout=START_TIMEOUT_S)
        begun = True
    except (ray.exceptions.RayError, ValueError) as error:
        raise _not_begun(folder, error) from None
    finally:
        if actor is not None and not begun:  # Ctrl-C too
            actors.end([actor])
    return connected


def _made(job: Any, folder: JobFolder) -> actors.Handle:
    """The actor of a job; Ray gives its name when the one of an earlier start is gone.

    Raises:
        ValueError: it lives.
    """
    deadline = time.monotonic() + ENDING_S
    while True:
        try:
            return job.remote(str(folder.path))
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def _not_begun(folder: JobFolder, error: Exception) -> SqlextError:
    if isinstance(error, ValueError) and not isinstance(error, ray.exceptions.RayError):
        return UserError(f'The job "{folder.id}" is running.', code="job_running")  # Ray gives a name once
    cause = getattr(error, "cause", None)
    if isinstance(cause, SqlextError):
        return cause
    return DeployError(
        f'The process of the job "{folder.id}" did not start.',
        code="job_start",
        hint="On a cluster, the same version of this package must be installed on every machine.",
    )


def resume(folder: JobFolder, ray_address: str | None) -> ClusterInfo:
    """Let a job that failed, was cancelled or got lost go on from its newest whole checkpoint.

    Raises:
        UserError: job_running, job_finished, job_unreadable.
        DeployError: no_room: the cluster is smaller than the one that it began on, by more than CPUs of a rank.
    """
    request = folder.request()
    state = status(folder)["state"]
    if state == "finished":
        raise UserError(
            f'The job "{folder.id}" has finished.',
            code="job_finished",
            hint=f'Deploy its model: RUN command AS LLM.`{folder.final}` WHERE action="infer" AND udfName="chat";',
        )
    if state not in OVER:
        raise UserError(
            f'The job "{folder.id}" is {state}.',
            code="job_running",
            hint=f'Wait for it: !llm wait "{folder.id}";',
        )
    connect(ray_address)
    cpus = float(_whole_cpus(nodes_total(), request.plan.ranks))
    plan = replace(request.plan, cpus_per_rank=min(request.plan.cpus_per_rank, cpus))
    require_fit(plan, hint="Let it go on where they fit, or start a training with fewer ranks.")
    return start(folder, replace(request, plan=plan), ray_address)


def status(folder: JobFolder) -> Status:
    """What is known of a job; its state is 'lost' when its process has gone without a word."""
    said = {"state": "lost", **folder.status()}
    if said["state"] in OVER or _lives(folder, said):
        return said
    said = {"state": "lost", **folder.status()}  # it may have ended in between
    return said if said["state"] in OVER else {**said, "state": "lost"}


def error_of(said: Status) -> SqlextError | None:
    """The error that a job has failed with; None for one that has not."""
    if said["state"] != "failed":
        return None
    told = said["error"]
    return Failure(told["kind"], ErrorInfo(told["code"], told["message"], told["hint"])).error()


def wait(folder: JobFolder, tick: Callable[[Status], None]) -> Status:
    """Wait until a job is over.

    Args:
        tick: called some times a second from this thread; may raise to stop waiting.

    Returns:
        Its last status.
    """
    while (said := status(folder))["state"] not in OVER:
        tick(said)
        time.sleep(POLL_S)
    return said


def cancel(folder: JobFolder, tick: Callable[[Status], None]) -> Status:
    """Stop a job after its next step, whose checkpoint it writes; one that does not listen is ended.

    Args:
        tick: see `wait`.

    Returns:
        Its last status. It still runs when it did not listen and is on a cluster that this process has no part in.
    """
    deadline = time.monotonic() + CANCEL_S
    folder.cancel()
    while (said := status(folder))["state"] not in OVER and time.monotonic() < deadline:
        tick(said)
        time.sleep(POLL_S)
    if said["state"] not in OVER and _end(folder, said):
        folder.update(state="cancelled", ended=time.time())
        said = status(folder)
    return said


def _end(folder: JobFolder, said: Status) -> bool:
    """End the job's processes, when they are on the cluster that this process is connected to."""
    if not (ray.is_initialized() and cluster_address() == said.get("cluster")):
        return False
    actors.end(actors.handles([_actor_name(folder)]))
    release(folder)
    return True


def _lives(folder: JobFolder, said: Status) -> bool:
    """Whether the process that a status tells of is there; one on another machine, if it has lately said so."""
    if said.get("pid") is None:
        return time.time() - said.get("queued", 0.0) < 2 * START_TIMEOUT_S
    if said["host"] != socket.gethostname():
        return time.time() - folder.last_beat < LOST_AFTER_S
    try:
        return abs(psutil.Process(said["pid"]).create_time() - said["process_started"]) < 1.0
    except psutil.NoSuchProcess:
        return False


def _actor_name(folder: JobFolder) -> str:
    return f"job:{folder.id}"


def _failure(folder: JobFolder, error: BaseException) -> Failure:
    """`error` as data; ours keep their words."""
    known = failure(error, ModelSpec(folder.id, "training"))
    if isinstance(error, SqlextError):
        return known
    again = f'!llm resume "{folder.id}"; goes on from the last whole checkpoint.'
    if isinstance(error, OSError) and is_full(error):
        return _fatal("disk_full", "The disk of the job's folder is full.", f"Make room; {again}")
    if known.info.code == "out_of_memory":
        less = "Use a smaller per_device_train_batch_size or max_seq_length, gradient_checkpointing, or quantization."
        return _fatal("out_of_memory", "The training ran out of memory.", less)
    return _fatal("training_failed", known.info.message, f'!llm logs "{folder.id}"; tells more; {again}')


def _fatal(code: str, message: str, hint: str) -> Failure:
    return Failure("Fatal", ErrorInfo(code, message, hint))


def _report(folder: JobFolder) -> None:
    """Write the page with the curves; a job is no worse without it."""
    try:
        write_report(folder)
    except Exception as error:
        logging.getLogger("sqlext.training").warning("no report: %s", type(error).__name__)
