"""Blocks: some dozen results packed into one record of the result store, about one page of its file.

Alone because it is the format on disk, and because it is what makes the store quick: results that were answered
together are written and read together, and a result becomes a Python tuple with one `unpack_from`.

A block's `data` is one header per result (latency, tokens, where its output lies, finish reason, kind), then the
outputs one after the other; texts are UTF-8 in which lone surrogates are allowed.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

Stored: TypeAlias = tuple[str | bytes, str, int, int, float]
"""Output, finish reason, prompt tokens, completion tokens, latency in ms."""

Row: TypeAlias = tuple[bytes, str | bytes, str, int, int, float]
"""A key and the fields of its `Stored`."""

KEY_BYTES = 16
MAX_BLOCK_BYTES = 3900  # with its record's own header it fits into one page of 4,096 bytes
MAX_BLOCK_ROWS = 200  # a place has eight bits for the row in its block
_HEADER = struct.Struct("<diiIIBB")  # latency, prompt tokens, completion tokens, start, end, reason, is text
_HEADER_BYTES = _HEADER.size
_unpack = _HEADER.unpack_from


class Block(NamedTuple):
    """Results of one `put`: their keys joined, their distinct finish reasons as JSON, headers and outputs."""

    keys: bytes
    reasons: str
    data: bytes

    @property
    def rows(self) -> int:
        """Results in it."""
        return len(self.keys) // KEY_BYTES

    @property
    def size(self) -> int:
        """Bytes of keys, headers and outputs."""
        return len(self.keys) + len(self.data)


def heads_of(keys: Sequence[bytes]) -> list[int]:
    """The first half of every key as a number: what the store looks keys up by.

    Raises:
        ValueError: the keys are not 16 bytes long.
    """
    joined = b"".join(keys)
    if len(joined) != len(keys) * KEY_BYTES:
        raise ValueError(f"keys of the result store are {KEY_BYTES} bytes long")
    return array("q", joined)[::2].tolist()


def split_keys(keys: bytes) -> list[bytes]:
    """The keys of a block, in the order of its rows."""
    return [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]


def pack(rows: Iterable[Row]) -> Iterator[Block]:
    """The rows in their order, as few blocks as they fit in; a large row has a block of its own."""
    full: list[tuple[Row, bytes]] = []
    size = 0
    for row in rows:
        output = row[1].encode("utf-8", "surrogatepass") if isinstance(row[1], str) else row[1]
        bytes_of_row = KEY_BYTES + _HEADER_BYTES + len(output)
        if full and (size + bytes_of_row > MAX_BLOCK_BYTES or len(full) == MAX_BLOCK_ROWS):
            yield _packed(full)
            full, size = [], 0
        full.append((row, output))
        size += bytes_of_row
    if full:
        yield _packed(full)


def _packed(rows: Sequence[tuple[Row, bytes]]) -> Block:
    reasons: dict[str, int] = {}
    headers = []
    start = 0
    for (_, output, reason, prompt_tokens, completion_tokens, latency_ms), encoded in rows:
        end = start + len(encoded)
        number = reasons.setdefault(reason, len(reasons))
        is_text = isinstance(output, str)
        headers.append(_HEADER.pack(latency_ms, prompt_tokens, completion_tokens, start, end, number, is_text))
        start = end
    keys = b"".join(row[0] for row, _ in rows)
    return Block(keys, json.dumps(list(reasons)), b"".join((*headers, *(encoded for _, encoded in rows))))


@lru_cache(maxsize=64)
def reasons_of(reasons: str) -> tuple[str, ...]:
    """The finish reasons of a block, as `unpack` wants them; there are few kinds."""
    return tuple(json.loads(reasons))


def unpack_all(rows: int, reasons: tuple[str, ...], data: bytes) -> Iterator[Stored]:
    """All results of a block of `rows`, in their order."""
    outputs = data[rows * _HEADER_BYTES :]
    text = outputs.decode() if outputs.isascii() else ""  # then a slice of it is an answer; most blocks are so
    for latency_ms, prompt_tokens, completion_tokens, start, end, reason, is_text in _HEADER.iter_unpack(
        data[: rows * _HEADER_BYTES]
    ):
        if is_text:
            shown: str | bytes = text[start:end] if text else str(outputs[start:end], "utf-8", "surrogatepass")
        else:
            shown = outputs[start:end]
        yield shown, reasons[reason], prompt_tokens, completion_tokens, latency_ms


def unpack(rows: int, reasons: tuple[str, ...], data: bytes, position: int) -> Stored:
    """The result at `position` of a block of `rows` results."""
    latency_ms, prompt_tokens, completion_tokens, start, end, reason, is_text = _unpack(
        data, position * _HEADER_BYTES
    )
    outputs = rows * _HEADER_BYTES
    output = data[outputs + start : outputs + end]
    shown = str(output, "utf-8", "surrogatepass") if is_text else output
    return shown, reasons[reason], prompt_tokens, completion_tokens, latency_ms
