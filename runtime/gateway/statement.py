"""A statement in flight: how its errors are treated, what it used, whether it was cancelled.

The session makes one for each SQL statement; the gateway reads and fills it from many threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from runtime.errors import ErrorInfo, SqlextError

OnError: TypeAlias = Literal["record", "null", "fail"]
CacheMode: TypeAlias = Literal["on", "off", "read"]

MAX_RECORDED_ERRORS = 10_000  # per statement; what is beyond is still counted


@dataclass(slots=True)
class Usage:
    """What a statement used of one model.

    `rows` asked, of which `reused` needed no call and `errors` failed; `calls` were made, with their tokens as the
    engine counted them; `seconds` the statement waited for the model.
    """

    rows: int = 0
    calls: int = 0
    reused: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A failed row as `llm_errors` shows it: never the row's text, but a key that finds it again.

    `input_key` is the first 16 hex digits of the SHA-256 of the input as text.
    """

    statement: int
    model: str
    input_key: str
    code: str
    message: str


class Statement:
    """State of one running SQL statement.

    Args:
        id: number of the statement in its session; 0 stands for all whose statement is not known.
        on_error: 'record' lists a failed row and gives NULL, 'null' gives NULL, 'fail' stops the statement.
        cache: 'on' uses and keeps results, 'read' uses but does not keep, 'off' neither.
    """

    def __init__(self, id: int = 0, on_error: OnError = "record", cache: CacheMode = "on") -> None:
        self.id = id
        self.on_error = on_error
        self.cache = cache
        self.started = time.monotonic()
        self.answered = 0  # calls this statement waited for and got, for progress; counted under gateways' locks
        self.usage: dict[str, Usage] = {}
        self.failed_rows: list[FailedRow] = []
        self.failure: SqlextError | None = None
        self._cancelled = False
        self._on_cancel: set[Callable[[], None]] = set()
        self._lock = threading.Lock()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Stop: every thread that waits for a model in this statement wakes at once."""
        with self._lock:
            self._cancelled = True
            wake = list(self._on_cancel)
        for callback in wake:
            callback()

    def fail(self, error: SqlextError) -> None:
        """The statement cannot go on: keep the first cause, and wake its other threads."""
        if self.id and not self._cancelled:
            self.failure = self.failure or error
            self.cancel()

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` at `cancel`; the returned function takes it back."""
        with self._lock:
            self._on_cancel.add(callback)
            cancelled = self._cancelled
        if cancelled:
            callback()
        return lambda: self._on_cancel.discard(callback)

    def add(self, model: str, **amounts: float) -> None:
        """Add to the usage of `model`; the names are those of `Usage`."""
        with self._lock:
            usage = self.usage.setdefault(model, Usage())
            for name, amount in amounts.items():
                setattr(usage, name, getattr(usage, name) + amount)

    def record(self, model: str, input_key: str, error: ErrorInfo) -> None:
        """Note a failed row for `llm_errors`."""
        with self._lock:
            if len(self.failed_rows) < MAX_RECORDED_ERRORS:
                self.failed_rows.append(FailedRow(self.id, model, input_key, error.code, error.message))

    @property
    def failed(self) -> int:
        """Rows that failed, of all models."""
        return sum(usage.errors for usage in self.usage.values())
