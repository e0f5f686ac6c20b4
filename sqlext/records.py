"""Few rows that a box would cut: one below the other, a line for each column, whole.

Alone because a box is made for many short rows; a description with lists in it, or text of several lines, is read
downwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

FEW = 10
MOST = 40  # of a list; the others are counted
GROUPED = 10_000  # whole numbers from here on are shown in groups of three digits

_SAYING_NOTHING: tuple[Any, ...] = (None, "", [])


def better(rows: pa.Table, width: int) -> bool:
    """Whether `rows` read better as records than in a box of `width` characters."""
    if not 0 < rows.num_rows <= FEW:
        return False
    texts = [[_line(value) for value in column.to_pylist()] for column in rows.columns]
    if any("\n" in text for column in texts for text in column):
        return True
    widths = [max(map(len, (name, *column))) + 3 for name, column in zip(rows.column_names, texts, strict=True)]
    return rows.num_rows == 1 and rows.num_columns > 1 and sum(widths) >= width


def lines(rows: pa.Table) -> Iterator[str]:
    """The records; an empty line stands between two."""
    margin = max(map(len, rows.column_names)) + 2
    for number, row in enumerate(rows.to_pylist()):
        if number:
            yield ""
        for name, value in row.items():
            for index, line in enumerate(_lines(value)):
                yield f"{'' if index else name:<{margin}}{line}".rstrip()


def _lines(value: Any) -> Sequence[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        more = [f"… and {len(value) - MOST} more"] if len(value) > MOST else []
        return [*_aligned(value[:MOST]), *more]
    return _line(value).split("\n")


def _aligned(items: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A list of structs, a line for each, under the names of those fields that say anything."""
    names = [name for name in items[0] if any(item[name] not in _SAYING_NOTHING for item in items)]
    cells = [
        names,
        *(["" if item[name] in _SAYING_NOTHING else _line(item[name]) for name in names] for item in items),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _line(value: Any) -> str:
    match value:
        case None:
            return "NULL"
        case bool():
            return "true" if value else "false"
        case int():
            return f"{value:,}" if abs(value) >= GROUPED else str(value)
        case dict():
            return " · ".join(f"{name} {_line(each)}" for name, each in value.items() if each not in _SAYING_NOTHING)
        case list():
            return ", ".join(map(_line, value)) or "[]"
    return str(value)
