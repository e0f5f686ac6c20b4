"""The one error tree, grouped by who must act.

    SqlextError
    ├── UserError            the person who wrote the SQL: something to correct
    │   └── SqlSyntaxError       … at a line and column
    ├── DeployError          a model did not come up; nothing was registered
    ├── RowError             nobody now: recorded on its row, the statement goes on
    ├── Retryable            the program: wait, then try again
    │   ├── WorkerLost           the worker process died; its batch goes to another
    │   │   └── EngineLost           … or its engine, which only a new process can bring back
    │   └── OutOfMemory          the batch was too large; halve it
    ├── Fatal                the operator: the statement stops
    └── Cancelled            nobody: the user pressed Ctrl-C

Every error has a stable `code`, a message that names the place and the cause, and a `hint` that says what to
do next. Messages never contain row text, prompts or keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "Cancelled",
    "DeployError",
    "EngineLost",
    "ErrorInfo",
    "Fatal",
    "OutOfMemory",
    "Place",
    "Retryable",
    "RowError",
    "SqlSyntaxError",
    "SqlextError",
    "UserError",
    "WorkerLost",
    "did_you_mean",
]


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a script: 1-based line and column, and the source line for the caret."""

    line: int
    column: int
    source: str = ""
    file: str | None = None

    def __str__(self) -> str:
        where = f"line {self.line}, column {self.column}"
        return f"{self.file}: {where}" if self.file else where

    def caret(self) -> str:
        """The source line with a caret under the column; '' when the source is not known."""
        if not self.source:
            return ""
        start = max(0, self.column - 80)  # a very long line shows the part around the caret
        shown = self.source[start : start + 120].replace("\t", " ")
        return f"  {shown}\n  {' ' * (self.column - 1 - start)}^"


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error as data: what crosses processes and stands in tables.

    `attempts` counts how often the row was tried before it was given up.
    """

    code: str
    message: str
    hint: str | None = None
    attempts: int = 1

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class SqlextError(Exception):
    """Base of all errors of this package.

    Args:
        message: what happened, and where.
        code: stable word for programs, for example ``option_unknown``.
        hint: what to type or do next.
        place: position in the script, when there is one.
    """

    default_code = "error"

    def __init__(
        self, message: str, *, code: str | None = None, hint: str | None = None, place: Place | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.place = place

    def __str__(self) -> str:
        lines = [f"{self.place}: {self.message}" if self.place else self.message]
        if self.place and (caret := self.place.caret()):
            lines.append(caret)
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.code, self.hint, self.place)

    @property
    def info(self) -> ErrorInfo:
        """This error as data."""
        return ErrorInfo(self.code, self.message, self.hint)


def _rebuild(kind: type[SqlextError], message: str, code: str, hint: str | None, place: Place | None) -> SqlextError:
    return kind(message, code=code, hint=hint, place=place)


class UserError(SqlextError):
    """Something in the SQL, the options or the files must be corrected."""

    default_code = "user_error"


class SqlSyntaxError(UserError):
    """One of our statements does not parse; `place` is always set."""

    default_code = "syntax"


class DeployError(SqlextError):
    """A model did not come up. Nothing was registered and no process is left."""

    default_code = "deploy_failed"


class RowError(SqlextError):
    """One row failed. It is recorded on that row; the others go on."""

    default_code = "row_failed"


class Retryable(SqlextError):
    """The same work may succeed later or in smaller pieces."""

    default_code = "retryable"


class WorkerLost(Retryable):
    """A worker process ended while it had work."""

    default_code = "worker_lost"


class EngineLost(WorkerLost):
    """The engine in a worker process died; the process ends itself, and a new one loads the model again."""

    default_code = "engine_lost"


class OutOfMemory(Retryable):
    """The batch did not fit into the device's memory."""

    default_code = "out_of_memory"


class Fatal(SqlextError):
    """The statement cannot go on."""

    default_code = "fatal"


class Cancelled(SqlextError):
    """The user stopped the statement."""

    default_code = "cancelled"


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The known word nearest to `word`, ignoring case and underscores, or None when nothing is near."""
    spelled = {name.lower().replace("_", ""): name for name in known}
    near = difflib.get_close_matches(word.lower().replace("_", ""), spelled, n=1, cutoff=0.6)
    return spelled[near[0]] if near else None
