"""A model that nobody asks gives its memory back, and is there again when it is asked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil
import pytest

from runtime import cluster
from runtime.cluster import WorkerInfo
from runtime.cluster.worker import keep_to_share
from runtime.spec import ModelSpec, PoolSpec
from tests.cluster.conftest import batch, outputs

MB = 1024 * 1024


def worker(name: str) -> WorkerInfo | None:
    return next((w for info in cluster.deployments() if info.name == name for w in info.workers), None)


def wait_until(true: Callable[[], bool], timeout_s: float = 60) -> None:
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < timeout_s
        time.sleep(0.1)


def test_an_idle_model_gives_its_memory_back(deploy, name):
    """Its process ends, and with it all it held; the next batch loads it again, as often as that happens."""
    pool = deploy("load_heavy", idle_timeout_s=1.0)
    for text in ("one", "two"):
        loaded = worker(name)
        assert loaded
        assert loaded.memory_bytes > 300 * MB
        wait_until(lambda: bool((now := worker(name)) and not now.ready))
        unloaded = worker(name)
        assert unloaded
        assert not psutil.pid_exists(loaded.pid)
        assert unloaded.deployed
        assert unloaded.memory_bytes < loaded.memory_bytes - 250 * MB
        assert outputs(pool, 0, batch(text)) == [text.upper()]
        assert cluster.exists(name)


def test_a_model_that_works_is_not_idle(deploy):
    """However long a batch takes."""
    pool = deploy("load", idle_timeout_s=0.3)
    assert outputs(pool, 0, batch("wait 2")) == ["WAIT 2"]


def test_a_part_of_a_gpu_is_a_part_of_its_memory(monkeypatch):
    """A worker that reserves a quarter of a GPU tells torch so before it loads."""
    import torch

    said = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", said.append)
    for gpus in (0.25, 1.0, 0.0, None):
        keep_to_share(PoolSpec(gpus_per_worker=gpus))
    assert said == [0.25]


def _gpu_used_mb() -> int:
    import torch

    free, total = torch.cuda.mem_get_info()
    return (total - free) // MB


@pytest.mark.skipif(not os.path.exists("/dev/nvidia0"), reason="This machine has no NVIDIA GPU.")
def test_removing_a_model_gives_the_gpu_back(ray_cluster, name, checkpoints):
    """What it held of the GPU's memory is free again, also when it is only idle."""
    before = _gpu_used_mb()
    spec = ModelSpec(name, "transformers", str(checkpoints["chat"]))
    pool = cluster.deploy(spec, PoolSpec(gpus_per_worker=0.5, idle_timeout_s=2.0))
    assert _gpu_used_mb() > before + 100  # a context alone takes more
    wait_until(lambda: _gpu_used_mb() < before + 50)
    assert outputs(pool, 0, batch("again"))[0] is not None
    cluster.remove(name)
    wait_until(lambda: _gpu_used_mb() < before + 50)
