"""`sqlext shell`: a prompt that speaks the whole language.

Alone because it is the only place where somebody types: it reads statements to their `;`, hands them to the
connection as a script would be, and shows what comes. Lines that begin with a dot are for the shell itself.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import duckdb
from prompt_toolkit import PromptSession
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import to_formatted_text
from prompt_toolkit.history import FileHistory
from prompt_toolkit.lexers import PygmentsLexer
from prompt_toolkit.shortcuts import print_formatted_text
from pygments.lexers.sql import SqlLexer

from runtime.errors import Cancelled, SqlextError, SqlSyntaxError, UserError, did_you_mean
from sqlext import __version__, render, script
from sqlext.completion import Completer
from sqlext.connection import Connection
from sqlext.progress import Progress
from udfs.signatures import quote

PROMPT, MORE = "sqlext> ", "   ...> "


class Shell:
    """A prompt on a connection.

    Args:
        history: file of the lines that were typed; made readable by its owner only.
    """

    def __init__(self, connection: Connection, progress: Progress, history: Path | None = None) -> None:
        self._connection = connection
        self._progress = progress
        self._mode: render.Mode = "box"
        self._timer = False
        self._output: IO[str] | None = None
        self._prompt: PromptSession[str] = PromptSession(
            PROMPT,
            lexer=PygmentsLexer(SqlLexer),
            completer=Completer(connection),
            complete_while_typing=False,
            history=FileHistory(str(history)) if history else None,
            multiline=Condition(lambda: not complete(self._prompt.default_buffer.text)),
            prompt_continuation=MORE,
            enable_history_search=True,
        )

    def run(self) -> None:
        """Read and run until the input ends or `.exit` is typed."""
        self._say(f"sqlext {__version__} on DuckDB {duckdb.__version__}. `.help` tells what can be typed.")
        while True:
            try:
                text = self._prompt.prompt()
            except KeyboardInterrupt:  # the line is given up, not the shell
                continue
            except EOFError:
                return
            if text.strip() in (".exit", ".quit"):
                return
            self.take(text)

    def take(self, text: str) -> None:
        """Do what was typed; an error is shown and not raised."""
        begun = time.monotonic()
        try:
            if text.lstrip().startswith("."):
                self._command(text.split())
            else:
                self._statements(text)
        except (KeyboardInterrupt, Cancelled):
            self._progress.pause()
            self._say("cancelled")
        except (SqlextError, duckdb.Error, OSError) as error:
            self._progress.pause()
            self._say(_told(error))
        if self._timer:
            self._say(f"{time.monotonic() - begun:.3f} s")

    def _statements(self, text: str, file: str | None = None) -> None:
        for _ in self._connection.run(text, file=file):
            if self._connection.has_rows:
                table = self._connection.fetch_arrow_table()
                self._progress.pause()
                render.show(self._connection.raw, table, self._mode, self._output)

    # -- lines that begin with a dot ----------------------------------------------------------------------------

    def _command(self, words: list[str]) -> None:
        name, *arguments = words
        if name not in _COMMANDS:
            near = did_you_mean(name, _COMMANDS)
            raise UserError(
                f"There is no {name} here.",
                code="usage",
                hint=f"Did you mean {near}?" if near else ".help lists what there is.",
            )
        does, usage, _ = _COMMANDS[name]
        try:
            inspect.signature(does).bind(self, *arguments)
        except TypeError:
            raise UserError(f"{name} is written otherwise.", code="usage", hint=f"Write {usage}.") from None
        does(self, *arguments)

    def help(self) -> None:
        """What can be typed."""
        self._say("Statements end with ; and may have several lines. Tab completes; Ctrl-C stops, Ctrl-D leaves.")
        for _, usage, doc in _COMMANDS.values():
            self._say(f"  {usage:22} {doc}")
        self._say("  !llm help;             the actions and the settings of the language")

    def tables(self) -> None:
        """The tables and views of the database."""
        self._statements("SELECT table_name AS name, table_type AS type FROM information_schema.tables ORDER BY ALL;")

    def schema(self, table: str | None = None) -> None:
        """The columns of a table, or the statements that made all of them."""
        if table:
            self._statements(f"DESCRIBE {quote(table)};")
        else:
            self._statements("SELECT sql FROM duckdb_tables() ORDER BY table_name;")

    def read(self, file: str) -> None:
        """Run a script."""
        self._statements(Path(file).expanduser().read_text(encoding="utf-8"), file)

    def mode(self, name: str) -> None:
        """How results are shown."""
        if name not in render.MODES:
            raise UserError(
                f"There is no mode {name}.", code="usage", hint=f"Write .mode {' | '.join(render.MODES)}."
            )
        self._mode = name

    def output(self, file: str | None = None) -> None:
        """Where results go."""
        if self._output:
            self._output.close()
        self._output = Path(file).expanduser().open("w", encoding="utf-8") if file else None

    def timer(self, word: str) -> None:
        """Whether each statement's time is told."""
        if word not in ("on", "off"):
            raise UserError(".timer is on or off.", code="usage", hint="Write .timer on.")
        self._timer = word == "on"

    def exit(self) -> None:
        """Taken care of where lines are read."""

    def _say(self, text: str) -> None:
        """Talk goes to stderr, as everywhere; results go to stdout."""
        print_formatted_text(to_formatted_text(text), file=sys.stderr)


_COMMANDS: dict[str, tuple[Callable[..., None], str, str]] = {
    ".help": (Shell.help, ".help", "this list"),
    ".tables": (Shell.tables, ".tables", "tables and views"),
    ".schema": (Shell.schema, ".schema [TABLE]", "the columns of a table; the statements that made all tables"),
    ".read": (Shell.read, ".read FILE", "run a script"),
    ".mode": (Shell.mode, ".mode MODE", "show results as box, line, json or csv"),
    ".output": (Shell.output, ".output [FILE]", "write results to a file; back to the screen"),
    ".timer": (Shell.timer, ".timer on|off", "tell how long each statement takes"),
    ".exit": (Shell.exit, ".exit", "leave; what only this shell deployed is undeployed"),
}


def complete(text: str) -> bool:
    """Whether what was typed can be run: nothing, a line of the shell's own, or statements that are all ended."""
    if not text.strip() or text.lstrip().startswith("."):
        return True
    try:
        chunks = script.split(text)
    except SqlSyntaxError:  # a string or comment without an end
        return False
    return not chunks or chunks[-1].closed


def history_file() -> Path | None:
    """Where typed lines are kept, readable by their owner only; None when nothing can be written there."""
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "sqlext"
    path = home / "history"
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        return path
    return None


def _told(error: Any) -> str:
    hint = getattr(error, "hint", None)
    return f"{error}\nhint: {hint}" if hint and hint not in str(error) else str(error)
