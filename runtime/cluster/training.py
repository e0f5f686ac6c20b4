"""Training on the cluster: the ranks of a job on Ray Train's workers, an only rank in an actor.

Ray Train starts the processes, tells each its place in the group and sees when one dies; for one rank alone it would
only add processes. It stands alone because what follows from that is decided here: another start from the newest
checkpoint or an end, what the user is told, and that nothing stays behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runtime.cluster.connection import live_nodes, nodes_available, ray
from runtime.cluster.failure import failure
from runtime.cluster.placement import demand, fitting
from runtime.errors import Cancelled, Fatal, SqlextError, WorkerLost
from runtime.spec import ModelSpec, PoolSpec
from runtime.training import loop
from runtime.training.folder import JobFolder, step_of
from runtime.training.plan import TrainingPlan

LOG = logging.getLogger("sqlext.training")
MAX_LOST = 3  # starts in a row that lose a rank before they come to a new checkpoint
END_S = 120.0  # for a rank to end its step and write a checkpoint when the job is cancelled
POLL_S = 0.2

_RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # a busy machine is slow, and there was room
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more process; a machine that goes is a rank that is lost
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths stay what they are
}
_BROKEN_PEER = ("DistBackendError", "DistNetworkError", "DistStoreError")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CAUSE = re.compile(r"[\w.]*(Error|Exception)\b")
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}
_COORDINATOR = "AutoscalingCoordinator"  # name and namespace of an actor that Ray Train leaves on the cluster


def train_on_ranks(plan: TrainingPlan) -> None:
    """Run the plan's ranks until they have ended; in the process of the job.

    A rank that dies takes the others with it, and all start again from the newest whole checkpoint.

    Raises:
        SqlextError: the training failed; what it had saved is intact.
        Cancelled: the folder asks for it.
    """
    folder = JobFolder(Path(plan.folder))
    release(folder)  # what an earlier start of this job had, whose process was killed
    before = step_of(folder.newest_checkpoint())
    lost = 0
    while True:
        _wait_for_room(plan, folder)
        try:
            _start_ranks(plan, folder)
            return
        except WorkerLost as error:
            if folder.cancelled:
                raise Cancelled("The training was cancelled.") from None
            step = step_of(folder.newest_checkpoint())
            lost = 1 if step > before else lost + 1
            before = step
            if lost >= MAX_LOST:
                raise _given_up(error, step) from None
            LOG.warning("%s The ranks start again from step %d.", error.message, step)


def release(folder: JobFolder) -> None:
    """Give back what the ranks of a job have reserved, if they have ended without doing so themselves."""
    reserved = folder.status().get("placement_group")
    if not reserved:
        return
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    with contextlib.suppress(Exception):  # it is gone already, or was on another cluster
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(reserved))))
    folder.update(placement_group=None)


def _wait_for_room(plan: TrainingPlan, folder: JobFolder) -> None:
    """Wait until all ranks fit on the cluster; Ray would wait as well, and not listen.

    Raises:
        Cancelled: the job was asked to stop.
    """
    need, waited = demand(_pool(plan)), False
    while fitting(need, nodes_available(), plan.ranks) < plan.ranks:
        if folder.cancelled:
            raise Cancelled("The training was cancelled.")
        if not waited:
            LOG.info("waiting for %d × %s", plan.ranks, need)
            folder.update(state="queued")
        waited = True
        time.sleep(POLL_S)
    if waited:
        folder.update(state="running")


def _pool(plan: TrainingPlan) -> PoolSpec:
    resources = tuple(sorted(plan.resources.items()))
    return PoolSpec(plan.ranks, 1, plan.gpus_per_rank, plan.cpus_per_rank, resources)


def _start_ranks(plan: TrainingPlan, folder: JobFolder) -> None:
    """Start all ranks once and wait for them.

    Raises:
        WorkerLost: a rank's process ended, or it did not reach another one.
        SqlextError: what a rank raised.
    """
    if plan.ranks == 1:
        _start_one(plan)
        return
    own = folder.logging / ".ray"
    try:
        # On the main thread Ray Train would take Ctrl-C for itself, and keep its own processes for that.
        with _environment(_RAY_TRAIN), _without_coordinator(), ThreadPoolExecutor(1, "sqlext-ranks") as thread:
            thread.submit(_fit, plan, own).result()
    finally:
        shutil.rmtree(own, ignore_errors=True)
        folder.update(placement_group=None)


class LoneRank:
    """The only rank of a job, in an actor's process, so that the job outlives it and can start it again."""

    def train(self, plan: TrainingPlan) -> None:
        """Train; raises like `_rank`."""
        os.environ |= _threads(plan)
        _rank({"plan": plan})


def _start_one(plan: TrainingPlan) -> None:
    """Start the only rank and wait for it; raises like `_start_ranks`."""
    need = demand(_pool(plan))
    amounts = {"num_cpus": need.pop("CPU", 0), "num_gpus": need.pop("GPU", 0), "resources": need}
    actor = ray.remote(LoneRank).options(**amounts, max_restarts=0).remote()
    try:
        ray.get(actor.train.remote(plan))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
    except ray.exceptions.RayError:
        cause = WorkerLost("The process of the training ended.", code="rank_lost")
    else:
        return
    finally:
        ray.kill(actor)
    raise cause from None


def _fit(plan: TrainingPlan, storage: Path) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig

    trainer = _trainer()(
        _rank,
        train_loop_config={"plan": plan},
        torch_config=TorchConfig(timeout_s=loop.PEER_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=plan.ranks, use_gpu=plan.gpus_per_rank > 0, resources_per_worker=demand(_pool(plan))
        ),
        run_config=RunConfig(
            name="ranks",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": _variables(plan)},
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        cause = _cause(error)
    else:
        return
    raise cause  # out here, where nothing holds on to Ray Train's processes


def _variables(plan: TrainingPlan) -> dict[str, str]:
    """The environment of a rank."""
    variables = _threads(plan)
    if _on_one_machine() and (loopback := _LOOPBACK.get(sys.platform)):
        variables["GLOO_SOCKET_IFNAME"] = loopback  # gloo would look for the machine's name in the network
    return variables


def _threads(plan: TrainingPlan) -> dict[str, str]:
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(plan.threads))


def _trainer() -> Any:
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            """Without a detached process that would never end where Ray has no dashboard; `release` does its work."""
            every = super()._create_default_callbacks()
            return [each for each in every if not isinstance(each, PlacementGroupCleanerCallback)]

    return Trainer


def _cause(error: Exception) -> SqlextError:
    """Why the ranks have ended: what one of them raised, rather than what followed from it on the others."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    ours = [each for _, each in sorted(failures.items()) if isinstance(each, SqlextError)]
    raised = [each for each in ours if not isinstance(each, WorkerLost)]
    if raised:
        return raised[0]
    if not failures:
        return Fatal(
            f"The ranks did not start: {_last_words(getattr(error, 'controller_failure', error))}",
            code="ranks_start",
            hint="On a cluster, the same version of this package must be installed on every machine.",
        )
    gone = sorted(rank for rank, each in failures.items() if not isinstance(each, SqlextError))
    if gone:
        return WorkerLost(f"The process of rank {gone[0]} ended.", code="rank_lost")
    return ours[0]


def _last_words(error: object) -> str:
    """What an error of Ray's says after the traces of other processes in it, without their colours."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if _CAUSE.match(line)), lines[-1] if lines else "no reason given")[
        :300
    ]


def _given_up(error: WorkerLost, step: int) -> Fatal:
    return Fatal(
        f"{error.message} That happened {MAX_LOST} times without a new checkpoint; the last one is of step {step}.",
        code="rank_lost",
        hint="Often memory ran out: use a smaller per_device_train_batch_size with more gradient_accumulation_steps, "
        "gradient_checkpointing, or fewer ranks on a machine. A smaller save_steps loses less.",
    )


def _rank(config: Mapping[str, Any]) -> None:
    """What the process of a rank runs.

    Raises:
        SqlextError: the training failed, in a form that every process can read.
    """
    plan: TrainingPlan = config["plan"]
    folder = JobFolder(Path(plan.folder))
    rank = os.environ.get("RANK", "0")
    first = rank == "0"
    folder.require()
    folder.take_output()
    logging.basicConfig(
        level=logging.INFO if first else logging.WARNING,
        format=f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s",
        force=True,
    )
    if first and (group := ray.util.get_current_placement_group()):
        folder.update(placement_group=group.id.hex())
    threading.Thread(target=_end_when_cancelled, args=(folder,), daemon=True).start()
    try:
        with _only_writer(folder) if first else contextlib.nullcontext():
            loop.train(plan)
    except SqlextError:
        raise
    except Exception as error:
        LOG.error("%s\n%s", _message(error, folder), "".join(traceback.format_tb(error.__traceback__)))
        raise _portable(error, folder) from None


@contextlib.contextmanager
def _only_writer(folder: JobFolder) -> Iterator[None]:
    """Wait for the end of a rank 0 whose driver was killed, and be the only one.

    Raises:
        Cancelled: the job was asked to stop.
    """
    waits = False
    while (lock := folder.take_models()) is None:
        if folder.cancelled:
            raise Cancelled("The training was cancelled.")
        if not waits:
            LOG.info("waiting for the end of the process that trained before")
        waits = True
        time.sleep(POLL_S)
    with lock:
        yield


def _portable(error: Exception, folder: JobFolder) -> SqlextError:
    """A foreign error as one of ours; one that another rank's end has caused is `WorkerLost`."""
    message, text = _message(error, folder), str(error)
    if type(error).__name__ in _BROKEN_PEER or (
        isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)
    ):
        return WorkerLost(f"A rank lost the connection to another one: {message}", code="rank_lost")
    again = f'!llm resume "{folder.id}"; goes on from the last whole checkpoint.'
    return Fatal(message, code="training_failed", hint=f'!llm logs "{folder.id}"; tells more; {again}')


def _message(error: Exception, folder: JobFolder) -> str:
    """What may be told of a foreign error: class, place, and its first line without keys."""
    return failure(error, ModelSpec(folder.id, "training")).info.message


def _end_when_cancelled(folder: JobFolder) -> None:
    """End this process when the job is cancelled and it does not come to an end by itself."""
    while not folder.cancelled:
        time.sleep(POLL_S)
    time.sleep(END_S)
    os.kill(os.getpid(), signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)


@contextlib.contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Settings that Ray Train takes from the environment, for as long as it starts."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ |= wanted
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _on_one_machine() -> bool:
    """Whether the cluster is one that was started inside a program of ours."""
    return all(node["NodeManagerAddress"] == "127.0.0.1" for node in live_nodes())


@contextlib.contextmanager
def _without_coordinator() -> Iterator[None]:
    """On a cluster of our own, end the process that Ray Train would leave there for an autoscaler."""
    already = _coordinator() is not None
    try:
        yield
    finally:
        if _on_one_machine() and not already and (left := _coordinator()) is not None:
            ray.kill(left)


def _coordinator() -> Any:
    with contextlib.suppress(ValueError):
        return ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
    return None
