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
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from runtime.gateway import Gateway
from runtime.spec import EngineInfo, Task
from udfs import meta, prompts, requests, signatures, typed
from udfs.context import StatementTable
from udfs.function import ModelFunction

FORMS = ROW, TYPED, SEVERAL = "_row", "_as", "_all"
"""The endings of a model function's other forms."""

_SPLIT_TYPE = pa.list_(pa.struct([("content", pa.string()), ("content_id", pa.int64())]))
_HELPERS: tuple[tuple[str, Callable[..., Any], pa.DataType, tuple[str, ...], str], ...] = (
    ("llm_prompt", requests.llm_prompt, pa.string(), ("VARCHAR", "VARCHAR[]"), "VARCHAR"),
    ("llm_result", requests.llm_result, pa.string(), ("VARCHAR",), "VARCHAR"),
    ("llm_response_full", requests.llm_response_full, pa.string(), ("VARCHAR",), "VARCHAR"),
    ("llm_stack", requests.llm_stack, pa.string(), ("VARCHAR", "VARCHAR"), "VARCHAR"),
    (
        "llm_split",
        requests.llm_split,
        _SPLIT_TYPE,
        ("VARCHAR", "VARCHAR[]", "BIGINT"),
        "STRUCT(content VARCHAR, content_id BIGINT)[]",
    ),
)
HELPER_NAMES = ("prompt", "llm_meta", "llm_param", "llm_response_predict", *(name for name, *_ in _HELPERS))
"""The helper functions, most of them Byzer's; no model can have such a name."""

_HELPER_MACROS = (  # `__udf` becomes the ending of the functions' names in this catalog
    prompts.MACRO,
    meta.MACRO,
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


@dataclass(frozen=True, slots=True)
class _Registered:
    """The Python functions of one name and SQL type. They are never removed: DuckDB frees a function also under a
    query that is running it. What has no gateway answers with an error, and serves again when its like is deployed.
    """

    function: ModelFunction
    value: str  # name of the function behind the macro
    row: str  # name of the function behind the `_row` macro
    typed: str  # name of the function behind the `_as` macro; '' where answers have no schema
    several: str  # name of the function behind the `_all` macro; '' where a call has one answer


_numbers = itertools.count(1)  # in all sessions of the process: two may share a database


class FunctionCatalog:
    """All model functions of one database. Thread-safe.

    Args:
        admin: a connection that belongs to this catalog alone and lives as long as it.
        statements: finds the statement that a chunk belongs to.
        orders: keeps the orders of fields that `prompt` has chosen; None: in memory.
    """

    def __init__(
        self,
        admin: duckdb.DuckDBPyConnection,
        statements: StatementTable,
        orders: prompts.PromptOrders | None = None,
    ) -> None:
        self._admin = admin
        self._statements = statements
        self._made: dict[tuple[str, str], _Registered] = {}  # by name and SQL types
        self._current: dict[str, _Registered] = {}
        self._macros: dict[str, tuple[str, ...]] = {}  # statements that make them
        self._version = 1
        self._lock = threading.RLock()
        helper = f"__udf{next(_numbers)}"
        for name, function, result, parameters, sql_type in _HELPERS:
            self._create(name + helper, requests.by_row(function, result), parameters, sql_type)
        orders = orders or prompts.PromptOrders()
        self._create(f"prompt{helper}", orders.prompts, prompts.PARAMETERS, "VARCHAR")
        of_model = requests.by_row(lambda name: meta.meta_of(name, self.gateways()), meta.ARROW_TYPE)
        self._create(f"llm_meta{helper}", of_model, ("VARCHAR",), meta.TYPE)
        self._reader = admin.cursor()
        types = typed.TypeFunctions(self._reader.dtype, statements)
        self._schemas, self._structures = f"llm_schema{helper}", f"llm_structure{helper}"
        self._create(self._schemas, types.schemas, typed.PARAMETERS, "VARCHAR")
        self._create(self._structures, types.structures, typed.PARAMETERS, "VARCHAR")
        self._helper_macros = tuple(macro.replace("__udf", helper) for macro in _HELPER_MACROS)

    def put(self, name: str, gateway: Gateway) -> Gateway | None:
        """Make `name` answer through `gateway`; returns the gateway it answered through before, to be closed.

        When the function keeps its SQL type, queries that run are carried over in the middle.
        """
        with self._lock:
            before = self._current.get(name)
            previous = before.function.gateway if before else None
            registered = self._registered(name, gateway)
            if before and before is not registered:
                before.function.gateway = None
            registered.function.gateway = gateway
            self._current[name] = registered
            macros = self._macros_of(name, registered, gateway)
            if self._macros.get(name) != macros:
                self._macros[name] = macros
                self._version += 1
            return previous

    def _macros_of(self, name: str, registered: _Registered, gateway: Gateway) -> tuple[str, ...]:
        info, defaults = gateway.info, gateway.pool.spec.defaults
        macros = [
            signatures.macro(name, registered.value, info, defaults, self._schemas),
            signatures.macro(name + ROW, registered.row, info, defaults, self._schemas),
        ]
        if registered.typed:
            macros.append(
                signatures.typed_macro(
                    name + TYPED, registered.typed, info, defaults, self._schemas, self._structures
                )
            )
        if registered.several:
            macros.append(signatures.several_macro(name + SEVERAL, registered.several, info, defaults))
        return tuple(macros)

    def remove(self, name: str) -> Gateway | None:
        """Take the model from `name`, which then answers with an error; returns its gateway, to be closed.

        None when there was no such function.
        """
        with self._lock:
            registered = self._current.pop(name, None)
            if registered is None:
                return None
            gateway, registered.function.gateway = registered.function.gateway, None
            return gateway

    def gateways(self) -> dict[str, Gateway]:
        """The gateways in use, by function name."""
        with self._lock:
            return {name: r.function.gateway for name, r in self._current.items() if r.function.gateway}

    def model_of(self, name: str) -> str | None:
        """The model that SQL calls by `name`, in lower case, in any of its forms; None when it calls none."""
        plain = (name, *map(name.removesuffix, FORMS))
        return next((each for each in plain if each in self._current), None)

    def is_model_function(self, name: str) -> bool:
        """Whether SQL calls a model by `name`, in lower case."""
        return self.model_of(name) is not None

    def owns(self, name: str) -> bool:
        """Whether a function of DuckDB's with this name was made here."""
        with self._lock:
            return any(made == name for made, _ in self._made)

    @property
    def version(self) -> int:
        """Grows with every change that cursors must catch up with."""
        return self._version

    def catch_up(self, cursor: duckdb.DuckDBPyConnection, seen: int) -> int:
        """Bring a cursor's macros from version `seen` to the present one, which is returned."""
        with self._lock:
            if seen == self._version:
                return seen
            if seen == 0:
                for helper in self._helper_macros:
                    cursor.execute(f"CREATE OR REPLACE TEMP MACRO {helper}")
            for macros in self._macros.values():
                for statement in macros:
                    cursor.execute(statement)
            return self._version

    def close(self) -> None:
        """Let every function answer that its model is gone."""
        with self._lock:
            for name in list(self._current):
                self.remove(name)
            self._reader.close()

    def _registered(self, name: str, gateway: Gateway) -> _Registered:
        info = gateway.info
        parameters, result = signatures.parameters(info), signatures.sql_type(info)
        key = (name, f"{parameters} {result}")
        if key not in self._made:
            function = ModelFunction(name, self._statements)
            number = next(_numbers)
            value, row = f"{name}__udf{number}", f"{name}_row__udf{number}"
            self._create(value, function.value, parameters, result)
            self._create(row, function.row, parameters, signatures.row_type(info))
            as_type = f"{name}{TYPED}__udf{number}" if info.task is Task.GENERATE else ""
            if as_type:
                self._create(as_type, function.json, parameters, "VARCHAR")
            several = f"{name}{SEVERAL}__udf{number}" if info.task is Task.DRAW else ""
            if several:
                self._create(several, function.several, parameters, "BLOB[]")
            if not self.owns(name):
                # Under its own name, for cursors that are not ours and have no macros: name('text') works there.
                # Another session on the same database may have made it; then that one answers there.
                with suppress(duckdb.CatalogException):
                    self._create(name, _plain(function, info), signatures.plain_parameters(info), result)
            self._made[key] = _Registered(function, value, row, as_type, several)
        return self._made[key]

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


def _plain(function: ModelFunction, info: EngineInfo) -> Callable[..., pa.Array]:
    """What stands behind the function without a macro."""
    if info.task is Task.RANK:
        return function.plain_pair
    return function.plain_media if info.task is Task.TRANSCRIBE else function.plain
