"""One run of a load test: warm up, send, watch.

Alone because it brings the parts together, on an event loop of its own: the thread that waits for it may have one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from runtime.benchmark.endpoint import Endpoint
from runtime.benchmark.function import Function
from runtime.benchmark.load import Load, Target, Tell, drive
from runtime.benchmark.observation import Observation
from runtime.errors import Cancelled
from runtime.gateway import Gateway
from runtime.secrets import Secret
from runtime.spec import CallOptions

MAX_THREADS = 512  # requests that a function can have in flight in an open loop


def measure_endpoint(
    base_url: str, model: str, key: Secret | None, parameters: Mapping[str, Any], load: Load, tell: Tell
) -> list[Observation]:
    """Put the load on an OpenAI-compatible address; see `Endpoint`."""
    endpoint = Endpoint(base_url, model, key, parameters)

    async def measured(heard: Tell) -> list[Observation]:
        async with endpoint:
            return await _measured(endpoint, load, heard)

    return _on_a_loop(measured, tell)


def measure_function(gateway: Gateway, options: CallOptions, load: Load, tell: Tell) -> list[Observation]:
    """Put the load on a deployed function; see `Function`."""
    threads = load.concurrency or min(MAX_THREADS, len(load.requests))
    with Function(gateway, options, threads) as function:
        return _on_a_loop(lambda heard: _measured(function, load, heard), tell)


async def _measured(target: Target, load: Load, tell: Tell) -> list[Observation]:
    if load.warmup:
        warm = replace(load, requests=load.warmup, concurrency=len(load.warmup), arrivals=None)
        await drive(target, warm, lambda *_: tell(0, 0))
    return await drive(target, load, tell)


def _on_a_loop(measure: Callable[[Tell], Coroutine[Any, Any, list[Observation]]], tell: Tell) -> list[Observation]:
    """Run it on a thread of its own; when the caller is interrupted, it ends too."""
    stopped = threading.Event()

    def heard(sent: int, ended: int) -> None:
        if stopped.is_set():
            raise Cancelled("The load test was cancelled.")
        tell(sent, ended)

    with ThreadPoolExecutor(1, thread_name_prefix="load-test") as thread:
        running = thread.submit(lambda: asyncio.run(measure(heard)))
        try:
            return running.result()
        except BaseException:
            stopped.set()
            with suppress(BaseException):
                running.result()
            raise
