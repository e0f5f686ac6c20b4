"""How full SQL keeps a pool of workers: distinct rows, 90 % equal rows, after a filter, after a join.

Four workers that take 5 ms for a batch and 0.1 ms for each row, batches of up to 256. Printed is the share of the
ideal: the time the workers need for the distinct rows when they are never without a full batch.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from timed_engine import ideal_s

import sqlext

WORKERS = 4
CASES = (
    ("10k distinct", 10_000, "SELECT count(length(slow('{n} ' || i))) FROM rows WHERE i < 10000"),
    ("10k, 90 % equal", 1_000, "SELECT count(length(slow('{n} ' || i % 1000))) FROM rows WHERE i < 10000"),
    ("200k distinct", 200_000, "SELECT count(length(slow('{n} ' || i))) FROM rows WHERE i < 200000"),
    ("200k, 90 % equal", 20_000, "SELECT count(length(slow('{n} ' || i % 20000))) FROM rows WHERE i < 200000"),
    ("20k after a 5 % filter", 20_000, "SELECT count(length(slow('{n} ' || i))) FROM rows WHERE i % 20 = 7"),
    (
        "20k after a join",
        20_000,
        "SELECT count(length(slow('{n} ' || r.i))) FROM rows r JOIN few ON r.i % 100 = few.k",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    said = parser.parse_args()
    os.environ["SQLEXT_CACHE_DIR"] = tempfile.mkdtemp(prefix="sqlext-bench-")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where workers find the engine
    with sqlext.connect() as con:
        con.execute(f"""
            !llm setup "infer_backend=timed_engine:load" "num_workers={WORKERS}" "cpus_per_worker=0.25";
            RUN command AS LLM.`` WHERE action="infer" AND udfName="slow";
            CREATE TABLE rows AS SELECT i FROM range(400000) t(i);
            CREATE TABLE few AS SELECT * FROM (VALUES (3), (17), (41), (59), (83)) t(k);
            SELECT count(length(slow('warm ' || i))) FROM range(10000) t(i);
        """)
        for name, distinct, sql in CASES:
            if said.case not in name:
                continue
            ideal = ideal_s(distinct, WORKERS)
            shares = []
            for number in range(said.rounds):
                started = time.perf_counter()
                con.execute(sql.format(n=f"{name} {number}")).fetchall()
                shares.append(ideal / (time.perf_counter() - started))
            print(f"{name:24} {max(shares):.0%} of the ideal {ideal:.2f} s", flush=True)


if __name__ == "__main__":
    main()
