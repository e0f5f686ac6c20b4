"""A driver that a test kills: one long CREATE TABLE AS on a model that writes down what is asked of it.

    killed_driver.py DATABASE LOG ROWS

Everything is real but for the workers, which are threads here: a batch is logged when it begins, and so is paid.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

from scripted import ScriptedPool

import sqlext
from runtime.gateway import Gateway
from runtime.spec import Answers, Batch

BATCH_S = 0.03
WORKERS = 2
MAX_BATCH_ROWS = 256


class LoggingPool(ScriptedPool):
    """Answers in capitals after a while."""

    def __init__(self, log: str) -> None:
        super().__init__(workers=WORKERS, max_batch_rows=MAX_BATCH_ROWS)
        self.spec = type(self.spec)("chat", "scripted", fingerprint="the same model")
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        os.write(self._log, "".join(f"{prompt}\n" for prompt in batch.prompts).encode())
        time.sleep(BATCH_S)
        count = len(batch.prompts)
        yield Answers(range(count), [p.upper() for p in batch.prompts], ["stop"] * count, [1] * count, [2] * count, 1)


def main(database: str, log: str, rows: str) -> None:
    with sqlext.connect(database) as con:
        con.session.functions.put("chat", Gateway(LoggingPool(log), con.session.store))
        print("ready", flush=True)
        con.execute(f"""
            CREATE OR REPLACE TABLE answers AS
            SELECT i, chat('row ' || i) AS answer FROM range({rows}) t(i) WHERE i % 10 <> 11
        """)
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
