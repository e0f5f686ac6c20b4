"""`sqlext chat`: a conversation with a model function in the terminal, or one prompt a line through a pipe.

Alone because it is a program of its own on top of `con.stream`: it keeps the turns, measures, and writes down every
exchange. Answers go to stdout, all else to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
from rich.console import Console

from runtime.checkpoints.folder import data_folder
from runtime.errors import SqlextError, UserError, did_you_mean
from udfs.arguments import OPTION_NAMES
from udfs.signatures import quote

if TYPE_CHECKING:
    from sqlext.connection import Connection

PROMPT = "› "
COMMANDS = "/reset forgets the turns so far, /system TEXT sets the system message, /exit or Ctrl-D leaves."


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and what came of it.

    Attributes:
        answer: all that was written of it.
        error: why there is no answer; None where there is one.
        stopped: Ctrl-C ended it.
        seconds: from the question to the answer's end, as it was seen here.
        first_s: until the first piece of it; None when there was none.
        token_s: from the first token to the last, for each token after the first; None for fewer than two.
        tokens_per_s: of the answer, over `seconds`.
        stored: no model was asked; the answer was in the result store.
    """

    prompt: str
    answer: str
    error: str | None = None
    stopped: bool = False
    seconds: float = 0.0
    first_s: float | None = None
    token_s: float | None = None
    tokens_per_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    stored: bool = False

    @property
    def line(self) -> str:
        """Its figures for a person."""
        if self.error or self.stopped:
            return "stopped" if self.stopped else f"error: {self.error}"
        parts = [f"{self.seconds:.2f} s"]
        if self.stored:
            return " · ".join(["stored answer", *parts])
        if self.first_s is not None:
            parts.append(f"first token after {self.first_s:.2f} s")
        if self.token_s is not None:
            parts.append(f"{self.token_s * 1000:.1f} ms per token")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
        return " · ".join([f"{self.completion_tokens} tokens", *parts])


class Conversation:
    """The turns with one model function; each question is asked with all that was said before.

    Args:
        options: the function's named options.

    Raises:
        UserError: there is no such function or option.
    """

    def __init__(self, connection: Connection, function: str, system: str, options: Mapping[str, Any]) -> None:
        models = connection.session.functions.gateways()
        if function.lower() not in models:
            raise _unknown("function", function, models)
        for name in options:
            if name not in OPTION_NAMES:
                raise _unknown("option", name, OPTION_NAMES)
        self._connection = connection
        named = "".join(f", {name} := ${number}" for number, name in enumerate(options, 2))
        self._query = f"SELECT {quote(function)}($1{named})"
        self._values = list(options.values())
        self._model = function.lower()
        self._turns: list[dict[str, str]] = []
        self.system = system

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self._turns = []

    def ask(self, prompt: str, *, shows: bool) -> Exchange:
        """Ask, and write the answer to stdout as it comes where `shows`. Ctrl-C stops it; what was not answered is
        not remembered as a turn."""
        question = {"role": "user", "content": prompt}
        system = [{"role": "system", "content": self.system}] if self.system else []
        began = time.perf_counter()
        first: float | None = None
        pieces: list[str] = []
        error, stopped, stream = None, False, None
        try:
            stream = self._connection.stream(self._query, [[*system, *self._turns, question], *self._values])
            for piece in stream:
                first = first or time.perf_counter() - began
                if piece.anew:
                    pieces.clear()
                    _write("\n", shows)
                pieces.append(piece)
                _write(piece, shows)
        except KeyboardInterrupt:
            stopped = True
        except (SqlextError, duckdb.Error) as failure:
            error = str(failure)
        finally:
            if stream:
                stream.close()
        seconds = time.perf_counter() - began
        if pieces or not (error or stopped):
            _write("\n", shows)
        answer = "".join(pieces)
        if error or stopped:
            return Exchange(prompt, answer, error, stopped, seconds, first)
        self._turns += [question, {"role": "assistant", "content": answer}]
        usage = stream.statement.usage.get(self._model) if stream else None
        if usage is None or not usage.calls:
            return Exchange(prompt, answer, seconds=seconds, first_s=first, stored=True)
        made = usage.completion_tokens
        return Exchange(
            prompt,
            answer,
            seconds=seconds,
            first_s=first,
            token_s=(seconds - first) / (made - 1) if first is not None and made > 1 else None,
            tokens_per_s=made / seconds,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=made,
        )


class ChatLog:
    """The file that keeps every exchange, a JSON object a line, readable by its owner only.

    Args:
        path: '' = a new file in the user's data folder.
    """

    def __init__(self, path: str, function: str) -> None:
        name = f"{function}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}.jsonl"
        self.path = Path(path) if path else data_folder() / "chats" / name

    def add(self, exchange: Exchange, system: str) -> None:
        """Write one exchange down."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "system": system, **asdict(exchange)}
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(file, "w", encoding="utf-8", errors="replace") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def talk(talking: Conversation, log: ChatLog, *, as_json: bool) -> bool:
    """Answer what is typed, or what comes through a pipe, to its end; whether all of it was answered.

    Raises:
        KeyboardInterrupt: Ctrl-C, where prompts come through a pipe.
    """
    console = Console(stderr=True, highlight=False)
    typed = sys.stdin.isatty()
    console.print(f"Every exchange is kept in {log.path}", style="dim", markup=False, soft_wrap=True)
    if typed:
        console.print(COMMANDS, style="dim", markup=False)
    good = True
    for text in _typed() if typed else _piped():
        if _obeyed(text, talking):
            continue
        exchange = talking.ask(text, shows=not as_json)
        log.add(exchange, talking.system)
        if as_json:
            print(json.dumps(asdict(exchange), ensure_ascii=False), flush=True)
        console.print(exchange.line, style="red" if exchange.error else "dim", markup=False, soft_wrap=True)
        good = good and not exchange.error
        if exchange.stopped and not typed:
            raise KeyboardInterrupt
    return good


def _obeyed(text: str, talking: Conversation) -> bool:
    """Whether `text` is a command, which is then done."""
    word, _, rest = text.partition(" ")
    if word == "/reset":
        talking.reset()
    elif word == "/system":
        talking.system = rest.strip()
    else:
        return False
    return True


def _typed() -> Iterator[str]:
    """What a person types, line by line, until Ctrl-D or /exit; Ctrl-C gives up the line."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its keys and its history
    while True:
        try:
            text = input(PROMPT).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if text == "/exit":
            return
        if text:
            yield text


def _piped() -> Iterator[str]:
    """The lines of stdin that are not empty, until /exit."""
    for line in sys.stdin:
        text = line.strip()
        if text == "/exit":
            return
        if text:
            yield text


def _write(text: str, shows: bool) -> None:
    if shows:
        sys.stdout.write(text)
        sys.stdout.flush()


def _unknown(what: str, name: str, known: Any) -> UserError:
    near = did_you_mean(name, known)
    there = f"There are: {', '.join(known)}." if known else "Deploy one first, with --script deploy.sql."
    return UserError(
        f'There is no {what} "{name}".',
        code=f"{what}_unknown",
        hint=f'Did you mean "{near}"? {there}' if near else there,
    )
