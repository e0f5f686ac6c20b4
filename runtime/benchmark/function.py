"""A deployed model function as the target of a load test.

Alone because it goes the way that rows go, through the gateway: calls that wait together share a batch, exactly as in
a query, but nothing is taken from the answers that are kept.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from runtime.benchmark.observation import Observation
from runtime.errors import SqlextError
from runtime.gateway import Gateway, Listener, Outcome, Statement
from runtime.spec import CallOptions

_numbers = itertools.count(-1, -1)  # of statements that belong to no session


class Function:
    """Asks a gateway; each request in flight has a thread that waits for it. Use it in a `with`.

    Args:
        options: of every call, beside the tokens of its answer.
        threads: most requests in flight.
    """

    def __init__(self, gateway: Gateway, options: CallOptions, threads: int) -> None:
        self._gateway = gateway
        self._options = options
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="load")

    def __enter__(self) -> Function:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def ask(self, seen: Observation) -> None:
        """Ask one question and watch its answer; what goes wrong is noted in `seen`."""
        statement = Statement(next(_numbers), cache="off")
        statement.listener = Listener(lambda more, _: seen.piece(time.perf_counter(), len(more)))
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, seen, statement)
        except asyncio.CancelledError:  # it took too long, or the run was ended
            statement.cancel()
            raise

    def _ask(self, seen: Observation, statement: Statement) -> None:
        options = replace(self._options, max_tokens=seen.request.max_tokens or self._options.max_tokens)
        try:
            found = self._gateway.ask(options, [seen.request.prompt], statement)[0]
        except SqlextError as error:
            seen.failed(error.code, error.message)
            return
        finally:
            self._gateway.forget(statement)
        outcome = Outcome._make(found) if found else Outcome(None)
        seen.input_tokens, seen.output_tokens = outcome.prompt_tokens, outcome.completion_tokens
        seen.finish_reason = outcome.finish_reason
        if outcome.error:
            seen.failed(outcome.error.code, outcome.error.message)
