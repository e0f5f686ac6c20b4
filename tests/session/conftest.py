"""Connections that speak the language, on the one cluster of the test run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sqlext
from runtime import cluster


@pytest.fixture
def con(ray_cluster: object) -> Iterator[sqlext.Connection]:
    """An in-memory database; what it deployed is gone afterwards."""
    before = {info.name for info in cluster.deployments()}
    connection = sqlext.connect()
    connection.session.notices = []
    connection.session.notify = connection.session.notices.append
    yield connection
    connection.close()
    for info in cluster.deployments():
        if info.name not in before:
            cluster.remove(info.name)


@pytest.fixture
def deploy(con: sqlext.Connection) -> Callable[..., None]:
    """Deploy a checkpoint under a name."""

    def run(path: Path | str, name: str, *settings: str, **options: object) -> None:
        said = "".join(f' AND `{key}`="{value}"' for key, value in options.items())
        setup = " ".join(f'"{setting}"' for setting in settings)
        con.execute(
            f'!llm setup single {setup}; RUN command AS LLM.`{path}` WHERE action="infer" AND udfName="{name}"{said}'
        )

    return run
