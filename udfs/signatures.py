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
from udfs.arguments import MESSAGES, OPTION_NAMES, REQUEST, TEXT
from udfs.context import VARIABLE

REQUEST_TYPE = "STRUCT(llm_request VARCHAR)"
"""What `llm_param` makes: no text of the user's can be mistaken for it."""

PARAMETERS = ("VARCHAR", "VARCHAR", "VARCHAR", "VARCHAR", "DOUBLE")
"""SQL types of the function behind the macro: statement, prompt, what the prompt is, options as JSON, draw."""


def sql_type(info: EngineInfo) -> str:
    """The SQL type that the function answers with."""
    match info.task:
        case Task.GENERATE:
            return "VARCHAR"
        case Task.EMBED:
            return f"FLOAT[{info.dimension}]"
        case Task.CLASSIFY:
            return "STRUCT(label VARCHAR, score DOUBLE)"


def row_type(info: EngineInfo) -> str:
    """The SQL type of the function's `_row` form."""
    return (
        f"STRUCT(output {sql_type(info)}, error VARCHAR, finish_reason VARCHAR, prompt_tokens BIGINT, "
        "completion_tokens BIGINT, cached BOOLEAN, latency_ms DOUBLE, model VARCHAR)"
    )


def quote(identifier: str) -> str:
    """`identifier` as SQL."""
    return '"' + identifier.replace('"', '""') + '"'


def macro(name: str, function: str, info: EngineInfo, defaults: CallOptions) -> str:
    """The statement that makes the temporary macro `name` over the registered `function`.

    A sampled call draws a random number as its last argument: that makes the expression volatile, so DuckDB neither
    folds nor merges calls that must each have an answer of their own.
    """
    kind = (
        f"CASE WHEN typeof(prompt) = '{REQUEST_TYPE}' THEN '{REQUEST}' "
        f"WHEN typeof(prompt) LIKE 'STRUCT(%role%' AND typeof(prompt) LIKE 'STRUCT(%content%)[]' THEN '{MESSAGES}' "
        f"ELSE '{TEXT}' END"
    )
    text = f"CASE WHEN {kind} = '{TEXT}' THEN prompt::VARCHAR ELSE to_json(prompt)::VARCHAR END"
    if info.task is not Task.GENERATE:
        return (
            f"CREATE OR REPLACE TEMP MACRO {quote(name)}(prompt, cache := NULL) AS "
            f"{quote(function)}(getvariable('{VARIABLE}'), {text}, {kind}, "
            "CASE WHEN cache IS NULL THEN NULL ELSE to_json(struct_pack(cache := cache))::VARCHAR END, 0)"
        )
    named = ", ".join(f"{option} := NULL" for option in OPTION_NAMES)
    said = " AND ".join(f"{option} IS NULL" for option in OPTION_NAMES)
    packed = ", ".join(f"{option} := {option}" for option in OPTION_NAMES)
    seed = "NULL" if defaults.seed is None else str(defaults.seed)
    heat = f"coalesce(try_cast(temperature AS DOUBLE), {defaults.temperature or 0})"
    sampled = f"{heat} > 0 AND coalesce(seed, {seed}) IS NULL"
    return (
        f"CREATE OR REPLACE TEMP MACRO {quote(name)}(prompt, {named}) AS "
        f"{quote(function)}(getvariable('{VARIABLE}'), {text}, {kind}, "
        f"CASE WHEN {said} THEN NULL ELSE to_json(struct_pack({packed}))::VARCHAR END, "
        f"CASE WHEN {sampled} THEN random() ELSE 0 END)"
    )


def output_column(info: EngineInfo, outputs: Sequence[Any]) -> pa.Array:
    """One output per row as an Arrow array of the function's type; None is NULL."""
    match info.task:
        case Task.GENERATE:
            return pa.array(outputs, pa.string())
        case Task.EMBED:
            return _vectors(outputs, info.dimension or 0)
        case Task.CLASSIFY:
            rows = [None if output is None else {"label": output[0], "score": output[1]} for output in outputs]
            return pa.array(rows, pa.struct([("label", pa.string()), ("score", pa.float64())]))


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
