"""A driver that is killed loses nothing that was answered."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import duckdb
from killed_driver import MAX_BATCH_ROWS, WORKERS

ROWS = 100_000
KILLS = 30
IN_FLIGHT = 2 * WORKERS * MAX_BATCH_ROWS


def test_thirty_kills_leave_every_row_right_and_pay_only_for_what_was_in_flight(tmp_path: Path):
    """kill -9 of the driver at random moments of a CTAS over 100,000 rows, then one run to the end."""
    database, log = tmp_path / "answers.duckdb", tmp_path / "asked.txt"
    environment = {
        **os.environ,
        "SQLEXT_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(Path(__file__).with_name("killed_driver.py")), str(database), str(log), str(ROWS)]
    moments = random.Random(11)
    kills = 0
    while kills < KILLS:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as driver:
            assert driver.stdout
            assert driver.stdout.readline() == "ready\n"
            try:
                driver.wait(moments.uniform(0.0, 0.35))
                break  # it has come to its end between the kills
            except subprocess.TimeoutExpired:
                driver.kill()
                kills += 1
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    with duckdb.connect(str(database)) as con:
        found = con.execute("SELECT count(*), count(DISTINCT i), count(*) FILTER (answer = 'ROW ' || i) FROM answers")
        assert found.fetchone() == (ROWS, ROWS, ROWS)
    asked = Counter(log.read_text().splitlines())
    assert len(asked) == ROWS
    assert kills == KILLS
    assert asked.total() - ROWS <= kills * IN_FLIGHT
