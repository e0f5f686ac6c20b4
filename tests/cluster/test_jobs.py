"""A job's process and its folder: how it begins, ends, fails, is stopped, lost and goes on."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_training
import psutil
import pytest

from runtime import cluster
from runtime.cluster import jobs
from runtime.errors import Cancelled, DeployError, Fatal, UserError
from runtime.training.folder import JobFolder, JobRequest, new_folder
from runtime.training.plan import TrainingPlan


@pytest.fixture
def job(ray_cluster: cluster.ClusterInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """job(order): a started job of the fake training."""
    monkeypatch.setattr(jobs, "train_on_ranks", fake_training.train)
    made: list[JobFolder] = []

    def begin(order: str) -> JobFolder:
        folder = new_folder(tmp_path, "sft", order)
        made.append(folder)
        jobs.start(folder, JobRequest(TrainingPlan(str(folder.path), "sft"), name=order), None)
        return folder

    yield begin
    for folder in made:
        if jobs.status(folder)["state"] not in jobs.OVER:
            os.kill(folder.status()["pid"], 9)


KEY = "verysecretverysecret"


def silent(said: jobs.Status) -> None:
    pass


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not psutil.pid_exists(pid)


def test_a_job_runs_in_a_process_of_its_own_and_leaves_nothing_but_its_folder(job: Any) -> None:
    """State, figures, log and report stand in the folder; the process is gone."""
    folder = job("run")
    said = jobs.wait(folder, silent)
    assert (said["state"], said["step"], said["model"]) == ("finished", 5, str(folder.final))
    assert said["pid"] != os.getpid()
    assert said["ended"] >= said["started"] > 0
    log = "\n".join(folder.log_lines(50))
    assert "printed by the training" in log
    assert "logged by the training" in log
    assert "<svg" in folder.report.read_text()
    assert gone(said["pid"])


def test_progress_is_told_while_one_waits(job: Any) -> None:
    """Who waits sees each state; raising stops the waiting and not the job."""
    folder = job("wait")
    seen = []

    def tick(said: jobs.Status) -> None:
        seen.append(said["state"])
        if said.get("step") == 5:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        jobs.wait(folder, tick)
    assert "running" in seen
    assert jobs.status(folder)["state"] == "running"
    assert jobs.cancel(folder, silent)["state"] == "cancelled"


def test_a_job_that_does_not_listen_is_ended(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time to stop by itself its process is killed; the state is the same."""
    monkeypatch.setattr(jobs, "CANCEL_S", 0.5)
    folder = job("deaf")
    assert jobs.cancel(folder, silent)["state"] == "cancelled"
    assert gone(folder.status()["pid"])


@pytest.mark.parametrize(
    ("order", "kind", "code", "message"),
    [
        ("raise", Fatal, "training_failed", "RuntimeError in fake_training.py"),
        ("user", UserError, "training_columns", "The rows are wrong."),
        ("full", Fatal, "disk_full", "The disk of the job's folder is full."),
    ],
)
def test_a_failure_is_told_with_its_code_and_hint(
    job: Any, order: str, kind: type[Exception], code: str, message: str
) -> None:
    """Our own errors keep their words; others name the place; the curves until then are there."""
    folder = job(order)
    said = jobs.wait(folder, silent)
    error = jobs.error_of(said)
    assert isinstance(error, kind)
    assert error is not None
    assert error.code == code
    assert error.message.startswith(message)
    assert error.hint
    assert folder.report.exists()


def test_a_killed_job_is_lost_and_goes_on(job: Any) -> None:
    """kill -9 of its process: the state says so without asking the process; resumed, it does the steps that remain."""
    folder = job("die")
    assert jobs.wait(folder, silent)["state"] == "lost"
    jobs.resume(folder, None)
    said = jobs.wait(folder, silent)
    assert (said["state"], said["step"]) == ("finished", 5)
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3, 4, 5]


def test_a_job_of_a_machine_that_is_gone_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process cannot be seen from here; it counts as lost when it has given no sign of life for two minutes."""
    monkeypatch.setattr(jobs, "CANCEL_S", 0.3)
    folder = new_folder(tmp_path, "sft", "x")
    folder.update(state="running", pid=os.getpid(), process_started=0.0, host="another-machine", cluster="there:1")
    folder.beat()
    assert jobs.status(folder)["state"] == "running"
    assert jobs.cancel(folder, silent)["state"] == "running"
    silent_since = time.time() - jobs.LOST_AFTER_S - 1
    os.utime(folder.path / "alive", (silent_since, silent_since))
    assert jobs.status(folder)["state"] == "lost"
    assert jobs.wait(folder, silent)["state"] == "lost"


def test_a_running_job_gives_signs_of_life(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when its training tells nothing for long."""
    folder = job("wait")
    first = folder.last_beat
    assert first > 0
    deadline = time.monotonic() + 4 * jobs.BEAT_S
    while folder.last_beat == first and time.monotonic() < deadline:
        time.sleep(0.1)
    assert folder.last_beat > first
    jobs.cancel(folder, silent)


def test_one_process_alone_drives_a_job(job: Any, tmp_path: Path) -> None:
    """Who comes second, as from another program's cluster, gets an error and changes nothing."""
    folder = new_folder(tmp_path, "sft", "run")
    folder.ask(JobRequest(TrainingPlan(str(folder.path), "sft"), name="run"))
    folder.update(state="lost")
    before = (folder.path / "status.json").read_bytes()
    with folder.take():
        with pytest.raises(UserError) as caught:
            jobs.resume(folder, None)
        assert caught.value.code == "job_running"
        assert (folder.path / "status.json").read_bytes() == before
    jobs.resume(folder, None)
    assert jobs.wait(folder, silent)["state"] == "finished"


def test_ctrl_c_while_a_job_starts_leaves_no_process(
    ray_cluster: cluster.ClusterInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor would train on, in a folder that is gone."""
    import ray

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    folder = new_folder(tmp_path, "sft", "wait")
    monkeypatch.setattr(ray, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jobs.start(folder, JobRequest(TrainingPlan(str(folder.path), "sft"), name="wait"), None)
    monkeypatch.undo()
    assert jobs.actors.handles([f"job:{folder.id}"]) == []


def test_what_a_killed_driver_left_is_cleared_away_and_its_time_counted(tmp_path: Path) -> None:
    """Who takes a job over: no half-written file stays, no error of before, and the seconds add up."""
    folder = new_folder(tmp_path, "sft", "x")
    for left in (folder.path / ".status.json.77.unfinished", folder.models / ".checkpoint-3.unfinished" / "x"):
        left.parent.mkdir(exist_ok=True)
        left.touch()
    folder.cancel()
    folder.stop_after(7)
    folder.update(state="running", seconds=5.0, began=1000.0, ended=900.0, error={"code": "x"})
    folder.beat()
    os.utime(folder.path / "alive", (1050.0, 1050.0))
    jobs.take_over(folder, JobRequest(TrainingPlan(str(folder.path), "sft")), "here:1")
    said = folder.status()
    assert (said["state"], said["seconds"], said["ended"], said["error"]) == ("queued", 55.0, None, None)
    assert (folder.cancelled, folder.stop_at) == (False, None)
    assert not [*folder.path.rglob(".*")]


def test_a_smaller_cluster_takes_a_job_over_or_says_that_it_cannot(job: Any, tmp_path: Path) -> None:
    """Fewer CPUs are a slower training; too few GPUs are an error, and no waiting for ever."""
    folder = new_folder(tmp_path, "sft", "run")
    plan = TrainingPlan(str(folder.path), "sft", cpus_per_rank=64.0)
    folder.ask(JobRequest(plan, name="run"))
    folder.update(state="lost")
    jobs.resume(folder, None)
    assert jobs.wait(folder, silent)["state"] == "finished"
    assert folder.request().plan.cpus_per_rank == 4.0
    folder.ask(JobRequest(replace(plan, ranks=12, gpus_per_rank=1.0), name="run"))
    folder.update(state="lost")
    with pytest.raises(DeployError, match="too small") as caught:
        jobs.resume(folder, None)
    assert "fewer ranks" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("free", "ranks", "each", "threads"),
    [([4], 1, 3.5, 4), ([0.5], 1, 0.5, 1), ([4], 2, 1.5, 2), ([2, 2], 2, 1.5, 2)],
)
def test_a_job_leaves_room_for_a_model_or_another_job(
    ray_cluster: cluster.ClusterInfo,
    monkeypatch: pytest.MonkeyPatch,
    free: list[float],
    ranks: int,
    each: float,
    threads: int,
) -> None:
    """It reserves what is free but for half a CPU a rank, and computes on all of it; the next one takes the rest."""
    monkeypatch.setattr(jobs, "nodes_available", lambda: [{"CPU": amount} for amount in free])
    assert jobs.free_cpus(ranks) == each
    assert TrainingPlan("", "sft", cpus_per_rank=each).threads == threads


def test_an_end_is_told_on_a_disk_without_room(small_disk: Path) -> None:
    """Neither the report nor the status needs room that is not there; nothing half written stays."""
    folder = new_folder(small_disk, "sft", "x")
    folder.ask(JobRequest(TrainingPlan(str(folder.path), "sft")))

    def train(plan: TrainingPlan) -> None:
        folder.note({"step": 1, "loss": 0.5})
        with (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 512)

    jobs.run(folder, train)
    said = folder.status()
    assert (said["state"], said["error"]["code"]) == ("failed", "disk_full")
    assert not [*folder.path.rglob(".*.unfinished")]


def test_a_job_folder_is_its_owners_alone(tmp_path: Path) -> None:
    """Rows and keys may stand in it."""
    assert new_folder(tmp_path / "root", "sft", "x").path.stat().st_mode & 0o777 == 0o700


def test_a_cancelled_job_goes_on(job: Any) -> None:
    """The wish to stop is taken back."""
    folder = job("wait")
    jobs.cancel(folder, silent)
    jobs.resume(folder, None)
    assert not folder.cancelled
    assert jobs.status(folder)["state"] in ("queued", "running")
    jobs.cancel(folder, silent)


def test_only_a_job_that_is_over_and_not_finished_goes_on(job: Any) -> None:
    """A running or finished one is an error that says what to do instead."""
    running, finished = job("wait"), job("run")
    jobs.wait(finished, silent)
    with pytest.raises(UserError, match="has finished") as caught:
        jobs.resume(finished, None)
    assert caught.value.code == "job_finished"
    with pytest.raises(UserError, match="is running") as caught:
        jobs.resume(running, None)
    assert caught.value.code == "job_running"
    jobs.cancel(running, silent)


def test_a_plan_that_no_cluster_can_hold_is_refused(ray_cluster: cluster.ClusterInfo) -> None:
    """Before anything starts, with what to type."""
    plan = TrainingPlan("", "sfft", ranks=12, gpus_per_rank=1.0)
    with pytest.raises(DeployError, match="12 ranks with 1 CPU, 1 GPU each: 4 of them fit") as caught:
        jobs.require_fit(plan)
    assert "num_workers=4" in str(caught.value.hint)


def test_a_failure_never_shows_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a library puts into its message is redacted, in the status and in the log."""

    def train(plan: TrainingPlan) -> None:
        raise RuntimeError(f"no access to s3://user:{KEY}@bucket")

    folder = new_folder(tmp_path, "sft", "x")
    folder.ask(JobRequest(TrainingPlan(str(folder.path), "sft")))
    records: list[str] = []
    monkeypatch.setattr(logging.getLogger("sqlext.training"), "error", lambda *said: records.append(str(said)))
    jobs.run(folder, train)
    told = (folder.path / "status.json").read_text() + "".join(records)
    assert "failed" in told
    assert KEY not in told
