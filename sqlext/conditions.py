"""The order of conditions: those that ask a model are evaluated after all others, so that fewer rows are asked.

DuckDB 2.0.0 evaluates the conditions of a WHERE in this order: what the scan takes over; what is no comparison, as
written; comparisons, as written. It sorts them by cost only if none can fail, and a Python function can. So each
condition that asks a model is made a comparison, ``CASE WHEN condition THEN 1 END > 0``, at the end. CASE, because it
does not evaluate the right side of an OR that is true already; no equality, because DuckDB would expect one row of it
and turn a join around.

It stands alone because it is the only place that changes a text of the user's. What it makes is used only after
DuckDB's own parser has shown that nothing but this has changed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import duckdb

from sqlext.clauses import CLAUSES, Clause, Reader, outer_where
from sqlext.query_tree import Node, Run, all_parsed, called_names, parsed, query_span, runner

_CLAUSE = re.compile(r"\b(?:WHERE|HAVING|QUALIFY)\b", re.IGNORECASE)


def models_last(raw: duckdb.DuckDBPyConnection, text: str, functions: Callable[[str], bool]) -> str:
    """The statement `text`, with the conditions that ask a model made to be evaluated last.

    It answers the same: the conditions of each WHERE, HAVING and QUALIFY are the same. It is the text itself when
    there is nothing to gain, or in doubt. A condition that may fail for a row (a cast, a function that is not known
    to be safe) and stands after one that asks a model stays after it. It runs small queries on `raw`, so no result
    may be half read, and raises nothing.

    Args:
        functions: whether a name (in lower case, as SQL calls it) is that of a model function or of its macro.
    """
    if not _CLAUSE.search(text) or not any(map(functions, called_names(text))):
        return text

    try:
        part = _part(raw, text)
        if part is None:
            return text
        start, end, select = part
        query = select + text[start:end]
        edited = _edited(query, functions)
        if edited == query or not _same(runner(raw), query, edited):
            return text
        return text[:start] + edited.removeprefix(select) + text[end:]
    except duckdb.Error:
        return text


def _part(raw: duckdb.DuckDBPyConnection, text: str) -> tuple[int, int, str] | None:
    """Where the conditions of a statement are: from, until, and what makes a query of that part."""
    span = query_span(raw, text)
    if span is not None:
        return *span, ""
    kinds = [it.type for it in raw.extract_statements(text)]
    where = outer_where(text) if kinds in ([duckdb.StatementType.UPDATE], [duckdb.StatementType.DELETE]) else None
    return (*where, "SELECT 1 ") if where else None


# -- what is written -------------------------------------------------------------------------------------------


def _edited(query: str, functions: Callable[[str], bool]) -> str:
    reader = Reader(query, functions)
    edits = sorted(edit for clause in reader.clauses() for edit in _edits(reader, clause))
    for start, end, replacement in reversed(edits):
        query = query[:start] + replacement + query[end:]
    return query


def _edits(reader: Reader, clause: Clause) -> Iterator[tuple[int, int, str]]:
    """What to put in place of which part of the text."""
    first = next((n for n, it in enumerate(clause.conditions) if it.asks), None)
    if first is None or (all(it.asks for it in clause.conditions) and not (reader.joins and clause.word == "WHERE")):
        return
    late = [it for it in clause.conditions[first:] if it.asks or not it.sure]
    head, tail = _frame(clause.word)
    if late == clause.conditions[first:] or reader.numbered:
        for it in late:
            start, end = reader.place(it)
            yield start, start, head
            yield end, end, tail
        return
    end = reader.tokens[clause.last - 1].end
    for it in late:
        yield *reader.place(it), "true"
    yield end, end, "".join(f" AND {head}{reader.text[slice(*reader.place(it))]}{tail}" for it in late)


def _frame(word: str) -> tuple[str, str]:
    """What to put around a condition. Only with an aggregate in it a condition of HAVING stays above the grouping."""
    return "(CASE WHEN (", ") THEN count(*) END >= 0)" if word == "HAVING" else ") THEN 1 END > 0)"


# -- the proof -------------------------------------------------------------------------------------------------


def _same(run: Run, query: str, edited: str) -> bool:
    """Whether two queries differ in nothing but the order and the frames of their conditions."""
    before, after = all_parsed(run, [query, edited])
    if before is None or after is None:
        return False
    frames = _frames()
    return bool(_normal(before, frames) == _normal(after, frames))


def _normal(tree: Any, frames: dict[str, Node]) -> Any:
    """A tree with the conditions of each clause in one order, without frames and without `true`."""
    if isinstance(tree, list):
        return [_normal(item, frames) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: sorted(_conjuncts(value, frames[key], frames)) if value and key in frames else _normal(value, frames)
        for key, value in tree.items()
    }


def _conjuncts(node: Node, frame: Node, frames: dict[str, Node]) -> list[str]:
    if node["type"] == "CONJUNCTION_AND":
        return [it for child in node["children"] for it in _conjuncts(child, frame, frames)]
    inner = _framed(frame, node)
    if inner is not None:
        return _conjuncts(inner, frame, frames)
    return [json.dumps(_normal(node, frames))] if node != _tree("true") else []


def _framed(frame: Any, node: Any) -> Node | None:
    """What stands in a node where the frame has its one column; None if they differ in anything else."""
    if isinstance(frame, dict) and frame.get("class") == "COLUMN_REF":
        return node if isinstance(node, dict) else None
    if type(frame) is not type(node) or not isinstance(frame, (dict, list)) or len(frame) != len(node):
        return None
    pairs = zip(frame, node, strict=True) if isinstance(frame, list) else ((frame[k], node.get(k)) for k in frame)
    different = [(a, b) for a, b in pairs if a != b]
    return _framed(*different[0]) if len(different) == 1 else None


@functools.cache
def _tree(condition: str) -> Node:
    """DuckDB's tree of a condition."""
    with duckdb.connect() as con:
        tree = parsed(runner(con), f"SELECT 1 WHERE {condition}")
    assert tree is not None
    return dict(tree["where_clause"])


def _frames() -> dict[str, Node]:
    """A framed column, for each clause."""
    return {key: _tree("x".join(_frame(word))) for word, key in CLAUSES.items()}
