"""Where in the result store the answer to a key lies: a table of the file, and the newest keys in memory.

Alone because it is an index with a trick of its own. Keys are random, so that a table filled key by key costs one
page of the file per key. Here a key is first found in memory, where every process holds the keys of the newest
blocks, read from the blocks themselves; when there are `SETTLE_ROWS` of them, one process moves them to the table in
sorted order.

A place may be dead: its block is gone, or has made way for another. Who reads compares the whole key; who writes a
key anew replaces its place; and each settling sweeps a part of the table.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from runtime.gateway.store_blocks import heads_of, split_keys

SETTLE_ROWS = 65_536  # some 10 MB of memory
SWEPT_BYTES = 16 * 2**20  # part of a file of this size that one settling sweeps: all of it
_ROW_BITS = 8  # of a place: the row in its block; the others are the block's id
_HEADS = 2**64

_FIND = "SELECT place FROM places WHERE head IN (SELECT value FROM json_each(?))"
_NEWER = "SELECT id, keys FROM blocks WHERE id > ? ORDER BY id"


class Places:
    """The index of one connection to the store's file. Not thread-safe; its owner holds a lock."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._recent: dict[int, int] = {}
        self._settled = self._seen = -1  # ids of blocks

    def catch_up(self) -> None:
        """Learn the keys that this and other processes have stored since the last time."""
        settled = self._number("settled")
        if settled != self._settled:
            self._recent = {}
            self._settled = self._seen = settled
        for block, keys in self._db.execute(_NEWER, (self._seen,)):
            first = block << _ROW_BITS
            heads = heads_of(split_keys(keys))
            self._recent.update(zip(heads, range(first, first + len(heads)), strict=True))
            self._seen = block

    def find(self, heads: Sequence[int]) -> dict[int, list[int]]:
        """Blocks that may hold keys with these heads, and the rows in them."""
        recent = self._recent
        places = [recent[head] for head in heads if head in recent] if recent else []
        others = [head for head in heads if head not in recent] if places else heads
        if others:
            places += [place for (place,) in self._db.execute(_FIND, (str(others),))]
        blocks: dict[int, list[int]] = {}
        for place in places:
            blocks.setdefault(place >> _ROW_BITS, []).append(place & (1 << _ROW_BITS) - 1)
        return blocks

    def settle(self, file_bytes: int) -> None:
        """Inside a transaction that writes: move the keys to the table when there are many, and sweep a part of it.

        Args:
            file_bytes: size of the file; the larger it is, the smaller the part.
        """
        self.catch_up()
        if len(self._recent) < SETTLE_ROWS:
            return
        alive = self._oldest() << _ROW_BITS
        rows = sorted((head, place) for head, place in self._recent.items() if place >= alive)
        self._db.executemany("INSERT OR REPLACE INTO places VALUES (?, ?)", rows)
        self._set_number("settled", self._seen)
        self._sweep(alive, min(1.0, SWEPT_BYTES / max(1, file_bytes)))

    def remove(self, blocks: str) -> None:
        """Inside a transaction that writes: forget the places in the blocks whose ids the query `blocks` gives."""
        self._db.execute(f"DELETE FROM places WHERE place >> {_ROW_BITS} IN ({blocks})")

    def _sweep(self, alive: int, part: float) -> None:
        """Drop the dead places below `alive` from the next `part` of the table, which is in the order of heads."""
        start = self._number("swept")
        stop = min(_HEADS // 2, start + int(_HEADS * part))
        self._db.execute("DELETE FROM places WHERE head BETWEEN ? AND ? AND place < ?", (start, stop - 1, alive))
        self._set_number("swept", stop if stop < _HEADS // 2 else -_HEADS // 2)

    def _oldest(self) -> int:
        (oldest,) = self._db.execute("SELECT coalesce(min(id), 0) FROM blocks").fetchone()
        return int(oldest)

    def _number(self, name: str) -> int:
        (number,) = self._db.execute("SELECT number FROM progress WHERE name = ?", (name,)).fetchone()
        return int(number)

    def _set_number(self, name: str, number: int) -> None:
        self._db.execute("UPDATE progress SET number = ? WHERE name = ?", (number, name))
