"""Results for a person or a program: DuckDB's own box, or JSON lines."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import duckdb
import pyarrow as pa

MAX_ROWS = 40  # of a box; the rest is counted in its foot


def show(raw: duckdb.DuckDBPyConnection, rows: pa.Table, as_json: bool) -> None:
    """Print `rows` to stdout.

    Args:
        as_json: each row as a JSON object on its own line, instead of a box.
    """
    if as_json:
        lines = raw.execute("SELECT to_json(rows)::VARCHAR FROM rows")  # DuckDB finds the variable by its name
        while batch := lines.fetchmany(1024):
            sys.stdout.writelines(f"{line}\n" for (line,) in batch)
    elif rows.num_columns:
        raw.from_arrow(rows).show(max_width=shutil.get_terminal_size((120, 24)).columns, max_rows=MAX_ROWS)
    sys.stdout.flush()


def table(findings: Sequence[Any]) -> pa.Table:
    """Dataclass instances of one kind as a table, a column for each field."""
    names = [field.name for field in fields(findings[0])]
    return pa.table({name: [getattr(finding, name) for finding in findings] for name in names})
