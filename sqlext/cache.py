"""The result store as a person handles it: `!llm cache`, `!llm cache clear`, `!llm cache prune`.

Alone because it needs no model: what is stored outlives them, and no store is made just to be looked at.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING

import pyarrow as pa

from runtime.errors import UserError
from runtime.gateway import default_path
from runtime.gateway.store import StoreLine

if TYPE_CHECKING:
    from sqlext.connection import Connection

_UNITS_S = {"m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}
_AGE = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s*([mhdw])", re.IGNORECASE)
_TEXT, _TIME = pa.string(), pa.timestamp("s", tz="UTC")
_CACHE = pa.schema(
    {"model": _TEXT, "results": pa.int64(), "mb": pa.float64(), "oldest": _TIME, "newest": _TIME, "file": _TEXT}
)


def cache(connection: Connection) -> pa.Table:
    """What is stored, one row for each model."""
    store = connection.session.stored()
    if store is None:
        return _CACHE.empty_table()
    lines = groupby(store.summary(), lambda line: line.model)
    rows = [_row(model, list(own)) | {"file": str(default_path())} for model, own in lines]
    return pa.Table.from_pylist(rows, _CACHE)


def clear(connection: Connection, model: str | None = None) -> pa.Table:
    """Forget the answers of a model, or of all; one row with the number of those that were stored."""
    session = connection.session
    name = model and model.lower()  # SQL does not mind the case of a function's name
    store = session.stored()
    removed = store.clear(name) if store else 0
    session.forget_answers(name)
    return pa.table({"removed": [removed]})


def prune(connection: Connection, age: str) -> pa.Table:
    """Forget the answers that were stored longer ago than `age`, such as 30d; one row with their number.

    Raises:
        UserError: the age cannot be read.
    """
    seconds = _seconds(age)
    session = connection.session
    store = session.stored()
    removed = store.prune(seconds) if store else 0
    session.forget_answers()
    return pa.table({"removed": [removed]})


def _row(model: str, lines: list[StoreLine]) -> dict[str, object]:
    """The sum over all that was deployed under this name."""
    return {
        "model": model,
        "results": sum(line.results for line in lines),
        "mb": round(sum(line.bytes for line in lines) / 1024 / 1024, 3),
        "oldest": datetime.fromtimestamp(min(line.oldest for line in lines), UTC),
        "newest": datetime.fromtimestamp(max(line.newest for line in lines), UTC),
    }


def _seconds(age: str) -> float:
    match = _AGE.fullmatch(age.strip())
    if match is None:
        raise UserError(
            f'"{age[:40]}" is no age.',
            code="option_value",
            hint='Write a number and m, h, d or w for minutes, hours, days or weeks: !llm cache prune "30d";',
        )
    return float(match[1]) * _UNITS_S[match[2].lower()]
