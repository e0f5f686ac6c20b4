"""Options: what was typed, checked against the one table.

It stands alone because every setting and every action's options are checked, defaulted and explained in the same
way, so that one error looks like another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from runtime.errors import Place, UserError, did_you_mean
from runtime.spec import Value
from sqlext.option_table import ACTIONS, DEFAULT_ACTION, PRESETS, SETUP, TABLE, Action, OptionSpec
from sqlext.statements import Option, Run, Scalar

__all__ = [
    "ACTIONS",
    "DEFAULT_ACTION",
    "HELP_COLUMNS",
    "PRESETS",
    "Action",
    "Resolved",
    "action",
    "defaults",
    "help_rows",
    "require_available",
    "resolve",
    "scopes",
]

HELP_COLUMNS = ("scope", "name", "aliases", "type", "default", "allowed", "meaning")


@dataclass(frozen=True, slots=True)
class Resolved:
    """Checked options: values by the table's names, only those that were given, and what to tell the user."""

    values: Mapping[str, Value]
    notices: tuple[str, ...] = ()


def resolve(options: Iterable[Option], scope: str) -> Resolved:
    """Check what was typed for `scope`: 'setup', an action's name or 'TableRepartition'.

    Raises:
        UserError: a key is unknown or given twice, or a value has the wrong type, range or word; with its place.
    """
    values: dict[str, Value] = {}
    first: dict[str, Option] = {}
    ignored: dict[str, str] = {}
    for option in options:
        spec, name = _find(option, scope)
        if name in first:
            _fail(
                f'"{option.key}" says again what "{first[name].key}" says.',
                "option_duplicate",
                f"It is first given at {first[name].place}; keep one of them.",
                option.place,
            )
        first[name] = option
        value = _checked(spec, option)
        if spec.ignored:
            ignored[option.key] = spec.ignored
        else:
            values[name] = value
    told = "; ".join(f"{key} ({why})" for key, why in ignored.items())
    return Resolved(values, (f"Accepted, but without meaning here: {told}.",) if told else ())


def require_available(options: Iterable[Option], scope: str) -> None:
    """Refuse options that are only planned: they would be accepted and do nothing.

    Raises:
        UserError: not_available, at the first of them.
    """
    for option in options:
        if _find(option, scope)[0].planned:
            _fail(f"{option.key} is not available in this version.", "not_available", "Leave it out.", option.place)


def defaults(scope: str) -> dict[str, Any]:
    """The default of each option of a scope, or of each setting under a preset; None = not set."""
    preset = PRESETS.get(scope, {})
    where = SETUP if scope in PRESETS else scope
    known = {spec.name: spec.default for spec in _specs(where) if not spec.ignored and "*" not in spec.name}
    return {**known, **preset}


def action(word: str, run: Run) -> Action:
    """The action called `word` that `run` asks for.

    Merging is also reached by `convert` with `model_dir`, as in the Byzer-LLM document.

    Raises:
        UserError: there is no such action.
    """
    by_name = {known.name: known for known in ACTIONS}
    said = next((option for option in run.options if option.key.lower() == "action"), None)
    name = word.lower()
    if name not in by_name:
        near = did_you_mean(name, by_name)
        hint = f'Did you mean "{near}"?' if near else f"Actions: {', '.join(by_name)}."
        _fail("There is no such action.", "action_unknown", hint, said.place if said else run.place)
    if name == "convert" and any(option.key.lower() == "model_dir" for option in run.options):
        name = "merge"
    return by_name[name]


def scopes() -> tuple[str, ...]:
    """All scopes, in the table's order."""
    return tuple(dict.fromkeys(scope for spec in TABLE for scope in spec.scopes))


def help_rows(word: str | None = None) -> list[tuple[str, ...]]:
    """Rows of `!llm help`, with the columns HELP_COLUMNS.

    Args:
        word: an action, 'setup' or an option; None lists the actions and the settings.

    Raises:
        UserError: `word` is none of these.
    """
    if word is None:
        planned = {True: "", False: " (not yet available)"}
        rows = [("action", it.name, "", "", "", "", it.doc + planned[it.available]) for it in ACTIONS]
        return rows + help_rows(SETUP)
    known = {scope.lower(): scope for scope in scopes()}
    if scope := known.get(word.lower()):
        return [_row(scope, spec) for spec in _specs(scope) if not spec.ignored]
    found = [_row(scope, spec) for spec in TABLE if _names(spec, word) for scope in spec.scopes]
    if not found:
        near = did_you_mean(word, [*known.values(), *(name for spec in TABLE for name in (spec.name, *spec.aliases))])
        hint = f'Did you mean "{near}"?' if near else "!llm help; lists the actions and the settings."
        raise UserError("There is no such action or option.", code="option_unknown", hint=hint)
    return found


def _specs(scope: str) -> list[OptionSpec]:
    return [spec for spec in TABLE if scope in spec.scopes]


def _plain(name: str) -> str:
    """A name without what does not count in it."""
    return name.lower().replace("_", "")


def _names(spec: OptionSpec, key: str) -> str | None:
    """The name under which `key` counts, if it is one of the spec's; the pattern's `*` is filled in."""
    for name in (spec.name, *spec.aliases):
        if not name.endswith(".*"):
            if _plain(name) == _plain(key):
                return spec.name
            continue
        *prefix, rest = key.split(".", name.count("."))
        if rest and _plain(".".join(prefix)) == _plain(name[:-2]):
            return spec.name[:-1] + rest
    return None


def _find(option: Option, scope: str) -> tuple[OptionSpec, str]:
    for spec in _specs(scope):
        if name := _names(spec, option.key):
            return spec, name
    where = "!llm setup has" if scope == SETUP else f"{scope} has"
    return _fail(
        f'{where} no option "{option.key}".', "option_unknown", _unknown_hint(option.key, scope), option.place
    )


def _unknown_hint(key: str, scope: str) -> str:
    _, dot, last = key.rpartition(".")
    names = [name for spec in _specs(scope) for name in (spec.name, *spec.aliases)]
    known = [name.replace("*", last) for name in names if dot or "*" not in name]
    elsewhere = [there for spec in TABLE if _names(spec, key) for there in spec.scopes]
    if SETUP in elsewhere:
        return f'It is a setting: !llm setup "{key}=…";'
    if scope == SETUP and elsewhere:
        return f"It belongs into the WHERE of a RUN, action {' or '.join(elsewhere)}."
    if elsewhere:
        return f"It is an option of {' and '.join(elsewhere)}."
    near = did_you_mean(key, known)
    return f'Did you mean "{near}"?' if near else f'!llm help "{scope}"; lists them.'


def _checked(spec: OptionSpec, option: Option) -> Value:
    """The option's value in its type, within its choices and its range."""
    try:
        value = _READ[spec.kind](option.value)
    except (ValueError, RecursionError):
        _fail(f"{option.key} takes {_TYPES[spec.kind]}.", "option_value", _range_hint(spec), option.place)
    if isinstance(value, str):
        value = dict(spec.spellings).get(value.lower(), value)
        if spec.choices:
            return _chosen(spec, option, value)
    elif isinstance(value, int | float) and not (
        (spec.minimum is None or value >= spec.minimum) and (spec.maximum is None or value <= spec.maximum)
    ):
        _fail(f"{option.key} is out of range.", "option_value", _range_hint(spec), option.place)
    return value


def _chosen(spec: OptionSpec, option: Option, value: str) -> str:
    by_lower = {choice.lower(): choice for choice in spec.choices}
    if (chosen := by_lower.get(value.lower())) is None:
        near = did_you_mean(value, spec.choices)
        hint = f'Did you mean "{near}"?' if near else f"Allowed: {', '.join(spec.choices)}."
        _fail(f"{option.key} has no such value.", "option_value", hint, option.place)
    return chosen


def _range_hint(spec: OptionSpec) -> str | None:
    low, high = spec.minimum, spec.maximum
    if low is not None and high is not None:
        return f"From {low:g} to {high:g}."
    return None if low is None else f"{low:g} or more."


def _int(said: Scalar) -> int:
    if isinstance(said, bool) or (isinstance(said, float) and not said.is_integer()):
        raise ValueError
    return int(said)


def _float(said: Scalar) -> float:
    if isinstance(said, bool) or not math.isfinite(number := float(said)):
        raise ValueError
    return number


def _bool(said: Scalar) -> bool:
    if str(said).strip().lower() not in ("true", "false"):
        raise ValueError
    return str(said).strip().lower() == "true"


def _text(said: Scalar) -> str:
    return str(said).lower() if isinstance(said, bool) else str(said)


def _json(said: Scalar) -> str:
    if not isinstance(json.loads(_text(said)), dict):
        raise ValueError
    return _text(said)


def _list(said: Scalar) -> tuple[Scalar, ...]:
    text = _text(said).strip()
    if not text.startswith("["):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    found = json.loads(text)
    if not all(isinstance(item, str | int | float | bool) for item in found):
        raise ValueError
    return tuple(found)


def _auto(said: Scalar) -> Value:
    if not isinstance(said, str):
        return said
    for read in (_bool, _int, _float):
        try:
            return read(said)
        except ValueError:
            pass
    try:
        return _list(said) if said.strip().startswith("[") else said
    except ValueError:
        return said


_READ: Mapping[str, Callable[[Scalar], Value]] = {
    "text": _text,
    "int": _int,
    "float": _float,
    "bool": _bool,
    "list": _list,
    "json": _json,
    "auto": _auto,
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list: a,b or a JSON array",
    "json": "a JSON object",
}


def _row(scope: str, spec: OptionSpec) -> tuple[str, ...]:
    default = "" if spec.default is None else _text(spec.default) if not isinstance(spec.default, tuple) else ""
    allowed = ", ".join(spec.choices) or (_range_hint(spec) or "").rstrip(".")
    doc = f"{spec.doc} Not yet available." if spec.planned else spec.doc
    return (scope, spec.name, ", ".join(spec.aliases), spec.kind, default, allowed, doc)


def _fail(message: str, code: str, hint: str | None, place: Place) -> NoReturn:
    raise UserError(message, code=code, hint=hint, place=place)
