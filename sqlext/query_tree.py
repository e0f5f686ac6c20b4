"""A query inside a statement, and DuckDB's own tree of it.

It stands alone because whoever has to understand a user's query (what to run ahead, in which order conditions are
evaluated) goes by DuckDB's parser, never by one of ours: what DuckDB cannot show is left as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeAlias

import duckdb

from sqlext.interrupt import call_from
from sqlext.lexemes import Kind, significant

Node: TypeAlias = dict[str, Any]
"""A node of the tree that json_serialize_sql() gives, or of a plan."""
Run: TypeAlias = Callable[..., list[tuple[Any, ...]]]
"""Runs SQL and gives all rows."""


def words(text: str) -> frozenset[str]:
    """The words of a text, for tables of names."""
    return frozenset(text.split())


CONDITIONAL = words("CASE_EXPR OPERATOR_COALESCE OPERATOR_TRY CONJUNCTION_OR OPERATOR_NOT")
"""Types of nodes that may leave a part of themselves out."""
CONDITIONAL_FUNCTIONS = words("if iff ifnull nvl nullif")
"""Functions that do so."""
LIMITS = ("LIMIT_MODIFIER", "LIMIT_PERCENT_MODIFIER")
"""Types of a query's modifiers that end it early."""
_QUERY_STARTS = ("SELECT", "FROM", "WITH", "VALUES", "TABLE")
_CALLED = re.compile(r'([^\W\d][\w$]*)"?\s*\(')


def runner(raw: duckdb.DuckDBPyConnection, frame: FrameType | None = None) -> Run:
    """What runs small queries on a cursor; `frame`: where DuckDB looks for variables that hold data frames."""

    def run(sql: str, values: Any = None) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = call_from(frame, raw.execute, sql, values).fetchall()
        return rows

    return run


def called_names(text: str) -> set[str]:
    """What a text may call, in lower case: all names before a parenthesis, also in strings. It tells whether to look
    closer."""
    return {name.lower() for name in _CALLED.findall(text)}


def query_span(raw: duckdb.DuckDBPyConnection, text: str) -> tuple[int, int] | None:
    """Where the query that the statement `text` is, or computes, begins and ends; None when there is none.

    Raises:
        duckdb.Error: DuckDB cannot parse the text.
    """
    statements = raw.extract_statements(text)
    if len(statements) != 1:
        return None
    if statements[0].type == duckdb.StatementType.SELECT:
        return 0, len(text)
    span = _inner(text)
    if span is None:
        return None
    inner = raw.extract_statements(text[slice(*span)])
    return span if [it.type for it in inner] == [duckdb.StatementType.SELECT] else None


def _inner(text: str) -> tuple[int, int] | None:
    """Where the query of a CREATE TABLE AS, INSERT or COPY begins and ends."""
    depth = 0
    top: list[tuple[str, int, int]] = []  # the lexemes outside parentheses, and the parentheses
    for it in significant(text, ours=False):
        word = text[it.start : it.end].upper() if it.kind in (Kind.WORD, Kind.SYMBOL) else ""
        depth -= word == ")"
        if depth == 0:
            top.append((word, it.start, it.end))
        depth += word == "("
    words = [word for word, _, _ in top]
    if words[-1] == ";":
        del words[-1], top[-1]
    match words[0]:
        case "CREATE" if "TABLE" in words[:5] and "AS" in words:
            first, last = words.index("AS") + 1, len(words)
            if words[-2:] == ["WITH", "DATA"]:
                last -= 2
        case "INSERT":
            starts = [n for n, (word, _, end) in enumerate(top) if word in _QUERY_STARTS or _opens(word, text, end)]
            ends = [
                n for n, word in enumerate(words) if word == "RETURNING" or words[n : n + 2] == ["ON", "CONFLICT"]
            ]
            first, last = min(starts, default=len(words)), min(ends, default=len(words))
        case "COPY" if words[1] == "(":
            return top[1][2], top[2][1]
        case _:
            return None
    return (top[first][1], top[last - 1][2]) if first < last else None


def _opens(word: str, text: str, end: int) -> bool:
    """Whether a parenthesis opens a query, rather than a list of columns."""
    inside = next(significant(text, end, ours=False), None) if word == "(" else None
    return inside is not None and text[inside.start : inside.end].upper() in _QUERY_STARTS


def parsed(run: Run, query: str) -> Node | None:
    """DuckDB's tree of a query, without places; None for what it cannot show (PIVOT)."""
    [tree] = all_parsed(run, [query])
    return tree


def all_parsed(run: Run, queries: list[str]) -> list[Node | None]:
    """The trees of several queries, for little more than the price of one."""

    def without_places(node: Node) -> Node:
        return {key: value for key, value in node.items() if not key.startswith("query_location")}

    [texts] = run("SELECT " + ", ".join(["json_serialize_sql(?::VARCHAR)"] * len(queries)), queries)
    found = [json.loads(text, object_hook=without_places) for text in texts]
    return [None if it["error"] else it["statements"][0]["node"] for it in found]


def nodes(tree: Any) -> Iterator[Node]:
    """All nodes of a tree, from the top."""
    if isinstance(tree, dict):
        yield tree
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for value in values:
        yield from nodes(value)


def of(tree: Any, *types: str) -> Iterator[Node]:
    """The nodes of these types."""
    return (node for node in nodes(tree) if node.get("type") in types)


def has(tree: Any, *types: str) -> bool:
    """Whether there is a node of these types."""
    return any(True for _ in of(tree, *types))


def lowered(names: Iterable[Any]) -> set[str]:
    """Names without what is empty, in lower case, as DuckDB compares them."""
    return {str(name).lower() for name in names if name}


def given_names(trees: Any) -> tuple[set[str], set[str]]:
    """Names that queries give to columns outside of select items, and names of tables, which alone stand for rows."""
    columns: set[str] = set()
    rows: set[str] = set()
    for node in nodes(trees):
        columns |= lowered((node.get("column_name_alias") or []) + (node.get("aliases") or []))
        if node.get("type") in ("SUBQUERY", "BASE_TABLE"):
            rows |= lowered((node.get("alias"), node.get("table_name")))
        if node.get("type") == "LAMBDA":
            columns |= lowered(it["column_names"][-1] for it in of(node["lhs"], "COLUMN_REF"))
    return columns, rows


def function_of(node: Node) -> str:
    """The function that a node calls, in lower case; '' when it calls none."""
    return str(node.get("function_name", "")).lower()


def explained(run: Run, text: str, parameters: Any = None) -> list[Node]:
    """The nodes of a statement's plan, from the top."""

    def flat(node: Node) -> Iterator[Node]:
        yield node
        for child in node["children"]:
            yield from flat(child)

    [(_, plan_text)] = run(f"EXPLAIN (FORMAT JSON) {text}", parameters)
    return [node for top in json.loads(plan_text) for node in flat(top)]
