"""What Tab offers at the prompt: words of SQL, the database's own names, and our statements with their options.

Alone because it reads half a statement, which nothing else has to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import duckdb
from prompt_toolkit.completion import CompleteEvent, Completion
from prompt_toolkit.completion import Completer as _Completer
from prompt_toolkit.document import Document

from sqlext import options
from sqlext.option_table import ACTIONS, PRESETS, SETUP, TABLE, OptionSpec

if TYPE_CHECKING:
    from sqlext.connection import Connection

VERBS = (
    *("setup", "models", "status", "model exists", "model remove", "jobs", "job", "logs", "wait", "cancel", "resume"),
    *("usage", "retry", "cache", "cache clear", "cache prune", "imports", "help"),
)
OURS = ("!llm", "RUN command AS LLM.`` WHERE ", "EXPLAIN LLM", "LOAD json.`", "SAVE overwrite")
_WORD = re.compile(r"`?[\w.]*$")
_SETTING = re.compile(r"[\"']([\w.]+)=([^\"']*)$")
_VALUE = re.compile(r"[`\"]?([\w.]+)[`\"]?\s*=\s*[\"']([^\"']*)$")
_ACTION = re.compile(r"\baction\s*=\s*[\"'](\w+)[\"']", re.IGNORECASE)
_NAMES = """
    SELECT table_name FROM information_schema.tables
    UNION SELECT column_name FROM information_schema.columns
    UNION SELECT function_name FROM duckdb_functions() WHERE regexp_full_match(function_name, '[a-z]\\w+')
    UNION SELECT keyword_name FROM duckdb_keywords()
"""


class Completer(_Completer):
    """Offers what may follow, from what stands before the cursor."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """The words that begin as the last one does, whatever their case."""
        before = document.text_before_cursor
        statement = before.rpartition(";")[2].lstrip()
        begun, offered = self._offered(statement)
        for word in offered:
            if _plain(word).startswith(_plain(begun)) and word.lower() != begun.lower():
                yield Completion(word, start_position=-len(begun))

    def _offered(self, statement: str) -> tuple[str, Iterable[str]]:
        """The word that was begun, and what it may become."""
        if statement.startswith("!"):
            return self._after_llm(statement)
        if re.match(r"(run|train|predict)\b.*\b(where|options)\b", statement, re.IGNORECASE | re.DOTALL):
            return _after_where(statement)
        begun = _begun(statement)
        ours = OURS if statement == begun else ()
        return begun, [*ours, *self._names()]

    def _after_llm(self, statement: str) -> tuple[str, Iterable[str]]:
        verb = re.sub(r"^!\w*\s*", "", statement)
        if re.fullmatch(r"!\w*", statement):
            return statement, ["!llm"]
        if found := re.match(r"setup\b\s*(.*)", verb, re.DOTALL):
            if value := _SETTING.search(found[1]):
                return value[2], _choices(value[1], SETUP)
            settings = [f"{spec.name}=" for spec in TABLE if SETUP in spec.scopes and not spec.ignored]
            return _begun(statement), [*PRESETS, *settings]
        functions = self._connection.session.functions.gateways()
        if re.match(r"(status|model \w+|cache clear)\s", verb):
            return _begun(statement), sorted(functions)
        return verb, VERBS

    def _names(self) -> list[str]:
        try:
            with self._connection.own_sql() as execute:
                names = [name for (name,) in execute(_NAMES).fetchall() if name]
        except duckdb.Error:
            return []
        return sorted({*names, *self._connection.session.functions.gateways()})


def _after_where(statement: str) -> tuple[str, Iterable[str]]:
    """Options of the action that is named, and their values."""
    named = _ACTION.search(statement)
    scope = named[1].lower() if named else ""
    if value := _VALUE.search(statement):
        choices = [it.name for it in ACTIONS] if value[1].lower() == "action" else _choices(value[1], scope)
        return value[2], choices
    known = [spec for spec in TABLE if (scope in spec.scopes if scope in options.scopes() else spec.name == "action")]
    return _begun(statement), [f'{_typed(spec)}="' for spec in known if not spec.ignored and "*" not in spec.name]


def _typed(spec: OptionSpec) -> str:
    return f"`{spec.name}`" if "." in spec.name else spec.name


def _choices(name: str, scope: str) -> list[str]:
    for spec in TABLE:
        if spec.name.lower() == name.lower() and (not scope or scope in spec.scopes):
            return ["true", "false"] if spec.kind == "bool" else list(spec.choices)
    return []


def _plain(word: str) -> str:
    return word.lower().lstrip("`")


def _begun(text: str) -> str:
    found = _WORD.search(text)
    return found[0] if found else ""
