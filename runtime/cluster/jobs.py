"""Training jobs on the cluster: one named actor for each, which outlives the statement that started it.

All that is told of a job stands in its folder. Ray is only needed to start one, and to end one that does not listen;
whether one still lives is seen from its process, so that a job of another program's cluster is told of truly.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

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
from runtime.cluster.training import release, train_on_ranks
from runtime.errors import Cancelled, DeployError, ErrorInfo, Fatal, SqlextError, UserError
from runtime.spec import ModelSpec, PoolSpec
from runtime.training.folder import JobFolder, JobRequest
from runtime.training.plan import TrainingPlan
from runtime.training.report import write_report

Status: TypeAlias = dict[str, Any]
"""What status.json says, and `state` as it is."""

OVER = ("finished", "failed", "cancelled", "lost")
START_TIMEOUT_S = 60.0
POLL_S = 0.1
CANCEL_S = 60.0  # for a job to come to the end of its step and save what it has; then it is ended


class TrainingJob:
    """The driver of one job, in an actor's process.

    Args:
        path: the job's folder.
    """

    def __init__(self, path: str) -> None:
        self._folder = JobFolder(Path(path))

    def begin(self, train: Callable[[TrainingPlan], None]) -> None:
        """Train in a thread; the actor ends with it."""
        self._folder.take_output()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        me = psutil.Process()
        self._folder.update(host=socket.gethostname(), pid=me.pid, process_started=me.create_time())
        threading.Thread(target=self._run, args=(train,), name="sqlext-job").start()

    def _run(self, train: Callable[[TrainingPlan], None]) -> None:
        try:
            run(self._folder, train)
        finally:
            ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def run(folder: JobFolder, train: Callable[[TrainingPlan], None]) -> None:
    """Train by the folder's request and write down how it went; raises nothing."""
    log = logging.getLogger("sqlext.training")
    began = time.time()
    try:
        folder.update(state="running", started=folder.status().get("started") or began)
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
    folder.update(**ended, ended=time.time(), seconds=round(spent, 3))
    log.info("job %s: %s", folder.id, ended["state"])


def free_cpus(ranks: int) -> int:
    """CPUs that each of `ranks` can have now; at least 1. Connects when needed."""
    connect()
    nodes = nodes_available()
    most = int(max((node.get("CPU", 0.0) for node in nodes), default=0.0))
    return next((cpus for cpus in range(most, 1, -1) if fitting({"CPU": cpus}, nodes, ranks) >= ranks), 1)


def require_fit(plan: TrainingPlan) -> None:
    """Check that the cluster is large enough for the ranks of a plan; whether they must wait is not asked.

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
        hint=f'Type `!llm setup {less}{max(1, most)}";`, or lower cpus_per_worker.',
    )


def start(folder: JobFolder, request: JobRequest, ray_address: str | None) -> ClusterInfo:
    """Start the job of a folder that has its rows; returns when its process runs.

    Raises:
        UserError: the cluster cannot be reached.
        DeployError: the job's process does not start.
    """
    connected = connect(ray_address)
    folder.ask(request)
    folder.update(state="queued", error=None, pid=None, cluster=cluster_address(), queued=time.time())
    job = ray.remote(TrainingJob).options(
        name=_actor_name(folder), namespace=NAMESPACE, lifetime="detached", num_cpus=0, max_restarts=0
    )
    try:
        actor = job.remote(str(folder.path))
        ray.get(actor.begin.remote(train_on_ranks), timeout=START_TIMEOUT_S)
    except ValueError as error:
        raise UserError(f'The job "{folder.id}" is running.', code="job_running") from error
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        actors.end([actor])
        folder.update(state="failed")
        raise DeployError(
            f'The process of the job "{folder.id}" did not start.',
            code="job_start",
            hint="On a cluster, the same version of this package must be installed on every machine.",
        ) from error
    return connected


def resume(folder: JobFolder, ray_address: str | None) -> ClusterInfo:
    """Let a job that failed, was cancelled or got lost go on from its newest whole checkpoint.

    Raises:
        UserError: job_running, job_finished, job_unreadable.
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
    folder.uncancel()
    plan = replace(request.plan, folder=str(folder.path))  # it may have been moved
    return start(folder, replace(request, plan=plan), ray_address)


def status(folder: JobFolder) -> Status:
    """What is known of a job; its state is 'lost' when its process has gone without a word."""
    said = {"state": "lost", **folder.status()}
    if said["state"] in OVER or _lives(said):
        return said
    said = {"state": "lost", **folder.status()}  # it may have ended in between
    return said if said["state"] in OVER else {**said, "state": "lost"}


def error_of(said: Status) -> SqlextError | None:
    """The error that a job has failed with; None for one that has not."""
    if said["state"] != "failed":
        return None
    if not (told := said.get("error")):
        return Fatal("The process of the job did not start.", code="job_start")
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
    """Stop a job after its present step; one that does not listen is ended. Its checkpoints stay.

    Args:
        tick: see `wait`.

    Returns:
        Its last status.
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


def _lives(said: Status) -> bool:
    """Whether the process that a status tells of is there. Of one on another machine nothing else is known."""
    if said.get("pid") is None:
        return time.time() - said.get("queued", 0.0) < 2 * START_TIMEOUT_S
    if said["host"] != socket.gethostname():
        return True
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
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
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
