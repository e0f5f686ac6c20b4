"""From examples to the sequences that a model is trained on: each alone, several packed, or a stream cut in blocks.

Alone because it is arithmetic on lengths. All three depend on the rows and their order alone, so that every run makes
the same sequences.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from runtime.training.token_file import FIRST

Write = Callable[[Any, Any], None]
"""Takes a finished sequence: ids and marks, arrays of equal length."""


class Sequences(Protocol):
    """Takes examples and writes sequences."""

    def add(self, ids: Any, marks: Any) -> None:
        """One example: ids as int32 and marks as uint8, at most the longest sequence (blocks: any length)."""
        ...

    def end(self) -> None:
        """Write what is left."""
        ...


class Single:
    """Each example is a sequence."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def add(self, ids: Any, marks: Any) -> None:
        """Written at once."""
        self._write(ids, _beginning(marks))

    def end(self) -> None:
        """Nothing is left."""


class Packed:
    """Each example goes whole into the sequence whose room it fills best, the longest of a window first.

    Args:
        length: tokens of a full sequence.
        window: examples that are looked at together.
    """

    def __init__(self, write: Write, length: int, window: int) -> None:
        self._write = write
        self._length = length
        self._window = window
        self._held: list[tuple[Any, Any]] = []

    def add(self, ids: Any, marks: Any) -> None:
        """Hold it; write the sequences of a full window."""
        self._held.append((ids, _beginning(marks)))
        if len(self._held) == self._window:
            self.end()

    def end(self) -> None:
        """Write the sequences of what is held."""
        for parts in self._filled():
            self._write(np.concatenate([ids for ids, _ in parts]), np.concatenate([marks for _, marks in parts]))
        self._held = []

    def _filled(self) -> list[list[tuple[Any, Any]]]:
        sequences: list[list[tuple[Any, Any]]] = []
        rooms: list[tuple[int, int]] = []  # what is free in which sequence, the smallest first
        for part in sorted(self._held, key=lambda part: -len(part[0])):
            best = bisect_left(rooms, (len(part[0]), -1))
            room, place = rooms.pop(best) if best < len(rooms) else (self._length, len(sequences))
            if place == len(sequences):
                sequences.append([])
            sequences[place].append(part)
            insort(rooms, (room - len(part[0]), place))
        return sequences


class Blocks:
    """Examples one after the other, cut into blocks of equal length; the last one may be shorter. Nothing is lost."""

    def __init__(self, write: Write, length: int) -> None:
        self._write = write
        self._length = length
        self._parts: list[tuple[Any, Any]] = []
        self._held = 0

    def add(self, ids: Any, marks: Any) -> None:
        """Write the blocks that are full with it."""
        self._parts.append((ids, marks))
        self._held += len(ids)
        if self._held >= self._length:
            self._cut()

    def end(self) -> None:
        """Write the rest."""
        if self._held:
            self._write(*self._joined())
        self._parts, self._held = [], 0

    def _cut(self) -> None:
        ids, marks = self._joined()
        full = len(ids) - len(ids) % self._length
        for start in range(0, full, self._length):
            self._write(ids[start : start + self._length], marks[start : start + self._length])
        self._parts, self._held = [(ids[full:], marks[full:])], len(ids) - full

    def _joined(self) -> tuple[Any, Any]:
        ids, marks = zip(*self._parts, strict=True)
        return np.concatenate(ids), np.concatenate(marks)


def _beginning(marks: Any) -> Any:
    """The marks of an example: its first token is not to be told from what stands before."""
    marks[0] = FIRST
    return marks
