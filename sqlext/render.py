"""Results for a person or a program: DuckDB's own box, records where a box would cut, or JSON lines."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import duckdb
import pyarrow as pa

from sqlext import records

MAX_ROWS = 40  # of a box; the rest is counted in its foot


def show(raw: duckdb.DuckDBPyConnection, rows: pa.Table, as_json: bool) -> None:
    """Print `rows` to stdout.

    Args:
        as_json: each row as a JSON object on its own line, instead of a box or records.
    """
    if as_json:
        _write_json(raw, rows)
    elif rows.column_names == ["explain_key", "explain_value"]:
        print(*rows["explain_value"].to_pylist(), sep="\n")
    elif records.better(rows, width := shutil.get_terminal_size((120, 24)).columns):
        print(*records.lines(rows), sep="\n", end="\n\n")
    elif rows.num_columns:
        raw.from_arrow(rows).show(max_width=width, max_rows=MAX_ROWS)
    sys.stdout.flush()


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
