"""The functions of one database: made, exchanged and removed. The only caller of DuckDB's create_function.

Python functions belong to the whole database and can be removed only on the connection that made them, so one
connection of ours, never inside a user's transaction, owns them all. Macros are temporary and belong to one cursor;
each cursor catches up before its next statement.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from runtime.gateway import Gateway
from runtime.spec import CallOptions
from udfs import requests, signatures
from udfs.context import StatementTable
from udfs.function import ModelFunction

_SPLIT_TYPE = pa.list_(pa.struct([("content", pa.string()), ("content_id", pa.int64())]))
_HELPERS: tuple[tuple[str, Callable[..., Any], pa.DataType, tuple[str, ...], str], ...] = (
    ("llm_prompt__udf", requests.llm_prompt, pa.string(), ("VARCHAR", "VARCHAR[]"), "VARCHAR"),
    ("llm_result__udf", requests.llm_result, pa.string(), ("VARCHAR",), "VARCHAR"),
    ("llm_response_full__udf", requests.llm_response_full, pa.string(), ("VARCHAR",), "VARCHAR"),
    ("llm_stack__udf", requests.llm_stack, pa.string(), ("VARCHAR", "VARCHAR"), "VARCHAR"),
    (
        "llm_split__udf",
        requests.llm_split,
        _SPLIT_TYPE,
        ("VARCHAR", "VARCHAR[]", "BIGINT"),
        "STRUCT(content VARCHAR, content_id BIGINT)[]",
    ),
)
_HELPER_MACROS = (
    "llm_param(request) AS struct_pack(llm_request := to_json(request)::VARCHAR)",
    "llm_prompt(template, arguments) AS llm_prompt__udf(template::VARCHAR, arguments::VARCHAR[])",
    "llm_result(response) AS llm_result__udf(response::VARCHAR)",
    "llm_response_predict(response) AS llm_result__udf(response::VARCHAR)",
    "llm_response_full(response) AS llm_response_full__udf(response::VARCHAR)",
    "llm_stack(response, request) AS struct_pack(llm_request := "
    "llm_stack__udf(response::VARCHAR, struct_extract(request, 'llm_request')))",
    "llm_split(text, separators, chunk_limit) AS "
    "llm_split__udf(text::VARCHAR, separators::VARCHAR[], chunk_limit::BIGINT)",
)


@dataclass(slots=True)
class _Registered:
    function: ModelFunction
    face: tuple[str, CallOptions]  # the SQL type and the defaults that its macros were made for
    names: tuple[str, ...]  # Python functions in DuckDB, behind the macros
    macros: tuple[str, ...]  # statements that make its macros


class FunctionCatalog:
    """All model functions of one database. Thread-safe.

    Args:
        admin: a connection that belongs to this catalog alone and lives as long as it.
        statements: finds the statement that a chunk belongs to.
    """

    def __init__(self, admin: duckdb.DuckDBPyConnection, statements: StatementTable) -> None:
        self._admin = admin
        self._statements = statements
        self._functions: dict[str, _Registered] = {}
        self._dropped: dict[str, int] = {}
        self._version = 1
        self._outgrown: list[str] = []  # functions of an earlier face: a query may still be running them
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        for name, function, result, parameters, sql_type in _HELPERS:
            self._create(name, requests.by_row(function, result), parameters, sql_type)

    def put(self, name: str, gateway: Gateway, defaults: CallOptions) -> Gateway | None:
        """Make `name` answer through `gateway`; returns the gateway it answered through before, to be closed.

        When the function keeps its SQL type, queries that run are carried over in the middle.
        """
        with self._lock:
            old = self._functions.get(name)
            face = (signatures.sql_type(gateway.info), defaults)
            if old and old.face == face:
                previous, old.function.gateway = old.function.gateway, gateway
                return previous
            if old:
                self._outgrown += old.names
                self._admin.remove_function(name)
            self._functions[name] = self._register(name, gateway, face)
            self._dropped.pop(name, None)
            self._version += 1
            return old.function.gateway if old else None

    def remove(self, name: str) -> Gateway | None:
        """Forget `name`; returns its gateway, to be closed. None when there was no such function."""
        with self._lock:
            registered = self._functions.pop(name, None)
            if registered is None:
                return None
            self._version += 1
            self._dropped[name] = self._version
            for function in (*registered.names, name):
                self._admin.remove_function(function)
            gateway, registered.function.gateway = registered.function.gateway, None
            return gateway

    def gateways(self) -> dict[str, Gateway]:
        """The gateways in use, by function name."""
        with self._lock:
            return {name: r.function.gateway for name, r in self._functions.items() if r.function.gateway}

    @property
    def version(self) -> int:
        """Grows with every change that cursors must catch up with."""
        return self._version

    def catch_up(self, cursor: duckdb.DuckDBPyConnection, seen: int) -> int:
        """Bring a cursor's macros from version `seen` to the present one, which is returned."""
        with self._lock:
            if seen == self._version:
                return seen
            for name, version in self._dropped.items():
                if version > seen:
                    for macro in (name, f"{name}_row"):
                        cursor.execute(f"DROP MACRO IF EXISTS temp.{signatures.quote(macro)}")
            if seen == 0:
                for helper in _HELPER_MACROS:
                    cursor.execute(f"CREATE OR REPLACE TEMP MACRO {helper}")
            for registered in self._functions.values():
                for statement in registered.macros:
                    cursor.execute(statement)
            return self._version

    def close(self) -> None:
        """Remove every function from the database."""
        with self._lock:
            for name in list(self._functions):
                self.remove(name)
            for function in (*self._outgrown, *(helper[0] for helper in _HELPERS)):
                self._admin.remove_function(function)

    def _register(self, name: str, gateway: Gateway, face: tuple[str, CallOptions]) -> _Registered:
        function = ModelFunction(gateway, self._statements)
        number = next(self._numbers)
        value, row = f"{name}__udf{number}", f"{name}_row__udf{number}"
        info, defaults = gateway.info, face[1]
        self._create(value, function.value, signatures.PARAMETERS, signatures.sql_type(info))
        self._create(row, function.row, signatures.PARAMETERS, signatures.row_type(info))
        # Under its own name, for cursors that are not ours and have no macros: chat('text') works there too.
        self._create(name, function.plain, ("VARCHAR",), signatures.sql_type(info))
        macros = (
            signatures.macro(name, value, info, defaults),
            signatures.macro(f"{name}_row", row, info, defaults),
        )
        return _Registered(function, face, (value, row), macros)

    def _create(self, name: str, function: Callable[..., pa.Array], parameters: tuple[str, ...], result: str) -> None:
        def columns(*chunk: pa.ChunkedArray) -> pa.Array:
            return function(*chunk)

        # DuckDB counts a variadic function as one of one argument, unless its signature says otherwise.
        columns.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(f"c{n}", inspect.Parameter.POSITIONAL_ONLY) for n in range(len(parameters))]
        )
        # null_handling: a function may answer NULL, and NULL rows must be counted; the default raises on both.
        self._admin.create_function(
            name,
            columns,
            [duckdb.dtype(parameter) for parameter in parameters],
            duckdb.dtype(result),
            type="arrow",
            null_handling="special",
        )
