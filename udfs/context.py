"""Which statement a chunk belongs to.

DuckDB calls a function without saying for which query. The macros pass a session variable along; its value names the
statement, and this table finds it. A cursor that never set the variable gets the default statement.
"""

from __future__ import annotations

import itertools
import threading

from runtime.gateway import Statement

VARIABLE = "sqlext_statement"
"""The session variable that the macros read with getvariable()."""


class StatementTable:
    """The statements in flight of one database, by the text that the variable holds. Thread-safe."""

    def __init__(self) -> None:
        self._statements: dict[str, Statement] = {}
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self.default = Statement()

    def new_id(self) -> int:
        """A number for the next statement."""
        return next(self._ids)

    def add(self, statement: Statement) -> str:
        """Make `statement` findable; returns the value for the variable."""
        key = f"main:{statement.id}"
        with self._lock:
            self._statements[key] = statement
        return key

    def discard(self, statement: Statement) -> None:
        """The statement has ended."""
        with self._lock:
            self._statements.pop(f"main:{statement.id}", None)

    def find(self, key: str | None) -> Statement:
        """The statement that `key` names, or the default one."""
        return self._statements.get(key or "", self.default)

    def running(self) -> list[Statement]:
        """All statements in flight."""
        with self._lock:
            return list(self._statements.values())
