"""A table of answers made, and made again by another process that finds every answer in the result store.

The model is the echo engine, so that what is measured is the way of a row. Printed are rows/s of both runs, the calls
of the second, and the memory of the process and all processes it started.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

import psutil

import sqlext


def memory_mb() -> int:
    """Resident memory of this process and those it started; what they share counts once for each."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_info().rss for process in processes) // 2**20


def make(rows: int, name: str) -> None:
    """Make the table, and tell how long it took."""
    with sqlext.connect() as con:
        con.execute("""
            !llm setup "infer_backend=echo";
            RUN command AS LLM.`` WHERE action="infer" AND udfName="echo";
            SELECT echo('warm');
        """)
        started = time.perf_counter()
        con.execute(
            f"CREATE TABLE t AS SELECT i, echo('row number ' || i || ' of a table') AS e FROM range({rows}) t(i)"
        )
        seconds = time.perf_counter() - started
        right = con.execute("SELECT count(*) FROM t WHERE e = 'row number ' || i || ' of a table'").fetchall()[0][0]
        calls = con.execute("SELECT sum(calls) FROM llm_calls WHERE query LIKE 'CREATE TABLE%'").fetchall()[0][0]
        print(
            f"{name:12} {rows / seconds:,.0f} rows/s, {calls:,} calls, {right:,} of {rows:,} right, "
            f"{memory_mb():,} MB in all processes",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--again", action="store_true", help="make the table from the store in $SQLEXT_CACHE_DIR")
    said = parser.parse_args()
    if said.again:
        make(said.rows, "second run")
        return
    os.environ["SQLEXT_CACHE_DIR"] = tempfile.mkdtemp(prefix="sqlext-bench-")
    make(said.rows, "first run")
    subprocess.run([sys.executable, __file__, "--again", "--rows", str(said.rows)], check=True)


if __name__ == "__main__":
    main()
