"""``RUN t AS TableRepartition.``: a table with the same rows, and how they are dealt out to the ranks of a training.

DuckDB's tables have no partitions, so the deal is remembered and carried out when the rows are written: in one pass,
in the table's order, in constant memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from runtime.errors import UserError, did_you_mean
from sqlext import options, sources
from sqlext.option_table import REPARTITION
from sqlext.sources import Execute, literal
from sqlext.statements import Run
from udfs.signatures import quote

if TYPE_CHECKING:
    from sqlext.connection import Connection

_KEY = "sqlext_key"


@dataclass(frozen=True, slots=True)
class Partitioning:
    """How a table's rows are dealt out.

    Attributes:
        count: of partitions.
        columns: rows that are equal in these stay together, or are sorted by them when `sliced`.
        sliced: parts of equal size that follow each other; otherwise each gets the next row, or the next new key.
        oid: DuckDB's number of the table or view this was said of; another one of that name has another.
    """

    count: int
    columns: tuple[str, ...] = ()
    sliced: bool = False
    oid: int = 0


def repartition(run: Run, connection: Connection) -> pa.Table:
    """Make the table that the statement names, and remember its partitioning; one row that tells of it.

    Raises:
        UserError: an option, the table or a column is wrong.
    """
    said = options.resolve(run.options, REPARTITION).values
    if run.input_table.lower() == "command" or not run.result:
        raise UserError(
            "TableRepartition takes a table and makes another.",
            code="input_table",
            hint='Write RUN t AS TableRepartition.`` WHERE partitionNum="2" AS t_2;',
        )
    if "partitionNum" not in said:
        raise UserError("The statement does not say how many.", code="option_missing", hint='Add partitionNum="2".')
    wanted: Any = said.get("partitionCols", ())
    sliced = said.get("partitionType") == "range" or said.get("shuffle") is False
    if wanted and said.get("shuffle") is False:
        raise UserError(
            "partitionCols deals rows out, and shuffle=false leaves them where they are.",
            code="option_value",
            hint="Leave one of them out.",
        )
    with connection.own_sql() as execute:
        known = columns_of(execute, run.input_table)
        columns = tuple(_column(str(name), known) for name in wanted)
        _make(execute, run.input_table, run.result)
        made = Partitioning(int(str(said["partitionNum"])), columns, sliced, _oid(execute, run.result))
    connection.partitionings[run.result.lower()] = made
    kind = "range" if sliced else "hash"
    return pa.table(
        {"table": [run.result], "partitions": [made.count], "type": [kind], "columns": [", ".join(columns)]}
    )


def partitioning_of(execute: Execute, connection: Connection, table: str) -> Partitioning | None:
    """How `table` was repartitioned; None when it was not, or is another one by now."""
    found = connection.partitionings.get(table.lower())
    return found if found and found.oid == _oid(execute, table) else None


def columns_of(execute: Execute, table: str) -> dict[str, str]:
    """The columns of a table and their types.

    Raises:
        UserError: table_unknown, with the nearest name.
    """
    import duckdb

    try:
        return {name: kind for name, kind, *_ in execute(f"DESCRIBE FROM {quoted(table)}").fetchall()}
    except duckdb.CatalogException:
        names = "SELECT table_name FROM duckdb_tables() UNION SELECT view_name FROM duckdb_views() WHERE NOT internal"
        near = did_you_mean(table, [name for (name,) in execute(names).fetchall()])
        raise UserError(
            f'There is no table "{table}".',
            code="table_unknown",
            hint=f'Did you mean "{near}"?' if near else "SHOW TABLES; lists the tables there are.",
        ) from None


def quoted(table: str) -> str:
    """A table's name as SQL; it may have a schema and a database before it."""
    return ".".join(quote(part) for part in table.split("."))


def write_parts(execute: Execute, table: str, folder: Path, how: Partitioning) -> int:
    """Write a table's rows as JSON lines, a file for each partition; the number of rows.

    Raises:
        UserError: partition_empty.
    """
    every = folder / ".rows"
    source = f"FROM {quoted(table)}"
    columns = ", ".join(map(quote, how.columns))
    if columns and how.sliced:
        source += f" ORDER BY {columns}"
    elif columns:
        source = f"SELECT hash({columns}) AS {_KEY}, * {source}"
    try:
        count = copy(execute, source, every)
        sizes = _deal(every, folder, how, count)
    finally:
        every.unlink(missing_ok=True)
    if count and min(sizes) == 0:
        what = f"{len([size for size in sizes if size])} different values of {', '.join(how.columns)}"
        raise UserError(
            f"{sizes.count(0)} of the {how.count} partitions are empty: {table} has {count} rows"
            + (f" with {what}." if columns and not how.sliced else "."),
            code="partition_empty",
            hint="Use fewer partitions" + (", or leave partitionCols out." if columns else "."),
        )
    return count


def copy(execute: Execute, query: str, file: Path) -> int:
    """Write the rows of a query as JSON lines, as they come; the number of rows."""
    [(count,)] = execute(f"COPY ({query}) TO {literal(str(file))} (FORMAT json)").fetchall()
    return int(count)


def _deal(every: Path, folder: Path, how: Partitioning, count: int) -> list[int]:
    """Deal lines out to the files of the partitions; the number of lines that each got."""
    sizes = [0] * how.count
    with ExitStack() as files, every.open("rb") as lines:
        names = (f"data-{part:05}-of-{how.count:05}.jsonl" for part in range(how.count))
        targets = [files.enter_context((folder / name).open("wb")) for name in names]
        if how.sliced:
            dealt: Iterator[tuple[int, bytes]] = ((i * how.count // count, line) for i, line in enumerate(lines))
        elif how.columns:
            dealt = _by_key(lines, sizes)
        else:
            dealt = ((i % how.count, line) for i, line in enumerate(lines))
        for part, line in dealt:
            targets[part].write(line)
            sizes[part] += 1
        for target in targets:
            target.flush()
            os.fsync(target.fileno())
    return sizes


def _by_key(lines: Iterator[bytes] | Any, sizes: list[int]) -> Iterator[tuple[int, bytes]]:
    """A key that is new goes to the part that has the fewest rows; its column is taken off the lines."""
    parts: dict[bytes, int] = {}
    for line in lines:
        key, _, rest = line.partition(b",")
        part = parts.get(key)
        if part is None:
            part = parts[key] = min(range(len(sizes)), key=sizes.__getitem__)
        yield part, b"{" + rest


def _make(execute: Execute, table: str, name: str) -> None:
    """The table `name` with the rows of `table`: a view, or a copy where both have the same name."""
    if table.lower() == name.lower():
        sources.put_table(execute, name, f"FROM {quoted(table)}")
        return
    sources.put_view(execute, name, f"FROM {quoted(table)}")


def _oid(execute: Execute, name: str) -> int:
    """DuckDB's number of the temporary table or view `name`; 0 when there is none."""
    query = " UNION ALL ".join(
        f"SELECT {kind}_oid FROM duckdb_{kind}s() WHERE temporary AND lower({kind}_name) = {literal(name.lower())}"
        for kind in ("table", "view")
    )
    found = execute(query).fetchall()
    return int(found[0][0]) if found else 0


def _column(name: str, known: Mapping[str, str]) -> str:
    spelled = {column.lower(): column for column in known}
    if name.lower() in spelled:
        return spelled[name.lower()]
    near = did_you_mean(name, known)
    raise UserError(
        f'The table has no column "{name}".',
        code="column_unknown",
        hint=f'Did you mean "{near}"?' if near else f"Columns: {', '.join(known)}.",
    )
