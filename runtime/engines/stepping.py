"""The thread that steps an engine which schedules by itself: the rows of all batches in flight are in it together.

Alone because such an engine (vLLM, OpenVINO) belongs to one thread, and because here it is decided that it died:
after an exception of a step nobody can say what state it is in, so every batch is told that it is lost, and only a
new process will answer.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

from runtime.errors import EngineLost, ErrorInfo

_log = logging.getLogger(__name__)

Outcome: TypeAlias = tuple[int, Any]
"""A row's index, and what the engine's step said of it, or the ErrorInfo of a row that it refuses."""

POLL_S = 0.05

Result = TypeVar("Result")


class Asked:
    """The rows of one batch in the engine.

    Args:
        is_dead: whether the engine died without a word.

    Attributes:
        box: what the loop says of them, a list for each step; EngineLost when there will be nothing more.
        open: the rows that are not finished, by the name of their request. Only the loop changes it.
    """

    def __init__(self, is_dead: Callable[[], bool]) -> None:
        self._is_dead = is_dead
        self.box: queue.SimpleQueue[list[Outcome] | EngineLost] = queue.SimpleQueue()
        self.open: dict[str, int] = {}

    def outcomes(self, rows: int, stop: threading.Event) -> Iterator[list[Outcome]]:
        """What the loop says, until so many rows have ended or `stop` is set.

        Raises:
            EngineLost: it will say nothing more.
        """
        while rows and not stop.is_set():
            try:
                said = self.box.get(timeout=POLL_S)
            except queue.Empty:
                if self._is_dead():
                    raise EngineLost("The process of the engine ended while it worked.") from None
                continue
            if isinstance(said, EngineLost):
                raise said
            rows -= sum(isinstance(outcome, ErrorInfo) or outcome.finished for _, outcome in said)
            yield said


_Waiting: TypeAlias = Asked | Future[Any] | None


class Loop:
    """Owns vLLM's engine. Thread-safe.

    Args:
        engine: a `vllm.LLMEngine`, or what has its methods; nobody else may touch it from now on.
        name: of the engine, for messages.
        is_dead: whether a process of the engine's own has ended: a step may wait for its word for ever.
    """

    def __init__(self, engine: Any, name: str = "vLLM", is_dead: Callable[[], bool] = lambda: False) -> None:
        self._is_dead = is_dead
        self._name = name
        self._engine = engine
        self._orders: queue.SimpleQueue[tuple[Callable[[], None], _Waiting] | None] = queue.SimpleQueue()
        self._asked: dict[str, Asked] = {}
        self._numbers = itertools.count(1)
        self._closing = False
        self._ending = threading.Lock()  # an order is either carried out or told that the engine is lost
        self._lost: EngineLost | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def ask(self, rows: Mapping[int, tuple[Sequence[int], Any]], adapter: Any = None) -> Asked:
        """Put rows into the engine: by index, the token ids and the SamplingParams of each.

        Args:
            adapter: a `LoRARequest` for all of them.
        """
        asked = Asked(self._is_dead)
        self._order(lambda: self._add(asked, rows, adapter), asked)
        return asked

    def drop(self, asked: Asked) -> None:
        """Nobody wants these rows any more; returns at once."""
        self._order(lambda: self._abort(asked))

    def do(self, work: Callable[[Any], Result]) -> Result:
        """What `work` returns, called with the engine between two steps. Raises as it does.

        Raises:
            EngineLost: the engine died.
        """
        done: Future[Result] = Future()

        def carry() -> None:
            try:
                done.set_result(work(self._engine))
            except Exception as error:
                done.set_exception(error)

        self._order(carry, done)
        while True:
            try:
                return done.result(timeout=POLL_S)
            except TimeoutError:
                if done.done():  # the work's own
                    raise
                if self._is_dead():
                    raise EngineLost("The process of the engine ended.") from None

    def close(self) -> None:
        """End the thread and vLLM's processes."""
        self._orders.put(None)
        self._thread.join()
        engine, self._engine = self._engine, None
        engine.engine_core.shutdown()

    # -- on the loop's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._obey(wait=not self._engine.has_unfinished_requests())
                if self._engine.has_unfinished_requests():
                    self._hand_out(self._engine.step())
        except BaseException as error:  # whatever it is, nothing can be said of the engine's state after it
            self._lose(error)

    def _obey(self, *, wait: bool) -> None:
        """Carry out what was ordered; with `wait`, there is nothing else to do until something is."""
        while wait or not self._orders.empty():
            order = self._orders.get()
            wait = False
            if order is None:
                self._closing = True
                return
            work, waiting = order
            try:
                work()
            except BaseException as error:
                _tell(waiting, self._loss(error))
                raise

    def _add(self, asked: Asked, rows: Mapping[int, tuple[Sequence[int], Any]], adapter: Any) -> None:
        refused: list[Outcome] = []
        for row, (ids, params) in rows.items():
            name = str(next(self._numbers))
            try:
                self._engine.add_request(name, {"prompt_token_ids": list(ids)}, params, lora_request=adapter)
            except (ValueError, TypeError) as error:  # what it cannot do; that it died is another exception
                refused.append((row, self._refusal(error)))
                continue
            asked.open[name] = row
            self._asked[name] = asked
        if refused:
            asked.box.put(refused)

    def _abort(self, asked: Asked) -> None:
        if names := list(asked.open):
            self._engine.abort_request(names)
        for name in names:
            del self._asked[name]
        asked.open.clear()

    def _hand_out(self, outputs: Sequence[Any]) -> None:
        parts: dict[Asked, list[Outcome]] = {}
        for output in outputs:
            if asked := self._asked.get(output.request_id):
                parts.setdefault(asked, []).append((asked.open[output.request_id], output))
                if output.finished:
                    del self._asked[output.request_id], asked.open[output.request_id]
        for asked, part in parts.items():
            asked.box.put(part)

    def _lose(self, error: BaseException) -> None:
        _log.exception("%s ended", self._name)
        with self._ending:
            self._lost = self._loss(error)
        for asked in set(self._asked.values()):
            asked.box.put(self._lost)
        while not self._orders.empty():
            if order := self._orders.get():
                _tell(order[1], self._lost)

    def _loss(self, error: BaseException) -> EngineLost:
        kind = type(error).__name__
        return EngineLost(f"The engine {self._name} ended: {kind}.", hint="It is started again by itself.")

    def _refusal(self, error: Exception) -> ErrorInfo:
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        return ErrorInfo("engine_refused", f"{self._name} refuses the row: {cause[:200]}")

    # -- on any thread ----------------------------------------------------------------------------------------------

    def _order(self, order: Callable[[], None], waiting: _Waiting = None) -> None:
        """Have the loop's thread do it; `waiting` is told when the engine dies before."""
        with self._ending:
            if not self._lost:
                self._orders.put((order, waiting))
                return
        _tell(waiting, self._lost)


def _tell(waiting: _Waiting, lost: EngineLost) -> None:
    if isinstance(waiting, Asked):
        waiting.box.put(lost)
    elif waiting is not None and not waiting.done():
        waiting.set_exception(lost)
