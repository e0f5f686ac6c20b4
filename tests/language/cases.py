"""Case files: inputs and what they give, as text.

A case is its input, a line `---`, and the expected text; `===` stands between cases. A statement is expected as its
kind, then one line for each field; an option shows the line and column where it stands.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from runtime.errors import SqlSyntaxError
from sqlext.parser import parse
from sqlext.script import split
from sqlext.statements import Option, Statement

FOLDER = Path(__file__).parent / "cases"
VARIABLES = {
    "n": "3",
    "day": "2026-11-20",
    "name": "chat",
    "table": "my table",
    "dir": "/data",
    "job": "job-7",
    "quoted": "it's \"x\" ''' ; -- $$",
}
DUCKDB_SETTINGS = frozenset({"memory_limit", "threads", "schema"})


def read(name: str) -> list[tuple[str, str]]:
    """(input, expected) of each case of a file."""
    cases = []
    for block in (FOLDER / name).read_text(encoding="utf-8").split("\n===\n"):
        text, _, expected = block.partition("\n---\n")
        cases.append((text, expected.rstrip("\n")))
    return cases


def outcome(text: str) -> str:
    """What a text of statements gives: each described, or the error as the user sees it."""
    try:
        chunks = split(text, duckdb_settings=DUCKDB_SETTINGS)
        return "\n".join(describe(parse(it, VARIABLES, duckdb_settings=DUCKDB_SETTINGS)) for it in chunks)
    except SqlSyntaxError as error:
        return str(error) if error.place else "an error without a place"


def describe(statement: Statement) -> str:
    """A statement as text, without its place."""
    lines = [type(statement).__name__]
    for field in fields(statement):
        value = getattr(statement, field.name)
        if isinstance(value, tuple) and value and isinstance(value[0], Option):
            lines += [f"  {it.key} = {it.value!r} @{it.place.line}:{it.place.column}" for it in value]
        elif field.name != "place" and value not in (None, ()):
            lines.append(f"  {field.name}: {value!r}")
    return "\n".join(lines)
