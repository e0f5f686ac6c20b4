"""The arguments of a model function: from the columns that DuckDB passes to prompts and call options.

The macros send three texts beside the statement: the prompt, the SQL type it had, and the named options as JSON.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from runtime.errors import RowError, UserError, did_you_mean
from runtime.spec import CallOptions, Message, Prompt, Value
from udfs.requests import REQUEST_TYPE, Request

ROLES = ("system", "user", "assistant", "tool")


def is_messages(sql_type: str) -> bool:
    """Whether a prompt of this SQL type is a list of {'role', 'content'} structs."""
    return sql_type.startswith("STRUCT(") and sql_type.endswith("[]")


def to_prompt(text: str, sql_type: str) -> Prompt:
    """The prompt that `text` stands for.

    Raises:
        RowError: a message without a role or content, or with an unknown role.
    """
    if not is_messages(sql_type):
        return text
    messages = []
    for number, turn in enumerate(json.loads(text), 1):
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES or content is None:
            raise RowError(
                f"Message {number} of the list needs a role ({', '.join(ROLES)}) and a content.",
                code="bad_messages",
            )
        messages.append(Message(role, str(content)))
    if not messages:
        raise RowError("The list of messages is empty.", code="bad_messages")
    return tuple(messages)


def to_request(text: str) -> Request:
    """The request that `llm_param` made."""
    return Request.from_json(json.loads(text)["llm_request"])


def is_request(sql_type: str) -> bool:
    """Whether a prompt of this SQL type was made by `llm_param`."""
    return sql_type == REQUEST_TYPE


@lru_cache(maxsize=1024)
def to_options(text: str | None) -> CallOptions:
    """Call options from the JSON of a call's named options; NULL ones are not said.

    Raises:
        UserError: a value of the wrong type or out of range.
    """
    if not text:
        return CallOptions()
    return options_from({name: value for name, value in json.loads(text).items() if value is not None})


def options_from(said: dict[str, Any]) -> CallOptions:
    """Call options from names and values; names that are not options of ours go to the engine.

    Raises:
        UserError: a value of the wrong type or out of range.
    """
    known: dict[str, Any] = {}
    extra: dict[str, Value] = {}
    for name, value in said.items():
        check = _CHECKS.get(name)
        if check:
            known[name] = check(name, value)
        elif near := did_you_mean(name, _CHECKS):
            raise UserError(
                f'The option "{name}" is not known.', code="option_unknown", hint=f'Did you mean "{near}"?'
            )
        else:
            extra[name] = tuple(value) if isinstance(value, list) else value
    return CallOptions(**known, extra=tuple(sorted(extra.items())))


def _number(low: float, high: float | None, whole: bool = False) -> Any:
    kind = "a whole number" if whole else "a number"
    bounds = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"

    def check(name: str, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        good = low <= number <= (high if high is not None else float("inf"))
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
}
OPTION_NAMES = tuple(_CHECKS)
"""The named options of a generating function, in the order its macro lists them."""
