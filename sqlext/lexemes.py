"""Lexemes: where each string, comment, name and symbol of a text begins and ends.

It stands alone because the splitter and the parser must agree on this to the character. There are two ways to read:
DuckDB's (its lexer, matched by tests) and that of our statements, where strings know backslash escapes, `'''…'''` is
a block, names may be dotted or hold `${variables}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What a lexeme is; the values are the group names of the patterns below."""

    BLANK = "blank"
    COMMENT = "comment"
    WORD = "word"
    NUMBER = "number"
    ESCAPED = "escaped"  # E'…', DuckDB only
    BLOCK = "block"  # '''…''', ours only
    STRING = "string"  # '…'
    DOUBLE = "double"  # "…": an identifier for DuckDB, a string for us
    BACK = "back"  # `…`
    DOLLAR = "dollar"  # $tag$…$tag$
    SYMBOL = "symbol"
    OPEN = "open"  # a string or comment without an end; always the last lexeme


class Lexeme(NamedTuple):
    """`text[start:end]` is of this kind."""

    kind: Kind
    start: int
    end: int


_LETTER = r"[A-Za-z_]|[^\x00-\x7f\s\ufeff]"  # as in DuckDB, every character outside ASCII but the blanks
_TAG = rf"(?P<tag>(?:(?:{_LETTER})(?:{_LETTER}|[0-9])*+)?)"
_BLANK = r"(?P<blank>[\s\ufeff]++)|(?P<comment>--[^\r\n]*+)|(?P<nested>/\*)"
_QUOTED = rf"(?P<back>`(?:[^`]++|``)*+`)|(?P<dollar>\${_TAG}\$.*?\$(?P=tag)\$)"

_DUCKDB = re.compile(
    rf"""{_BLANK}|{_QUOTED}
    |(?P<escaped>[eE]'(?:[^'\\]++|\\.|'')*+')
    |(?P<string>'(?:[^']++|'')*+')
    |(?P<double>"(?:[^"]++|"")*+")
    |(?P<open>[eE]?'|["`]|\${_TAG.replace("tag", "open_tag")}\$)
    |(?P<word>(?:{_LETTER})(?:{_LETTER}|[0-9$])*+)
    |(?P<number>[0-9][0-9A-Za-z_.]*+)
    |(?P<symbol>.)""",
    re.VERBOSE | re.DOTALL,
)

_PART = rf"(?:{_LETTER}|[0-9]|\$\{{[^{{}}\r\n]*+\}})++"

_OURS = re.compile(
    rf"""{_BLANK}|{_QUOTED}
    |(?P<block>'''.*?'''(?!'))
    |(?P<string>'(?!'')(?:[^'\\]++|\\.|'')*+')
    |(?P<double>"(?:[^"\\]++|\\.|"")*+")
    |(?P<open>'''|['"`]|\${_TAG.replace("tag", "open_tag")}\$)
    |(?P<number>[+-]?(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)(?:[eE][+-]?[0-9]++)?+(?![\w.$]))
    |(?P<word>{_PART}(?:\.{_PART})*+)
    |(?P<symbol>.)""",
    re.VERBOSE | re.DOTALL,
)

_COMMENT_EDGE = re.compile(r"/\*|\*/")
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "'": "'", "\\": "\\"}


def lexemes(text: str, start: int = 0, *, ours: bool) -> Iterator[Lexeme]:
    """All lexemes of `text` from `start`, without gaps; `ours` chooses the way to read."""
    pattern = _OURS if ours else _DUCKDB
    while start < len(text):
        match = pattern.match(text, start)
        assert match is not None  # the last alternative takes any character
        group = match.lastgroup
        if group == "nested":
            end = _comment_end(text, start)
            yield Lexeme(Kind.COMMENT if end else Kind.OPEN, start, end or len(text))
            start = end or len(text)
        elif match["open"] is not None:
            yield Lexeme(Kind.OPEN, start, len(text))
            return
        else:
            kind = Kind(group or "symbol")
            yield Lexeme(kind, start, match.end())
            start = match.end()


def significant(text: str, start: int = 0, *, ours: bool) -> Iterator[Lexeme]:
    """The lexemes that are neither blanks nor comments."""
    return (it for it in lexemes(text, start, ours=ours) if it.kind not in (Kind.BLANK, Kind.COMMENT))


def content(text: str, lexeme: Lexeme) -> str:
    """What a lexeme of our statements stands for: without its quotes, escapes resolved."""
    raw = text[lexeme.start : lexeme.end]
    match lexeme.kind:
        case Kind.BLOCK:
            return raw[3:-3]
        case Kind.DOLLAR:
            edge = raw.index("$", 1) + 1
            return raw[edge:-edge]
        case Kind.BACK:
            return raw[1:-1].replace("``", "`")
        case Kind.STRING | Kind.DOUBLE:
            quote = raw[0]
            return re.sub(
                rf"\\([nt\"'\\])|{quote}{quote}",
                lambda found: _ESCAPES[found[1]] if found[1] else quote,
                raw[1:-1],
            )
        case _:
            return raw


def _comment_end(text: str, start: int) -> int | None:
    """The end of the comment that opens at `start`; comments nest, as in DuckDB."""
    depth = 0
    for edge in _COMMENT_EDGE.finditer(text, start):
        depth += 1 if edge[0] == "/*" else -1
        if depth == 0:
            return edge.end()
    return None
