"""Deploying fake models, each under its own name, and taking everything down after each test."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from runtime import cluster
from runtime.cluster import Pool
from runtime.spec import Batch, CallOptions, ModelSpec, PoolSpec, Prompt

_numbers = itertools.count(1)
_batches = itertools.count(1)


@pytest.fixture
def name() -> str:
    return f"model_{next(_numbers)}"


@pytest.fixture
def deploy(ray_cluster: cluster.ClusterInfo, name: str) -> Iterator[Callable[..., Pool]]:
    """deploy(engine, workers, path=…, options…, **pool settings): on no GPU and a tenth of a CPU each."""

    def make(engine: str = "load", workers: int = 1, path: str = "", options: dict = {}, **pool: object) -> Pool:  # noqa: B006
        spec = ModelSpec(name, engine if ":" in engine or engine == "echo" else f"fake_engines:{engine}", path)
        spec = ModelSpec(spec.name, spec.engine, path, options=tuple(sorted(options.items())))
        settings = {"num_workers": workers, "gpus_per_worker": 0.0, "cpus_per_worker": 0.1} | pool
        return cluster.deploy(spec, PoolSpec(**settings))

    yield make
    cluster.remove(name)


def batch(*prompts: Prompt) -> Batch:
    return Batch(next(_batches), CallOptions(), prompts)


def outputs(pool: Pool, worker: int, asked: Batch) -> list[object]:
    """The outputs of a batch in the order of its prompts."""
    found: dict[int, object] = {}
    for answers in pool.run(worker, asked):
        found.update(zip(answers.rows, answers.outputs, strict=True))
    return [found[row] for row in range(len(asked.prompts))]


def pids(name: str) -> list[int]:
    return [w.pid for d in cluster.deployments() if d.name == name for w in d.workers if w]
