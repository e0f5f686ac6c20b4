"""Tables that are made each time they are read: `llm_errors`, `llm_calls`, `llm_results`, `llm_jobs`, ….

Alone because they are views of what other files keep: statements that have ended, the result store, and jobs. Every
cursor has them under these names unless it has tables of its own that are called so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import duckdb
import numpy as np
import pyarrow as pa

from sqlext import jobs
from sqlext.benchmark import REQUESTS

if TYPE_CHECKING:
    from runtime.gateway import Usage
    from sqlext.session import Session

Made: TypeAlias = pa.Table | pa.RecordBatchReader

OWN_TABLES = ("llm_errors", "llm_calls", "llm_results", "llm_benchmark_requests", "llm_jobs", "llm_job_metrics")
SCANNED_ROWS = 4_096  # of stored answers that are read at once; vectors are large
_TEXT, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
_ERRORS = pa.schema(
    [
        ("statement", _INT),
        *((name, _TEXT) for name in ("query", "model", "input_key", "code", "message")),
        ("attempts", _INT),
    ]
)
_COUNTS = ("rows", "calls", "reused", "errors", "cut", "prompt_tokens", "completion_tokens")
_CALLS = pa.schema(
    [
        ("statement", _INT),
        ("query", _TEXT),
        ("model", _TEXT),
        *((name, _INT) for name in _COUNTS),
        ("seconds", _FLOAT),
    ]
)
_RESULTS = pa.schema(
    [
        ("key", _TEXT),
        ("model", _TEXT),
        ("output", _TEXT),
        ("vector", pa.list_(pa.float32())),
        ("finish_reason", _TEXT),
        ("prompt_tokens", _INT),
        ("completion_tokens", _INT),
        ("latency_ms", _FLOAT),
        ("created", pa.timestamp("us", tz="UTC")),
    ]
)


class LiveTable:
    """A table that is made anew each time it is read; register it with a DuckDB connection."""

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make = make

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._make().__arrow_c_stream__(requested_schema)


def register(raw: duckdb.DuckDBPyConnection, session: Session) -> None:
    """Make the tables of the session known to a cursor."""
    of_session: tuple[Callable[[Session], Made], ...] = (errors, calls, results, benchmark_requests)
    made: list[Callable[[], Made]] = [partial(make, session) for make in of_session]
    for name, make in zip(OWN_TABLES, [*made, jobs.job_table, jobs.metrics], strict=True):
        raw.register(name, LiveTable(make))


def errors(session: Session) -> pa.Table:
    """`llm_errors`: the failed rows of all remembered statements, oldest first; never a row's text."""
    rows = [
        (row.statement, statement.query, row.model, row.input_key, row.code, row.message, row.attempts)
        for statement in session.known_statements()
        for row in statement.failed_rows
    ]
    return _table(rows, _ERRORS)


def calls(session: Session) -> pa.Table:
    """`llm_calls`: what each remembered statement used of each model, oldest first."""
    rows = [
        (statement.id, statement.query, model, *_figures(usage))
        for statement in session.known_statements()
        for model, usage in list(statement.usage.items())
    ]
    return _table(rows, _CALLS)


def results(session: Session) -> pa.RecordBatchReader:
    """`llm_results`: the stored answers of all models, oldest first, a few thousand in memory at a time."""
    return pa.RecordBatchReader.from_batches(_RESULTS, _stored(session))


def benchmark_requests(session: Session) -> pa.Table:
    """`llm_benchmark_requests`: what the session's latest load test saw of each request."""
    return session.benchmark if session.benchmark is not None else REQUESTS.empty_table()


def _figures(usage: Usage) -> tuple[Any, ...]:
    return (*(getattr(usage, name) for name in _COUNTS), round(usage.seconds, 3))


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)


def _stored(session: Session) -> Iterator[pa.RecordBatch]:
    store = session.stored()
    for rows in store.scan(SCANNED_ROWS) if store else ():
        keys, models, _, outputs, reasons, prompt_tokens, completion_tokens, latencies, created = zip(
            *rows, strict=True
        )
        columns = (
            [key.hex() for key in keys],
            models,
            [None if isinstance(output, bytes) else output for output in outputs],
            [np.frombuffer(output, "<f4") if isinstance(output, bytes) else None for output in outputs],
            reasons,
            prompt_tokens,
            completion_tokens,
            latencies,
            [int(second * 1e6) for second in created],
        )
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _RESULTS, strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, schema=_RESULTS)
