"""What EXPLAIN LLM runs of a statement to count its model calls, and how far that count can be trusted.

Alone because the question is another one than that of a probe: no call is made, so it does not matter whether a run
without answers asks for too much, only whether it changes something, uses something up, or never ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import duckdb

from runtime.errors import UserError
from sqlext.answer_flow import decides_calls, ends_early
from sqlext.probe import query_of
from sqlext.query_sources import Sources
from sqlext.query_tree import function_of, has, nodes, parsed, runner, words
from sqlext.rereading import consumes

_CHANGING = words("nextval setval setseed write_log")


@dataclass(frozen=True, slots=True)
class Countable:
    """A query that can be run without answers.

    Attributes:
        query: a part of the statement to the letter; takes the statement's parameters.
        names: the names by which it calls model functions, in lower case.
        depends: answers may decide which other calls are made.
        stops: answers may end the query before all rows are read.
    """

    query: str
    names: frozenset[str]
    depends: bool
    stops: bool


def query_in(
    raw: duckdb.DuckDBPyConnection, text: str, functions: Callable[[str], bool], frame: FrameType | None = None
) -> Countable:
    """The query that the statement `text` is or computes; arguments as for `probe.plan`.

    Raises:
        UserError: explain_statement: there is none that can be run for this.
        duckdb.Error: it does not parse.
    """

    run = runner(raw, frame)
    query = query_of(raw, text)
    if query is None:
        raise _refused("it is no query, nor a CREATE TABLE … AS, INSERT or COPY of one")
    tree = parsed(run, query)
    if tree is None:  # DuckDB does not show it; all that is known is that it is a query
        return Countable(query, frozenset(), depends=True, stops=True)
    sources = Sources(run, tree, functions)
    called = {function_of(node) for node in nodes(sources.all)}
    if changing := called & (_CHANGING | sources.volatile):
        raise _refused(f"{min(changing)}() changes something, or may do so, each time it is called")
    if has(sources.all, "RECURSIVE_CTE_NODE"):
        raise _refused("without answers a recursion may never end")
    if consumes(run, sources):
        raise _refused("it reads a stream, which would be gone afterwards")
    return Countable(
        query,
        frozenset(name for name in called if functions(name)),
        depends=decides_calls(sources, sources.calls()),
        stops=ends_early(sources),
    )


def _refused(why: str) -> UserError:
    return UserError(
        f"EXPLAIN LLM cannot count the calls of this statement: {why}.",
        code="explain_statement",
        hint="Write EXPLAIN LLM SELECT … with the same model calls over a table.",
    )
