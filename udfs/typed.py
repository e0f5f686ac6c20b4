"""SQL types and JSON schemas: which schema makes a model answer with a type, and which type a schema's answers have.

Alone because both directions must fit: whatever the schema of a type allows, DuckDB's `from_json` can cast. Types are
read by DuckDB, so every spelling of one is understood; what has more digits than are safe in a JSON number (DECIMAL,
HUGEINT) is answered as a text.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import duckdb
import pyarrow as pa

from runtime.errors import SqlextError, UserError
from runtime.schema import MAX_INTEGER, PATTERNS, Schema, closed, of_values, target, text_of
from udfs.context import StatementTable

PARAMETERS = ("VARCHAR", "VARCHAR")
"""SQL types of both functions: the statement, and what was said."""

_FLOAT_BOUND = 2**53  # schema libraries read no larger bound of a number
_DIGITS = {"tinyint": 2, "smallint": 4, "integer": 9, "bigint": 18}
_BITS = {"tinyint": 8, "smallint": 16, "integer": 32, "bigint": 64}
_TEXTS = {
    "hugeint": "^(?:0|-?[1-9][0-9]{0,37})$",
    "uhugeint": "^(?:0|[1-9][0-9]{0,37})$",
    "date": PATTERNS["date"],
    "time": PATTERNS["time"],
    "time with time zone": PATTERNS["zoned-time"],
    "timestamp": PATTERNS["timestamp"],
    "timestamp_s": PATTERNS["timestamp"],
    "timestamp_ms": PATTERNS["timestamp"],
    "timestamp with time zone": PATTERNS["date-time"],
    "uuid": PATTERNS["uuid"],
    "interval": "^[1-9][0-9]{0,5} (?:years?|months?|days?|hours?|minutes?|seconds?)$",
}
_SQL_TYPES = {"string": "VARCHAR", "integer": "BIGINT", "number": "DOUBLE", "boolean": "BOOLEAN"}
_BY_PATTERN = {
    PATTERNS["date"]: "DATE",
    PATTERNS["time"]: "TIME",
    PATTERNS["date-time"]: "TIMESTAMP WITH TIME ZONE",
    PATTERNS["uuid"]: "UUID",
}
_reading = threading.Lock()  # a connection of DuckDB's serves one thread at a time
_HINT = (
    "Answers can be BOOLEAN, whole numbers, FLOAT, DOUBLE, DECIMAL, VARCHAR, ENUM, DATE, TIME, TIMESTAMP, INTERVAL, "
    "UUID, JSON, and STRUCT, MAP, lists and arrays of these."
)


class TypeFunctions:
    """The functions that read, as a statement is planned, what type its answers are to have.

    Args:
        read_type: DuckDB's reading of a type's text.
        statements: finds the statement, which is to stop with the error.
    """

    def __init__(self, read_type: Callable[[str], Any], statements: StatementTable) -> None:
        self._read_type = read_type
        self._statements = statements

    def schemas(self, statements: pa.ChunkedArray, said: pa.ChunkedArray) -> pa.Array:
        """The JSON schema for each JSON text of what `schema :=` says; NULL for NULL."""
        return self._each(
            statements,
            said,
            lambda text: None if text is None else schema_from(json.loads(text), self._read_type),
        )

    def structures(self, statements: pa.ChunkedArray, types: pa.ChunkedArray) -> pa.Array:
        """What `from_json` is to be given for each type or JSON schema."""
        return self._each(statements, types, _structure)

    def _each(
        self, statements: pa.ChunkedArray, said: pa.ChunkedArray, read: Callable[[str | None], str | None]
    ) -> pa.Array:
        texts: list[str | None] = said.to_pylist()
        try:
            known = {text: read(text) for text in dict.fromkeys(texts)}
        except SqlextError as error:  # DuckDB keeps only the text of an exception
            self._statements.find(statements[0].as_py()).fail(error)
            raise
        return pa.array([known[text] for text in texts], pa.string())


def schema_from(said: Any, read_type: Callable[[str], Any] = duckdb.dtype) -> str:
    """The text of the schema that was meant by a SQL type, a JSON schema or a list of values.

    Args:
        said: JSON, or the text of any of them.
        read_type: DuckDB's reading of a type; the types that every database has unless another one is given.

    Raises:
        UserError: schema_type, schema_invalid, schema_empty.
    """
    if isinstance(said, str):
        if not said.lstrip().startswith(("{", "[")):
            return text_of(schema_of_type(_type(said, read_type)))
        said = _parsed(said)
    if isinstance(said, list):
        return text_of(of_values(said))
    if isinstance(said, dict):
        return text_of(closed(said))
    raise UserError(
        "What is given as schema is neither a type, nor a JSON schema, nor a list of values.",
        code="schema_invalid",
        hint="Write schema := 'STRUCT(label VARCHAR)', or ['yes', 'no'].",
    )


def schema_of_type(kind: Any) -> Schema:
    """The schema of a SQL type, as DuckDB has read it.

    Raises:
        UserError: schema_type, no answer can have it.
    """
    name = str(kind.id)
    if str(kind) == "JSON":
        return {}
    if name in _PLAIN:
        return _PLAIN[name]
    if name not in _COMPOSED or (name == "struct" and not all(field for field, _ in kind.children)):
        raise UserError(f"A model cannot answer with the type {str(kind)[:80]}.", code="schema_type", hint=_HINT)
    return _COMPOSED[name](dict(kind.children))


def type_of_schema(schema: Schema) -> str:
    """The SQL type of a closed schema's answers; JSON where there is no narrower one."""
    try:
        return _sql_type(schema, schema, frozenset())
    except RecursionError:
        return "JSON"


def _structure(said: str | None) -> str:
    if said is None:
        raise UserError("The type of the answer is NULL.", code="schema_type", hint=_HINT)
    return json.dumps(type_of_schema(closed(_parsed(said))) if said.lstrip().startswith("{") else said)


def _type(text: str, read_type: Callable[[str], Any]) -> Any:
    with _reading:
        try:
            return read_type(text)
        except duckdb.Error as error:
            raise UserError(str(error).splitlines()[0], code="schema_type", hint=_HINT) from None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(
            "The JSON schema is no JSON.", code="schema_invalid", hint="Look for a comma or a quote that is missing."
        ) from None


# -- types to schemas ------------------------------------------------------------------------------------------


def _object(properties: dict[str, Any], *, required: bool) -> Schema:
    made: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**made, "required": list(properties)} if required else made


def _list(parts: dict[str, Any]) -> Schema:
    return {"type": "array", "items": schema_of_type(parts["child"])}


def _decimal(precision: int, scale: int) -> str:
    """The pattern of a DECIMAL's text."""
    whole = precision - scale
    digits = f"(?:0|[1-9][0-9]{{0,{whole - 1}}})" if whole else "0"
    return f"^-?{digits}(?:\\.[0-9]{{1,{scale}}})?$" if scale else f"^-?{digits}$"


def _map(parts: dict[str, Any]) -> Schema:
    """Only keys of which one value has one text: a MAP has each key once."""
    key, values = parts["key"], schema_of_type(parts["value"])
    name = str(key.id)
    if name == "varchar":
        return {"type": "object", "additionalProperties": values}
    if name == "enum":
        return _object({label: values for _, labels in key.children for label in labels}, required=False)
    if name in ("date", "uuid", "hugeint", "uhugeint"):
        pattern = _TEXTS[name]
    elif name.removeprefix("u") in _BITS:
        sign, digits = "" if name.startswith("u") else "-?", _DIGITS[name.removeprefix("u")]
        pattern = f"^(?:0|{sign}[1-9][0-9]{{0,{digits - 1}}})$"
    else:
        raise UserError(
            f"A model cannot answer with a MAP from {str(key)[:80]}.",
            code="schema_type",
            hint="Keys can be VARCHAR, ENUM, DATE, UUID and whole numbers.",
        )
    return {"type": "object", "patternProperties": {pattern: values}, "additionalProperties": False}


def _integer(bits: int, *, signed: bool) -> Schema:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return {"type": "integer", "minimum": max(low, -MAX_INTEGER), "maximum": min(high, MAX_INTEGER)}


_PLAIN: dict[str, Schema] = {
    "boolean": {"type": "boolean"},
    "varchar": {"type": "string"},
    "double": {"type": "number"},
    "float": {"type": "number", "minimum": -_FLOAT_BOUND, "maximum": _FLOAT_BOUND},
    **{name: _integer(bits, signed=True) for name, bits in _BITS.items()},
    **{f"u{name}": _integer(bits, signed=False) for name, bits in _BITS.items()},
    **{name: {"type": "string", "pattern": pattern} for name, pattern in _TEXTS.items()},
}
_COMPOSED: dict[str, Callable[[dict[str, Any]], Schema]] = {
    "decimal": lambda parts: {"type": "string", "pattern": _decimal(parts["precision"], parts["scale"])},
    "enum": lambda parts: {"enum": list(parts["values"])},
    "list": _list,
    "array": lambda parts: {**_list(parts), "minItems": parts["size"], "maxItems": parts["size"]},
    "map": _map,
    "struct": lambda parts: _object({name: schema_of_type(part) for name, part in parts.items()}, required=True),
}


# -- schemas to types ------------------------------------------------------------------------------------------


def _sql_type(node: Any, root: Schema, open_references: frozenset[str]) -> str:
    node = node if isinstance(node, dict) else {}
    if reference := node.get("$ref"):
        if reference in open_references:  # it contains itself, as no SQL type can
            return "JSON"
        return _sql_type(target(root, reference), root, open_references | {reference})
    if "enum" in node or "const" in node:
        return _enum(node.get("enum", [node.get("const")]))
    if choice := next((word for word in ("anyOf", "oneOf", "allOf") if word in node), None):
        return _sql_type(_only([part for part in node[choice] if part != {"type": "null"}]), root, open_references)
    kinds = node.get("type")
    kind = _only([kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "null"])
    if kind in ("array", "object"):
        return (_array if kind == "array" else _struct_or_map)(node, root, open_references)
    return _BY_PATTERN.get(node.get("pattern", ""), _SQL_TYPES.get(str(kind), "JSON"))


def _only(some: list[Any]) -> Any:
    """The one there is, or None."""
    return some[0] if len(some) == 1 else None


def _enum(values: list[Any]) -> str:
    some = [value for value in values if value is not None]
    if some and all(isinstance(value, str) for value in some):
        return f"ENUM({', '.join(map(_literal, dict.fromkeys(some)))})"
    kinds = {type(value) for value in some}
    if kinds == {int} and max(map(abs, some)) > MAX_INTEGER:
        return "JSON"
    return {bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE"}.get(kinds.pop(), "JSON") if len(kinds) == 1 else "JSON"


def _array(node: Schema, root: Schema, open_references: frozenset[str]) -> str:
    if "prefixItems" in node:
        return "JSON"
    size = node.get("minItems", 0)
    fixed = str(size) if 0 < size == node.get("maxItems") else ""
    return f"{_sql_type(node.get('items'), root, open_references)}[{fixed}]"


def _struct_or_map(node: Schema, root: Schema, open_references: frozenset[str]) -> str:
    fields, others = node.get("properties"), node.get("additionalProperties")
    if fields and others is False and "patternProperties" not in node:
        if len({name.lower() for name in fields}) < len(fields) or "" in fields:
            return "JSON"
        inside = (f"{_name(name)} {_sql_type(part, root, open_references)}" for name, part in fields.items())
        return f"STRUCT({', '.join(inside)})"
    if not fields and isinstance(others, dict) and "patternProperties" not in node:
        return f"MAP(VARCHAR, {_sql_type(others, root, open_references)})"
    return "JSON"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
