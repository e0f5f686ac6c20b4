"""Dialects: queries written for Spark SQL, as DuckDB's.

It stands alone because it is the only place that rewrites a query, and the only one that needs sqlglot: for users who
bring scripts of Byzer's. Queries in DuckDB's own dialect are never rewritten.
"""

from __future__ import annotations

import re
from itertools import islice

from runtime.errors import Place, UserError
from sqlext.lexemes import significant
from sqlext.parser import trailing_name

_TRANSLATED = re.compile(
    r"SELECT|WITH|FROM|VALUES|INSERT|\(|CREATE (OR REPLACE )?(TEMP |TEMPORARY |GLOBAL )*(TABLE|VIEW)\b", re.IGNORECASE
)


def from_spark(sql: str, place: Place | None = None) -> str:
    """One Spark SQL statement in DuckDB's dialect; names of functions that are not SQL's own stay as typed.

    Queries, INSERT, and CREATE of tables and views are translated, all else stays as it is. So does a trailing
    ` AS name` that is not part of the query.

    Args:
        place: where the statement begins in the script; errors are told from there.

    Raises:
        UserError: the text is no Spark SQL.
    """
    words = (sql[it.start : it.end] for it in islice(significant(sql, ours=False), 6))
    if not _TRANSLATED.match(" ".join(words)):
        return sql
    try:
        return _translated(sql, place)
    except UserError as error:
        tail = trailing_name(sql)
        if tail is None:
            raise
        query, name = tail
        try:
            quoted = name.replace('"', '""')
            return f'{_translated(query, place)} AS "{quoted}"'
        except UserError:
            raise error from None


def _translated(sql: str, place: Place | None) -> str:
    import sqlglot  # 0.2 s: only for those who ask for it
    from sqlglot.errors import ParseError, SqlglotError

    try:
        trees = [tree for tree in sqlglot.parse(sql, read="spark") if tree is not None]
    except ParseError as error:
        first = error.errors[0] if error.errors else {}
        raise _no_spark(str(first.get("description") or "it does not parse"), _within(place, first)) from None
    except SqlglotError:
        raise _no_spark("a string or comment in it has no end", place) from None
    if len(trees) != 1:
        raise _no_spark("it is not one statement", place)
    return str(trees[0].sql(dialect="duckdb", normalize_functions=False))


def _within(start: Place | None, error: dict[str, object]) -> Place | None:
    """The place of sqlglot's error, whose line and column count from the statement's beginning."""
    line, last_column = error.get("line"), error.get("col")
    if not isinstance(line, int) or not isinstance(last_column, int):
        return start
    column = max(1, last_column - len(str(error.get("highlight") or " ")) + 1)
    if start is None:
        return Place(line, column)
    if line == 1:
        return Place(start.line, start.column + column - 1, start.source, start.file)
    return Place(start.line + line - 1, column, "", start.file)


def _no_spark(why: str, place: Place | None) -> UserError:
    return UserError(
        f"This is no Spark SQL: {why.rstrip('.')}.",
        code="syntax",
        hint="Correct it, or write SET dialect='duckdb'; before it.",
        place=place or Place(1, 1),
    )
