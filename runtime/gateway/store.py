"""Finished answers that outlive the process: found again by key, shared by processes, safe against kill -9.

One SQLite file (`store_file`). Answers come in batches and are asked for in batches, so they are kept in blocks of
some dozen (`store_blocks`), and a key leads to its block through `store_places`.

One connection behind one lock: nothing can leak when threads end, and what is known of the file has one owner.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from runtime.gateway.store_blocks import (
    KEY_BYTES,
    Row,
    Stored,
    heads_of,
    pack,
    reasons_of,
    split_keys,
    unpack,
    unpack_all,
)
from runtime.gateway.store_file import StoreFile, default_path
from runtime.gateway.store_places import Places

__all__ = ["Measured", "ResultStore", "Row", "Scanned", "StoreLine", "Stored", "default_path"]

MAX_BYTES = 10 * 10**9
SAMPLE = 8  # one key in so many is looked up first; its block mostly holds the keys asked for with it
SCAN_BLOCKS = 64  # read at a time
KEPT_PART = 0.9  # of the bound, after the oldest answers were dropped
VACUUM_PAGES = 10_000  # given back in one transaction

Scanned: TypeAlias = tuple[bytes, str, str, str | bytes, str, int, int, float, float]
"""Key, model, fingerprint, the fields of a `Stored`, epoch seconds when it was stored."""

_BLOCKS = "SELECT id, created, rows, keys, reasons, data FROM blocks WHERE id IN (SELECT value FROM json_each(?))"
_ADD_BLOCK = "INSERT INTO blocks (model, created, rows, bytes, keys, reasons, data) VALUES (?, ?, ?, ?, ?, ?, ?)"
_SUMMARY = """
    SELECT m.model, m.fingerprint, sum(b.rows), sum(b.bytes), min(b.created), max(b.created)
    FROM blocks b JOIN models m ON m.id = b.model GROUP BY b.model ORDER BY m.model, m.fingerprint
"""
_SCAN = """
    SELECT b.id, m.model, m.fingerprint, b.created, b.rows, b.keys, b.reasons, b.data
    FROM blocks b JOIN models m ON m.id = b.model WHERE b.id > ? ORDER BY b.id LIMIT ?
"""
_ADD_MEASURED = """
    INSERT INTO measured VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    calls = calls + excluded.calls, prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens, seconds = seconds + excluded.seconds
"""


@dataclass(frozen=True, slots=True)
class StoreLine:
    """What is stored of one model: bytes are those of keys and outputs, times are epoch seconds."""

    model: str
    fingerprint: str
    results: int
    bytes: int
    oldest: float
    newest: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Sums over all calls to a model so far; seconds are wall time."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class ResultStore:
    """Answers by key. Thread-safe; any number of processes may have the same file open.

    Args:
        path: the file; made, with its folder, when it is missing.
        max_bytes: bound on the file; the oldest answers are dropped to keep it. May be assigned.
        max_age_s: older answers are not found any more. May be assigned.

    Every method raises a `Fatal` (store_read, store_write, store_locked) or `UserError` (store_corrupt,
    store_readonly) when the file fails; the constructor also a `UserError` store_path, store_folder, store_version
    or store_foreign.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, max_age_s: float | None = None) -> None:
        self.max_bytes = max_bytes
        self.max_age_s = max_age_s
        self._file = StoreFile(path, self._start)

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def _start(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._places = Places(db)

    # -- answers ------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Stored]:
        """The answers that are stored under `keys`, each 16 bytes; keys without one are left out."""
        with self._file.reading():
            self._places.catch_up()
            return self._find(keys)

    def put(self, model: str, fingerprint: str, rows: Sequence[Row]) -> None:
        """Store answers of one model, all or none; a key that has an answer keeps it.

        When it returns, the answers survive the end of this process.

        Raises:
            Fatal: store_write.
        """
        if not rows:
            return
        with self._file.writing():
            self._places.catch_up()
            by_key = {row[0]: row for row in reversed(rows)}
            for key in self._find(list(by_key)):
                del by_key[key]
            self._add(model, fingerprint, [*reversed(by_key.values())])
            self._places.settle(self._used_bytes())
            self._make_room()

    def scan(self, batch_rows: int = 10_000) -> Iterator[list[Scanned]]:
        """Everything stored, oldest first, in lists of at most `batch_rows`; others may write meanwhile."""
        batch: list[Scanned] = []
        after = 0
        while True:
            with self._file.reading():
                blocks = self._db.execute(_SCAN, (after, SCAN_BLOCKS)).fetchall()
            if not blocks:
                break
            for after, model, fingerprint, created, rows, keys, reasons, data in blocks:  # noqa: B007
                kinds = reasons_of(reasons)
                for key, stored in zip(split_keys(keys), unpack_all(rows, kinds, data), strict=True):
                    batch.append((key, model, fingerprint, *stored, created))
                while len(batch) >= batch_rows:
                    yield batch[:batch_rows]
                    del batch[:batch_rows]
        if batch:
            yield batch

    def summary(self) -> list[StoreLine]:
        """What is stored, per model and fingerprint."""
        with self._file.reading():
            return [StoreLine(*line) for line in self._db.execute(_SUMMARY)]

    def clear(self, model: str | None = None) -> int:
        """Forget the answers of `model`, or all answers and facts; the number of answers. The file shrinks."""
        if model is None:
            with self._file.writing():
                self._db.execute("DELETE FROM facts")
            return self._remove("true", ())
        return self._remove("model IN (SELECT id FROM models WHERE model = ?)", (model,))

    def prune(self, older_than_s: float) -> int:
        """Forget the answers stored more than `older_than_s` seconds ago; their number. The file shrinks."""
        return self._remove("created < ?", (time.time() - older_than_s,))

    # -- facts and sums -----------------------------------------------------------------------------------

    def recall(self, name: str) -> str | None:
        """The text remembered under `name`."""
        with self._file.reading():
            found = self._db.execute("SELECT text FROM facts WHERE name = ?", (name,)).fetchone()
        return found[0] if found else None

    def remember(self, name: str, text: str) -> None:
        """Keep `text` under `name`, in place of what was there."""
        with self._file.writing():
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, text))

    def measured(self, fingerprint: str) -> Measured | None:
        """The sums of all `add_measured`; None when there was none."""
        columns = "calls, prompt_tokens, completion_tokens, seconds"
        with self._file.reading():
            found = self._db.execute(
                f"SELECT {columns} FROM measured WHERE fingerprint = ?", (fingerprint,)
            ).fetchone()
        return Measured(*found) if found else None

    def add_measured(self, fingerprint: str, more: Measured) -> None:
        """Add to the sums."""
        with self._file.writing():
            self._db.execute(
                _ADD_MEASURED,
                (fingerprint, more.calls, more.prompt_tokens, more.completion_tokens, more.seconds),
            )

    # -- with the lock held -------------------------------------------------------------------------------

    def _find(self, keys: Sequence[bytes]) -> dict[bytes, Stored]:
        others = list(zip(heads_of(keys), keys, strict=True))
        wanted = set(keys)
        found: dict[bytes, Stored] = {}
        sample = [head for head, _ in others[::SAMPLE]]
        del others[::SAMPLE]
        self._collect(sample, wanted, found)
        self._collect([head for head, key in others if key not in found], wanted, found)
        return found

    def _collect(self, heads: Sequence[int], wanted: set[bytes], found: dict[bytes, Stored]) -> None:
        """Add the wanted answers with these heads to `found`, and more wanted ones of blocks that hold several."""
        blocks = self._places.find(heads)
        if not blocks:
            return
        expired = time.time() - self.max_age_s if self.max_age_s is not None else 0.0
        for block, created, rows, keys, reasons, data in self._db.execute(_BLOCKS, (str(list(blocks)),)):
            if created < expired:
                continue
            kinds = reasons_of(reasons)
            if len(blocks[block]) > 1:
                both = zip(split_keys(keys), unpack_all(rows, kinds, data), strict=True)
                found.update([it for it in both if it[0] in wanted])
                continue
            [position] = blocks[block]
            key = keys[position * KEY_BYTES : (position + 1) * KEY_BYTES]
            if key in wanted:
                found[key] = unpack(rows, kinds, data, position)

    def _add(self, model: str, fingerprint: str, rows: Sequence[Row]) -> None:
        self._db.execute("INSERT OR IGNORE INTO models (model, fingerprint) VALUES (?, ?)", (model, fingerprint))
        (number,) = self._db.execute(
            "SELECT id FROM models WHERE model = ? AND fingerprint = ?", (model, fingerprint)
        ).fetchone()
        now = time.time()
        self._db.executemany(
            _ADD_BLOCK,
            ((number, now, block.rows, block.size, *block) for block in pack(rows)),
        )

    def _used_bytes(self) -> int:
        """Bytes of the file's pages that hold something; freed ones are filled before the file grows."""
        pages, free, page_bytes = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * page_bytes)

    def _make_room(self) -> None:
        """Drop the oldest blocks when the file is at its bound: a tenth of it, so that it is seldom done."""
        used = self._used_bytes()
        if used <= self.max_bytes:
            return
        excess = used - int(self.max_bytes * KEPT_PART)
        last = 0
        with closing(self._db.execute("SELECT id, bytes FROM blocks ORDER BY id")) as blocks:
            for last, size in blocks:  # noqa: B007
                excess -= size
                if excess <= 0:
                    break
        self._db.execute("DELETE FROM blocks WHERE id <= ?", (last,))

    def _remove(self, condition: str, values: tuple[object, ...]) -> int:
        with self._file.writing():
            self._db.execute("CREATE TEMP TABLE gone (id INTEGER PRIMARY KEY)")
            self._db.execute(f"INSERT INTO gone SELECT id FROM blocks WHERE {condition}", values)
            (rows,) = self._db.execute(
                "SELECT coalesce(sum(rows), 0) FROM blocks WHERE id IN (SELECT id FROM gone)"
            ).fetchone()
            self._db.execute("DELETE FROM blocks WHERE id IN (SELECT id FROM gone)")
            self._places.remove("SELECT id FROM gone")
            self._db.execute("DROP TABLE gone")
        self._shrink()
        return int(rows)

    def _shrink(self) -> None:
        """Give free pages back to the file system, in portions that let others write in between."""
        free = 1
        while free:
            with self._file.altering():
                self._db.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()
                (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
        with self._file.altering():
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
