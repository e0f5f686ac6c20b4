"""The plan of a probe: whether a statement is worth running ahead, and which query inside it.

Before a statement runs, its query can be run once with model functions that note their arguments and answer NULL (or
what is stored). That pays off only if the second run asks for the same rows. This module decides it from DuckDB's own
parse tree, because plans show an expression under its alias. When in doubt the answer is no: a probe that is left
out costs time, a wrong one costs calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import duckdb

from sqlext.answer_flow import harmless
from sqlext.lexemes import significant
from sqlext.query_sources import Sources, builtin, repeatable
from sqlext.query_tree import Run, called_names, explained, parsed, query_span, runner, words
from sqlext.rereading import rereadable
from sqlext.row_order import settled

# What may stand before a parenthesis and calls nothing. A word that is missing here costs time, nothing else.
_NO_FUNCTIONS = words(
    "all and any as between by case cast decimal else end except exclude exists filter from having in insert "
    "intersect into is join lateral like materialized not offset on or over qualify replace select set table then "
    "try_cast union using values varchar when where with"
)


@dataclass(frozen=True, slots=True)
class Probe:
    """What to run ahead of a statement.

    Attributes:
        query: a query that DuckDB can run, a part of the statement to the letter; takes the statement's parameters.
        calls: how many different calls of model functions it makes; from two on, a second pass may find more.
    """

    query: str
    calls: int


def plan(
    raw: duckdb.DuckDBPyConnection,
    text: str,
    parameters: Any,
    functions: Callable[[str], bool],
    frame: FrameType | None = None,
) -> Probe | None:
    """What to run ahead of the statement `text`, or None when that would gain nothing or might waste calls.

    Call it in probe mode: DuckDB evaluates constant calls while it plans. It runs small queries on `raw`, so no
    result may be half read; it raises nothing, and leaves an open transaction as it was.

    Args:
        functions: whether a name (in lower case, as SQL calls it) is that of a model function or of its macro.
        frame: where DuckDB looks for variables that hold data frames.
    """

    run = runner(raw, frame)
    try:
        query = query_of(raw, text) if _may_call(run, text, functions) else None
        tree = parsed(run, query) if query else None
        if query is None or tree is None:
            return None
        sources = Sources(run, tree, functions)
        calls = sources.calls()
        if not calls or _in_transaction(run):
            return None
        again = repeatable(sources) and settled(run, sources) and rereadable(run, sources)
        if not (again and harmless(sources, calls)):
            return None
        full = explained(run, text, parameters)
        inner = full if query == text else explained(run, query, parameters)
        # An existing table shows as CREATE_TABLE with nothing below, a query without rows as EMPTY_RESULT.
        if {"CREATE_TABLE", "EMPTY_RESULT"} & {node["name"] for node in full + inner}:
            return None
        return Probe(query, calls)
    except duckdb.Error:
        return None


def _may_call(run: Run, text: str, functions: Callable[[str], bool]) -> bool:
    """Whether a look at the words leaves it open that a model is called; most statements are plain SQL."""
    text = text.lower()
    called = called_names(text)
    if any(map(functions, called)) or not called - _NO_FUNCTIONS <= builtin().names:
        return True
    # Without their definitions, which DuckDB writes anew for each view.
    views = run("SELECT lower(view_name) FROM duckdb_views() WHERE NOT internal")
    return any(name in text for (name,) in views)


def query_of(raw: duckdb.DuckDBPyConnection, text: str) -> str | None:
    """The query that `text` is or computes, to the letter, if it can take the statement's parameters."""
    span = query_span(raw, text)
    if span is None:
        return None
    rest = text[: span[0]] + text[span[1] :]
    if any(rest[it.start : it.start + 1] in ("?", "$") for it in significant(rest, ours=False)):
        return None
    return text[slice(*span)]


def _in_transaction(run: Run) -> bool:
    """Whether the user has opened a transaction, which an error in the probe would abort."""
    return run("SELECT current_transaction_id()") == run("SELECT current_transaction_id()")
