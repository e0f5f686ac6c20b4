"""Where the clauses of a query stand that drop rows, and which conditions they are made of.

It stands alone because DuckDB's tree does not say where a condition ends in the text. What is read here by lexemes is
only a proposal: whoever changes a text by it lets DuckDB's parser have the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from sqlext.lexemes import Kind, significant
from sqlext.query_tree import words

CLAUSES = {"WHERE": "where_clause", "HAVING": "having", "QUALIFY": "qualify"}
"""The key words, and how DuckDB's tree calls the clauses."""

_CLAUSE_ENDS = words(
    "WHERE HAVING QUALIFY GROUP WINDOW ORDER LIMIT OFFSET FETCH UNION INTERSECT EXCEPT USING SELECT FROM RETURNING ;"
)
_QUERY_STARTS = words("SELECT FROM WITH VALUES TABLE PIVOT UNPIVOT DESCRIBE SHOW SUMMARIZE")
# A condition of these alone cannot fail for a row, so that it may be evaluated for rows that the answer would drop.
_SURE = words(
    "and any avg between ceil coalesce concat contains count date_trunc day dense_rank else ends_with extract floor "
    "greatest hash ifnull ilike in isnan least left len length like list_contains lower ltrim max md5 min month not "
    "nullif or over prefix rank regexp_full_match regexp_matches replace reverse right round row_number rtrim "
    "starts_with strlen strpos substr substring suffix then trim try_cast upper when year"
)
_MAY_OVERFLOW = ("*", "<<")
_TEXT_TYPES = words("VARCHAR TEXT STRING")


class _Token(NamedTuple):
    """A lexeme: its upper-case word or symbol ('' for what is quoted), and its place."""

    word: str
    kind: Kind
    start: int
    end: int


class Condition(NamedTuple):
    """The tokens from `first` until `last`, and whether a model has to be asked, or a row may fail, for it."""

    first: int
    last: int
    asks: bool
    sure: bool


class Clause(NamedTuple):
    """A clause with all its conditions; `last` is where its tokens end."""

    word: str
    last: int
    conditions: list[Condition]


class Reader:
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
        self._many_tables = self.joins or any(map(self._lists_tables, range(len(self.tokens))))

    def place(self, condition: Condition) -> tuple[int, int]:
        """Where a condition begins and ends in the text."""
        return self.tokens[condition.first].start, self.tokens[condition.last - 1].end

    def clauses(self) -> Iterator[Clause]:
        """The clauses on all levels."""
        for n, token in enumerate(self.tokens):
            before = [it.word for it in self.tokens[max(0, n - 2) : n]]
            if token.word not in CLAUSES or before[-1:] == ["."] or before == ["FILTER", "("]:
                continue
            last = n + 1
            while last < len(self.tokens) and self.tokens[last].word not in (*_CLAUSE_ENDS, ")"):
                last = self._after(last)
                if self._words(last - 1, 2) == ("DISTINCT", "FROM"):  # IS DISTINCT FROM
                    last += 1
            if last > n + 1:
                yield Clause(token.word, last, list(self._conditions(n + 1, last)))

    def _conditions(self, first: int, last: int) -> Iterator[Condition]:
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

    def _condition(self, first: int, last: int) -> Condition:
        """A condition with a query in it is left alone: DuckDB makes a join of it."""
        inside = range(first, last)
        if any(self.tokens[n].word == "(" and self._is_query(n) for n in inside):
            return Condition(first, last, asks=False, sure=True)
        called = [self._name(n) for n in inside if n + 1 < last and self.tokens[n + 1].word == "("]
        asks = any(self._functions(name) for name in called) and not self._may_join(first, last)
        unsure = any(name not in _SURE and not self._functions(name) for name in called if name)
        return Condition(
            first, last, asks, not unsure and not any(self._casts(n) or self._computes(n) for n in inside)
        )

    def _may_join(self, first: int, last: int) -> bool:
        """Whether DuckDB may join tables by this condition, which it could not if it were changed."""
        n = first
        while self._many_tables and n < last:
            if self.tokens[n].word == "=":
                sides = (range(first, n), range(n + 1, last))
                return all(any(self.tokens[m].kind in (Kind.WORD, Kind.DOUBLE) for m in side) for side in sides)
            n = self._after(n)
        return False

    def _lists_tables(self, n: int) -> bool:
        """Whether a FROM stands here that lists tables with commas."""
        if self.tokens[n].word != "FROM":
            return False
        n += 1
        while n < len(self.tokens) and self.tokens[n].word not in (*_CLAUSE_ENDS, ")"):
            if self.tokens[n].word == ",":
                return True
            n = self._after(n)
        return False

    def _computes(self, n: int) -> bool:
        """Whether there is arithmetic that overflows soon; the star of count(*) is none."""
        return self.tokens[n].word in _MAY_OVERFLOW and self._words(n - 1, 3) != ("(", "*", ")")

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


def outer_where(text: str) -> tuple[int, int] | None:
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
