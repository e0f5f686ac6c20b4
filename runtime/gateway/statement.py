"""A statement in flight: how its errors are treated, what it used, whether it was cancelled.

The session makes one for each SQL statement; the gateway reads and fills it from many threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal, TypeAlias

from runtime.errors import ErrorInfo, Fatal, SqlextError
from runtime.gateway.budget import Budgets
from runtime.gateway.listener import Listener
from runtime.spec import CallOptions, Prompt

OnError: TypeAlias = Literal["record", "null", "fail"]
CacheMode: TypeAlias = Literal["on", "off", "read"]

CACHE_MODES = ("on", "off", "read")
MAX_RECORDED_ERRORS = 10_000  # per statement; what is beyond is still counted


class Mode(Enum):
    """What a run of the statement's query is for."""

    REAL = "real"  # every row waits for its answer
    AHEAD = "ahead"  # calls are noted for the workers; what is not known yet is answered by NULL
    EXPLAIN = "explain"  # calls are counted and not made


@dataclass(slots=True)
class Usage:
    """What a statement used of one model.

    `rows` went through its function, of which `refused` could not be asked and `errors` failed in all; `calls` were
    made, with their tokens as the engine counted them; `cut` of them ended at max_tokens, or were not read to their
    end, `cut_unasked` of these without that anyone had said max_tokens. `seconds` lie between the first batch that
    was sent and the last answer.
    """

    rows: int = 0
    refused: int = 0
    errors: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: int = 0
    cut_unasked: int = 0
    began: float = 0.0
    ended: float = 0.0

    @property
    def reused(self) -> int:
        """Rows that needed no call of their own."""
        return max(0, self.rows - self.refused - self.calls)

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(slots=True)
class Explained:
    """What a statement would ask of one model.

    `rows` go through its function; of the distinct deterministic calls (`seen` holds their keys) `stored` are known
    already; `sampled` calls are never merged. `calls` would be made, with `prompt_tokens` (None: the engine cannot
    count) and at most `max_answer_tokens` of answers (None: nothing bounds them).
    """

    rows: int = 0
    stored: int = 0
    sampled: int = 0
    calls: int = 0
    prompt_tokens: int | None = 0
    max_answer_tokens: int | None = 0
    seen: set[bytes] = field(default_factory=set)

    @property
    def distinct(self) -> int:
        return len(self.seen) + self.sampled

    def add(self, calls: int, prompt_tokens: int | None, limit: int | None) -> None:
        """Calls that would be made, with their tokens and the most that each answer may have."""
        self.calls += calls
        self.prompt_tokens = _sum(self.prompt_tokens, prompt_tokens)
        self.max_answer_tokens = _sum(self.max_answer_tokens, limit and limit * calls)


def _sum(total: int | None, more: int | None) -> int | None:
    return None if total is None or more is None else total + more


@dataclass(frozen=True, slots=True)
class FailedCall:
    """What `!llm retry` asks again. Kept in memory only, and never shown."""

    options: CallOptions = field(repr=False)
    prompt: Prompt = field(repr=False)


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A failed row as `llm_errors` shows it: never the row's text, but a key that finds it again.

    `input_key` is the first 16 hex digits of the SHA-256 of the input as text; `call` is None where asking again
    is of no use.
    """

    statement: int
    model: str
    input_key: str
    code: str
    message: str
    attempts: int
    call: FailedCall | None = None


class Statement:
    """State of one running SQL statement.

    Args:
        id: number of the statement in its session; 0 stands for all whose statement is not known.
        on_error: 'record' lists a failed row and gives NULL, 'null' gives NULL, 'fail' stops the statement.
        cache: 'on' uses and keeps results, 'read' uses but does not keep, 'off' neither.
        budgets: what it may spend.

    Attributes:
        mode: what its query is being run for; set by who runs it.
        passes: runs of the query in mode AHEAD that were begun.
        nested: an answer may decide about other calls, so that no part of a run ahead may be passed over.
        query: its text, for `llm_errors`; shortened and without secrets.
        listener: hears the answer while it is written; None for most.
    """

    def __init__(
        self,
        id: int = 0,
        on_error: OnError = "record",
        cache: CacheMode = "on",
        budgets: Budgets | None = None,
        query: str = "",
    ) -> None:
        self.id = id
        self.on_error = on_error
        self.cache = cache
        self.budgets = budgets or Budgets()
        self.query = query
        self.mode = Mode.REAL
        self.passes = 0
        self.nested = False
        self.started = time.monotonic()
        self.usage: dict[str, Usage] = {}
        self.explained: dict[str, Explained] = {}
        self.failed_rows: list[FailedRow] = []
        self.failure: SqlextError | None = None
        self.listener: Listener | None = None
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

    def add(self, model: str, **amounts: int) -> None:
        """Add to the usage of `model`; the names are those of `Usage`."""
        with self._lock:
            usage = self.usage.setdefault(model, Usage())
            for name, amount in amounts.items():
                setattr(usage, name, getattr(usage, name) + amount)

    def worked(self, model: str, began: float | None = None, ended: float | None = None) -> None:
        """`model` worked for the statement from `began`, or until `ended` (monotonic seconds)."""
        with self._lock:
            usage = self.usage.setdefault(model, Usage())
            if began is not None and not usage.began:
                usage.began = usage.ended = began
            if ended is not None:
                usage.ended = ended

    def record(self, model: str, input_key: str, error: ErrorInfo, call: FailedCall | None = None) -> None:
        """Note a failed row for `llm_errors`, and the call for `!llm retry`."""
        with self._lock:
            if len(self.failed_rows) < MAX_RECORDED_ERRORS:
                row = FailedRow(self.id, model, input_key, error.code, error.message, error.attempts, call)
                self.failed_rows.append(row)

    def retried(self, model: str, errors: Mapping[FailedCall, ErrorInfo | None]) -> None:
        """These calls were asked again, and failed again or (None) were answered: their rows have not failed then."""

        def now(row: FailedRow) -> FailedRow | None:
            if row.model != model or row.call is None or row.call not in errors:
                return row
            error = errors[row.call]
            if error is None:
                return None
            attempts = row.attempts + error.attempts
            return replace(row, code=error.code, message=error.message, attempts=attempts)

        with self._lock:
            self.failed_rows = [row for failed in self.failed_rows if (row := now(failed))]

    @property
    def answered(self) -> int:
        """Calls that were answered, for progress."""
        return sum(usage.calls for usage in list(self.usage.values()))

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers so far, for progress."""
        return sum(usage.prompt_tokens + usage.completion_tokens for usage in list(self.usage.values()))

    @property
    def failed(self) -> int:
        """Rows that failed, of all models."""
        return sum(usage.errors for usage in self.usage.values())


def row_failure(model: str, error: ErrorInfo, *, followed: bool = False) -> Fatal:
    """The error of a statement whose on_error is «fail», at its first failed row; or whose one answer is followed."""
    return Fatal(
        f'A row failed in "{model}": {error.message}',
        code=error.code,
        hint=error.hint
        if followed
        else 'on_error is «fail»; with `!llm setup "on_error=record"` the row is listed and the rest goes on.',
    )
