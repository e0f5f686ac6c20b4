"""The result store up to 1,000,000 answers: written in batches and found again, against a plain table by key."""

from __future__ import annotations

import argparse
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from runtime.gateway.store import ResultStore, Row

LOOKUP_ROWS = 2048
LOOKUPS = 50


def memory_mb() -> int:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss // 2**20


def written_bytes() -> int:
    """Bytes this process has written so far, to files of any kind."""
    return psutil.Process().io_counters().write_chars


def rows_of(keys: Sequence[bytes], first: int) -> list[Row]:
    """Answers of about 80 bytes."""
    return [
        (key, f"{'an answer of the model ' * 3}{i:>11}", "stop", 20, 30, 12.5) for i, key in enumerate(keys, first)
    ]


def write(put: Callable[[list[Row]], object], keys: Sequence[bytes], batch_rows: int) -> str:
    """Put everything; rates of the whole and of the last tenth, and bytes written per answer."""
    before, memory, spent, last = written_bytes(), memory_mb(), 0.0, 0.0
    for first in range(0, len(keys), batch_rows):
        rows = rows_of(keys[first : first + batch_rows], first)
        started = time.perf_counter()
        put(rows)
        took = time.perf_counter() - started
        spent += took
        last += took if first >= len(keys) * 0.9 else 0.0
    return (
        f"{len(keys) / spent:,.0f} rows/s, the last tenth {len(keys) / 10 / last:,.0f} rows/s, "
        f"{(written_bytes() - before) / len(keys):,.0f} bytes written per row, +{memory_mb() - memory} MB resident"
    )


def lookups(find: Callable[[list[bytes]], dict[bytes, object]], keys: Sequence[bytes]) -> dict[str, float]:
    """Keys per second: asked in the order they were written, shuffled among 64 batches, at random, and not there."""
    rng = random.Random(2)
    count = min(LOOKUP_ROWS, len(keys))
    starts = [rng.randrange(len(keys) - count + 1) for _ in range(LOOKUPS)]
    near = [keys[start : start + 64 * count] for start in starts]
    asked = {
        "in order": [list(keys[start : start + count]) for start in starts],
        "near": [rng.sample(window, count) for window in near],
        "at random": [rng.sample(keys, count) for _ in starts],
        "missing": [[rng.randbytes(16) for _ in range(count)] for _ in starts],
    }
    rates = {}
    for name, batches in asked.items():
        started = time.perf_counter()
        found = sum(len(find(batch)) for batch in batches)
        rates[name] = LOOKUPS * count / (time.perf_counter() - started)
        assert found == (0 if name == "missing" else LOOKUPS * count), f"{name}: {found} found"
    return rates


class PlainTable:
    """The store that would be written first: one row per answer, the key its primary key."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = NORMAL")
        self.db.execute("CREATE TABLE results (key BLOB PRIMARY KEY, o, f, p, c, l) WITHOUT ROWID")

    def put(self, rows: list[Row]) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        self.db.executemany("INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?, ?, ?)", rows)
        self.db.execute("COMMIT")

    def find(self, keys: list[bytes]) -> dict[bytes, object]:
        query = f"SELECT * FROM results WHERE key IN ({','.join('?' * len(keys))})"
        return {key: stored for key, *stored in self.db.execute(query, keys)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 2048])
    said = parser.parse_args()
    rng = random.Random(1)
    keys = [rng.randbytes(16) for _ in range(said.rows)]
    for batch_rows in said.batches:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plain.sqlite"
            plain = PlainTable(path)
            print(f"plain table, batches of {batch_rows:,}: {write(plain.put, keys, batch_rows)}")
            plain_rates = lookups(plain.find, keys)
            plain.db.close()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.sqlite"
            store = ResultStore(path)
            told = write(lambda rows, store=store: store.put("chat", "f", rows), keys, batch_rows)
            print(
                f"store, batches of {batch_rows:,}:       {told}, "
                f"{path.stat().st_size / said.rows:,.0f} bytes on disk per row"
            )
            for name, rate in lookups(store.find, keys).items():
                print(f"  found, {name}: {rate:,.0f} keys/s, {rate / plain_rates[name]:.1f} times the plain table")
            print(f"  {memory_mb()} MB resident")
            store.close()


if __name__ == "__main__":
    main()
