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
from typing import Any, NamedTuple

import duckdb

from sqlext.lexemes import Kind, significant
from sqlext.query_tree import Node, Run, all_parsed, parsed, query_span, words

_CLAUSE = re.compile(r"\b(?:WHERE|HAVING|QUALIFY)\b", re.IGNORECASE)
_CALLED = re.compile(r'([^\W\d][\w$]*)"?\s*\(')
_CLAUSES = {"WHERE": "where_clause", "HAVING": "having", "QUALIFY": "qualify"}
_CLAUSE_ENDS = words(
    "WHERE HAVING QUALIFY GROUP WINDOW ORDER LIMIT OFFSET FETCH UNION INTERSECT EXCEPT USING SELECT FROM RETURNING ;"
)
_QUERY_STARTS = words("SELECT FROM WITH VALUES TABLE PIVOT UNPIVOT DESCRIBE SHOW SUMMARIZE")
# A condition of these alone cannot fail for a row, so that it may be evaluated for rows that the answer would drop.
_SURE = words(
    "abs and any avg between ceil coalesce concat contains count date_part date_trunc day dense_rank else "
    "ends_with extract floor greatest hash ifnull ilike in isnan least left len length like list_contains lower "
    "ltrim max md5 min month not nullif or over prefix rank regexp_full_match regexp_matches replace reverse "
    "right round row_number rtrim starts_with strlen strpos substr substring suffix sum then trim try_cast upper "
    "when year"
)
_TEXT_TYPES = words("VARCHAR TEXT STRING")


class _Token(NamedTuple):
    """A lexeme: its upper-case word or symbol ('' for what is quoted), and its place."""

    word: str
    kind: Kind
    start: int
    end: int


class _Condition(NamedTuple):
    """The tokens from `first` until `last`, and whether a model has to be asked, or a row may fail, for it."""

    first: int
    last: int
    asks: bool
    sure: bool


class _Clause(NamedTuple):
    """A clause with all its conditions; `last` is where its tokens end."""

    word: str
    last: int
    conditions: list[_Condition]


def models_last(raw: duckdb.DuckDBPyConnection, text: str, functions: Callable[[str], bool]) -> str:
    """The statement `text`, with the conditions that ask a model made to be evaluated last.

    It answers the same: the conditions of each WHERE, HAVING and QUALIFY are the same. It is the text itself when
    there is nothing to gain, or in doubt. A condition that may fail for a row (a cast, a function that is not known
    to be safe) and stands after one that asks a model stays after it. It runs small queries on `raw`, so no result
    may be half read, and raises nothing.

    Args:
        functions: whether a name (in lower case, as SQL calls it) is that of a model function or of its macro.
    """
    if not _CLAUSE.search(text) or not any(map(functions, {it.lower() for it in _CALLED.findall(text)})):
        return text

    def run(sql: str, values: Any = None) -> list[tuple[Any, ...]]:
        return raw.execute(sql, values).fetchall()

    try:
        part = _part(raw, text)
        if part is None:
            return text
        start, end, select = part
        query = select + text[start:end]
        edited = _edited(query, functions)
        if edited == query or not _same(run, query, edited):
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
    where = _outer_where(text) if kinds in ([duckdb.StatementType.UPDATE], [duckdb.StatementType.DELETE]) else None
    return (*where, "SELECT 1 ") if where else None


def _outer_where(text: str) -> tuple[int, int] | None:
    """Where the only WHERE outside parentheses begins and ends; after it comes RETURNING, or nothing."""
    depth, start = 0, None
    for it in significant(text, ours=False):
        word = text[it.start : it.end].upper() if it.kind in (Kind.WORD, Kind.SYMBOL) else ""
        depth += (word == "(") - (word == ")")
        if depth == 0 and word == "WHERE":
            start = it.start
        elif depth == 0 and start is not None and word in ("RETURNING", ";"):
            return start, it.start
    return None if start is None else (start, len(text))


# -- what is written -------------------------------------------------------------------------------------------


def _edited(query: str, functions: Callable[[str], bool]) -> str:
    reader = _Reader(query, functions)
    edits = sorted(edit for clause in reader.clauses() for edit in _edits(reader, clause))
    for start, end, replacement in reversed(edits):
        query = query[:start] + replacement + query[end:]
    return query


def _edits(reader: _Reader, clause: _Clause) -> Iterator[tuple[int, int, str]]:
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


class _Reader:
    """The clauses of a query, by its lexemes. What it gets wrong the comparison of the trees finds.

    Attributes:
        tokens: all but blanks and comments.
        joins: there is a join, which may need fewer rows of a table if DuckDB does not expect few anyway.
        numbered: placeholders are numbered by their order, so that nothing can be moved.
    """

    def __init__(self, text: str, functions: Callable[[str], bool]) -> None:
        self.text = text
        self.tokens = [
            _Token(text[s:e].upper() if kind in (Kind.WORD, Kind.SYMBOL) else "", kind, s, e)
            for kind, s, e in significant(text, ours=False)
        ]
        self.joins = any(it.word == "JOIN" for it in self.tokens)
        self.numbered = any(it.word == "?" for it in self.tokens)
        self._functions = functions
        self._ends = self._brackets()

    def place(self, condition: _Condition) -> tuple[int, int]:
        """Where a condition begins and ends in the text."""
        return self.tokens[condition.first].start, self.tokens[condition.last - 1].end

    def clauses(self) -> Iterator[_Clause]:
        """The clauses on all levels."""
        for n, token in enumerate(self.tokens):
            before = [it.word for it in self.tokens[max(0, n - 2) : n]]
            if token.word not in _CLAUSES or before[-1:] == ["."] or before == ["FILTER", "("]:
                continue
            last = n + 1
            while last < len(self.tokens) and self.tokens[last].word not in (*_CLAUSE_ENDS, ")"):
                last = self._after(last)
                if self._words(last - 1, 2) == ("DISTINCT", "FROM"):  # IS DISTINCT FROM
                    last += 1
            if last > n + 1:
                yield _Clause(token.word, last, list(self._conditions(n + 1, last)))

    def _conditions(self, first: int, last: int) -> Iterator[_Condition]:
        """What AND joins, also within parentheses."""
        for start, end in self._parts(first, last):
            if self.tokens[start].word == "(" and self._after(start) == end and not self._is_query(start):
                yield from self._conditions(start + 1, end - 1)
            else:
                yield self._condition(start, end)

    def _parts(self, first: int, last: int) -> list[tuple[int, int]]:
        parts, start, n, cases, betweens = [], first, first, 0, 0
        while n < last:
            word = self.tokens[n].word
            cases += (word == "CASE") - (word == "END")
            if not cases:
                if word == "OR":
                    return [(first, last)]
                betweens += word == "BETWEEN"
                if word == "AND" and betweens:
                    betweens -= 1
                elif word == "AND":
                    parts.append((start, n))
                    start = n + 1
            n = self._after(n)
        return [*parts, (start, last)]

    def _condition(self, first: int, last: int) -> _Condition:
        """A condition with a query in it is left alone: DuckDB makes a join of it."""
        inside = range(first, last)
        if any(self.tokens[n].word == "(" and self._is_query(n) for n in inside):
            return _Condition(first, last, asks=False, sure=True)
        called = [self._name(n) for n in inside if n + 1 < last and self.tokens[n + 1].word == "("]
        asks = any(self._functions(name) for name in called)
        unsure = any(name not in _SURE and not self._functions(name) for name in called if name)
        return _Condition(first, last, asks, not unsure and not any(map(self._casts, inside)))

    def _casts(self, n: int) -> bool:
        """Whether a cast is made that some value may not survive; a constant fails before any row, or never."""
        match self._words(n, 3):
            case "CAST", *_:
                return True
            case "-", ">", _:  # the arrows of JSON
                return True
            case ":", ":", type_:
                return type_ not in _TEXT_TYPES and self.tokens[n - 1].kind not in (Kind.STRING, Kind.NUMBER)
        return False

    def _name(self, n: int) -> str:
        """The function that a token may call, in lower case; '' for symbols."""
        token = self.tokens[n]
        text = self.text[token.start : token.end].lower()
        return text.strip('"') if token.kind in (Kind.WORD, Kind.DOUBLE) else ""

    def _is_query(self, n: int) -> bool:
        inside = next((it.word for it in self.tokens[n + 1 :] if it.word != "("), "")
        return inside in _QUERY_STARTS

    def _words(self, n: int, count: int) -> tuple[str, ...]:
        return tuple(it.word for it in self.tokens[n : n + count])

    def _after(self, n: int) -> int:
        """The token after this one, or after the bracket that it opens."""
        return self._ends.get(n, n) + 1

    def _brackets(self) -> dict[int, int]:
        open_: list[int] = []
        ends = {}
        for n, token in enumerate(self.tokens):
            if token.word in ("(", "[", "{"):
                open_.append(n)
            elif token.word in (")", "]", "}") and open_:
                ends[open_.pop()] = n
        return ends


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
        tree = parsed(lambda sql, values: con.execute(sql, values).fetchall(), f"SELECT 1 WHERE {condition}")
    assert tree is not None
    return dict(tree["where_clause"])


def _frames() -> dict[str, Node]:
    """A framed column, for each clause."""
    return {key: _tree("x".join(_frame(word))) for word, key in _CLAUSES.items()}
