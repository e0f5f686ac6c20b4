"""A row of the input table as what is trained on: a conversation or a plain text.

Alone because tables come in four forms, found from their columns, and everything behind knows only two things.

    messages      OpenAI: a list of {role, content [, weight]}, or JSON text of one; a content may be a list of text
                  parts, and an answer of weight 0 is not learnt
    instruction, output [, input, system, history]      Alpaca; history is a list of [question, answer]
    conversation  MOSS: a list of {human, assistant}, or JSON text of one
    text          plain text; also `value` or `content`, as LOAD text and read_text call it

Other columns beside them are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from runtime.errors import RowError, UserError, did_you_mean
from runtime.spec import Message

Conversation: TypeAlias = tuple[Message, ...]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Form:
    """A table's form.

    Attributes:
        name: 'messages', 'alpaca', 'moss' or 'text'.
        columns: the columns that are read: their names here, and as the table spells them.
    """

    name: str
    columns: Mapping[str, str]

    @property
    def is_text(self) -> bool:
        """Plain text, all of which is to be learnt."""
        return self.name == "text"


_OPTIONAL = ("input", "system", "history")
_FORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("moss", ("conversation",)),
    ("alpaca", ("instruction", "output")),
    ("text", ("text",)),
)
_TEXT_ALONE = ({"value"}, {"content"})
_BESIDE_TEXT = {"file", "filename", "size", "last_modified"}  # what LOAD text and read_text give with it


def find_form(columns: Collection[str]) -> Form:
    """The form of a table with these columns.

    Raises:
        UserError: training_columns, with the columns found.
    """
    spelled = {column.lower(): column for column in columns}
    for name, needed in _FORMS:
        if spelled.keys() >= set(needed):
            read = (*needed, *_OPTIONAL) if name == "alpaca" else needed
            return Form(name, {column: spelled[column] for column in read if column in spelled})
    for alone in _TEXT_ALONE:
        if spelled.keys() - _BESIDE_TEXT == alone:
            return Form("text", {"text": spelled[next(iter(alone))]})
    raise _unknown_columns(columns, spelled)


def read_row(form: Form, row: Mapping[str, Any]) -> Conversation | str:
    """What to learn from one row. A conversation ends with an answer to learn: what comes after it is left out.

    Raises:
        RowError: row_empty, row_no_answer, and those of `read_turns`; the message names the column.
    """
    turns = read_turns(form, row)
    if isinstance(turns, str):
        if not turns.strip():
            raise _bad("row_empty", "text is empty")
        return turns
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise _bad("row_no_answer", "There is no turn of the assistant")
    last = max((place for place in answers if turns[place].weight), default=None)
    if last is None:
        raise _bad("row_no_answer", "Every turn of the assistant has the weight 0")
    turns = turns[: last + 1]
    if any(turn.role == "assistant" and not turn.content.strip() for turn in turns):
        raise _bad("row_empty", "A turn of the assistant is empty")
    return turns


def read_turns(form: Form, row: Mapping[str, Any]) -> Conversation | str:
    """What one row says as it stands, whether or not it can be learnt from.

    Raises:
        RowError: row_null, row_type, row_role, row_tool_calls; the message names the column.
    """
    cells = {name: row.get(column) for name, column in form.columns.items()}
    return _text(cells["text"], "text") if form.is_text else tuple(_CONVERSATIONS[form.name](cells))


def lines_of(rows: Sequence[Path]) -> Iterator[bytes]:
    """The lines of the files of a table, empty ones left out."""
    for file in rows:
        with file.open("rb", buffering=1 << 20) as stream:
            yield from (line for line in stream if not line.isspace())


def row_of(line: bytes) -> dict[str, Any]:
    """The row in a line of JSON.

    Raises:
        RowError: row_json.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise _bad("row_json", "The line is no JSON object")
    return row


def form_of(rows: Sequence[Path]) -> Form:
    """The form of a table, as its first row tells it.

    Raises:
        UserError: training_columns; training_no_rows, when it has none.
    """
    for line in lines_of(rows):
        try:
            return find_form(row_of(line).keys())
        except RowError:
            continue
    raise UserError(
        "The table has no rows to train on.",
        code="training_no_rows",
        hint="Look at the query that makes the table, and at its filters.",
    )


def _messages(cells: Mapping[str, Any]) -> Iterator[Message]:
    for turn in _objects(cells["messages"], "messages"):
        role = turn.get("role")
        if role is None:
            raise _bad("row_null", "messages: a message has no role")
        if role not in ROLES:
            raise _bad("row_role", "messages: a role is unknown", f"Roles: {', '.join(ROLES)}.")
        if turn.get("tool_calls") or turn.get("function_call"):
            raise _bad(
                "row_tool_calls",
                "messages: a message calls tools, which is not trained on",
                "Leave such rows out, or write the call as text into the content.",
            )
        yield Message(role, _content(turn.get("content")), weight=_weight(turn.get("weight")))


def _content(said: object) -> str:
    """The content of a message: a text, or the texts of its parts together."""
    if not isinstance(said, list):
        return _text(said, "messages: a content")
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else 0 for part in said]
    return "".join(_text(part, "messages: a part of a content") for part in parts)


def _weight(said: object) -> int:
    if said is None:
        return 1
    if said not in (0, 1):
        raise _bad("row_type", "messages: a weight is neither 0 nor 1")
    return int(bool(said))


def _alpaca(cells: Mapping[str, Any]) -> Iterator[Message]:
    if system := _optional_text(cells, "system"):
        yield Message("system", system)
    for turn in _list(cells["history"], "history") if cells.get("history") is not None else ():
        if not isinstance(turn, list) or len(turn) != 2:
            raise _bad("row_type", "history: a turn is no pair of question and answer")
        yield Message("user", _text(turn[0], "history: a question"))
        yield Message("assistant", _text(turn[1], "history: an answer"))
    asked = (_text(cells["instruction"], "instruction"), _optional_text(cells, "input"))
    yield Message("user", "\n".join(part for part in asked if part))
    yield Message("assistant", _text(cells["output"], "output"))


def _moss(cells: Mapping[str, Any]) -> Iterator[Message]:
    for turn in _objects(cells["conversation"], "conversation"):
        yield Message("user", _text(turn.get("human"), "conversation: human"))
        yield Message("assistant", _text(turn.get("assistant"), "conversation: assistant"))


_CONVERSATIONS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Message]]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "moss": _moss,
}


def _text(value: object, what: str) -> str:
    if value is None:
        raise _bad("row_null", f"{what} is NULL")
    if not isinstance(value, str):
        raise _bad("row_type", f"{what} is no text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _bad("row_type", f"{what} holds characters that are no valid Unicode text") from None
    return value


def _optional_text(cells: Mapping[str, Any], name: str) -> str:
    return _text(cells[name], name) if cells.get(name) is not None else ""


def _list(value: object, what: str) -> list[Any]:
    """A list, or the one that stands as JSON in a text."""
    if value is None:
        raise _bad("row_null", f"{what} is NULL")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _bad("row_type", f"{what} is neither a list nor JSON of one") from None
    if not isinstance(value, list):
        raise _bad("row_type", f"{what} is no list")
    return value


def _objects(value: object, what: str) -> list[dict[str, Any]]:
    found = _list(value, what)
    if not all(isinstance(each, dict) for each in found):
        raise _bad("row_type", f"{what} holds something that is no object")
    return found


def _bad(code: str, why: str, hint: str | None = None) -> RowError:
    return RowError(f"{why}.", code=code, hint=hint)


def _unknown_columns(columns: Collection[str], spelled: Mapping[str, str]) -> UserError:
    wanted = [column for _, needed in _FORMS for column in needed]
    missing = [column for column in wanted if column not in spelled]
    near = next(((said, found) for said in columns if (found := did_you_mean(said, missing))), None)
    return UserError(
        f"The columns of the table are {', '.join(columns) or 'none'}; no form of training rows has them.",
        code="training_columns",
        hint=(f'Is "{near[0]}" meant to be "{near[1]}"? ' if near else "")
        + "Forms: messages (OpenAI); instruction, output and perhaps input, system, history (Alpaca); "
        "conversation (MOSS); text.",
    )
