"""What a query reads and calls, with everything that its views and macros hide, and whether that can be done twice.

It stands alone because views and macros have to be opened before anything can be said about a query.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import duckdb

from sqlext.lexemes import significant
from sqlext.query_tree import Node, Run, explained, function_of, has, lowered, nodes, of, parsed, words
from sqlext.tables import OWN_TABLES
from udfs.signatures import quote

# Answers that differ between two statements, beside those of functions that DuckDB calls volatile. Dates may pass.
_CLOCKS = words(
    "now get_current_time get_current_timestamp transaction_timestamp current_timestamp current_time localtime "
    "localtimestamp"
)
_WEB = ("http://", "https://")
_READERS = ("read_", "parquet_scan", "glob")
_TABLE_FUNCTIONS = words("range generate_series unnest repeat repeat_row json_each json_tree")


@dataclass(frozen=True, slots=True)
class Builtin:
    """DuckDB's own functions; error() is only a way to stop, so it does not count as volatile."""

    names: frozenset[str]
    volatile: frozenset[str]
    aggregates: frozenset[str]


@functools.cache
def builtin() -> Builtin:
    """The functions of this DuckDB."""
    with duckdb.connect() as fresh:
        rows = fresh.execute(
            "SELECT lower(function_name), function_type, stability FROM duckdb_functions()"
        ).fetchall()
    return Builtin(
        frozenset(name for name, _, _ in rows),
        frozenset(name for name, _, stability in rows if stability == "VOLATILE" and name != "error"),
        frozenset(name for name, kind, _ in rows if kind == "aggregate"),
    )


class Sources:
    """The trees of a query and of all views and macros behind it.

    Attributes:
        trees: of the query and its views.
        macros: trees of the user's macros, by name.
        parameters: names of the macros' parameters and of the views' columns.
        volatile: functions of the user's whose answers differ from call to call.
        expanded: views that `trees` holds, unlike those over a registered Python object.
        complete: nothing was left out.
    """

    def __init__(self, run: Run, tree: Node, is_model: Callable[[str], bool]) -> None:
        self.trees: list[Node] = []
        self.macros: dict[str, list[Node]] = {}
        self.parameters: set[str] = set()
        self.volatile: set[str] = set()
        self.expanded: set[str] = set()
        self.complete = True
        self._is_model = is_model
        self._run = run
        self._seen: set[str] = set()
        self._add(tree)
        self._callers: set[str] = set()
        while more := {name for name, trees in self.macros.items() if self._has_call(trees)} - self._callers:
            self._callers |= more

    @functools.cached_property
    def _views(self) -> dict[str, str]:
        return dict(self._run("SELECT lower(view_name), sql FROM duckdb_views() WHERE NOT internal"))

    @property
    def all(self) -> list[Any]:
        """All trees."""
        return [self.trees, list(self.macros.values())]

    def is_call(self, node: Node) -> bool:
        """Whether a node calls a model function, by itself or in a macro."""
        name = function_of(node)
        return bool(name) and (name in self._callers or self._is_model(name))

    def calls(self) -> int:
        """How many different calls there are; the same call twice in one SELECT is one, a macro's are its user's."""
        repeated = (len(self._calls(trees, 0)) - 1 for trees in self.macros.values())
        return len(self._calls(self.trees, 0)) + sum(max(0, more) for more in repeated)

    def _has_call(self, tree: Any) -> bool:
        return any(self.is_call(node) for node in nodes(tree))

    def _calls(self, tree: Any, select: int) -> set[tuple[int, str]]:
        if isinstance(tree, dict) and tree.get("type") == "SELECT_NODE":
            select = id(tree)
        values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
        found = {call for value in values for call in self._calls(value, select)}
        return (
            found | {(select, json.dumps({**tree, "alias": ""}))}
            if isinstance(tree, dict) and self.is_call(tree)
            else found
        )

    def _add(self, tree: Node, macro: str = "") -> None:
        self.macros.setdefault(macro, []).append(tree) if macro else self.trees.append(tree)
        names = {function_of(node) for node in nodes(tree)} - builtin().names - self._seen - {""}
        strange = {name for name in names if not self._is_model(name)}
        tables = lowered(node["table_name"] for node in of(tree, "BASE_TABLE"))
        views = tables & self._views.keys() - self._seen if tables else set()
        self._seen |= strange | views
        for view in views:
            self._add_view(view)
        if strange:
            self._add_functions(sorted(strange))

    def _add_view(self, name: str) -> None:
        sql = self._views[name]
        if "_scan() AS __duckdb_source" in sql:  # a registered Python object
            return
        self.expanded.add(name)
        words = list(significant(sql, ours=False))
        head = list(itertools.takewhile(lambda it: sql[it.start : it.end] != "AS", words))
        self.parameters |= lowered(sql[it.start : it.end].strip('"') for it in head)
        self._add_text(sql[words[len(head)].end :].rstrip(" ;"))

    def _add_functions(self, names: list[str]) -> None:
        rows = self._run(
            "SELECT lower(function_name), function_type, macro_definition, parameters, stability "
            f"FROM duckdb_functions() WHERE lower(function_name) IN ({', '.join('?' * len(names))})",
            names,
        )
        for name, kind, definition, parameters, stability in rows:
            if stability == "VOLATILE":
                self.volatile.add(name)
            if definition:
                self.parameters |= lowered(parameters)
                self._add_text(f"SELECT ({definition})" if kind == "macro" else definition, name)

    def _add_text(self, query: str, macro: str = "") -> None:
        tree = parsed(self._run, query)
        if tree is None:
            self.complete = False
        else:
            self._add(tree, macro)


def repeatable(sources: Sources) -> bool:
    """Whether a second run sees the same arguments, as far as functions go."""
    columns = lowered(it["column_names"][0] for it in of(sources.all, "COLUMN_REF") if len(it["column_names"]) == 1)
    names = {function_of(node) for node in nodes(sources.all)}
    changing = (columns | names) & _CLOCKS or names & (builtin().volatile | sources.volatile)
    sampled = any(node.get("sample") for node in nodes(sources.all))
    # A recursion may go on for as long as no answer ends it.
    return sources.complete and not changing and not sampled and not has(sources.all, "RECURSIVE_CTE_NODE")


def rereadable(run: Run, sources: Sources) -> bool:
    """Whether all tables can be read twice: no pipe, no stream, nothing that is asked over the web."""
    return (
        not has(sources.all, "SHOW_REF")
        and all(_function_rereadable(it["function"], sources) for it in of(sources.all, "TABLE_FUNCTION"))
        and all(_table_rereadable(run, path) for path in _tables(sources))
    )


def consumes(run: Run, sources: Sources) -> bool:
    """Whether reading leaves nothing to be read again: a pipe or a stream, but not what is asked over the web."""
    paths = {text for function in of(sources.all, "TABLE_FUNCTION") for text in _texts(function)}
    tables = {path for path in _tables(sources) if path[-1].lower() not in OWN_TABLES}
    pipes = {path for path in paths | {path[-1] for path in tables} if _flows(path)}
    return any(not path.startswith(_WEB) for path in pipes) or any(
        _is_stream(_table_plan(run, path)) for path in tables if path[-1] not in pipes
    )


def _tables(sources: Sources) -> set[tuple[str, ...]]:
    """Tables, files and variables that are read, by the parts of their names."""
    ctes = {it["key"] for node in nodes(sources.all) for it in (node.get("cte_map") or {}).get("map", ())}
    known = lowered(ctes) | sources.expanded
    return {
        tuple(table["qualified_name"]["path"])
        for table in of(sources.all, "BASE_TABLE")
        if str(table["table_name"]).lower() not in known
    }


def _texts(tree: Node) -> list[str]:
    """The constant texts in an expression."""
    values = (it["literal"].get("text") for it in of(tree, "VALUE_CONSTANT") if "literal" in it)
    return [value for value in values if isinstance(value, str)]


def _function_rereadable(function: Node, sources: Sources) -> bool:
    name = function_of(function)
    if not name.startswith(_READERS):
        return name in _TABLE_FUNCTIONS or name in sources.macros or name.startswith("duckdb_")
    computed = has(function["arguments"], "VALUE_PARAMETER", "SUBQUERY") or any(
        function_of(node) not in ("", "list_value", "struct_pack") for node in nodes(function["arguments"])
    )
    return not computed and not any(map(_flows, _texts(function)))


def _table_rereadable(run: Run, path: tuple[str, ...]) -> bool:
    """A table, a file, or a Python variable; what has more nodes is a relation in a variable, whatever it does."""
    if _flows(path[-1]):
        return False
    nodes = _table_plan(run, path)
    return len(nodes) == 1 and not _is_stream(nodes)


def _table_plan(run: Run, path: tuple[str, ...]) -> list[Node]:
    return explained(run, "FROM " + ".".join(map(quote, path)))


def _is_stream(nodes: list[Node]) -> bool:
    """Whether a table's plan reads a stream of Arrow data, which has no known length; a table of it has."""
    return nodes[0]["name"] == "PYTHON_ARROW_SCAN" and int(nodes[0]["extra_info"]["Estimated Cardinality"]) <= 1


def _flows(path: str) -> bool:
    """Whether what is read at a path is gone afterwards, or may be another the next time."""
    path = path.removeprefix("file://")
    if path.startswith((*_WEB, "/dev/", "/proc/")):
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
