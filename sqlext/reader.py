"""The reader: the lexemes of one statement of ours, taken from left to right.

It stands alone because every statement of ours is read with the same few steps (a keyword, a name, a path, options)
and every error must be made in one way: the place, what was expected, the nearest word, and never a value's text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NoReturn

from runtime.errors import Place, SqlSyntaxError, did_you_mean
from sqlext.lexemes import Kind, Lexeme, content, significant
from sqlext.script import Chunk, substitute, unterminated
from sqlext.statements import Option, Scalar

STRINGS = (Kind.STRING, Kind.DOUBLE, Kind.BLOCK, Kind.DOLLAR)
WHERE = ("WHERE", "OPTIONS")
_ONE_VARIABLE = re.compile(r"\$\{[^{}]*\}")


class Reader:
    """The lexemes of `chunk`.

    Raises:
        SqlSyntaxError: a string or comment in it has no end.
    """

    def __init__(self, chunk: Chunk, variables: Mapping[str, str]) -> None:
        self._chunk = chunk
        self._variables = variables
        self._lexemes = list(significant(chunk.text, ours=True))
        self._next = 0
        if self._lexemes and self._lexemes[-1].kind is Kind.OPEN:
            start = self._lexemes[-1].start
            raise unterminated(chunk.text, start, chunk.place_at(start))

    @property
    def present(self) -> Lexeme | None:
        """The lexeme to be read next; None at the end."""
        return self._lexemes[self._next] if self._next < len(self._lexemes) else None

    @property
    def place(self) -> Place:
        """Where the next lexeme begins; at the end, just behind the last."""
        present = self.present
        return self._chunk.place_at(present.start if present else len(self._chunk.text))

    def raw(self, lexeme: Lexeme) -> str:
        """The lexeme as typed."""
        return self._chunk.text[lexeme.start : lexeme.end]

    def typed(self, lexeme: Lexeme) -> str:
        """What the lexeme stands for, variables not replaced."""
        return content(self._chunk.text, lexeme)

    def filled(self, text: str) -> str:
        """`text` with its variables replaced."""
        return substitute(text, self._variables)

    def take(self) -> Lexeme:
        """Step over the next lexeme, which must be there."""
        lexeme = self._lexemes[self._next]
        self._next += 1
        return lexeme

    def sees(self, *words: str) -> bool:
        """Whether the next lexeme is one of these upper-case keywords or symbols."""
        present = self.present
        return present is not None and self.raw(present).upper() in words

    def accept(self, *words: str) -> bool:
        """Step over the next lexeme if it is one of `words`."""
        seen = self.sees(*words)
        self._next += seen
        return seen

    def expect(self, *words: str, hint: str | None = None) -> None:
        """Step over one of `words`."""
        if not self.accept(*words):
            self.fail(f"Expected {either(words)}", words, hint)

    def name(self, what: str, hint: str | None = None) -> str:
        """The name of a table or column: a word, dotted or not, or a quoted one."""
        present, place = self.present, self.place
        if (
            present is None
            or present.kind not in (Kind.WORD, Kind.BACK, Kind.DOUBLE)
            or self.sees("AS", "INTO", "AND", *WHERE)
        ):
            self.fail(f"Expected {what}", hint=hint)
        name = self.filled(self.typed(self.take()))
        if not name:
            raise SqlSyntaxError(f"Expected {what}, found an empty name.", hint=hint, place=place)
        return name

    def target(self, example: str) -> tuple[str, str]:
        """``word.`path` `` or `word.path`: the word and the path."""
        hint = f"Write {example}"
        present = self.present
        if present is None or present.kind is not Kind.WORD or self.sees("AND", *WHERE):
            self.fail("Expected a format and a path", hint=hint)
        word, dot, path = self.typed(self.take()).partition(".")
        if not dot:
            if not self.accept("."):
                self.fail("Expected a dot and a path", hint=hint)
            if (following := self.present) is None or following.kind not in (Kind.BACK, *STRINGS):
                self.fail("Expected the path in backquotes", hint=hint)
            path = self.typed(self.take())
        return word, self.filled(path)

    def options(self, *ends: str) -> tuple[Option, ...]:
        """``WHERE key="value" AND …``, nothing when there is no WHERE; `ends` are the words that may follow."""
        if not self.accept(*WHERE):
            return ()
        while self.accept("AND"):
            pass
        found: dict[str, Option] = {}
        while found or not (self.present is None or self.sees(*ends)):
            option = self._option()
            add_option(found, option)
            if not self.accept("AND"):
                break
        return tuple(found.values())

    def end(self, *others: str, hint: str = "End each statement with ;") -> None:
        """Nothing may follow; `others` are the words that could have."""
        if self.present is not None:
            self.fail(f"Expected {either((*others, 'the end of the statement'))}", others, hint)

    def fail(self, message: str, words: Iterable[str] = (), hint: str | None = None) -> NoReturn:
        """Raise `message` with what was found instead, and the nearest of `words`."""
        place, present = self.place, self.present
        near = did_you_mean(self.raw(present), words) if present and present.kind is Kind.WORD else None
        raise SqlSyntaxError(
            f"{message}, found {self._describe(place)}.",
            hint=f"Did you mean {near}?" if near else hint,
            place=place,
        )

    def _option(self) -> Option:
        place, present = self.place, self.present
        if present is None or present.kind not in (Kind.WORD, Kind.BACK) or self.sees("AS", "AND", *WHERE):
            self.fail("Expected an option's key", hint='Write WHERE key="value" AND key2="value2".')
        key = self.typed(self.take())
        if not key or "${" in key:
            raise SqlSyntaxError("A key must be written out.", hint="Variables stand in values.", place=place)
        self.expect("=", hint='Write key="value".')
        return Option(key, self._value(), place)

    def _value(self) -> Scalar:
        present = self.present
        raw = self.raw(present) if present else ""
        if present and (present.kind in STRINGS or _ONE_VARIABLE.fullmatch(raw)):
            return self.filled(self.typed(self.take()))
        if present and present.kind is Kind.NUMBER:
            self.take()
            return int(raw) if raw.lstrip("+-").isdigit() and len(raw) < 30 else float(raw)
        if self.accept("TRUE", "FALSE"):
            return raw.lower() == "true"
        return self.fail("Expected a value", hint='Put the value in quotes: key="value".')

    def _describe(self, place: Place) -> str:
        """What stands next, never the text of a value; a line that is not shown is not told either."""
        present = self.present
        if present is None:
            return "the end of the statement"
        if present.kind in STRINGS:
            return "a string"
        raw = self.raw(present)
        return f'"{raw}"' if place.source and len(raw) <= 60 else f"a {present.kind}"


def add_option(found: dict[str, Option], option: Option) -> None:
    """Add `option` to those found before, by its lower-case key.

    Raises:
        SqlSyntaxError: the key is there already.
    """
    first = found.setdefault(option.key.lower(), option)
    if first is not option:
        hint = f"It is first given at {first.place}; keep one of them."
        raise SqlSyntaxError("This key is given twice.", code="option_duplicate", hint=hint, place=option.place)


def either(words: Iterable[str]) -> str:
    """'a', 'a or b', 'a, b or c'."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
