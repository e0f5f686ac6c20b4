"""Several ranks on the cluster: the same weights as one, another start when one dies, and nothing left behind."""

from __future__ import annotations

import importlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import psutil
import pytest
import ranks
from ranks import PARAMETERS, TEXTS

from runtime import cluster
from runtime.cluster import training
from runtime.cluster.training import release, train_on_ranks
from runtime.errors import Cancelled, Fatal, SqlextError, WorkerLost
from runtime.training import loop
from runtime.training.folder import JobFolder
from runtime.training.plan import TrainingPlan

LONG = {**PARAMETERS, "num_train_epochs": 20.0, "save_steps": 10}
PARTS = (TEXTS[:20], TEXTS[20:])
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(models.language_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: str) -> dict[str, Path]:
    """Folders of finetune_model, without a cluster: by one rank, and by two with FSDP and from a table in parts."""
    root = tmp_path_factory.mktemp("jobs")

    def job(name: str, **more: Any) -> TrainingPlan:
        said = {"rows": TEXTS, "model": model, "parameters": PARAMETERS, "ranks": 2, **more}
        return ranks.job(root / name, **said)

    loop.train(job("single", ranks=1, parameters={**PARAMETERS, "per_device_train_batch_size": 4}))
    loop.train(job("lone", ranks=1, parameters=LONG))
    fsdp = {**PARAMETERS, "strategy": "fsdp"}
    begun = job("resumed", parameters={**fsdp, "max_steps": 8})
    rest = TrainingPlan(begun.folder, "sfft", model, parameters=fsdp, ranks=2)
    parts = job("parts", rows=(), parts=PARTS)
    plans = [job("ddp"), job("long", parameters=LONG), parts, job("fsdp", parameters=fsdp), begun, rest]
    assert ranks.train(plans, 2) == [""] * len(plans)
    return {folder.name: folder / "finetune_model" for folder in root.iterdir()}


@pytest.fixture
def cleaned(ray_cluster: cluster.ClusterInfo) -> Iterator[None]:
    """The test leaves as many processes and as much reserved as it found."""
    before, free = _actors(), cluster.free().available
    yield
    _wait_until(lambda: not _actors().keys() - before.keys())
    _wait_until(lambda: cluster.free().available["CPU"] >= free["CPU"])


def _actors() -> dict[str, tuple[str, int]]:
    """Class and process of every living actor, without the one that Ray keeps for each cluster that has seen a training."""
    state = importlib.import_module("ray._private.state")
    alive = [(name, actor) for name, actor in state.actors().items() if actor["State"] != "DEAD"]
    found = {name: (actor["ActorClassName"], actor["Pid"]) for name, actor in alive}
    return {name: actor for name, actor in found.items() if actor[0] != "_AutoscalingCoordinatorActor"}


def _rank_pids() -> list[int]:
    return [pid for kind, pid in _actors().values() if kind in ("RayTrainWorker", "LoneRank")]


def _wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, _actors()
        time.sleep(0.02)


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _require_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    import torch

    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


class Running:
    """A training in a thread, as in the process of a job."""

    def __init__(self, plan: TrainingPlan) -> None:
        self.error: SqlextError | None = None
        self._thread = threading.Thread(target=self._run, args=(plan,))
        self._thread.start()

    def _run(self, plan: TrainingPlan) -> None:
        try:
            train_on_ranks(plan)
        except SqlextError as error:
            self.error = error

    def end(self) -> SqlextError | None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.error


@pytest.mark.parametrize("name", ["ddp", "fsdp", "resumed"])
def test_two_ranks_train_what_one_trains(trained: dict[str, Path], name: str) -> None:
    """With half the batch each, in a whole checkpoint; also when FSDP goes on from a checkpoint."""
    _require_equal(_weights(trained[name] / "final"), _weights(trained["single"] / "final"))


def test_an_epoch_of_fsdp_is_a_sharded_checkpoint(trained: dict[str, Path], tmp_path: Path) -> None:
    """Each rank has written its part, and torch reads them as one."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = trained["fsdp"] / "Epoch-2"
    assert len(list(folder.glob("*.distcp"))) == 2
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    _require_equal(torch.load(tmp_path / "whole.pt", weights_only=True), _weights(trained["fsdp"] / "final"))


def test_each_rank_reads_its_part_of_the_table(trained: dict[str, Path], model: str) -> None:
    """All of its rows and no other's; the shorter part begins again, so that both ranks take as many steps."""
    folder = trained["parts"].parent
    read = ranks.rows_read(folder, model)
    assert [set(each) for each in read] == [set(part) for part in PARTS]
    longest = max(len(part) for part in PARTS)
    assert len(read[0]) == len(read[1]) == 2 * longest
    assert JobFolder(folder).status()["steps"] == 2 * longest // PARAMETERS["per_device_train_batch_size"]


def test_ranks_share_the_rows_of_a_table_without_partitions(trained: dict[str, Path], model: str) -> None:
    """Each row once in an epoch, on one rank."""
    read = ranks.rows_read(trained["ddp"].parent, model)
    half = len(TEXTS) // 2
    for epoch in (slice(0, half), slice(half, 2 * half)):
        assert sorted([*read[0][epoch], *read[1][epoch]]) == sorted(TEXTS)


@pytest.mark.usefixtures("cleaned")
@pytest.mark.parametrize(("count", "like"), [(1, "lone"), (2, "long")])
def test_a_rank_that_dies_costs_no_result(
    trained: dict[str, Path], model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, like: str
) -> None:
    """All ranks, or the only one, start again from the newest checkpoint and end as without a death."""
    plan = ranks.job(tmp_path / "job", TEXTS, model=model, parameters=LONG, ranks=count)
    folder = JobFolder(Path(plan.folder))
    running = Running(plan)
    _wait_until(lambda: list(folder.models.glob("checkpoint-*")))
    os.kill(_rank_pids()[-1], signal.SIGKILL)
    assert running.end() is None
    assert re.search(r"start again from step [1-9]", caplog.text)
    _require_equal(_weights(folder.final), _weights(trained[like] / "final"))
    assert folder.status().get("placement_group") is None


@pytest.mark.usefixtures("cleaned")
def test_a_cancelled_training_ends_and_leaves_nothing(model: str, tmp_path: Path) -> None:
    """Also Ray Train's own processes and files are gone; the checkpoints stay."""
    plan = ranks.job(tmp_path / "job", TEXTS, model=model, parameters={**LONG, "num_train_epochs": 1e6}, ranks=2)
    folder = JobFolder(Path(plan.folder))
    running = Running(plan)
    _wait_until(lambda: list(folder.models.glob("checkpoint-*")))
    pids = _rank_pids()
    folder.cancel()
    assert isinstance(running.end(), Cancelled)
    _wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert list(folder.models.glob("checkpoint-*"))
    assert not folder.final.exists()
    assert not (folder.logging / ".ray").exists()


@pytest.mark.usefixtures("cleaned")
def test_an_error_of_a_rank_is_the_error_of_the_job(model: str, tmp_path: Path) -> None:
    """Its own words, once: what would fail again is not started again."""
    parameters = {**PARAMETERS, "learning_rate": 1e30, "max_grad_norm": 0.0}
    plan = ranks.job(tmp_path / "job", TEXTS, model=model, parameters=parameters, ranks=2)
    with pytest.raises(Fatal) as caught:
        train_on_ranks(plan)
    assert caught.value.code == "training_nan"


def test_a_foreign_error_is_logged_without_keys(
    ray_cluster: cluster.ClusterInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class, place and first line; the rest of its text may hold anything."""
    key = "verysecretverysecret"

    def fail(plan: TrainingPlan) -> None:
        raise RuntimeError(f"no access to s3://user:{key}@bucket\nand {key} is in this row")

    plan = ranks.job(tmp_path / "job", TEXTS, model="")
    told: list[str] = []
    monkeypatch.setattr(loop, "train", fail)
    monkeypatch.setattr(JobFolder, "take_output", lambda _: None)
    monkeypatch.setattr(training.logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(training.LOG, "error", lambda form, *said: told.append(form % said))
    with pytest.raises(Fatal) as caught:
        training._rank({"plan": plan})
    assert caught.value.code == "training_failed"
    assert "RuntimeError" in told[0]
    assert key not in told[0] + str(caught.value)


def test_a_rank_without_the_jobs_folder_ends_the_job(ray_cluster: cluster.ClusterInfo, tmp_path: Path) -> None:
    """On its machine the folder is not there; without this the others would wait for it."""
    plan = ranks.job(tmp_path / "job", TEXTS, model="")
    (tmp_path / "job").rename(tmp_path / "elsewhere")
    with pytest.raises(Fatal, match="is not on the machine") as caught:
        training._start_one(plan)
    assert caught.value.code == "job_folder"
    assert not (tmp_path / "job").exists()


def test_a_rank_waits_for_the_one_before_it(ray_cluster: cluster.ClusterInfo, model: str, tmp_path: Path) -> None:
    """When the driver was killed its rank may live for a moment; two would spoil each other's checkpoints."""
    plan = ranks.job(tmp_path / "job", TEXTS, model=model, parameters={**PARAMETERS, "max_steps": 2})
    folder = JobFolder(Path(plan.folder))
    held = folder.take_models()
    assert held
    running = Running(plan)
    _wait_until(lambda: any("waiting for the end" in line for line in folder.log_lines(20)))
    assert not list(folder.models.iterdir())
    held.close()
    assert running.end() is None
    assert folder.status()["step"] == 2


def test_a_training_that_waits_for_room_can_be_cancelled(ray_cluster: cluster.ClusterInfo, tmp_path: Path) -> None:
    """It is queued until all its ranks fit at once."""
    plan = ranks.job(tmp_path / "job", TEXTS, model="", ranks=2, cpus_per_rank=1000.0)
    folder = JobFolder(Path(plan.folder))
    running = Running(plan)
    _wait_until(lambda: folder.status().get("state") == "queued")
    folder.cancel()
    assert isinstance(running.end(), Cancelled)


def test_ranks_that_die_again_and_again_end_the_job(
    ray_cluster: cluster.ClusterInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three starts without a new checkpoint; a start that came to one counts as the first."""
    plan = ranks.job(tmp_path / "job", TEXTS, model="", ranks=2)
    folder, starts = JobFolder(Path(plan.folder)), 0

    def die(*_: object) -> None:
        nonlocal starts
        starts += 1
        if starts == 2:
            (folder.models / "checkpoint-7").mkdir()
            (folder.models / "checkpoint-7" / "trainer_state.json").touch()
        raise WorkerLost("The process of rank 1 ended.")

    monkeypatch.setattr(training, "_start_ranks", die)
    with pytest.raises(Fatal, match="the last one is of step 7") as caught:
        train_on_ranks(plan)
    assert (caught.value.code, starts) == ("rank_lost", 4)


def test_what_a_killed_job_had_reserved_is_given_back(ray_cluster: cluster.ClusterInfo, tmp_path: Path) -> None:
    """Its next start would wait for room that it holds itself."""
    import ray

    group = ray.util.placement_group([{"CPU": 1}])
    ray.get(group.ready())
    (tmp_path / "job").mkdir()
    folder = JobFolder(tmp_path / "job")
    folder.update(placement_group=group.id.hex())
    release(folder)
    _wait_until(lambda: ray.util.placement_group_table(group)["state"] == "REMOVED")
    release(folder)  # once more changes nothing
