"""Answers with a schema: what a call's JSON schema is, and whether an answer fits it.

Alone because three must agree on it: who asks writes the schema, an engine is held to it token by token, and the
gateway, which trusts no engine, reads the answer again. An answer with a schema is one compact JSON text.

A schema here is closed: an object has the properties that it names, unless it says otherwise, whole numbers keep
within ±MAX_INTEGER, and what is a date, a time, a time stamp or a UUID is said by a pattern; all libraries know it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeAlias
from urllib.parse import unquote

from runtime.errors import ErrorInfo, UserError

Schema: TypeAlias = dict[str, Any]

MAX_INTEGER = 9 * 10**18
"""Bound on whole numbers: below 2**63, and exact as a float, which some libraries read bounds as."""

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
_OFFSET = "[+-](?:0[0-9]|1[0-4]):[0-5][0-9]"
PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "zoned-time": f"^{_TIME}{_OFFSET}$",
    "timestamp": f"^{_DATE}[T ]{_TIME}$",
    "date-time": f"^{_DATE}[T ]{_TIME}(?:Z|{_OFFSET})$",
    "uuid": "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
}
"""Texts of one form, by its name: the `format` of a JSON schema where that has one. Only days that exist."""

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_PARTS = ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else")
_APPLIED_TOGETHER = ("allOf", "not", "if", "then", "else")
_HINT = "Write schema := a SQL type ('STRUCT(label VARCHAR)'), a JSON schema, or a list of values."


def of_values(values: Sequence[Any]) -> Schema:
    """The schema of an answer that is one of these texts, numbers or truth values; NULLs are left out.

    Their order means nothing: a query gives them in another one each time, and the call is to be known again.

    Raises:
        UserError: schema_empty, schema_invalid.
    """
    if any(isinstance(value, list | dict) for value in values):
        raise UserError(
            "A list of values given as schema may hold texts, numbers, true and false.",
            code="schema_invalid",
            hint=_HINT,
        )
    known = {json.dumps(value): value for value in values if value is not None}
    if not known:
        raise UserError("The list of values given as schema is empty.", code="schema_empty", hint=_HINT)
    return {"enum": [known[text] for text in sorted(known)]}


def closed(schema: Any) -> Schema:
    """A user's JSON schema, checked and closed.

    Raises:
        UserError: schema_invalid; schema_empty, where nothing could be answered.
    """
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        made: Schema = _closed(schema)
        for reference in _references(made):
            target(made, reference)
        return made
    except SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "its top"
        raise UserError(f"The JSON schema is wrong at {where[:80]}.", code="schema_invalid", hint=_HINT) from None
    except RecursionError:
        raise UserError("The JSON schema is nested too deeply.", code="schema_invalid", hint=_HINT) from None


def target(schema: Schema, reference: str) -> Any:
    """What a `$ref` in a schema refers to.

    Raises:
        UserError: schema_invalid, it is not there.
    """
    found: Any = schema
    try:
        start, *steps = reference.split("/")
        if start != "#":
            raise KeyError(start)
        for step in steps:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            found = found[int(name)] if isinstance(found, list) else found[name]
    except (LookupError, ValueError, TypeError):
        raise UserError(
            "The JSON schema refers to what is not in it.",
            code="schema_invalid",
            hint='Write what it refers to into its "$defs", and "$ref": "#/$defs/…".',
        ) from None
    return found


def text_of(schema: Schema) -> str:
    """The schema as it travels in `CallOptions`; the order of properties is that of the answer.

    Raises:
        UserError: schema_invalid.
    """
    try:
        return json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise UserError("A number in the schema is too large.", code="schema_invalid", hint=_HINT) from None


@lru_cache(maxsize=1024)
def is_text(schema: str) -> bool:
    """Whether every answer is a JSON string, so that it can be shown without its quotes."""
    said = json.loads(schema)
    values = said.get("enum", [said["const"]] if "const" in said else None)
    if values is None:
        return bool(said.get("type") == "string")
    return all(isinstance(value, str) for value in values)


def unfit(schema: str, output: str, finish_reason: str) -> ErrorInfo | None:
    """What is wrong with an answer; None when it is whole and fits.

    Args:
        output: the JSON text that the engine gave.
        finish_reason: 'length' for an answer that was cut.
    """
    cut = finish_reason == "length"
    try:
        value = _value(output)
        # A number that was cut looks like one that was not.
        fits = _validator(schema).is_valid(value) and not (cut and _is_number(value))
    except (ValueError, RecursionError):
        fits = False
    if fits:
        return None
    if cut:
        return ErrorInfo(
            "answer_cut",
            "The answer was cut at its limit of tokens before it was whole.",
            "Raise max_tokens, or write a type with less room, such as an ENUM, DECIMAL or a maxLength.",
        )
    return ErrorInfo("answer_unfit", "The answer does not fit its schema.", "See whether the schema can be met.")


def _closed(node: Any, together: bool = False) -> Any:
    """Args:
    together: another schema holds beside this one, and may name more properties.
    """
    if not isinstance(node, dict):
        return node
    made: Schema = {}
    for key, value in node.items():
        if key in _MAPS and isinstance(value, dict):
            made[key] = {name: _closed(part) for name, part in value.items()}
        elif key in _LISTS and isinstance(value, list):
            made[key] = [_closed(part, key in _APPLIED_TOGETHER) for part in value]
        else:
            made[key] = _closed(value, key in _APPLIED_TOGETHER) if key in _PARTS else value
    if made.get("enum") == []:
        raise UserError("An enum of the JSON schema is empty.", code="schema_empty", hint=_HINT)
    if "properties" in made and not together and not any(key in made for key in _APPLIED_TOGETHER):
        made.setdefault("additionalProperties", False)
    if "integer" in (made.get("type"), *_many(made.get("type"))):
        made["minimum"] = max(made.get("minimum", -MAX_INTEGER), -MAX_INTEGER)
        made["maximum"] = min(made.get("maximum", MAX_INTEGER), MAX_INTEGER)
    if made.get("format") in PATTERNS and "pattern" not in made:
        made["pattern"] = PATTERNS[made.pop("format")]
    return made


def _many(types: Any) -> list[Any]:
    return types if isinstance(types, list) else []


def _references(node: Any) -> Iterator[str]:
    """The `$ref`s of a schema; in a value of `enum` or `const` it would be one by name only, and is taken for one."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    for part in node if isinstance(node, list) else ():
        yield from _references(part)


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator
    from referencing import Registry  # an empty one: without it a reference would be looked for on the web

    return Draft202012Validator(json.loads(schema), registry=Registry())


def _value(output: str) -> Any:
    """The value of a JSON text that every reader takes for the same.

    Raises:
        ValueError: there is none, or a name comes twice, a number is not finite, a text is no Unicode.
    """
    value = json.loads(output, object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
    if "\\u" in output:
        json.dumps(value, ensure_ascii=False).encode()  # half a character
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name comes twice")
    return made


def _finite(text: str) -> float:
    value = float(text)
    if not abs(value) < float("inf"):
        raise ValueError("no finite number")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
