"""Results for a person or a program: DuckDB's own box, records where a box would cut, JSON lines, CSV."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from typing import IO, Any, Literal, TypeAlias, get_args

import duckdb
import pyarrow as pa

from sqlext import records

MAX_ROWS = 40  # of a box; the rest is counted in its foot

Mode: TypeAlias = Literal["box", "line", "json", "csv"]
MODES: tuple[Mode, ...] = get_args(Mode)


def show(raw: duckdb.DuckDBPyConnection, rows: pa.Table, mode: Mode = "box", out: IO[str] | None = None) -> None:
    """Print `rows`.

    Args:
        mode: 'box'; 'line', a line for each value; 'json', each row as a JSON object on its own line; 'csv'.
        out: where to, instead of stdout.
    """
    with redirect_stdout(out) if out else nullcontext():
        match mode:
            case "json":
                _write_json(raw, rows)
            case "csv":
                _write_csv(rows)
            case "line":
                print(*records.lines(rows), sep="\n", end="\n\n")
            case "box":
                _show_box(raw, rows)
        sys.stdout.flush()


def _show_box(raw: duckdb.DuckDBPyConnection, rows: pa.Table) -> None:
    """DuckDB's box, or what reads better in its place."""
    if rows.column_names == ["explain_key", "explain_value"]:
        print(*rows["explain_value"].to_pylist(), sep="\n")
    elif records.better(rows, width := shutil.get_terminal_size((120, 24)).columns):
        print(*records.lines(rows), sep="\n", end="\n\n")
    elif rows.num_columns:
        raw.from_arrow(rows).show(max_width=width, max_rows=MAX_ROWS)


def _write_csv(rows: pa.Table) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(rows.column_names)
    for batch in rows.to_batches(1024):
        writer.writerows(zip(*(column.to_pylist() for column in batch.columns), strict=True))


def _write_json(raw: duckdb.DuckDBPyConnection, rows: pa.Table) -> None:
    with raw.cursor() as cursor:  # where no name of the user's can be meant by ours
        cursor.register("sqlext_rows", rows)
        lines = cursor.execute("SELECT to_json(sqlext_row)::VARCHAR FROM sqlext_rows AS sqlext_row")
        while batch := lines.fetchmany(1024):
            sys.stdout.writelines(f"{_strict(line)}\n" for (line,) in batch)


def _strict(line: str) -> str:
    """A line of DuckDB's JSON with null for NaN and Infinity, which JSON does not have."""
    if "NaN" not in line and "Infinity" not in line:
        return line
    return json.dumps(json.loads(line, parse_constant=lambda _: None), ensure_ascii=False, separators=(",", ":"))


def table(findings: Sequence[Any]) -> pa.Table:
    """Dataclass instances of one kind as a table, a column for each field."""
    names = [field.name for field in fields(findings[0])]
    return pa.table({name: [getattr(finding, name) for finding in findings] for name in names})
