"""Whether what a query reads can be read again: tables, files and frames can, pipes and streams cannot.

It stands alone because this is asked of files, plans and Python variables, while functions are known by name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any

from sqlext.query_sources import Sources
from sqlext.query_tree import Node, Run, explained, function_of, has, nodes, of, words
from sqlext.tables import OWN_TABLES
from udfs.signatures import quote

_WEB = ("http://", "https://")
_READERS = ("read_", "parquet_scan", "glob")
_TABLE_FUNCTIONS = words("range generate_series unnest repeat repeat_row json_each json_tree")


def rereadable(run: Run, sources: Sources) -> bool:
    """Whether all tables can be read twice: no pipe, no stream, nothing that is asked over the web."""
    return (
        not has(sources.all, "SHOW_REF")
        and all(_function_rereadable(it["function"], sources) for it in of(sources.all, "TABLE_FUNCTION"))
        and all(_table_rereadable(run, path) for path in _tables(sources))
        and not any(_is_stream(_table_plan(run, path)) for path in _shadowed(sources))
    )


def consumes(run: Run, sources: Sources) -> bool:
    """Whether reading leaves nothing to be read again: a pipe or a stream, but not what is asked over the web."""
    paths = {text for function in of(sources.all, "TABLE_FUNCTION") for text in _texts(function)}
    tables = {path for path in _read(sources) if path[-1].lower() not in OWN_TABLES}
    pipes = {path for path in paths | {path[-1] for path in tables} if _flows(path)}
    return any(not path.startswith(_WEB) for path in pipes) or any(
        _is_stream(_table_plan(run, path)) for path in tables if path[-1] not in pipes
    )


def _tables(sources: Sources) -> set[tuple[str, ...]]:
    """Tables, files and variables that are read, by the parts of their names; no views that were opened."""
    return {path for path in _read(sources) if path[-1].lower() not in sources.expanded}


def _shadowed(sources: Sources) -> set[tuple[str, ...]]:
    """What has the name of a view, and may be something else in another schema."""
    return _read(sources) - _tables(sources)


def _read(sources: Sources) -> set[tuple[str, ...]]:
    return {path for tree in (*sources.trees, *sources.macros.values()) for path in _paths(tree, frozenset())}


def _paths(tree: Any, ctes: frozenset[str]) -> Iterator[tuple[str, ...]]:
    """What a tree reads, by the parts of its names; in a CTE its own name still means something else.

    Looking for a table that is not there would abort an open transaction, so CTEs are told apart by scope.
    """
    if isinstance(tree, list):
        for it in tree:
            yield from _paths(it, ctes)
    if not isinstance(tree, dict):
        return
    if tree.get("type") == "BASE_TABLE":
        path = tuple(tree["qualified_name"]["path"])
        if len(path) > 1 or path[0].lower() not in ctes:
            yield path
    for cte in (tree.get("cte_map") or {}).get("map", ()):
        name = cte["key"].lower()
        recursive = has(cte["value"], "RECURSIVE_CTE_NODE")
        yield from _paths(cte["value"], ctes | {name} if recursive else ctes)
        ctes |= {name}
    for key, value in tree.items():
        if key != "cte_map":
            yield from _paths(value, ctes)


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
