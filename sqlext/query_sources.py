"""What a query reads and calls, with everything that its views and macros hide.

It stands alone because views and macros have to be opened before anything can be said about a query.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import duckdb

from sqlext.lexemes import significant
from sqlext.query_tree import Node, Run, function_of, has, lowered, nodes, of, parsed, words

# Answers that differ between two statements, beside those of functions that DuckDB calls volatile. Dates may pass.
_CLOCKS = words(
    "now get_current_time get_current_timestamp transaction_timestamp current_timestamp current_time localtime "
    "localtimestamp current_localtime current_localtimestamp txid_current ago pg_conf_load_time "
    "pg_postmaster_start_time"
)
_OURS = re.compile(r"__udf\d+$")  # the endings of the functions behind models and helpers


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
        parameters: names of the macros' parameters.
        columns: names of the views' columns.
        volatile: functions of the user's whose answers differ from call to call.
        python: functions of the user's written in Python; what they do beside answering is not known.
        expanded: views that `trees` holds, unlike those over a registered Python object.
        complete: nothing was left out.
    """

    def __init__(self, run: Run, tree: Node, is_model: Callable[[str], bool]) -> None:
        self.trees: list[Node] = []
        self.macros: dict[str, list[Node]] = {}
        self.parameters: set[str] = set()
        self.columns: set[str] = set()
        self.volatile: set[str] = set()
        self.python: set[str] = set()
        self.expanded: set[str] = set()
        self.complete = True
        self._is_model = is_model
        self._run = run
        self._seen: set[str] = set()
        self._seen_views: set[str] = set()
        self._add(tree)
        self._callers: set[str] = set()
        while more := {name for name, trees in self.macros.items() if self._has_call(trees)} - self._callers:
            self._callers |= more

    @functools.cached_property
    def _views(self) -> dict[str, list[str]]:
        """The definitions of views by name, of all schemas: which one a query means is not looked up."""
        views: dict[str, list[str]] = {}
        for name, sql in self._run("SELECT lower(view_name), sql FROM duckdb_views() WHERE NOT internal"):
            views.setdefault(name, []).append(sql)
        return views

    @functools.cached_property
    def _view_names(self) -> set[str]:
        """The names alone: DuckDB writes every definition anew, its own views' too, when it is asked for one."""
        return {name for (name,) in self._run("SELECT lower(view_name) FROM duckdb_views() WHERE NOT internal")}

    @functools.cached_property
    def _functions(self) -> dict[str, list[tuple[Any, ...]]]:
        """All functions that are not DuckDB's own, by name. To list them takes longer than all else together, so that
        they are only looked at for a name that DuckDB does not have."""
        rows = self._run(
            "SELECT lower(function_name), function_type, macro_definition, parameters, stability "
            "FROM duckdb_functions() WHERE NOT internal OR lower(function_name) NOT IN (SELECT unnest(?::VARCHAR[]))",
            [sorted(builtin().names)],
        )
        functions: dict[str, list[tuple[Any, ...]]] = {}
        for name, *row in rows:
            functions.setdefault(name, []).append(tuple(row))
        return functions

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
        names = {function_of(node) for node in nodes(tree)} - self._seen - {""}
        names = {name for name in names if not self._is_model(name)}
        tables = lowered(node["table_name"] for node in of(tree, "BASE_TABLE"))
        views = tables & self._view_names - self._seen_views if tables else set()
        self._seen |= names
        self._seen_views |= views
        for view in views:
            for sql in self._views[view]:
                self._add_view(view, sql)
        strange = names - builtin().names
        for name in sorted(names & self._functions.keys()) if strange else ():
            for function in self._functions[name]:
                self._add_function(name, function)

    def _add_view(self, name: str, sql: str) -> None:
        if "_scan() AS __duckdb_source" in sql:  # a registered Python object
            return
        self.expanded.add(name)
        words = list(significant(sql, ours=False))
        head = list(itertools.takewhile(lambda it: sql[it.start : it.end] != "AS", words))
        self.columns |= lowered(sql[it.start : it.end].strip('"') for it in head)
        self._add_text(sql[words[len(head)].end :].rstrip(" ;"))

    def _add_function(self, name: str, row: tuple[Any, ...]) -> None:
        kind, definition, parameters, stability = row
        if stability == "VOLATILE":
            self.volatile.add(name)
        if definition:
            self.parameters |= lowered(parameters)
            self._add_text(f"SELECT ({definition})" if kind == "macro" else definition, name)
        elif not _OURS.search(name):
            self.python.add(name)

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
    changing = (columns | names) & _CLOCKS or names & (builtin().volatile | sources.volatile | sources.python)
    sampled = any(node.get("sample") for node in nodes(sources.all))
    # A recursion may go on for as long as no answer ends it.
    return sources.complete and not changing and not sampled and not has(sources.all, "RECURSIVE_CTE_NODE")
