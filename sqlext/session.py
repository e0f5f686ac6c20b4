"""The session: what all cursors of one database share.

Settings, variables, the model functions, the statements in flight and what they used. Two sessions in one process
know nothing of each other.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from typing import Any

import duckdb
import pyarrow as pa

from runtime.gateway import FailedRow, Statement, Usage
from sqlext import options
from udfs.context import StatementTable
from udfs.register import HELPER_NAMES, FunctionCatalog

_ERRORS = pa.schema(
    [("statement", pa.int64()), *((name, pa.string()) for name in ("model", "input_key", "code", "message"))]
)
_USAGE = pa.schema(
    [
        ("statement", pa.int64()),
        ("model", pa.string()),
        *((name, pa.int64()) for name in ("rows", "calls", "reused", "errors", "prompt_tokens", "completion_tokens")),
        ("seconds", pa.float64()),
    ]
)
HISTORY = 200  # ended statements whose usage is remembered


class Session:
    """State shared by the cursors of one database.

    Args:
        raw: a DuckDB connection to the database; the session keeps a cursor of its own on it.

    Attributes:
        notify: told what is worth saying but is not data; prints to stderr unless replaced.
        on_deploy: told how far a deployment is.
    """

    def __init__(self, raw: duckdb.DuckDBPyConnection) -> None:
        self._admin = raw.cursor()
        self.statements = StatementTable()
        self.functions = FunctionCatalog(self._admin, self.statements)
        self.settings: dict[str, Any] = options.defaults("single")
        self.variables: dict[str, str] = {}
        self.dialect = "duckdb"
        self.notify: Callable[[str], None] = _to_stderr
        self.on_deploy: Callable[[Any], None] = _ignore
        self.history: deque[Statement] = deque(maxlen=HISTORY)
        self.duckdb_settings = DuckdbSettings(self._ask)
        self._lock = threading.Lock()
        self._reader = raw.cursor()  # a cursor serves one thread at a time
        self._reading = threading.Lock()

    def new_statement(self) -> Statement:
        """A statement with the session's present settings."""
        return Statement(self.statements.new_id(), on_error=self.settings["on_error"], cache=self.settings["cache"])

    def ended(self, statement: Statement) -> None:
        """Remember what a statement used."""
        self.statements.discard(statement)
        if statement.usage:
            with self._lock:
                self.history.append(statement)

    def errors_table(self) -> pa.Table:
        """`llm_errors`: the failed rows of all remembered statements, oldest first."""
        rows = [row for statement in self._known() for row in statement.failed_rows]
        columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(FailedRow)}
        return pa.table(columns, _ERRORS)

    def usage_table(self) -> pa.Table:
        """`!llm usage`: what each remembered statement used of each model."""
        used = [
            (statement.id, model, usage) for statement in self._known() for model, usage in statement.usage.items()
        ]
        columns: dict[str, list[Any]] = {"statement": [u[0] for u in used], "model": [u[1] for u in used]}
        for field in fields(Usage):
            columns[field.name] = [round(getattr(usage, field.name), 3) for _, _, usage in used]
        return pa.table(columns, _USAGE)

    def _known(self) -> list[Statement]:
        with self._lock:
            return [*self.history, *self.statements.running(), self.statements.default]

    def is_taken(self, name: str) -> bool:
        """Whether `name` is a function or a reserved word of DuckDB's, one of our helpers, or a `_row` form."""
        models = self.functions.gateways()
        if name in HELPER_NAMES or name.removesuffix("_row") in models or f"{name}_row" in models:
            return name not in models
        query = """
            SELECT 1 FROM duckdb_functions() WHERE lower(function_name) = $1 AND NOT $2
            UNION ALL SELECT 1 FROM duckdb_keywords() WHERE keyword_name = $1 AND keyword_category <> 'unreserved'
        """
        return bool(self._ask(query, [name, self.functions.owns(name)]))

    def _ask(self, query: str, parameters: list[Any]) -> list[Any]:
        with self._reading:
            return self._reader.execute(query, parameters).fetchall()

    def close(self) -> None:
        """Drop the functions and the handles to their workers. The models stay deployed on a cluster of others."""
        for statement in (*self.statements.running(), self.statements.default):
            statement.cancel()
        gateways = self.functions.gateways()
        with suppress(duckdb.Error):  # the database may have been closed before us
            self.functions.close()
        for gateway in gateways.values():
            gateway.close()
        self._reader.close()
        self._admin.close()


class DuckdbSettings:
    """Names that `SET name=…` gives to DuckDB, settings of extensions that are not loaded among them."""

    def __init__(self, ask: Callable[[str, list[Any]], list[Any]]) -> None:
        self._ask = ask
        self._known: dict[str, bool] = {}

    def __contains__(self, name: object) -> bool:
        name = str(name).lower()
        if name not in self._known:
            try:
                self._ask("SELECT current_setting(?)", [name])
                self._known[name] = True
            except duckdb.Error as error:
                self._known[name] = "unrecognized configuration parameter" not in str(error)
        return self._known[name]


def _ignore(event: Any) -> None:
    pass


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
