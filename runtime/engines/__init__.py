"""Engines: one file each, found by name through the entry-point group ``sqlext.engines``.

An engine loads one checkpoint and turns batches of prompts into answers. To add one, write a module with
``load(spec: ModelSpec) -> Engine`` and name it in the group; another package can do the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

from runtime.errors import UserError, did_you_mean
from runtime.spec import Answers, Batch, Delta, EngineInfo, ModelSpec

GROUP = "sqlext.engines"
EXTRAS = {"vision": "vision", "diffusers": "diffusers", "transcription": "speech", "speech": "speech"}
"""Engines whose packages come with an extra of this package."""


class Engine(Protocol):
    """A loaded model. One thread calls `run` at a time unless the pool's worker_concurrency is above 1."""

    @property
    def info(self) -> EngineInfo:
        """What was loaded and how it runs."""
        ...

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers | Delta]:
        """Answer every row of `batch`, yielding finished rows as they finish.

        A row that cannot be answered is yielded with its error. When `stop` is set the engine ends soon, with
        rows left out. For the rows in `batch.stream`, an engine whose info says `streams` yields a `Delta` whenever
        there is more text, until the row's answer comes; `runtime.engines.telling.Telling` makes them of the text so
        far. An engine that cannot leaves them out.

        Raises:
            OutOfMemory: the batch is too large for the device.
            Retryable, Fatal: the whole batch failed.
        """
        ...

    def count_tokens(self, batch: Batch) -> list[int] | None:
        """Tokens of each prompt of `batch`, exactly as `run` counts `prompt_tokens`; 0 for one that cannot be asked.

        None when the engine cannot know, as may be said by leaving the method out. May be called while `run` works.

        Raises:
            SqlextError: the options of the batch are wrong.
        """
        ...

    def close(self) -> None:
        """Give back the memory."""
        ...


def available() -> dict[str, str]:
    """Names of the installed engines and where each is loaded from."""
    return {point.name: point.value for point in entry_points(group=GROUP)}


def loader(name: str) -> Callable[[ModelSpec], Engine]:
    """The `load` function of the engine called `name`; a name with a colon, ``module:function``, is imported.

    Raises:
        UserError: engine_unknown, no such engine is installed; package_missing, what it needs is not.
    """
    try:
        load: Callable[[ModelSpec], Engine] = require(name).load()
    except ModuleNotFoundError as error:
        if name not in EXTRAS or not error.name:
            raise
        raise UserError(
            f'The engine "{name}" needs the package {error.name.partition(".")[0]}, where the workers run.',
            code="package_missing",
            hint=f'pip install "sqlext[{EXTRAS[name]}]"',
        ) from None
    return load


def require(name: str) -> EntryPoint:
    """Where the engine called `name` is loaded from, without importing it.

    Raises:
        UserError: no such engine is installed.
    """
    if ":" in name:
        return EntryPoint(name, name, GROUP)
    for point in entry_points(group=GROUP, name=name):
        return point
    known = available()
    near = did_you_mean(name, known)
    raise UserError(
        f'There is no engine "{name}".',
        code="engine_unknown",
        hint=(f'Did you mean "{near}"? ' if near else "") + f"Installed: {', '.join(sorted(known))}.",
    )
