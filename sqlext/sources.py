"""Tables in and out: LOAD, SAVE, tables that a run leaves behind, and tables that are made when read."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import duckdb
import pyarrow as pa
from pyarrow import json

from runtime.errors import UserError, did_you_mean
from sqlext.statements import Load, Option, Save
from udfs.signatures import quote

_READERS = {"json": "read_json", "csv": "read_csv", "parquet": "read_parquet", "excel": "read_xlsx"}
_WRITERS = {"json": "JSON", "csv": "CSV", "parquet": "PARQUET", "excel": "XLSX"}
# Options of Spark's readers and writers that DuckDB knows by another name, or does by itself.
_RENAMED = {"inferschema": None, "sep": "delim", "delimiter": "delim", "charset": "encoding"}


class LiveTable:
    """A table that is made anew each time it is read; register it with a DuckDB connection."""

    def __init__(self, table: Callable[[], pa.Table]) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table().__arrow_c_stream__(requested_schema)


def literal(value: Any) -> str:
    """`value` as SQL."""
    if isinstance(value, bool) or not isinstance(value, str):
        return str(value)
    return "'" + value.replace("'", "''") + "'"


def create_table(name: str, query: str) -> str:
    """The statement that keeps the result of `query` as the temporary table `name`."""
    return f"CREATE OR REPLACE TEMP TABLE {quote(name)} AS {query}"


def keep(raw: duckdb.DuckDBPyConnection, name: str, rows: pa.Table) -> None:
    """Keep `rows` as the temporary table `name`."""
    raw.execute(create_table(name, "FROM rows"))  # DuckDB finds the variable by its name


def load(statement: Load, raw: duckdb.DuckDBPyConnection, variables: Mapping[str, str]) -> None:
    """Carry out `LOAD`: a temporary view over files, or a temporary table from the JSON text in a variable.

    Raises:
        UserError: an unknown format or variable.
        duckdb.Error: the files cannot be read.
    """
    if statement.format.lower() == "jsonstr":
        rows = _json_rows(statement, variables)
        keep(raw, statement.table, rows)
        return
    raw.execute(f"CREATE OR REPLACE TEMP VIEW {quote(statement.table)} AS {_reading(statement)}")


def _reading(statement: Load) -> str:
    path = literal(statement.path.removeprefix("file://"))
    options = _options(statement.options)
    form = statement.format.lower()
    if form == "text":
        if str(options.get("wholetext", "false")).lower() == "true":
            return f"SELECT filename AS file, content AS value FROM read_text({path})"
        return (
            "SELECT filename AS file, unnest(string_split(rtrim(content, chr(10)), chr(10))) AS value "
            f"FROM read_text({path})"
        )
    if form not in _READERS:
        raise _unknown_format("LOAD", statement, [*_READERS, "text", "jsonStr"])
    arguments = ", ".join([path, *(f"{key} = {literal(value)}" for key, value in options.items())])
    return f"SELECT * FROM {_READERS[form]}({arguments})"


def _json_rows(statement: Load, variables: Mapping[str, str]) -> pa.Table:
    text = variables.get(statement.path)
    if text is None:
        near = did_you_mean(statement.path, variables)
        raise UserError(
            f'There is no variable "{statement.path}" to load JSON from.',
            code="variable_unknown",
            hint=f'Did you mean "{near}"?' if near else f"Write SET {statement.path}='{{…}}'; before it.",
        )
    try:
        return json.read_json(io.BytesIO(text.encode()))
    except pa.ArrowInvalid:
        raise UserError(f'The variable "{statement.path}" is not JSON, one object a line.', code="bad_json") from None


def save(statement: Save, raw: duckdb.DuckDBPyConnection) -> None:
    """Carry out `SAVE` by COPY.

    Raises:
        UserError: an unknown format, or the target exists and the mode says it must not.
        duckdb.Error: the table does not exist or the files cannot be written.
    """
    form = statement.format.lower()
    if form not in _WRITERS:
        raise _unknown_format("SAVE", statement, list(_WRITERS))
    path = statement.path.removeprefix("file://")
    if os.path.exists(path) and statement.mode in ("errorIfExists", "ignore"):
        if statement.mode == "ignore":
            return
        raise UserError(
            f"The target {path} exists already.",
            code="target_exists",
            hint="Write SAVE overwrite … or SAVE append …, or choose another path.",
        )
    settings = [f"FORMAT {_WRITERS[form]}"]
    settings += [f"{key.upper()} {literal(value)}" for key, value in _options(statement.options).items()]
    if statement.partition_by:
        settings.append(f"PARTITION_BY ({', '.join(map(quote, statement.partition_by))})")
        settings += ["OVERWRITE true"] if statement.mode == "overwrite" else []
    if statement.mode == "append":
        settings += ["APPEND true"] if statement.partition_by else ["PER_THREAD_OUTPUT true", "APPEND true"]
    raw.execute(f"COPY (FROM {quote(statement.table)}) TO {literal(path)} ({', '.join(settings)})")


def _options(options: tuple[Option, ...]) -> dict[str, Any]:
    renamed = {option.key.lower(): option.value for option in options}
    return {_RENAMED.get(key, key) or "": value for key, value in renamed.items() if _RENAMED.get(key, key)}


def _unknown_format(verb: str, statement: Load | Save, known: list[str]) -> UserError:
    near = did_you_mean(statement.format, known)
    return UserError(
        f'{verb} does not know the format "{statement.format}".',
        code="format_unknown",
        hint=(f"Did you mean {near}? " if near else "") + f"Known: {', '.join(known)}.",
    )
