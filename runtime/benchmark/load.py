"""The load generator: sends requests at their times and watches what comes back.

Alone because its own delays must not be measured: it is one event loop that does nothing but send and note the time.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from runtime.benchmark.observation import Observation
from runtime.benchmark.workload import Request

TICK_S = 0.1

Ask: TypeAlias = Callable[[Observation], Coroutine[Any, Any, None]]


Tell: TypeAlias = Callable[[int, int], None]
"""Called some times a second with the numbers of sent and of ended requests; what it raises ends the run."""


@dataclass(frozen=True, slots=True)
class Load:
    """What to send to a target, and how: with so many requests in flight, or each at its time.

    Attributes:
        warmup: requests that are sent before, and not counted.
        concurrency: requests in flight; the next one is sent when one ends (closed loop).
        arrivals: seconds from the start, one for each request, whatever becomes of the others (open loop).
        timeout_s: after so many seconds nothing more is sent; requests that were not sent are left out.
        request_timeout_s: a request that takes longer is given up, with the error `timeout`.
    """

    requests: Sequence[Request]
    warmup: Sequence[Request] = ()
    concurrency: int | None = None
    arrivals: Sequence[float] | None = None
    timeout_s: float = 600.0
    request_timeout_s: float = 600.0


class Target(Protocol):
    """What is asked."""

    async def ask(self, seen: Observation) -> None:
        """Send the request of `seen` and note in it what comes; errors are noted, not raised."""
        ...


async def drive(target: Target, load: Load, tell: Tell = lambda sent, ended: None) -> list[Observation]:
    """Send the requests and wait for all that were sent, in the order of the requests. The warm-up is not sent."""
    seen = [Observation(number, request) for number, request in enumerate(load.requests)]
    sent: list[Observation] = []
    ended = 0

    async def ask(one: Observation) -> None:
        nonlocal ended
        sent.append(one)
        one.start = time.perf_counter()
        try:
            async with asyncio.timeout(load.request_timeout_s):
                await target.ask(one)
        except TimeoutError:
            one.failed("timeout", f"There was no whole answer after {load.request_timeout_s:g} s.")
        one.end = time.perf_counter()
        ended += 1

    async def watch() -> None:
        while True:
            tell(len(sent), ended)
            await asyncio.sleep(TICK_S)

    with _no_pauses():
        begun = time.perf_counter()
        until = begun + load.timeout_s
        if load.arrivals is None:
            work = _closed(seen, load.concurrency or 1, until, ask)
        else:
            work = _open(seen, load.arrivals, begun, until, ask)
        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            for task in (working, watching):
                if task.done():
                    task.result()
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)
    tell(len(sent), ended)
    return sorted(sent, key=lambda one: one.number)


async def _closed(seen: Sequence[Observation], concurrency: int, until: float, ask: Ask) -> None:
    waiting = iter(seen)

    async def one_after_the_other() -> None:
        for one in waiting:
            if time.perf_counter() >= until:
                return
            one.due = time.perf_counter()
            await ask(one)

    async with asyncio.TaskGroup() as slots:
        for _ in range(min(concurrency, len(seen))):
            slots.create_task(one_after_the_other())


async def _open(seen: Sequence[Observation], arrivals: Sequence[float], begun: float, until: float, ask: Ask) -> None:
    async with asyncio.TaskGroup() as flying:
        for one, at in zip(seen, arrivals, strict=True):
            one.due = begun + at
            if one.due >= until:
                return
            if (delay := one.due - time.perf_counter()) > 0:
                await asyncio.sleep(delay)
            flying.create_task(ask(one))


@contextmanager
def _no_pauses() -> Iterator[None]:
    """Python's garbage collector would stop the clock of every request for some milliseconds."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
