"""Dialects: queries written for Spark SQL, as DuckDB's.

It stands alone because it is the only place that rewrites a query, and the only one that needs sqlglot: for users who
bring scripts of Byzer's. Queries in DuckDB's own dialect are never rewritten.
"""

from __future__ import annotations

from runtime.errors import Place, UserError


def from_spark(sql: str, place: Place | None = None) -> str:
    """One Spark SQL statement in DuckDB's dialect; names of functions that are not SQL's own stay as typed.

    Args:
        place: where the statement begins in the script; errors are told from there.

    Raises:
        UserError: the text is no Spark SQL.
    """
    import sqlglot  # 0.2 s: only for those who ask for it
    from sqlglot.errors import ParseError, SqlglotError

    try:
        trees = [tree for tree in sqlglot.parse(sql, read="spark") if tree is not None]
        if len(trees) != 1:
            raise _no_spark("it is not one statement", place)
        return str(trees[0].sql(dialect="duckdb", normalize_functions=False))
    except ParseError as error:
        first = error.errors[0] if error.errors else {}
        raise _no_spark(str(first.get("description") or "it does not parse"), _within(place, first)) from None
    except SqlglotError:
        raise _no_spark("a string or comment in it has no end", place) from None


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
