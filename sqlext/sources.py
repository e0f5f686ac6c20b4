"""Tables in and out: LOAD, SAVE, and tables that a run leaves behind."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import duckdb
import pyarrow as pa
import pyarrow.json

from runtime.errors import UserError, did_you_mean
from sqlext.statements import Load, Option, Save
from udfs.signatures import quote

if TYPE_CHECKING:
    from sqlext.connection import Connection

Execute: TypeAlias = Callable[[str], Any]
"""Runs a statement of SQL on the user's cursor."""

_READERS = {"json": "read_json", "csv": "read_csv", "parquet": "read_parquet", "excel": "read_xlsx"}
_WRITERS = {"json": "JSON", "csv": "CSV", "parquet": "PARQUET", "excel": "XLSX"}
_STAGED = "sqlext_staged"
_ROWS = "sqlext_rows"
# Options of Spark's readers and writers that DuckDB knows by another name, or does by itself.
_RENAMED = {"inferschema": None, "sep": "delim", "delimiter": "delim", "charset": "encoding"}


def literal(value: Any) -> str:
    """`value` as SQL."""
    if isinstance(value, bool) or not isinstance(value, str):
        return str(value)
    return "'" + value.replace("'", "''") + "'"


def stage(query: str) -> str:
    """The statement that computes `query` into a temporary table without a name of the user's."""
    return f"CREATE OR REPLACE TEMP TABLE {_STAGED} AS {query}"


def put_staged(execute: Execute, name: str, staged: str = "TABLE") -> None:
    """Give the staged table or view the name `name`, in place of the temporary table or view that had it."""
    for kind in ("VIEW", "TABLE"):
        catalog, column = f"duckdb_{kind.lower()}s()", f"{kind.lower()}_name"
        found = f"SELECT 1 FROM {catalog} WHERE temporary AND lower({column}) = lower({literal(name)})"
        if execute(found).fetchall():
            execute(f"DROP {kind} temp.{quote(name)}")
    execute(f"ALTER {staged} {_STAGED} RENAME TO {quote(name)}")


def put_table(execute: Execute, name: str, query: str) -> None:
    """Compute `query`, which may read the table that had this name, and keep it as the temporary table `name`."""
    execute(stage(query))
    put_staged(execute, name)


def put_view(execute: Execute, name: str, query: str) -> None:
    """Keep `query` as the temporary view `name`."""
    execute(f"CREATE OR REPLACE TEMP VIEW {_STAGED} AS {query}")
    put_staged(execute, name, "VIEW")


def keep(raw: duckdb.DuckDBPyConnection, name: str, rows: pa.Table) -> None:
    """Keep `rows` as the temporary table `name`."""
    raw.execute("SELECT 1").fetchall()  # an unread result would stand in the way of registering
    raw.register(_ROWS, rows)
    try:
        put_table(raw.execute, name, f"FROM {_ROWS}")
    finally:
        raw.unregister(_ROWS)


def keep_for_good(raw: duckdb.DuckDBPyConnection, name: str, rows: pa.Table) -> None:
    """Keep `rows` as a table of the database, in place of one that has the name and the same columns.

    Args:
        name: it may have a schema and a database before it.

    Raises:
        UserError: output_table: something else stands there, or DuckDB refuses it.
    """
    raw.execute("SELECT 1").fetchall()  # as in `keep`
    whole = require_replaceable(raw.execute, name, rows.column_names)
    raw.register(_ROWS, rows)
    try:
        raw.execute(f"CREATE OR REPLACE TABLE {whole} AS FROM {_ROWS}")
    except duckdb.Error as error:
        cause = str(error).partition("\n")[0]
        raise UserError(f"The table {name} cannot be written: {cause}", code="output_table") from None
    finally:
        raw.unregister(_ROWS)


def require_replaceable(execute: Execute, name: str, columns: Sequence[str]) -> str:
    """Check that the table `name` can be made, or made again: where it stands is nothing that has other columns.

    Returns:
        Its whole name, as SQL.

    Raises:
        UserError: output_table.
    """
    *path, table = name.split(".")
    place = _place(execute, path)
    if place is None:
        raise _no_output(name, "its schema or database does not exist", "Write name, or schema.name.")
    readonly = f"SELECT readonly FROM duckdb_databases() WHERE lower(database_name) = {literal(place[0].lower())}"
    if execute(readonly).fetchall() == [(True,)]:
        raise _no_output(name, "the database is read-only", "Open it to be written, or leave outputTable out.")
    whole = _sql((*place, table))
    for kind in ("view", "table"):
        found = (
            f"SELECT database_name, schema_name, temporary FROM duckdb_{kind}s() "
            f"WHERE lower({kind}_name) = {literal(table.lower())}"
        )
        for *where, temporary in execute(found).fetchall():
            if temporary and not path:
                raise _no_output(name, f"there is a temporary {kind} of this name", "Choose another name.")
            if temporary or _lower(where) != _lower(place):
                continue
            if kind == "view" or [row[0] for row in execute(f"DESCRIBE {whole}").fetchall()] != [*columns]:
                raise _no_output(name, f"there is a {kind} of this name that is no outcome", "Choose another name.")
    return whole


def _place(execute: Execute, path: Sequence[str]) -> tuple[str, ...] | None:
    """Database and schema of a table with `path` before its name; None when they are not there."""
    [(database, schema)] = execute("SELECT current_database(), current_schema()").fetchall()
    wanted = {0: [(database, schema)], 1: [(database, *path), (*path, "main")], 2: [tuple(path)]}.get(len(path), [])
    known = execute("SELECT database_name, schema_name FROM duckdb_schemas()").fetchall()
    return next((place for place in wanted if _lower(place) in map(_lower, known)), None)


def _no_output(name: str, why: str, hint: str) -> UserError:
    return UserError(f'The table "{name}" cannot be written: {why}.', code="output_table", hint=hint)


def _lower(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name.lower() for name in names)


def _sql(names: Iterable[str]) -> str:
    return ".".join(map(quote, names))


def load(statement: Load, connection: Connection) -> None:
    """Carry out `LOAD`: a temporary view over files, or a temporary table from the JSON text in a variable.

    Raises:
        UserError: an unknown format or variable, or the files cannot be read.
    """
    if statement.format.lower() == "jsonstr":
        keep(connection.raw, statement.table, _json_rows(statement, connection.session.variables))
        return
    with connection.own_sql() as execute, _own_words("LOAD"):
        put_view(execute, statement.table, _reading(statement))


def _reading(statement: Load) -> str:
    path = literal(statement.path.removeprefix("file://"))
    options = _options(statement.options)
    form = statement.format.lower()
    if form == "text":
        if str(options.get("wholetext", "false")).lower() == "true":
            return f"SELECT filename AS file, content AS value FROM read_text({path})"
        return (
            "SELECT filename AS file, unnest(regexp_split_to_array(rtrim(content, E'\\r\\n'), '\\r?\\n')) AS value "
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
        if text.lstrip().startswith("["):
            return pa.Table.from_pylist(json.loads(text))
        return pyarrow.json.read_json(io.BytesIO(text.encode()))
    except (pa.ArrowInvalid, ValueError, AttributeError):
        raise UserError(
            f'The variable "{statement.path}" is no JSON table.',
            code="bad_json",
            hint="It must hold one object a line, or an array of objects.",
        ) from None


def save(statement: Save, connection: Connection) -> None:
    """Carry out `SAVE` by COPY.

    Raises:
        UserError: an unknown format; the target exists and the mode says it must not; the table does not exist or
            the files cannot be written.
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
    table = _sql(statement.table.split("."))
    with connection.own_sql() as execute, _own_words("SAVE"):
        execute(f"COPY (FROM {table}) TO {literal(path)} ({', '.join(settings)})")


@contextmanager
def _own_words(verb: str) -> Iterator[None]:
    """What DuckDB says of SQL that the user did not write, without that SQL."""
    try:
        yield
    except duckdb.Error as error:
        cause = str(error).partition("\n")[0]
        raise UserError(
            f"{verb} failed: {cause}", code="files", hint="Check the path, the format and the options."
        ) from None


def _options(options: tuple[Option, ...]) -> dict[str, Any]:
    named = ((option.key.lower(), option.value) for option in options)
    renamed = ((_RENAMED.get(key, key), value) for key, value in named)
    return {key: value for key, value in renamed if key is not None}


def _unknown_format(verb: str, statement: Load | Save, known: list[str]) -> UserError:
    near = did_you_mean(statement.format, known)
    return UserError(
        f'{verb} does not know the format "{statement.format}".',
        code="format_unknown",
        hint=(f"Did you mean {near}? " if near else "") + f"Known: {', '.join(known)}.",
    )
