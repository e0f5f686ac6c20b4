"""The script: text into statements, and `${name}` into values.

It stands alone because there is only one splitter: whoever needs to know where a statement ends asks here.
Statements are not changed in any way; nothing is known here of what they mean, only whose they are.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Container, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Literal

from runtime.errors import Place, SqlSyntaxError
from sqlext.lexemes import Kind, Lexeme, significant

__all__ = ["Chunk", "Head", "head", "split", "substitute", "unterminated"]

Head = Literal["llm", "run", "load", "save", "set", "explain", "sql"]
"""Whose a statement is: 'sql' is DuckDB's, all others are ours."""

_VARIABLE = re.compile(r"\$\{([^{}\r\n]*+)\}")
_LINE_END = re.compile(r"\r\n|\n|\r")
_HEADS: Mapping[str, Head] = {"!": "llm", "RUN": "run", "TRAIN": "run", "PREDICT": "run", "SAVE": "save"}
_VARIABLE_SET = re.compile(r"[\w`].*=(?:['\"`]|\$\w*\$)", re.DOTALL)
_ENDS = {
    "/*": ("comment", "*/"),
    "'''": ("block string", "'''"),
    "'": ("string", "'"),
    "e'": ("string", "'"),
    '"': ("quoted text", '"'),
    "`": ("backquoted name", "`"),
    "$": ("dollar-quoted string", "the same $…$ that opens it"),
}
_SECRET = re.compile(
    r"api_?key|secret|passw|credential|token(?!s|_?id|iz|_?count)|\b(?:sk|hf|gh[opsu]|xox[abp])[-_]\w{6}|\bAKIA",
    re.IGNORECASE,
)
_LONGEST_LINE = 10_000
_CLAUSE = re.compile(r"\b(?:and|where|options|setup)\b|;", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One statement of a script.

    Attributes:
        text: exactly as typed, from its first to its last character that is no blank or comment; no ending `;`.
        place: of its first character.
        closed: whether a `;` ended it; a prompt asks for more lines until then.
    """

    text: str
    place: Place
    closed: bool = True

    def place_at(self, offset: int) -> Place:
        """The place in the file of `text[offset]`."""
        line, begin = _line(_line_starts(self.text[:offset]), offset)
        if line == 1:
            column = self.place.column + offset
            return Place(self.place.line, column, self.place.source, file=self.place.file)
        source = _shown(self.text, begin)
        return Place(self.place.line + line - 1, offset - begin + 1, source, file=self.place.file)


def split(text: str, file: str | None = None, *, duckdb_settings: Container[str] = ()) -> list[Chunk]:
    """The statements of a script, in order.

    Args:
        file: name of the script for messages.
        duckdb_settings: lower-case names whose `SET name='…'` is DuckDB's.

    Raises:
        SqlSyntaxError: a string or comment has no end; the place is that of its beginning.
    """
    lines = _line_starts(text)

    def place(offset: int) -> Place:
        line, begin = _line(lines, offset)
        return Place(line, offset - begin + 1, _shown(text, begin), file=file)

    chunks = []
    position = 0
    while (start := _next(text, position)) is not None:
        ours = head(text, start, duckdb_settings) not in ("sql", "explain")
        last, end = _extent(text, start, ours)
        if end.kind is Kind.OPEN:
            raise unterminated(text, end.start, place(end.start))
        if last > start:
            chunks.append(Chunk(text[start:last], place(start), closed=end.start < len(text)))
        position = end.end
    return chunks


def head(text: str, start: int = 0, duckdb_settings: Container[str] = ()) -> Head:
    """Whose the statement is that begins at `start`, a character that is no blank or comment.

    `LOAD` is ours before ``word.``, `SET` before `name = ` and a string unless DuckDB has a setting of that name.
    """
    found = significant(text, start, ours=False)
    words = chain((text[it.start : it.end] for it in found), repeat(""))
    first = next(words).upper()
    if first == "LOAD":
        _, dot = next(words), next(words)
        return "load" if dot[:1] in (".", "`") else "sql"
    if first == "EXPLAIN":
        return "explain" if next(words).upper() == "LLM" else "sql"
    if first == "SET":
        name, equals, value = next(words), next(words), next(words)
        known = name.strip("`").lower() in duckdb_settings
        return "set" if not known and equals == "=" and _VARIABLE_SET.match(f"{name}={value}") else "sql"
    return _HEADS.get(first, "sql")


def substitute(text: str, variables: Mapping[str, str]) -> str:
    """`text` with every known `${name}` replaced once; unknown names stay as they are."""
    return _VARIABLE.sub(lambda found: variables.get(found[1].strip(), found[0]), text)


def unterminated(text: str, start: int, place: Place) -> SqlSyntaxError:
    """The error for the string or comment without an end that begins at `text[start]`."""
    opening = next(it for it in _ENDS if text[start : start + 3].lower().startswith(it))
    what, end = _ENDS[opening]
    doubled = " Inside the string, write '' for a quote." if end == "'" else ""
    return SqlSyntaxError(
        f"This {what} has no end.", code="unterminated", hint=f"Close it with {end}.{doubled}", place=place
    )


def _next(text: str, position: int) -> int | None:
    """Where the next statement begins, or None at the end of the script."""
    found = (it.start for it in significant(text, position, ours=False) if text[it.start] != ";")
    return next(found, None)


def _extent(text: str, start: int, ours: bool) -> tuple[int, Lexeme]:
    """The end of the last lexeme of the statement at `start`, and what ends it: `;`, the text's end, or OPEN."""
    last = start
    for lexeme in significant(text, start, ours=ours):
        if lexeme.kind is Kind.OPEN or text[lexeme.start] == ";":
            return last, lexeme
        last = lexeme.end
    return last, Lexeme(Kind.SYMBOL, len(text), len(text))


def _line_starts(text: str) -> list[int]:
    return [0, *(found.end() for found in _LINE_END.finditer(text))]


def _line(starts: list[int], offset: int) -> tuple[int, int]:
    """The 1-based number of the line that holds `offset`, and where it begins."""
    number = bisect_right(starts, offset)
    return number, starts[number - 1]


def _shown(text: str, begin: int) -> str:
    """The line that begins at `begin`, or '' when it may hold a key or is very long: errors show it."""
    end = _LINE_END.search(text, begin, begin + _LONGEST_LINE)
    stop = end.start() if end else len(text)
    if stop - begin > _LONGEST_LINE:
        return ""
    clause = begin
    for found in _CLAUSE.finditer(text, max(0, begin - 2000), begin):
        clause = found.start()
    return "" if _SECRET.search(text, clause, stop) else text[begin:stop]
