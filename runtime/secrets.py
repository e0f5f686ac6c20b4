"""What must never be shown: keys, and the text of rows.

Alone because every way out of the program (errors, logs, tables) asks here, and so that there is one answer. A key is
given by reference and looked up as late as it can be; from then on `redact` knows it, in every process that holds it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.spec import Prompt

HIDDEN = "***"
QUOTE = 12  # characters in a row that count as quoting a prompt
MIN_HIDDEN = 6  # shorter values are no keys, and stand in texts by chance
MAX_FILE_BYTES = 64 * 1024

_NAME = re.compile(r"key|token|secret|password", re.IGNORECASE)
_SHAPES = (
    re.compile(r"(?<=://)[^\s/@]+(?=@)"),  # user and password in an address
    re.compile(r"\b(?:sk|hf|pk|xai|gsk|ghp|github_pat)[-_ ][\w\-.]{8,}"),
    re.compile(r"\b(?:AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w.-]{8,})"),
    re.compile(r"(?i)(?:\bbearer|(?:key|token|secret|password)[\"']?\s*[=:])\s*[\"']?[^\s\"',;&]{8,}"),
)

_known: set[str] = set()  # the values of this process


class Secret:
    """A text that shows itself as ``***``. `reveal` has it; pickling keeps it, so that it can travel to a worker."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value
        if len(value) >= MIN_HIDDEN:
            _known.add(value)

    def reveal(self) -> str:
        """The text itself."""
        return self._value

    def __str__(self) -> str:
        return HIDDEN

    __repr__ = __str__

    def __format__(self, _: str) -> str:
        return HIDDEN

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        return Secret, (self._value,)


def resolve(said: str | Secret) -> Secret:
    """The secret that was said: ``env:NAME``, ``file:PATH``, or the secret itself.

    Raises:
        UserError: secret_missing: no such variable or file here, or it is empty; secret_bad: it cannot be a key.
    """
    if isinstance(said, Secret):
        return said
    kind, colon, name = said.partition(":")
    if colon and kind == "env":
        value, what = os.environ.get(name), f'the environment variable "{redact(name)}"'
    elif colon and kind == "file":
        value, what = _content(name), f'the file "{redact(name)}"'
    else:
        value, what = said, "the statement"
    value = (value or "").strip()
    if not value:
        raise UserError(
            f"There is no key in {what}.",
            code="secret_missing",
            hint="Set it before the program starts; on a cluster, on every machine before Ray starts there.",
        )
    if not value.isascii() or not value.isprintable() or " " in value:
        raise UserError(
            f"What is in {what} is no key: it has spaces, line ends or characters beyond ASCII.",
            code="secret_bad",
            hint="It must be the key alone.",
        )
    return Secret(value)


def travelling(said: str, *, here: bool) -> str | Secret:
    """What is sent to the workers for a key: the reference, as long as they can look it up themselves.

    Args:
        here: the workers run on this machine: what is set in this process counts, even if it was set after they
            started.
    """
    if not said.startswith(("env:", "file:")):
        return Secret(said)
    if here:
        try:
            return resolve(said)
        except UserError:
            pass  # the worker says so, unless it has what we have not
    return said


def redact(text: str, options: Iterable[tuple[str, Any]] = ()) -> str:
    """`text` without keys: those this process has resolved, and whatever looks like one.

    Args:
        options: of a model; values under the name of a key are hidden too.
    """
    named = (value for name, value in options if isinstance(value, str) and _NAME.search(name))
    hidden = {*tuple(_known), *(value for value in named if len(value) >= MIN_HIDDEN)}
    for value in sorted(hidden, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, HIDDEN)
    for shape in _SHAPES:
        text = shape.sub(HIDDEN, text)
    return text


def first_line(error: BaseException, max_chars: int = 200) -> str:
    """The cause in a line that may be shown: the kind of the error and how its message begins, without keys."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return redact(f"{type(error).__name__}: {said}" if said else type(error).__name__)[:max_chars]


def quotes(text: str, prompts: Sequence[Prompt], system: str | None = None) -> bool:
    """Whether `text` repeats a part of a prompt or of the system message."""
    contents = [
        content
        for prompt in prompts
        for content in ([prompt] if isinstance(prompt, str) else [message.content for message in prompt])
    ]
    if any(len(content) >= 3 and content in text for content in contents):
        return True
    everything = "\n".join([*contents, system or ""])
    return any(text[start : start + QUOTE] in everything for start in range(len(text) - QUOTE + 1))


def _content(path: str) -> str | None:
    try:
        with Path(path).expanduser().open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return None
