"""The SQL face of a model function: its types, its macros, and its result columns.

DuckDB's Python functions have neither named arguments nor defaults nor overloads; macros give them all of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from runtime.gateway import Outcome, PlainOutcome
from runtime.spec import CallOptions, EngineInfo, Task
from udfs import media
from udfs.arguments import MESSAGES, OPTION_NAMES, OPTIONS_OF, PAIR, REQUEST, SEVERAL, TEXT
from udfs.context import VARIABLE

REQUEST_TYPE = "STRUCT(llm_request VARCHAR)"
"""What `llm_param` makes: no text of the user's can be mistaken for it."""

PARAMETERS = ("VARCHAR", "VARCHAR", "VARCHAR", "VARCHAR", "DOUBLE")
"""SQL types of the function behind the macro: statement, prompt, what the prompt is, options as JSON, draw."""


def parameters(info: EngineInfo) -> tuple[str, ...]:
    """SQL types of the function behind the macro of a model."""
    return (*PARAMETERS, *(media.PARAMETERS if takes_media(info) else ()))


def plain_parameters(info: EngineInfo) -> tuple[str, ...]:
    """SQL types of the function without a macro."""
    return {Task.RANK: ("VARCHAR", "VARCHAR"), Task.TRANSCRIBE: ("BLOB",)}.get(info.task, ("VARCHAR",))


def given(info: EngineInfo) -> tuple[str, ...]:
    """Names of the arguments that a call must have."""
    return {Task.RANK: ("query", "text"), Task.TRANSCRIBE: ("audio",)}.get(info.task, ("prompt",))


def takes_media(info: EngineInfo) -> bool:
    """Whether images or recordings go in."""
    return info.images or info.task is Task.TRANSCRIBE


def sql_type(info: EngineInfo) -> str:
    """The SQL type that the function answers with."""
    match info.task:
        case Task.GENERATE:
            return "VARCHAR"
        case Task.EMBED:
            return f"FLOAT[{info.dimension}]"
        case Task.CLASSIFY:
            return "STRUCT(label VARCHAR, score DOUBLE)"
        case Task.RANK:
            return "DOUBLE"
        case Task.DRAW | Task.SPEAK:
            return "BLOB"
        case Task.TRANSCRIBE:
            return "VARCHAR"


def row_type(info: EngineInfo) -> str:
    """The SQL type of the function's `_row` form."""
    return (
        f"STRUCT(output {sql_type(info)}, error VARCHAR, finish_reason VARCHAR, prompt_tokens BIGINT, "
        "completion_tokens BIGINT, cached BOOLEAN, latency_ms DOUBLE, model VARCHAR)"
    )


def quote(identifier: str) -> str:
    """`identifier` as SQL."""
    return '"' + identifier.replace('"', '""') + '"'


_KIND = (
    f"CASE WHEN typeof(prompt) = '{REQUEST_TYPE}' THEN '{REQUEST}' "
    f"WHEN typeof(prompt) LIKE 'STRUCT(%role%' AND typeof(prompt) LIKE 'STRUCT(%content%)[]' THEN '{MESSAGES}' "
    f"ELSE '{TEXT}' END"
)
_ASKED = f"CASE WHEN {_KIND} = '{TEXT}' THEN prompt::VARCHAR ELSE to_json(prompt)::VARCHAR END"


def macro(name: str, function: str, info: EngineInfo, defaults: CallOptions, schemas: str) -> str:
    """The statement that makes the temporary macro `name` over the registered `function`.

    Args:
        schemas: the registered function that reads what `schema :=` says.
    """
    if info.task is not Task.GENERATE:
        return _reading_macro(name, function, info, defaults, OPTIONS_OF[info.task])
    named = ", ".join(f"{option} := NULL" for option in (*OPTION_NAMES, *_image(info)))
    said = " AND ".join(f"{option} IS NULL" for option in OPTION_NAMES)
    schema = f"CASE WHEN schema IS NULL THEN NULL ELSE {_read(schemas, 'to_json(schema)::VARCHAR')} END"
    options = f"CASE WHEN {said} THEN NULL ELSE {_packed(schema)} END"
    call = _call(function, options, info, defaults)
    return f"CREATE OR REPLACE TEMP MACRO {quote(name)}(prompt, {named}) AS {call}"


def several_macro(name: str, function: str, info: EngineInfo, defaults: CallOptions) -> str:
    """The statement that makes the temporary macro `name`, which answers with several images of a call."""
    return _reading_macro(name, function, info, defaults, (*SEVERAL, *OPTIONS_OF[info.task]))


def _reading_macro(name: str, function: str, info: EngineInfo, defaults: CallOptions, options: Sequence[str]) -> str:
    """The macro of a function that is no generating one."""
    asked, kind = _ASKED, _KIND
    if info.task is Task.RANK:
        pair = "to_json([query::VARCHAR, text::VARCHAR])::VARCHAR"
        kind = f"'{PAIR}'"
        asked = f"CASE WHEN query IS NULL OR text IS NULL THEN NULL ELSE {pair} END"
    elif info.task is Task.TRANSCRIBE:
        kind = f"'{TEXT}'"
        asked = "CASE WHEN audio IS NULL THEN NULL ELSE '' END"
    named = (*given(info), *(f"{option} := NULL" for option in (*options, *_image(info))))
    said = " AND ".join(f"{option} IS NULL" for option in options)
    packed = ", ".join(f"{option} := {option}" for option in options)
    columns = (
        f"getvariable('{VARIABLE}')",
        asked,
        kind,
        f"CASE WHEN {said} THEN NULL ELSE to_json(struct_pack({packed}))::VARCHAR END",
        _draw(options, defaults),
        *((media.columns("audio" if info.task is Task.TRANSCRIBE else "image"),) if takes_media(info) else ()),
    )
    return (
        f"CREATE OR REPLACE TEMP MACRO {quote(name)}({', '.join(named)}) AS {quote(function)}({', '.join(columns)})"
    )


def _image(info: EngineInfo) -> tuple[str, ...]:
    return ("image",) if info.images else ()


def typed_macro(
    name: str, function: str, info: EngineInfo, defaults: CallOptions, schemas: str, structures: str
) -> str:
    """The statement that makes the temporary macro `name`, whose answers have the type in its second argument.

    DuckDB gives the call that type when it plans the query, so the type must be constant. It also writes it out,
    which opens types that the user has created.

    Args:
        function: registered; answers with JSON.
        schemas, structures: the registered functions that read a type, for the model and for `from_json`.
    """
    named = ", ".join(f"{option} := NULL" for option in (*OPTION_NAMES, *_image(info)) if option != "schema")
    structure = _read(structures, "as_type::VARCHAR")
    # Never NULL, which has no type; and not constant to DuckDB before the macro is used.
    written_out = f"typeof(from_json(coalesce(nullif(as_type, as_type), 'null'), {structure}))"
    said = f"CASE WHEN ltrim(as_type::VARCHAR) LIKE '{{%' THEN as_type::VARCHAR ELSE {written_out} END"
    options = _packed(_read(schemas, f"to_json({said})::VARCHAR"))
    return (
        f"CREATE OR REPLACE TEMP MACRO {quote(name)}(prompt, as_type, {named}) AS "
        f"from_json({_call(function, options, info, defaults)}, {structure})"
    )


def _read(function: str, said: str) -> str:
    """The call of one of the functions of `udfs.typed`."""
    return f"{quote(function)}(getvariable('{VARIABLE}'), {said})"


def _packed(schema: str) -> str:
    """The named options as JSON."""
    packed = (f"{option} := {schema if option == 'schema' else option}" for option in OPTION_NAMES)
    return f"to_json(struct_pack({', '.join(packed)}))::VARCHAR"


def _call(function: str, options: str, info: EngineInfo, defaults: CallOptions) -> str:
    """The call of a generating function."""
    image = f", {media.columns('image')}" if info.images else ""
    return (
        f"{quote(function)}(getvariable('{VARIABLE}'), {_ASKED}, {_KIND}, {options}, "
        f"{_draw(OPTION_NAMES, defaults)}{image})"
    )


def _draw(options: Sequence[str], defaults: CallOptions) -> str:
    """The last argument of a call with these named options.

    A sampled call draws a random number: that makes the expression volatile, so DuckDB neither folds nor merges calls
    that must each have an answer of their own. What is never sampled must not look so: DuckDB refuses volatile
    expressions in the ORDER BY of a window.
    """
    if "seed" not in options:
        return "0"
    seed = "NULL" if defaults.seed is None else str(defaults.seed)
    heat = str(defaults.temperature or 0)
    if "temperature" in options:
        heat = f"coalesce(try_cast(temperature AS DOUBLE), {heat})"
    sampled = f"{heat} > 0 AND coalesce(nullif(try_cast(seed AS BIGINT), -1), {seed}) IS NULL"
    return f"CASE WHEN {sampled} THEN random() ELSE 0 END"


def output_column(info: EngineInfo, outputs: Sequence[Any]) -> pa.Array:
    """One output per row as an Arrow array of the function's type; None is NULL."""
    match info.task:
        case Task.EMBED:
            return _vectors(outputs, info.dimension or 0)
        case Task.CLASSIFY:
            rows = [None if output is None else {"label": output[0], "score": output[1]} for output in outputs]
            return pa.array(rows, pa.struct([("label", pa.string()), ("score", pa.float64())]))
        case Task.DRAW:
            return pa.array([None if output is None else output[0] for output in outputs], pa.binary())
        case Task.GENERATE | Task.TRANSCRIBE | Task.RANK | Task.SPEAK as task:
            return pa.array(outputs, {Task.RANK: pa.float64(), Task.SPEAK: pa.binary()}.get(task, pa.string()))


def images_column(outputs: Sequence[Any]) -> pa.Array:
    """All images of each row as an Arrow array of lists; None is NULL."""
    return pa.array([None if output is None else list(output) for output in outputs], pa.list_(pa.binary()))


def row_column(
    info: EngineInfo, model: str, outputs: Sequence[Any], outcomes: Sequence[PlainOutcome | None], statement: int
) -> pa.Array:
    """The `_row` form of every row; a row without an outcome (NULL in) is NULL.

    A row is `cached` when no call was made for it in the statement with this id.
    """
    missing = pa.array([outcome is None for outcome in outcomes], pa.bool_())
    rows = [Outcome._make(outcome) if outcome else _NONE for outcome in outcomes]
    columns = {
        "output": output_column(info, outputs),
        "error": pa.array([str(row.error) if row.error else None for row in rows], pa.string()),
        "finish_reason": pa.array([row.finish_reason or None for row in rows], pa.string()),
        "prompt_tokens": pa.array([row.prompt_tokens for row in rows], pa.int64()),
        "completion_tokens": pa.array([row.completion_tokens for row in rows], pa.int64()),
        "cached": pa.array([row.statement != statement for row in rows], pa.bool_()),
        "latency_ms": pa.array([row.latency_ms for row in rows], pa.float64()),
        "model": pa.array([model] * len(rows), pa.string()),
    }
    return pa.StructArray.from_arrays(list(columns.values()), list(columns), mask=missing)


_NONE = Outcome(None)


def _vectors(outputs: Sequence[Any], dimension: int) -> pa.Array:
    missing = np.fromiter((output is None for output in outputs), bool, len(outputs))
    values = np.zeros((len(outputs), dimension), np.float32)
    present = [output for output in outputs if output is not None]
    if present:
        values[~missing] = np.stack(present)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), dimension, mask=pa.array(missing))
