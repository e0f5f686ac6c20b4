"""The arguments of a model function: from the columns that DuckDB passes to prompts and call options.

The macros send three texts beside the statement: the prompt, what it is (a text, messages, a request), and the named
options as JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from runtime.errors import RowError, UserError, did_you_mean
from runtime.gateway import CACHE_MODES, CacheMode
from runtime.spec import CallOptions, Message, Prompt, Task, Value
from udfs.typed import schema_from

ROLES = ("system", "user", "assistant", "tool")
TEXT, MESSAGES, REQUEST, PAIR = "text", "messages", "request", "pair"
"""What a prompt can be, as the macro finds from its SQL type."""


def to_messages(text: str) -> tuple[Message, ...]:
    """The turns in the JSON of a list of {'role', 'content'} structs.

    Raises:
        RowError: bad_messages: there is none, or one without a content or with an unknown role.
    """
    messages = []
    for number, turn in enumerate(json.loads(text), 1):
        role, content = ((turn or {}).get(key) for key in ("role", "content"))
        if role not in ROLES or content is None:
            raise RowError(
                f"Message {number} of the list needs a role ({', '.join(ROLES)}) and a content.",
                code="bad_messages",
            )
        messages.append(Message(role, str(content)))
    if not messages:
        raise RowError("The list of messages is empty.", code="bad_messages")
    return tuple(messages)


def to_pair(text: str) -> tuple[Message, ...]:
    """The query and the text in the JSON of a list of the two."""
    query, answer = json.loads(text)
    return Message("query", query), Message("text", answer)


def with_media(prompt: Prompt, media: tuple[bytes, ...]) -> Prompt:
    """The prompt with media in front of the text that the user says last.

    Raises:
        RowError: bad_messages: the user says nothing.
    """
    if not media:
        return prompt
    turns = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    places = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if not places:
        raise RowError("There is no message of the user's that an image could belong to.", code="bad_messages")
    turns[places[-1]] = replace(turns[places[-1]], media=media)
    return tuple(turns)


def request_text(text: str | None) -> str | None:
    """The JSON that was given to `llm_param`, or None for NULL."""
    found: str | None = json.loads(text)["llm_request"] if text is not None else None
    return found


class Said(NamedTuple):
    """What a call's named options say: what decides its answer, and how stored answers are used (None: not said)."""

    options: CallOptions
    cache: CacheMode | None


@lru_cache(maxsize=1024)
def to_said(text: str | None) -> Said:
    """The JSON of a call's named options, read; NULL ones are not said.

    Raises:
        UserError: a value of the wrong type or out of range.
    """
    said = json.loads(text) if text else {}
    cache = said.pop("cache", None)
    if cache is not None and cache not in CACHE_MODES:
        raise UserError(
            "cache has no such value.",
            code="option_value",
            hint=f"Write cache := {' or '.join(map(repr, CACHE_MODES))}.",
        )
    return Said(options_from({name: value for name, value in said.items() if value is not None}), cache)


def options_from(said: dict[str, Any]) -> CallOptions:
    """Call options from names and values; names that are not options of ours go to the engine.

    Raises:
        UserError: a value of the wrong type or out of range.
    """
    known: dict[str, Any] = {}
    extra: dict[str, Value] = {}
    for name, value in said.items():
        if name == "seed" and str(value) == "-1":  # Byzer's word for none
            continue
        check = _CHECKS.get(name)
        if check:
            known[name] = check(name, value)
        elif name not in _ENGINES_OWN and (near := did_you_mean(name, _CHECKS)):
            raise UserError(
                f'The option "{name}" is not known.', code="option_unknown", hint=f'Did you mean "{near}"?'
            )
        else:
            extra[name] = _plain(name, value)
    return CallOptions(**known, extra=tuple(sorted(extra.items())))


def _plain(name: str, value: Any) -> Value:
    """A value that an engine may get: a scalar, or a list of scalars."""
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float | bool) for item in items):
        raise UserError(f"{name} must be a text, a number, true, false or a list of these.", code="option_value")
    return tuple(value) if isinstance(value, list) else value


def _number(low: float, high: float | None, whole: bool = False) -> Any:
    kind = "a whole number" if whole else "a number"
    bounds = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"

    def check(name: str, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        good = math.isfinite(number) and low <= number <= (math.inf if high is None else high)
        if isinstance(value, bool) or not good or (whole and number != int(number)):
            raise UserError(f"{name} must be {kind}, {bounds}.", code="option_value", hint=f"Write {name} := …")
        return int(number) if whole else number

    return check


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text.", code="option_value", hint=f"Write {name} := '…'.")
    return value


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise UserError(
            f"{name} must be a text or a list of texts, none of them empty.",
            code="option_value",
            hint=f"Write {name} := ['…', '…'].",
        )
    return tuple(stops)


_CHECKS = {
    "system": _text,
    "temperature": _number(0, None),
    "max_tokens": _number(1, None, whole=True),
    "top_p": _number(0, 1),
    "top_k": _number(0, None, whole=True),
    "stop": _stops,
    "seed": _number(0, None, whole=True),
    "schema": lambda _, said: schema_from(said),
}
OPTION_NAMES = (*_CHECKS, "cache")
"""The named options of a generating function, in the order its macro lists them."""

_DRAWING = (
    *("negative_prompt", "sampler_name", "sampling_steps", "cfg_scale", "width", "height", "strength", "seed"),
    "cache",
)
OPTIONS_OF = {
    Task.EMBED: ("cache",),
    Task.CLASSIFY: ("cache",),
    Task.RANK: ("cache",),
    Task.DRAW: _DRAWING,
    Task.TRANSCRIBE: ("language", "task", "timestamps", "max_tokens", "cache"),
    Task.SPEAK: ("speaker", "speaking_rate", "seed", "cache"),
}
"""The named options of the other functions."""
SEVERAL = ("batch_size", "batch_count")
"""How many images a call draws; where its answer can be several."""
_ENGINES_OWN = {
    *SEVERAL,
    *(name for names in OPTIONS_OF.values() for name in names),
}  # known, though not checked here
