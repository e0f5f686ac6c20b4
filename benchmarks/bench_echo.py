"""1,000,000 rows through Ray workers and back, against the same function as a plain in-process Arrow function."""

from __future__ import annotations

import argparse
import time

import psutil
import pyarrow as pa

import sqlext

QUERY = "SELECT sum(length({function}('row number ' || i))) FROM range({rows}) t(i)"


def memory_mb() -> int:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss // 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    said = parser.parse_args()
    with sqlext.connect() as con:
        con.raw.create_function(
            "plain", lambda text: pa.array(text.to_pylist()), ["VARCHAR"], "VARCHAR", type="arrow", side_effects=False
        )
        con.execute(f"""
            !llm setup "infer_backend=echo" "num_workers={said.workers}";
            RUN command AS LLM.`` WHERE action="infer" AND udfName="echo";
            SELECT count(echo('warm' || i)) FROM range(20000) t(i);
        """)
        started = time.perf_counter()
        con.execute(QUERY.format(function="plain", rows=said.rows)).fetchall()
        plain = time.perf_counter() - started
        print(f"plain Arrow function   {said.rows / plain:,.0f} rows/s")
        for rows in (said.rows // 4, said.rows, said.rows * 2):
            before = time.perf_counter()
            con.execute('!llm setup "cache=off"')
            counted = con.execute(QUERY.format(function="echo", rows=rows)).fetchall()[0][0]
            seconds = time.perf_counter() - before
            assert counted, "no rows came back"
            print(
                f"echo through Ray       {rows / seconds:,.0f} rows/s for {rows:,} rows, "
                f"1/{(seconds / rows) / (plain / said.rows):.0f} of plain, {memory_mb()} MB resident"
            )


if __name__ == "__main__":
    main()
