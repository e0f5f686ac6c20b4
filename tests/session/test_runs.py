"""A query that is run ahead for its calls answers and asks as if it had been run once.

Each shape of query is run twice, in two fresh sessions with stores of their own: as it is, and with the run ahead
switched off. Only the workers are scripted.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import ScriptedPool

import sqlext
from runtime.errors import ErrorInfo, SqlextError
from runtime.gateway import Gateway, Statement
from runtime.spec import Answers, Batch, CallOptions, EngineInfo, ModelSpec, Prompt, Task
from sqlext import probe, runs

MAX_BATCH_ROWS = 128
WORKERS = 2
DIMENSION = 4
LARGE = 30_000  # rows: more than a dozen chunks

fingerprints = itertools.count()


def chat(text: str) -> str:
    """An answer that may be empty, look like NULL, be that of many, or be the prompt's own."""
    number = crc32(text.encode())
    own = f"A{text[:1]}{number % 1000}"
    return ("", "NULL", "yes", "yes", "no", f"{number % 10}", own, own)[number % 8]


def judge(text: str) -> str:
    return ("yes", "no", "yes, but", f"J{text[-1:]}")[crc32(b"j" + text.encode()) % 4]


def embed(text: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(crc32(text.encode()).to_bytes(DIMENSION, "little"), np.uint8).astype(np.float32) / 255


ANSWERS = {"chat": chat, "judge": judge, "embed": embed}


class Model(ScriptedPool):
    """A pure function of prompt and options; a prompt that begins with «bad» fails."""

    def __init__(self, name: str) -> None:
        super().__init__(workers=WORKERS, max_batch_rows=MAX_BATCH_ROWS)
        self.name = name
        self.spec = ModelSpec(name, "scripted", fingerprint=f"{name} {next(fingerprints)}")
        if name == "embed":
            self.info = EngineInfo("scripted", Task.EMBED, dimension=DIMENSION, max_batch_rows=MAX_BATCH_ROWS)
        self.asked: Counter[tuple[CallOptions, Prompt]] = Counter()

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        with self._lock:
            self.batches.append((worker, list(batch.prompts)))
            self.asked.update((batch.options, prompt) for prompt in batch.prompts)
        count = len(batch.prompts)
        errors = {row: ErrorInfo("bad", "It is bad.") for row, it in enumerate(batch.prompts) if str(it)[:3] == "bad"}
        outputs = [None if row in errors else self._answer(it, batch) for row, it in enumerate(batch.prompts)]
        yield Answers(range(count), outputs, ["stop"] * count, [1] * count, [2] * count, 1.0, errors)

    def _answer(self, prompt: Prompt, batch: Batch) -> Any:
        text = prompt if isinstance(prompt, str) else "\n".join(f"{it.role}: {it.content}" for it in prompt)
        said = [str(it) for it in (batch.options.system, batch.options.max_tokens) if it]
        return ANSWERS[self.name](" ".join([text, *said]))


class Watched(Gateway):
    """Notes how many calls were asked ahead of the real runs."""

    ahead = 0

    def forget(self, statement: Statement) -> None:
        self.ahead += self.asked_ahead(statement)[0]
        super().forget(statement)


class Ran(NamedTuple):
    """What came of a script."""

    rows: list[tuple[Any, ...]]
    error: tuple[type, str] | None
    asked: Counter[Any]
    ahead: int
    failed: list[Any]
    usage: list[Any]
    batches: int

    @property
    def same(self) -> tuple[Any, ...]:
        """All that the run ahead must leave as it is."""
        return (self.error, Counter(map(repr, self.rows)), self.asked, self.failed, self.usage)


TABLES = f"""
    CREATE TABLE t AS SELECT i, 's' || i AS s, i % 7 AS g, CASE WHEN i % 9 = 4 THEN NULL ELSE 'n' || i % 50 END AS n
        FROM range(400) r(i);
    CREATE TABLE k AS SELECT i, 's' || i * 3 AS v, chr(CAST(97 + i % 3 AS INTEGER)) AS c FROM range(40) r(i);
    CREATE TABLE large AS SELECT i, 'l' || i % 4000 AS s FROM range({LARGE}) r(i);
    CREATE TABLE target (i BIGINT, a VARCHAR);
    INSERT INTO target SELECT i, 'old' FROM range(10) r(i);
    CREATE VIEW words AS SELECT i, s || '!' AS w FROM t WHERE i % 2 = 0;
    CREATE VIEW answers AS SELECT i, s, chat(s) AS a FROM t;
    CREATE VIEW verdicts AS SELECT i, a, judge(a) AS verdict FROM answers;
    CREATE MACRO polite(x) AS chat('please ' || x);
    CREATE MACRO twice(x) AS chat(chat(x));
    CREATE MACRO asked(low) AS TABLE SELECT i, chat(s) AS a FROM t WHERE i < low;
    CREATE SEQUENCE ids;
"""


@contextmanager
def session() -> Iterator[tuple[sqlext.Connection, dict[str, Watched]]]:
    """A database with tables, views, macros and three models."""
    with sqlext.connect() as con:
        models = fresh_models(con)
        con.execute(TABLES)
        yield con, models


def fresh_models(con: sqlext.Connection) -> dict[str, Watched]:
    """Models of which nothing is known yet, behind the functions' names."""
    models = {name: Watched(Model(name), con.session.store) for name in ANSWERS}
    for name, gateway in models.items():
        before = con.session.functions.put(name, gateway)
        if before:
            before.close()
    return models


def ran(con: sqlext.Connection, models: dict[str, Watched], script: str, parameters: Any = None) -> Ran:
    frame = pd.DataFrame({"i": range(300), "s": [f"f{i % 80}" for i in range(300)]})
    rows = pa.table({"i": range(300), "s": [f"a{i % 80}" for i in range(300)]})
    found, error = [], None
    try:
        con.execute(script, parameters)
        if con.has_rows:
            found = con.fetchall()
    except (SqlextError, duckdb.Error) as raised:
        error = (type(raised), str(raised))
        con.raw.execute("SELECT 1")
    del frame, rows
    return Ran(
        found,
        error,
        sum((Counter({(name, *call): n for call, n in it.pool.asked.items()}) for name, it in models.items()), Counter()),
        sum(gateway.ahead for gateway in models.values()),
        con.execute("SELECT model, input_key, code, count(*) FROM llm_errors GROUP BY ALL ORDER BY ALL").fetchall(),
        con.execute("SELECT * EXCLUDE (seconds) FROM llm_calls ORDER BY ALL").fetchall(),
        sum(len(gateway.pool.batches) for gateway in models.values()),
    )


@contextmanager
def switched_off(*, also_order: bool = False) -> Iterator[None]:
    """Queries are run once; with `also_order`, to the letter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "plan", lambda *_: None)
        if also_order:
            patch.setattr(runs, "models_last", lambda _, query, __: query)
        yield


def both(tmp_path: Path, script: str, parameters: Any = None) -> tuple[Ran, Ran]:
    """The script as it is, and without a run ahead."""
    found = []
    for ahead in (True, False):
        folder = tmp_path / str(ahead)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SQLEXT_CACHE_DIR", str(folder))
            patch.chdir(folder)
            with session() as (con, models):
                if ahead:
                    found.append(ran(con, models, script, parameters))
                else:
                    with switched_off():
                        found.append(ran(con, models, script, parameters))
    return found[0], found[1]
