"""Deployments: whole or not at all, seen by every process, gone when removed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from runtime import cluster
from runtime.errors import DeployError, UserError
from runtime.spec import ModelSpec, PoolSpec, Task
from tests.cluster.conftest import batch, outputs, pids


def test_a_deployment_describes_itself_and_leaves_no_process(deploy, name):
    """deploy, describe, remove: every field is true, and then every process id is gone."""
    pool = deploy(workers=2, cpus_per_worker=1.0)
    assert (pool.name, pool.generation, pool.workers, pool.info.task) == (name, 1, 2, Task.GENERATE)
    assert pool.info.notes == ("OMP_NUM_THREADS=1",)
    assert outputs(pool, 1, batch("a", "b")) == ["A", "B"]
    (info,) = [d for d in cluster.deployments() if d.name == name]
    assert (info.state, info.generation, info.spec, info.pool, info.info) == (
        "ready",
        1,
        pool.spec,
        pool.pool,
        pool.info,
    )
    first, second = info.workers
    assert (first.index, first.rows, first.requests, first.last_work) == (0, 0, 0, None)
    assert (second.index, second.rows, second.requests, second.completion_tokens) == (1, 2, 1, 2)
    assert (second.ready, second.deployed, second.busy) == (True, True, 0)
    assert second.memory_bytes > 10**7
    assert time.time() - second.last_work < 30
    processes = [psutil.Process(w.pid) for w in info.workers]
    assert cluster.remove(name) is True
    assert not any(process.is_running() for process in processes)
    assert not cluster.exists(name)
    assert cluster.remove(name) is False


def test_cpus_per_worker_decides_the_threads(deploy):
    """Three CPUs give three OpenMP threads; a fraction gives one."""
    assert deploy(cpus_per_worker=3.0).info.notes == ("OMP_NUM_THREADS=3",)


def test_the_engines_own_processes_end_too(deploy, name, tmp_path):
    """A process that an engine started is gone when its model is removed."""
    deploy("load_with_child", path=str(tmp_path / "pid"))
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    assert child.is_running()
    cluster.remove(name)
    assert not child.is_running()


def worker_processes() -> set[int]:
    """Workers of this test run's own cluster, whose processes are our descendants."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "Worker" in process.name():
                found.add(process.pid)
    return found


@pytest.mark.parametrize(
    ("engine", "kind", "code", "text"),
    [
        ("load_user_error", UserError, "no_config", "The folder has no config.json."),
        ("load_foreign_error", DeployError, "engine_failed", "Unpicklable in fake_engines.py"),
        ("load_out_of_memory", DeployError, "out_of_memory", "ran out of memory"),
        ("load_exit", DeployError, "engine_failed", "library says goodbye"),
        ("load_die", DeployError, "worker_died", "ended while its model was loaded"),
        ("load_hang", DeployError, "load_timeout", "after 1 s"),
        ("load_sleep", DeployError, "load_timeout", "after 1 s"),
        ("load_one_of_two", DeployError, "second", "Only one can be."),
        ("load_probe_fails", DeployError, "nan", "The model answers NaN."),
        ("load_silent", DeployError, "probe_failed", "no answer to a first row"),
        ("absent:load", DeployError, "engine_failed", "ModuleNotFoundError"),
    ],
)
def test_a_failed_deployment_leaves_nothing(deploy, name, tmp_path, engine, kind, code, text):
    """One short error with a code, and no actor and no process of it."""
    before = worker_processes()
    with pytest.raises(kind) as raised:
        deploy(engine, workers=2, path=str(tmp_path), load_timeout_s=1.0 if code == "load_timeout" else 60.0)
    assert raised.value.code == code
    assert text in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3
    assert not [d for d in cluster.deployments() if d.name == name]
    assert worker_processes() <= before


def test_an_unknown_engine_is_the_users_error(deploy):
    """The nearest engine is named."""
    with pytest.raises(UserError, match='Did you mean "echo"'):
        cluster.deploy(ModelSpec("x", "ecko"), PoolSpec(gpus_per_worker=0, cpus_per_worker=0.1))
    assert not cluster.exists("x")


@pytest.mark.parametrize(
    ("settings", "text", "hint"),
    [
        ({"workers": 9, "cpus_per_worker": 1.0}, "asked 9 CPU (1 CPU each); there: 4 CPU", "num_workers=4"),
        ({"gpus_per_worker": 5.0}, "5 GPU; there: 4 CPU, 4 GPU", "gpus_per_worker=0"),
        ({"workers": 2, "resources": (("master", 0.6),)}, "1.2 master", "num_workers=1"),
        ({"resources": (("tpu", 1.0),)}, "there: 4 CPU, 0 tpu", "resource.tpu"),
    ],
)
def test_too_much_is_refused_at_once(deploy, settings, text, hint):
    """What was asked, what is there and what to type, in well under a second, with nothing started."""
    began = time.monotonic()
    with pytest.raises(DeployError) as raised:
        deploy(**settings)
    assert time.monotonic() - began < 1
    assert raised.value.code == "no_room"
    assert text in raised.value.message
    assert hint in raised.value.hint


def test_what_is_taken_is_not_free(deploy, name, monkeypatch):
    """A second model that does not fit beside the first is refused and the first goes on."""
    monkeypatch.setattr("runtime.cluster.placement.SETTLE_S", 0.5)
    pool = deploy(gpus_per_worker=3.0)
    with pytest.raises(DeployError, match=r"Too little is free.* free: [\d.]+ CPU, 1 GPU"):
        deploy(gpus_per_worker=2.0)
    assert outputs(pool, 0, batch("a")) == ["A"]


def test_a_gpu_each_where_there_are_gpus(deploy):
    """gpus_per_worker left open is one on a cluster with GPUs."""
    assert deploy(gpus_per_worker=None).pool.gpus_per_worker == 1


def test_what_ray_refuses_is_the_users_error(deploy):
    """Half a GPU may be shared, one and a half may not."""
    with pytest.raises(UserError, match="whole number"):
        deploy(gpus_per_worker=1.5)


@pytest.mark.parametrize("setting", ["num_workers", "worker_concurrency", "gpus_per_worker", "cpus_per_worker"])
def test_a_setting_out_of_range_is_named(deploy, setting):
    """-1 of anything is the user's error."""
    with pytest.raises(UserError, match=setting):
        deploy(**{"workers": 1, setting: -1})


def test_progress_goes_from_starting_to_all_loaded(ray_cluster, deploy, name):
    """The last word is that all workers are ready."""
    seen: list[cluster.DeployProgress] = []
    spec = ModelSpec(name, "fake_engines:load")
    cluster.deploy(spec, PoolSpec(2, gpus_per_worker=0, cpus_per_worker=0.1), progress=seen.append)
    assert seen[0].phase == "starting"
    assert (seen[-1].phase, seen[-1].workers_ready, seen[-1].workers) == ("loading", 2, 2)
    assert [p.seconds for p in seen] == sorted(p.seconds for p in seen)


def test_an_interrupted_deployment_leaves_nothing(deploy, name):
    """Ctrl-C while a model loads ends its processes before it is passed on."""

    def interrupt(progress: cluster.DeployProgress) -> None:
        if progress.phase == "loading":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cluster.deploy(
            ModelSpec(name, "fake_engines:load_sleep"),
            PoolSpec(gpus_per_worker=0, cpus_per_worker=0.1),
            progress=interrupt,
        )
    assert pids(name) == []
    assert not cluster.remove(name)


def test_a_redeployment_leaves_the_old_one_until_it_is_retired(deploy, name):
    """Two generations answer side by side; attach finds the newer; retire ends exactly the older."""
    old, new = deploy(), deploy()
    assert (old.generation, new.generation) == (1, 2)
    assert outputs(old, 0, batch("a")) == outputs(new, 0, batch("a")) == ["A"]
    assert cluster.attach(name).generation == 2
    cluster.retire(old)
    assert [d.generation for d in cluster.deployments() if d.name == name] == [2]
    assert cluster.remove(name, generation=1) is False
    assert outputs(new, 0, batch("b")) == ["B"]


def test_a_failed_redeployment_leaves_the_old_one(deploy, name):
    """What answered before answers after."""
    old = deploy()
    with pytest.raises(DeployError):
        deploy("load_probe_fails")
    assert cluster.attach(name).generation == 1
    assert outputs(old, 0, batch("a")) == ["A"]


def test_six_deployments_of_one_name_at_once(deploy, name):
    """Each gets a generation of its own, whole; the newest is found."""
    with ThreadPoolExecutor(6) as threads:
        pools = list(threads.map(lambda _: deploy(workers=2, cpus_per_worker=0.05), range(6)))
    assert sorted(pool.generation for pool in pools) == [1, 2, 3, 4, 5, 6]
    assert [outputs(pool, 1, batch("a")) for pool in pools] == [["A"]] * 6
    assert cluster.attach(name).generation == 6
    assert len(set(pids(name))) == 12


def test_a_deployment_under_way_is_seen_but_not_used(deploy, name):
    """It is listed as loading, does not exist yet, and can be removed by someone else."""
    errors: list[DeployError] = []

    def load() -> None:
        try:
            deploy("load_sleep")
        except DeployError as error:
            errors.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    while not (listed := [d for d in cluster.deployments() if d.name == name and d.spec]):
        pass
    assert listed[0].state == "loading"
    assert not cluster.exists(name)
    cluster.remove(name)
    thread.join()
    assert [error.code for error in errors] == ["worker_died"]


def test_attach_names_the_nearest_model(deploy, name):
    """A model that is not deployed is the user's error."""
    deploy()
    with pytest.raises(UserError, match=f'Did you mean "{name}"'):
        cluster.attach(f"{name}x")


def test_another_process_attaches_by_address(ray_cluster, deploy, name):
    """It lists the model, runs rows on it, and leaves it deployed."""
    deploy()
    program = f"""
from runtime import cluster
from runtime.spec import Batch, CallOptions
cluster.connect({ray_cluster.address!r})
pool = cluster.attach({name!r})
print([text for answers in pool.run(0, Batch(1, CallOptions(), ["from", "afar"])) for text in answers.outputs])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "['FROM', 'AFAR']", done.stderr
    assert done.stderr == ""
    assert outputs(cluster.attach(name), 0, batch("still")) == ["STILL"]
    assert Path(f"/proc/{pids(name)[0]}").exists()
