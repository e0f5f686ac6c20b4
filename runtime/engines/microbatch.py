"""Rows of like length side by side: how a batch is cut into pieces that fit the device.

Alone because every engine on torch pays for padding in the same way: a piece costs its longest row times its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runtime.errors import ErrorInfo, RowError
from runtime.prompts.chat import plain_text
from runtime.spec import Answers, Batch


def microbatches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices into `lengths`, longest first, in pieces of at most `max_rows` rows and `max_tokens` padded tokens.

    A row that is longer than `max_tokens` by itself is a piece of its own.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        size = max(1, min(max_rows, max_tokens // max(1, lengths[order[start]])))
        yield order[start : start + size]
        start += size


def failed(errors: dict[int, ErrorInfo], latency_ms: float) -> Answers:
    """The answers of rows that failed."""
    rows = sorted(errors)
    none = [0] * len(rows)
    return Answers(rows, [None] * len(rows), [""] * len(rows), none, none, latency_ms, errors)


def texts_of(batch: Batch) -> tuple[dict[int, str], dict[int, ErrorInfo]]:
    """The texts of a batch that can be read, by index, and the errors of the others."""
    texts: dict[int, str] = {}
    errors: dict[int, ErrorInfo] = {}
    for index, prompt in enumerate(batch.prompts):
        try:
            texts[index] = plain_text(prompt)
        except RowError as error:
            errors[index] = error.info
    return texts, errors
