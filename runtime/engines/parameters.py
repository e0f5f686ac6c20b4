"""The parameters of a call that only one engine knows: read, or refused with the nearest name.

Alone because every engine has some, and a misspelt one must end the same way everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from runtime.errors import Fatal, did_you_mean
from runtime.spec import Value

_WANTED: dict[Any, str] = {float: "a number", int: "a whole number"}

Reader: TypeAlias = Callable[[Any], Any]
"""Makes a parameter of what was typed; any exception: it is none."""


def read_parameters(
    extra: Iterable[tuple[str, Value]], known: Mapping[str, Reader], wanted: Mapping[Any, str]
) -> dict[str, Any]:
    """Parameters by name.

    Args:
        extra: `CallOptions.extra`.
        known: how each is read.
        wanted: what to write, for each way to read; `int` and `float` need not be there.

    Raises:
        Fatal: option_unknown with the nearest name, option_value.
    """
    return {name: _read(name, value, known, wanted) for name, value in extra}


def _read(name: str, value: Value, known: Mapping[str, Reader], wanted: Mapping[Any, str]) -> Any:
    if name not in known:
        near = did_you_mean(name, known)
        raise Fatal(
            f'There is no generation parameter "{name}" for this engine.',
            code="option_unknown",
            hint=(f'Did you mean "{near}"? ' if near else "") + f"It has: {', '.join(known)}.",
        )
    try:
        return known[name](value)
    except (ValueError, TypeError, KeyError):
        raise bad_value(name, {**_WANTED, **wanted}[known[name]]) from None


def bad_value(name: str, wanted: str) -> Fatal:
    """The error for a parameter that is not what it must be."""
    return Fatal(f"The generation parameter {name} must be {wanted}.", code="option_value", hint=f"Correct {name}.")


def truth(value: Value) -> bool:
    """True or false, however it was typed."""
    return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]


def count(value: Value) -> int:
    """A whole number, at least 1."""
    number = int(str(value))
    if number < 1:
        raise ValueError
    return number
