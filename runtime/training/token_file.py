"""Token ids on disk: three flat files that are read by position, so that memory does not grow with the data.

tokens.bin   int32, the ids of all sequences one after the other
marks.bin    uint8, one for each id: LOSS, FIRST
ends.bin     int64, where each sequence ends, in tokens
data.json    what became of the table, see `runtime.training.tokens.Prepared`
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

LOSS, FIRST = 1, 2
"""Bits of a mark: the model is to write this token itself; an example begins here."""
NO_LABEL = -100
"""The label of a token without loss, as torch and transformers have it."""

TOKENS, MARKS, ENDS, DATA = "tokens.bin", "marks.bin", "ends.bin", "data.json"


class TokenFile:
    """Sequences of token ids, by index. Can be pickled; reads with `pread`, so that processes may share it.

    Args:
        folder: what `runtime.training.tokens.prepare` made.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.packed = bool(json.loads((self.folder / DATA).read_text(encoding="utf-8"))["packed"])
        self._count = (self.folder / ENDS).stat().st_size // 8
        self._files: dict[str, int] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """input_ids and labels as int64 (tokens,), labels -100 where there is no loss.

        Of packed examples also position_ids, which start again at each of them; its first token has no label, as
        nothing of the example stands before it.
        """
        start, end = self._range(index)
        ids = self._read(TOKENS, np.int32, start, end).astype(np.int64)
        marks = self._read(MARKS, np.uint8, start, end)
        found = {"input_ids": ids, "labels": np.where(marks & LOSS, ids, NO_LABEL)}
        if self.packed:
            found["position_ids"] = _positions(marks)
        return found

    def length(self, index: int) -> int:
        """Tokens of a sequence, without reading it."""
        start, end = self._range(index)
        return end - start

    def lengths(self) -> Any:
        """Tokens of every sequence, as int32 (sequences,)."""
        ends = np.fromfile(self.folder / ENDS, np.int64)
        return np.diff(ends, prepend=0).astype(np.int32)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)

    def _range(self, index: int) -> tuple[int, int]:
        place = index + self._count if index < 0 else index
        if not 0 <= place < self._count:
            raise IndexError(index)
        ends = self._read(ENDS, np.int64, max(0, place - 1), place + 1)
        return (int(ends[0]) if place else 0), int(ends[-1])

    def _read(self, name: str, kind: type[np.generic], start: int, end: int) -> Any:
        if name not in self._files:
            self._files[name] = os.open(self.folder / name, os.O_RDONLY)
        size = np.dtype(kind).itemsize
        return np.frombuffer(os.pread(self._files[name], (end - start) * size, start * size), kind)


def _positions(marks: Any) -> Any:
    """Positions that start again where an example begins."""
    places = np.arange(len(marks), dtype=np.int64)
    return places - np.maximum.accumulate(np.where(marks & FIRST, places, 0))


class TokenWriter:
    """Appends sequences to the files of a folder; counts what it wrote."""

    def __init__(self, tokens: IO[bytes], marks: IO[bytes], ends: IO[bytes]) -> None:
        self._files = (tokens, marks, ends)
        self.sequences = self.tokens = self.loss_tokens = 0

    def write(self, ids: Sequence[int] | Any, marks: Any) -> None:
        """One sequence: its ids, and a mark for each as uint8."""
        self.sequences += 1
        self.tokens += len(ids)
        self.loss_tokens += int(np.count_nonzero(marks & LOSS))
        content = (np.asarray(ids, np.int32), marks, np.asarray([self.tokens], np.int64))
        for file, part in zip(self._files, content, strict=True):
            file.write(part.tobytes())


@contextmanager
def token_writer(folder: Path) -> Iterator[TokenWriter]:
    """A writer into an empty folder; at the end the files are on the disk."""
    with ExitStack() as opened:
        files = [opened.enter_context((folder / name).open("wb")) for name in (TOKENS, MARKS, ENDS)]
        yield TokenWriter(*files)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
