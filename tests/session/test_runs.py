"""A query that is run ahead for its calls answers and asks as if it had been run once.

Each shape of query is run twice, in two fresh sessions with stores of their own: as it is, and with the run ahead
switched off. Only the workers are scripted.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager, nullcontext
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
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
from runtime.errors import ErrorInfo, Fatal, SqlextError
from runtime.gateway import Gateway, Statement, Usage
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


class World:
    """A session with tables, views, macros and three models of which nothing is known yet."""

    def __init__(self, folder: Path, *, ahead: bool = True) -> None:
        folder.mkdir()
        self.folder = folder
        self.ahead = ahead
        self.verbatim = False  # conditions are left in order
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SQLEXT_CACHE_DIR", str(folder))
            self.con = sqlext.connect()
            self.con.session.notify = lambda _: None
            self.forget()
        self.con.execute(TABLES)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.con.close()

    def forget(self) -> None:
        """Other models behind the functions' names."""
        self.models = {name: Watched(Model(name), self.con.session.store) for name in ANSWERS}
        for name, gateway in self.models.items():
            before = self.con.session.functions.put(name, gateway)
            if before:
                before.close()

    def run(self, script: str, parameters: Any = None) -> Ran:
        """Run a script; the rows are those of its last statement."""
        frame = pd.DataFrame({"i": range(300), "s": [f"f{i % 80}" for i in range(300)]})
        rows = pa.table({"i": range(300), "s": [f"a{i % 80}" for i in range(300)]})
        self.forget()
        history = self.con.session.history
        history.clear()
        found, error = [], None
        try:
            with (
                chdir(self.folder),
                nullcontext() if self.ahead else switched_off(order=self.verbatim),
            ):
                self.con.execute(script, parameters)
            if self.con.has_rows:
                found = self.con.fetchall()
        except (SqlextError, duckdb.Error) as raised:
            error = (type(raised), str(raised))
        del frame, rows
        return Ran(
            found,
            error,
            Counter({(name, *call): n for name, it in self.models.items() for call, n in it.pool.asked.items()}),
            sum(gateway.ahead for gateway in self.models.values()),
            sorted((row.model, row.input_key, row.code) for it in history for row in it.failed_rows),
            [(it.query, name, *figures(usage)) for it in history for name, usage in sorted(it.usage.items())],
            sum(len(gateway.pool.batches) for gateway in self.models.values()),
        )


def figures(usage: Usage) -> tuple[int, ...]:
    """What was used, without the times."""
    return dataclasses.astuple(dataclasses.replace(usage, began=0, ended=0))


@contextmanager
def switched_off(*, order: bool = False) -> Iterator[None]:
    """Queries are not run ahead; with `order`, their conditions are left in order, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "plan", lambda *_: None)
        if order:
            patch.setattr(runs, "models_last", lambda _, query, __: query)
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, World]]:
    """For scripts that leave nothing behind: a session as it is, and one without a run ahead."""
    folder = tmp_path_factory.mktemp("shared")
    with World(folder / "as_is") as as_is, World(folder / "once", ahead=False) as once:
        yield as_is, once


Both: TypeAlias = Callable[[Any], tuple[Ran, Ran]]


@pytest.fixture
def both(shared: tuple[World, World], tmp_path: Path) -> Both:
    """Run a script as it is, and without a run ahead; in fresh sessions when it may change something."""

    def run(shape: Any) -> tuple[Ran, Ran]:
        script, parameters = said(shape)
        if script.startswith(("SELECT", "FROM", "WITH", "VALUES")) and "nextval" not in script:
            return shared[0].run(script, parameters), shared[1].run(script, parameters)
        with World(tmp_path / "as_is") as as_is, World(tmp_path / "once", ahead=False) as once:
            return as_is.run(script, parameters), once.run(script, parameters)

    return run


def said(shape: Any) -> tuple[str, Any]:
    """A script and its parameters."""
    return shape if isinstance(shape, tuple) else (shape, None)


# Shapes of which every call is asked ahead: a script, and the parameters of its last statement.
AHEAD: list[Any] = [
    "SELECT chat(s) FROM t",
    "SELECT s, chat(s), upper(chat(s)) FROM t",
    "SELECT i FROM t WHERE chat(s) = 'yes'",
    "SELECT i FROM t WHERE g < 3 AND chat(s) <> 'no' AND i % 2 = 1",
    "SELECT i, chat(s) FROM t WHERE chat(s) LIKE 'A%'",
    "SELECT i FROM t WHERE NOT (chat(s) = 'yes' OR g = 2)",
    "SELECT i FROM t WHERE chat(s) IN ('yes', 'no') ORDER BY i",
    "SELECT i FROM t WHERE chat(s) IS NULL OR chat(s) = ''",
    "SELECT chat(n) FROM t",
    "SELECT i FROM t WHERE chat(n) IS NOT NULL",
    "SELECT chat(NULL), chat('constant')",
    "SELECT chat(chat(s)) FROM t",
    "SELECT judge(chat(chat(s))) FROM t",
    "SELECT twice(s) FROM t",
    "SELECT polite(s), polite(n) FROM t",
    "FROM asked(50)",
    "FROM answers",
    "SELECT a, count(*) FROM answers GROUP BY a",
    "FROM verdicts",
    "SELECT i FROM verdicts WHERE verdict = 'yes' AND i < 150",
    "SELECT chat(w) FROM words WHERE i > 100",
    "SELECT CASE WHEN g = 1 THEN chat(s) ELSE judge(s) END FROM t",
    "SELECT CASE chat(s) WHEN 'yes' THEN 1 WHEN 'no' THEN 0 END FROM t",
    "SELECT coalesce(n, chat(s)) FROM t",
    "SELECT coalesce(chat(n), 'nothing') FROM t",
    "SELECT if(i % 2 = 0, chat(s), s) FROM t",
    "SELECT list_transform([s, s || '?', NULL], lambda x: chat(x)) FROM t",
    "SELECT [chat(x) FOR x IN [s, 'same'] IF x <> 's3'] FROM t",
    "SELECT i, (SELECT max(chat(k.v)) FROM k WHERE k.i = t.i) FROM t",
    "SELECT i FROM t WHERE s IN (SELECT 's' || length(chat(v)) FROM k)",
    "SELECT i, (SELECT count(*) FROM k WHERE chat(v) = 'yes') FROM t",
    "SELECT t.i, chat(t.s), judge(k.v) FROM t JOIN k USING (i)",
    "SELECT t.i FROM t JOIN k ON t.i = k.i AND chat(t.s) = 'yes'",
    "SELECT t.i, chat(k.v) FROM t LEFT JOIN k ON t.s = k.v",
    "SELECT chat(t.s), chat(k.v) FROM t FULL JOIN k ON t.s = k.v",
    "SELECT t.i, k.i FROM t RIGHT JOIN k ON chat(t.s) = k.c",
    "SELECT i FROM t SEMI JOIN (SELECT chat(v) AS a FROM k) x ON x.a = 'A' || t.s",
    "SELECT chat(k.c || u.x) FROM k, (VALUES ('x'), ('y')) u(x)",
    "SELECT t.i, x.a FROM t, LATERAL (SELECT chat(t.s || k.v) AS a FROM k WHERE k.i = t.i) x",
    "SELECT t.i FROM t JOIN k ON t.i = k.i WHERE chat(t.s) <> 'no' AND k.c = 'a'",
    "SELECT i, a, row_number() OVER (PARTITION BY a ORDER BY i) FROM answers",
    "SELECT chat(s), count(*), min(i) FROM t GROUP BY 1 HAVING count(*) > 3",
    "SELECT g, max(chat(s)) FROM t GROUP BY g HAVING max(chat(s)) > 'B' ORDER BY g",
    "SELECT count(*) FILTER (chat(s) = 'yes'), string_agg(chat(s), ',' ORDER BY chat(s)) FROM t",
    "SELECT g, chat(s), count(*) FROM t GROUP BY ROLLUP (g, chat(s))",
    "SELECT DISTINCT chat(s) FROM t",
    "SELECT DISTINCT ON (chat(s)) chat(s), i FROM t ORDER BY i",
    "SELECT chat(s) FROM t UNION SELECT chat(v) FROM k",
    "SELECT chat(s) FROM t UNION ALL SELECT judge(v) FROM k",
    "SELECT chat(s) FROM t INTERSECT SELECT judge(v) FROM k",
    "SELECT chat(s) FROM t EXCEPT SELECT chat(v) FROM k",
    "SELECT i, chat(s) AS a FROM t ORDER BY a, i LIMIT 9",
    "SELECT chat(s) FROM t LIMIT 7",
    "FROM answers LIMIT 11",
    "WITH x AS (SELECT i, chat(s) AS a FROM t) SELECT a, count(*) FROM x GROUP BY a",
    "WITH x AS MATERIALIZED (SELECT i, chat(s) AS a FROM t) SELECT p.i FROM x p JOIN x q ON p.a = q.a AND p.i < q.i",
    "WITH x AS (SELECT chat(s) AS a FROM t WHERE g = 1) SELECT judge('is it ' || a) FROM x WHERE a LIKE 'A%'",
    "VALUES (chat('a')), (chat('b')), (judge('a'))",
    "SELECT chat('n' || i) FROM range(300) r(i)",
    "SELECT chat(x) FROM unnest(['a', NULL, 'b']) u(x)",
    "SELECT chat(s) FROM frame",
    "SELECT i FROM rows WHERE chat(s) <> 'no'",
    "CREATE TEMP TABLE tt AS SELECT * FROM t WHERE i < 60; SELECT chat(s) FROM tt",
    ("SELECT chat(s || ?) FROM t WHERE i < ?", ["!", 60]),
    ("SELECT chat(s || $2) FROM t WHERE i < $1 AND chat(s) <> $2", [60, "no"]),
    ("SELECT chat(s || $ending) FROM t WHERE chat(s) <> $answer", {"ending": "!", "answer": "no"}),
    ("INSERT INTO target SELECT i, chat(s || ?) FROM t", ["!"]),
    "CREATE TABLE new AS SELECT i, chat(s) AS a FROM t; FROM new",
    "CREATE OR REPLACE TABLE target AS SELECT i, chat(s) AS a FROM t; FROM target",
    "CREATE TEMP TABLE new AS FROM answers; FROM new",
    "INSERT INTO target SELECT i, chat(s) FROM t WHERE chat(s) <> 'no'; FROM target",
    "INSERT INTO target BY NAME SELECT chat(s) AS a FROM t; FROM target",
    "INSERT INTO target SELECT i, chat(s) FROM t RETURNING a, i",
    "INSERT INTO target VALUES (1, chat('x')), (2, chat('y')) RETURNING *",
    "COPY (SELECT i, chat(s) AS a FROM t) TO 'out.parquet'; FROM 'out.parquet'",
    "COPY (SELECT i, chat(s) AS a FROM t) TO 'out.csv' (HEADER); FROM read_csv('out.csv')",
    "SELECT chat_row(s).output, chat_row(s).cached, chat_row(s).prompt_tokens FROM t",
    "SELECT chat_row(s) FROM t WHERE chat(s) <> 'no'",
    "SELECT chat_row(s || chat_row(s).output).cached FROM t",
    "SELECT chat(s, max_tokens := i % 3 + 1) FROM t",
    "SELECT chat(s, system := n) FROM t",
    "SELECT chat(s, temperature := 0.7, seed := 1) FROM t",
    "SELECT chat([{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': s}]) FROM t",
    "SELECT chat(s, cache := 'off'), chat(n, cache := 'read') FROM t",
    "SELECT chat(i) FROM t",
    "SELECT embed(s) FROM t",
    "SELECT chat(s) FROM t WHERE chat('constant') <> 'never'",
    "SELECT i FROM t WHERE array_cosine_similarity(embed(s), embed('kitten')) > 0.9",
    "SELECT chat(CASE WHEN i % 10 = 3 THEN 'bad ' || i ELSE s END) FROM t",
    "SELECT chat_row(CASE WHEN i % 10 = 3 THEN 'bad ' || i % 20 ELSE s END).error FROM t",
    "SELECT i FROM t WHERE chat(if(i % 2 = 0, 'bad ', 'good ') || i % 30) IS NULL",
    "SELECT judge('bad' || chat(s)), judge(chat('bad' || g)) FROM t",
    "SELECT chat([]), chat([{'role': 'nobody', 'content': s}]) FROM t WHERE i < 3",
    "SELECT chat(s) FROM large",
    "SELECT i, chat(s || i) FROM large WHERE i % 100 = 7",
    "SELECT count(DISTINCT chat(s)) FROM large WHERE i % 3 = 0 AND chat(s) <> 'no'",
    "SELECT chat(chat(s)) FROM large WHERE i % 20 = 3",
    "SELECT chat(large.s), k.c FROM large JOIN k ON large.i % 700 = k.i",
    "CREATE TABLE new AS SELECT i, chat(s) AS a FROM large; SELECT a, count(*), sum(i) FROM new GROUP BY a",
]

# Shapes that are not run ahead, or not wholly: it would gain nothing, or ask in vain.
ONCE: list[Any] = [
    "SELECT i, chat(s) FROM t ORDER BY i DESC LIMIT 5 OFFSET 3",
    "SELECT i, lag(chat(s)) OVER (ORDER BY i) FROM t ORDER BY i",
    "SELECT i FROM t QUALIFY row_number() OVER (PARTITION BY g ORDER BY i) < 9 AND chat(s) <> 'no'",
    "SELECT i FROM answers QUALIFY row_number() OVER (PARTITION BY a ORDER BY i) = 1",
    "SELECT k.i, t.s FROM k ASOF JOIN (SELECT i, s FROM t WHERE chat(s) <> 'no') t ON k.i >= t.i",
    "SELECT i FROM t ORDER BY array_distance(embed(s), embed('kitten')), i LIMIT 5",
    "SELECT i FROM t ANTI JOIN (SELECT chat(v) AS a FROM k) x ON x.a = chat(t.s)",
    "SELECT t.i, k.v FROM t JOIN k ON chat(t.s) = chat(k.v)",
    "SELECT i FROM large WHERE chat(s) = 'yes' LIMIT 20",
    "SELECT * FROM (SELECT i, chat(s) AS a FROM large) WHERE a = 'yes' LIMIT 20",
    "SELECT * FROM (SELECT i FROM large WHERE chat(s) = 'yes') LIMIT 20 OFFSET 5",
    "WITH x AS MATERIALIZED (SELECT i, chat(s) AS a FROM t) SELECT i FROM x WHERE a = 'yes' LIMIT 3",
    "SELECT EXISTS (SELECT 1 FROM large WHERE chat(s) = 'yes')",
    "SELECT i FROM t WHERE EXISTS (SELECT 1 FROM k WHERE k.i = t.i AND chat(k.v) = 'yes')",
    "SELECT i FROM t WHERE chat(s) = 'yes' ORDER BY i LIMIT 3",
    "SELECT CASE WHEN chat(s) = 'yes' THEN judge(s) ELSE judge(n) END FROM t",
    "SELECT coalesce(nullif(chat(s), ''), judge(s)) FROM t",
    "SELECT i FROM t WHERE chat(s) = 'yes' OR judge(s) = 'yes'",
    "SELECT judge(s) FROM t WHERE chat(s) IS DISTINCT FROM 'yes'",
    "SELECT judge(concat('about ', chat(s))) FROM t",
    "SELECT judge(string_agg(chat(s), ',' ORDER BY i)) FROM t GROUP BY g",
    "SELECT chat(s) AS a, judge(chat(s)) FROM t GROUP BY ALL",
    "SELECT judge(t.s) FROM t LEFT JOIN k ON chat(t.s) = k.c WHERE k.c IS NULL",
    "SELECT judge(s) FROM t ORDER BY chat(s), i LIMIT 3",
    "SELECT DISTINCT chat(s) FROM t LIMIT 3",
    "SELECT chat(s || nextval('ids')) FROM t",
    "WITH RECURSIVE r AS (SELECT 's1' AS s UNION ALL SELECT s || '.' || chat(s) FROM r WHERE length(s) < 20) FROM r",
    "PIVOT (SELECT g, chat(s) AS a FROM t) ON a USING count(*)",
    "UPDATE target SET a = chat('u' || i) WHERE i % 2 = 0; FROM target",
    "UPDATE target SET a = 'yes' WHERE i > 2 AND chat('u' || i) = 'yes' RETURNING i",
    "DELETE FROM target WHERE chat('u' || i) = 'yes'; FROM target",
    "MERGE INTO target USING t ON target.i = t.i WHEN MATCHED THEN UPDATE SET a = chat(t.s); FROM target",
    "INSERT INTO target VALUES (DEFAULT, chat('x')); FROM target",
    "PREPARE p AS SELECT chat(s || $1) FROM t; EXECUTE p('!')",
    "PREPARE p AS SELECT chat(s || $1) FROM t; EXECUTE p('!'); EXECUTE p('?')",
    "EXPLAIN ANALYZE CREATE TABLE new AS SELECT chat(s) AS a FROM t; FROM new",
    "EXPLAIN ANALYZE SELECT chat(s) FROM t; SELECT 1",
    "EXPLAIN SELECT chat(s) FROM t; SELECT 1",
    "SELECT i FROM t WHERE g > 7 AND chat(s) = 'yes'",
    "SELECT chat(s) FROM t WHERE chat('constant') = 'never'",
    "CREATE VIEW v AS SELECT chat(s) AS a FROM t; SELECT 1",
    "BEGIN; INSERT INTO target SELECT i, chat(s) FROM t; COMMIT; FROM target",
    "BEGIN; INSERT INTO target SELECT i, chat(s) FROM t; ROLLBACK; FROM target",
    "BEGIN; INSERT INTO target SELECT i, if(chat(s) IS NULL, error('NULL'), 'x') FROM t; COMMIT; FROM target",
    "BEGIN; CREATE TABLE new AS FROM answers; SELECT judge(a) FROM new",
    '!llm setup "cache=off"; SELECT chat(s), chat(n) FROM t',
    "!llm setup \"on_error=null\"; SELECT chat(if(g = 2, 'bad', s)) FROM t",
]

# Shapes that fail.
WRONG: list[Any] = [
    "SELECT chat(s)::INTEGER FROM t",
    "SELECT i, CASE WHEN chat(s) = 'no' THEN error('stop') END FROM t",
    "SELECT chat(s), error('stop') FROM t",
    "SELECT chat(s) FROM t WHERE 1 = i::VARCHAR::DATE::INTEGER",
    "SELECT (SELECT chat(s) FROM t)",
    "CREATE TABLE t AS SELECT chat(s) FROM t",
    "INSERT INTO target SELECT chat(s), i FROM t",
    "CREATE TABLE one (a VARCHAR PRIMARY KEY); INSERT INTO one SELECT chat(s) FROM t",
    "SELECT chat(nope) FROM t",
    "SELECT chat(s, temperature := 'hot') FROM t",
    "SELECT chat(s, max_token := 3) FROM t",
    ("SELECT chat(s) FROM t WHERE i < ?", []),
    '!llm setup "max_rows=100"; SELECT chat(s) FROM t WHERE i < 0 UNION ALL SELECT error(chat(s)) FROM t WHERE i < 9',
]


def same(shape: Any, as_is: Ran, once: Ran) -> None:
    """What holds for every shape: the run ahead leaves everything as it is, and asks for nothing more."""
    assert as_is.error == once.error
    assert as_is.asked == once.asked
    assert Counter(map(repr, as_is.rows)) == Counter(map(repr, once.rows))
    if re.search(r"ORDER BY (i|ALL)( DESC)?( LIMIT .*)?$", said(shape)[0]):
        assert list(map(repr, as_is.rows)) == list(map(repr, once.rows))
    assert as_is.failed == once.failed
    assert as_is.usage == once.usage
    assert set(as_is.asked.values()) <= {1}
    assert as_is.ahead <= len(once.asked)
    assert once.ahead == 0


@pytest.mark.parametrize("shape", AHEAD, ids=str)
def test_a_run_ahead_finds_every_call_and_changes_nothing(both: Both, shape: Any) -> None:
    """Same rows, calls, failed rows and figures as without it; each call is made once, and noted before it is needed."""
    as_is, once = both(shape)
    same(shape, as_is, once)
    assert as_is.error is None
    assert as_is.ahead == len(as_is.asked) > 0


@pytest.mark.parametrize("shape", ONCE, ids=str)
def test_what_is_not_run_ahead_is_the_same(both: Both, shape: Any) -> None:
    """Queries that look for rows that NULL never gives, changes, transactions: each call once, and none too many."""
    as_is, once = both(shape)
    same(shape, as_is, once)
    assert as_is.error is None


@pytest.mark.parametrize("shape", WRONG, ids=str)
def test_errors_are_those_of_the_real_run(both: Both, shape: Any) -> None:
    """Type and text of an error are the same; so is what was asked before it."""
    as_is, once = both(shape)
    same(shape, as_is, once)
    assert as_is.error


@pytest.mark.parametrize(
    ("query", "distinct"),
    [
        ("SELECT i, chat(s || i) FROM large WHERE i % 20 = 7", LARGE // 20),
        ("SELECT count(*) FROM large WHERE chat(s || i) <> 'no' AND i % 20 = 7", LARGE // 20),
        ("SELECT chat(large.s || large.i) FROM large JOIN k ON large.i % 800 = k.i", 1520),
    ],
)
def test_batches_are_full_where_chunks_are_not(shared: tuple[World, World], query: str, distinct: int) -> None:
    """The rows that a filter or a join leaves of fifteen chunks come in less than half as many batches."""
    as_is, once = (world.run(query) for world in shared)
    assert len(as_is.asked) == len(once.asked) == distinct
    assert once.batches >= ceil(LARGE / 2048)
    assert as_is.batches <= once.batches / 2


def test_the_first_failure_ends_a_strict_statement(both: Both) -> None:
    """With on_error=fail the error is the same with a run ahead, and no call is made twice."""
    as_is, once = both("!llm setup \"on_error=fail\"; SELECT chat(if(i % 3000 = 7, 'bad', s)) FROM large")
    assert as_is.error == once.error
    assert as_is.error
    assert as_is.error[0] is Fatal
    assert set(as_is.asked.values()) == set(once.asked.values()) == {1}


def test_sampled_calls_are_made_for_every_row(shared: tuple[World, World]) -> None:
    """Equal prompts with a temperature and without a seed are asked as often as there are rows, and never ahead."""
    for query, sampled, merged in (
        ("SELECT chat('same', temperature := 0.7) FROM t", 400, 0),
        ("SELECT chat(s, temperature := 0.7) FROM frame", 300, 0),
        ("SELECT chat(s, temperature := (i % 2) * 0.7) FROM frame WHERE i % 2 = 1 OR i < 80", 150, 40),
    ):
        as_is, once = (world.run(query) for world in shared)
        assert as_is.asked == once.asked
        by_heat = [0, 0]
        for (_, options, _), count in as_is.asked.items():
            by_heat[not options.temperature] += count
        assert by_heat == [sampled, merged]
        assert as_is.ahead == merged
        assert sorted(as_is.rows) == sorted(once.rows)


def test_what_a_failed_statement_asked_is_kept(tmp_path: Path) -> None:
    """A file that cannot be written is found out after the answers are there; the next try pays for none of them."""
    with World(tmp_path / "world") as world:
        with pytest.raises(duckdb.IOException):
            world.con.execute(f"COPY (SELECT chat(s) FROM t) TO '{tmp_path}/nowhere/out.parquet'")
        world.con.execute(f"COPY (SELECT chat(s) FROM t) TO '{tmp_path}/out.parquet'")
        asked = world.models["chat"].pool.asked
        assert (len(asked), asked.total()) == (400, 400)


def test_cursors_at_the_same_time_share_their_calls(tmp_path: Path) -> None:
    """Four threads with queries that overlap: each has its own rows, and no call is made twice."""
    queries = [
        "SELECT i, chat(s) FROM large WHERE i % 2 = 0",
        "SELECT i, chat(s) FROM large WHERE chat(s) <> 'no' AND i % 3 = 0",
        "SELECT i, chat(chat(s)) FROM large WHERE i % 10 = 0",
        "SELECT chat(s), count(*) FROM large GROUP BY 1",
    ]
    with World(tmp_path / "alone", ahead=False) as world:
        alone = [sorted(world.run(query).rows) for query in queries]
    with World(tmp_path / "together") as world, ThreadPoolExecutor(len(queries)) as threads:
        barrier = threading.Barrier(len(queries))

        def run(query: str) -> list[Any]:
            with world.con.cursor() as cursor:
                barrier.wait()
                return sorted(cursor.execute(query).fetchall())

        assert list(threads.map(run, queries)) == alone
        assert set(world.models["chat"].pool.asked.values()) == {1}


# -- queries made by chance --------------------------------------------------------------------------------------

CHOICE = st.sampled_from
SOURCES = CHOICE(
    [  # in half of them no column holds an answer
        "(SELECT i, g, s, n, s AS a FROM t WHERE i < 60)",
        "(SELECT i, i % 5 AS g, v AS s, c AS n, v || c AS a FROM k)",
        "(SELECT i, i % 4 AS g, 'r' || i AS s, 'n' AS n, 'r' || i % 7 AS a FROM range(30) r(i))",
        "(SELECT i, i % 3 AS g, s, NULL AS n, a FROM answers WHERE i < 60)",
        "(SELECT i, i % 3 AS g, polite(w) AS s, w AS n, w AS a FROM words WHERE i < 60)",
        "(SELECT i, i % 4 AS g, 'r' || i AS s, n, chat('r' || i % 7) AS a FROM range(30) r(i), (VALUES ('n')) n(n))",
    ]
)


def texts(field: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Expressions that are texts."""
    called = st.builds("{}({})".format, CHOICE(["chat", "chat", "judge", "polite"]), field)
    some = st.one_of(field, called)
    return st.one_of(
        field,
        called,
        st.builds("{}({})".format, CHOICE(["chat", "judge", "upper"]), some),
        st.builds("({} || '?')".format, some),
        st.builds("chat({} || {})".format, some, field),
        st.builds("concat({}, '.')".format, some),
        st.builds("coalesce({}, {})".format, some, some),
        st.builds("CASE WHEN {} THEN {} ELSE {} END".format, conditions(some), some, some),
        st.builds("list_transform([{}, {}], lambda y: chat(y))[1]".format, some, field),
    )


def conditions(text: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Expressions that are true or false."""
    simple = st.one_of(
        st.builds("{} = 'yes'".format, text),
        st.builds("{} LIKE 'A%'".format, text),
        st.builds("{} IS NULL".format, text),
        st.builds("{} IN ('yes', 'no')".format, text),
        st.builds("{} IN (SELECT chat(c) FROM k)".format, text),
        CHOICE(["i % 3 = 0", "i > 20", "g < 2", "EXISTS (SELECT 1 FROM k WHERE judge(k.c) = 'yes')"]),
    )
    several = st.builds("{} {} {}".format, simple, CHOICE(["AND", "AND", "OR", "AND NOT"]), simple)
    return st.one_of(simple, simple, several.map("({})".format))


TEXTS = texts(CHOICE(["s", "n", "a"]))
CONDITIONS = conditions(
    CHOICE(["s", "chat(s)", "chat(s)", "chat(a)", "judge(s)", "judge(n || '?')", "chat(chat(s))"])
)
JOINED = st.builds(
    "{}({}{})".format,
    CHOICE(["chat", "judge", "upper"]),
    CHOICE(["x.s", "y.s", "y.a", "chat(y.s)"]),
    CHOICE(["", " || '?'"]),
)


def maybe(*parts: str | st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """These parts one after the other, or nothing."""
    strategies = [st.just(it) if isinstance(it, str) else it for it in parts]
    return st.one_of(st.just(""), st.tuples(*strategies).map("".join))


ENDINGS = maybe(CHOICE([" ORDER BY ALL", " ORDER BY ALL LIMIT 5", " ORDER BY ALL DESC LIMIT 7 OFFSET 2"]))
WHERE = maybe(" WHERE ", CONDITIONS)
PLAIN = st.builds("SELECT i, {} FROM {} x{}".format, TEXTS, SOURCES, WHERE)
QUERIES = st.one_of(
    st.builds("{}{}".format, PLAIN, st.one_of(ENDINGS, st.just(" LIMIT 5"))),
    st.builds("SELECT DISTINCT g, {} FROM {} x{}{}".format, TEXTS, SOURCES, WHERE, ENDINGS),
    st.builds(
        "SELECT max(i), {} AS b, count(*) FROM {} x{} GROUP BY b{}{}".format,
        TEXTS,
        SOURCES,
        WHERE,
        CHOICE(["", " HAVING count(*) > 1", " HAVING b <> 'no'", " HAVING max(chat(s)) > 'B'"]),
        ENDINGS,
    ),
    st.builds(
        "SELECT x.i, {} FROM {} x {} JOIN {} y ON {}{}{}".format,
        JOINED,
        SOURCES,
        CHOICE(["", "LEFT", "FULL"]),
        SOURCES,
        CHOICE(["x.i = y.i", "x.i = y.i AND chat(x.s) = chat(y.s)", "x.i = y.i AND chat(x.s) = 'yes'"]),
        CHOICE(["", " WHERE chat(x.s) <> 'no' AND x.i % 2 = 0", " WHERE judge(x.n) = 'yes' OR x.g = 1"]),
        ENDINGS,
    ),
    st.builds("{} {} {}".format, PLAIN, CHOICE(["UNION", "UNION ALL", "INTERSECT", "EXCEPT"]), PLAIN),
    st.builds(
        "WITH z(i, b) AS ({}) SELECT i, chat(b) FROM z WHERE {}{}".format, PLAIN, CHOICE(["true", "b > 'B'"]), ENDINGS
    ),
    st.builds(
        "SELECT i, {} FROM {} x QUALIFY row_number() OVER (PARTITION BY g ORDER BY i) < 3".format, TEXTS, SOURCES
    ),
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(query=QUERIES)
def test_any_query_is_the_same(shared: tuple[World, World], query: str) -> None:
    """A query made by chance: as it is, run once, and run once to the letter of its text, it answers the same."""
    as_is, once = (world.run(query) for world in shared)
    same(query, as_is, once)
    if "LIMIT" in query or as_is.error:
        return
    shared[1].verbatim = True
    try:
        plain = shared[1].run(query)
    finally:
        shared[1].verbatim = False
    assert Counter(plain.rows) == Counter(as_is.rows)
