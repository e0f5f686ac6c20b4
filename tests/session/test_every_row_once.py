"""Every distinct row of a deterministic call is paid for once: across chunks, cursors, statements, sessions,
processes, deployments and deaths of the driver. Counted by the workers themselves."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import models
import pytest

import sqlext
from runtime import cluster

ECHO = "infer_backend=echo"
DISTINCT = 3000
ROWS = 40_000
TEXTS = f"SELECT i, 'text ' || i % {DISTINCT} AS x FROM range({ROWS}) r(i)"


def paid(con: sqlext.Connection, name: str = "say") -> int:
    """Rows that the workers of a model have answered since they started."""
    rows = con.execute(f'!llm status "{name}"').arrow()["rows"]
    return sum(rows.to_pylist())


class Paid:
    """Rows that a model answers inside the block: `rows`."""

    def __init__(self, con: sqlext.Connection, name: str = "say") -> None:
        self._con, self._name = con, name

    def __enter__(self) -> Paid:
        self._before = paid(self._con, self._name)
        return self

    def __exit__(self, *_: object) -> None:
        self.rows = paid(self._con, self._name) - self._before


def reconnected(name: str, *more: str) -> sqlext.Connection:
    """Another session on a model that is deployed."""
    other = sqlext.connect()
    for it in (name, *more):
        other.execute(f"RUN command AS LLM.`` WHERE action='infer' AND udfName='{it}' AND reconnect='true'")
    return other


def stored(con: sqlext.Connection) -> int:
    ((count,),) = con.execute("SELECT count(*) FROM llm_results").fetchall()
    return int(count)


@pytest.fixture
def say(con: sqlext.Connection, deploy: Callable[..., None]) -> sqlext.Connection:
    """The model say on two workers, which answers with the prompt."""
    deploy("", "say", ECHO, "num_workers=2")
    con.execute(f"CREATE TABLE texts AS {TEXTS}")
    return con


@pytest.mark.parametrize(
    "query",
    [
        "SELECT count(say(x)) FROM texts",
        "SELECT count(say(x)), count(upper(say(x))) FROM texts WHERE say(x) <> ''",
        "SELECT sum(n) FROM (SELECT say(x) AS a, count(*) AS n FROM texts GROUP BY a)",
    ],
)
def test_distinct_inputs_are_rows_of_the_model(say: sqlext.Connection, query: str) -> None:
    """In SELECT, WHERE and both, over twenty chunks: as many rows as there are distinct inputs; then none."""
    for expected in (DISTINCT, 0):
        with Paid(say) as model:
            assert say.execute(query).fetchall()[0][0] == ROWS
        assert model.rows == expected
    assert stored(say) == DISTINCT


def test_eight_cursors_ask_for_each_row_once(say: sqlext.Connection) -> None:
    """Eight threads with the same query at the same time: one call for each distinct input, the right rows for all."""
    barrier = threading.Barrier(8)

    def run(number: int) -> list[Any]:
        with say.cursor() as cursor:
            barrier.wait()
            return cursor.execute("SELECT i, say(x) = x FROM texts").fetchall()

    with Paid(say) as model, ThreadPoolExecutor(8) as threads:
        for rows in threads.map(run, range(8)):
            assert len(rows) == ROWS
            assert all(right for _, right in rows)
    assert model.rows == DISTINCT


def test_statements_that_overlap_share_what_they_have_in_common(say: sqlext.Connection) -> None:
    """Two statements at the same time, half of whose inputs are equal, pay for the union."""
    barrier = threading.Barrier(2)

    def run(first: int) -> int:
        with say.cursor() as cursor:
            barrier.wait()
            query = f"SELECT count(say('n ' || ({first} + i % 2000))) FROM range(20_000) r(i)"
            (count,) = cursor.execute(query).fetchone()
            return int(count)

    with Paid(say) as model, ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, (0, 1000))) == [20_000, 20_000]
    assert model.rows == 3000


def test_only_what_changed_is_asked(say: sqlext.Connection) -> None:
    """In a new session: the same query is free; changed prompts, options and system messages are asked, once."""
    say.execute("SELECT count(say(x)) FROM texts").fetchall()
    changed = "CASE WHEN i % 3000 < 17 THEN 'other ' || i % 3000 ELSE x END"
    with reconnected("say") as other:
        other.execute(f"CREATE TABLE texts AS {TEXTS}")
        for call, expected in (
            ("say(x)", 0),
            (f"say({changed})", 17),
            ("say(x, max_tokens := 5)", DISTINCT),
            ("say(x, system := 'Be brief.')", DISTINCT),
            ("say(x, system := 'Be kind.', max_tokens := 5)", DISTINCT),
            ("say([{'role': 'user', 'content': x}])", DISTINCT),
        ):
            for again in (expected, 0):
                with Paid(other) as model:
                    other.execute(f"SELECT count({call}) FROM texts").fetchall()
                assert model.rows == again, call


def test_other_weights_are_asked_anew_and_the_first_are_remembered(
    con: sqlext.Connection, deploy: Callable[..., None], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """A redeploy with other weights finds nothing; the first weights, from a copy in another folder, find all."""
    query = "SELECT i, chat('say ' || i, max_tokens := 4) FROM range(20) r(i) ORDER BY i"
    other = models.language_model(tmp_path / "other", seed=7, eos_bias=2.0)
    copy = shutil.copytree(checkpoints["chat"], tmp_path / "a copy")
    answers = []
    for folder, expected in ((checkpoints["chat"], 20), (other, 20), (copy, 0)):
        deploy(folder, "chat")
        with Paid(con, "chat") as model:
            answers.append(con.execute(query).fetchall())
        assert model.rows == expected
    assert answers[0] == answers[2] != answers[1]


def test_sampled_calls_are_neither_merged_nor_stored(say: sqlext.Connection) -> None:
    """With a temperature and no seed every row is a call, each time; with a seed equal rows are one."""
    for _ in range(2):
        with Paid(say) as model:
            say.execute("SELECT count(say('same', temperature := 0.7)) FROM range(5000)").fetchall()
        assert model.rows == 5000
    assert stored(say) == 0
    for expected in (1, 0):
        with Paid(say) as model:
            say.execute("SELECT count(say('same', temperature := 0.7, seed := 1)) FROM range(5000)").fetchall()
        assert model.rows == expected


def test_null_and_failed_rows_are_not_stored(con: sqlext.Connection, deploy: Callable[..., None]) -> None:
    """NULL is never asked; a failed row is asked once in a statement, and again in the next."""
    deploy("", "fake", "infer_backend=fake_engines:load_counting")
    for expected in (3, 1):
        with Paid(con, "fake") as model:
            con.execute(
                "SELECT fake(w) FROM (VALUES ('a'), ('row error'), (NULL), ('row error'), ('b')) t(w)"
            ).fetchall()
        assert model.rows == expected
    assert con.execute("SELECT output FROM llm_results ORDER BY 1").fetchall() == [("A",), ("B",)]


def test_modes_of_the_cache(say: sqlext.Connection) -> None:
    """off neither uses nor keeps, read uses and does not keep, for a session and for a call; a call has the last word."""

    def asked(call: str) -> tuple[int, int]:
        with Paid(say) as model:
            say.execute(f"SELECT count({call}) FROM texts").fetchall()
        return model.rows, stored(say)

    new = iter(range(100))

    def fresh(cache: str = "") -> str:
        return f"say('new {next(new)} ' || x{cache})"

    assert asked("say(x)") == (DISTINCT, DISTINCT)
    assert asked("say(x, cache := 'off')") == (DISTINCT, DISTINCT)
    assert asked("say(x, cache := 'read')") == (0, DISTINCT)
    for mode in ("off", "read"):
        call = fresh(f", cache := '{mode}'")
        assert [asked(call), asked(call)] == [(DISTINCT, DISTINCT)] * 2
    say.execute('!llm setup "cache=off"')
    assert asked("say(x)") == (DISTINCT, DISTINCT)
    assert asked("say(x, cache := 'on')") == (0, DISTINCT)
    say.execute('!llm setup "cache=read"')
    assert asked("say(x)") == (0, DISTINCT)
    call = fresh()
    assert [asked(call), asked(call)] == [(DISTINCT, DISTINCT)] * 2
    assert asked(fresh(", cache := 'on'")) == (DISTINCT, 2 * DISTINCT)


def test_another_process_pays_for_nothing(say: sqlext.Connection, ray_cluster: cluster.ClusterInfo) -> None:
    """A second process with the same store reconnects to the model, and gets every answer without a call."""
    say.execute("SELECT count(say(x)) FROM texts").fetchall()
    script = f"""
        !llm setup "ray_address={ray_cluster.address}";
        RUN command AS LLM.`` WHERE action="infer" AND reconnect="true" AND udfName="say";
        SELECT count(say(x)) AS n, count(*) FILTER (say(x) = x) AS same FROM ({TEXTS});
        SELECT rows, calls FROM llm_calls;
    """
    with Paid(say) as model:
        done = subprocess.run(
            [Path(sys.executable).with_name("sqlext"), "--json", "-c", script],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    answer, calls = done.stdout.splitlines()[-2:]
    assert answer == f'{{"n":{ROWS},"same":{ROWS}}}'
    assert calls.endswith('"calls":0}')
    assert model.rows == 0


def test_vectors_and_labels_come_back_as_they_were(
    con: sqlext.Connection, deploy: Callable[..., None], checkpoints: dict[str, Path]
) -> None:
    """Embeddings and classes from the store equal the model's own to the bit, and have the same SQL types."""
    deploy(checkpoints["encoder"], "embed")
    deploy(checkpoints["classifier"], "clf")
    query = """
        SELECT embed(x) AS v, clf(x) AS c, typeof(v), typeof(c), array_cosine_similarity(v, embed('other')) AS d
        FROM (SELECT CASE WHEN i % 10 = 3 THEN NULL ELSE 'a text ' || i END AS x FROM range(200) r(i))
    """
    first = con.execute(query).arrow()
    assert first["v"].null_count == first["c"].null_count == 20
    with reconnected("embed", "clf") as other, Paid(other, "embed") as vectors, Paid(other, "clf") as labels:
        again = other.execute(query).arrow()
    assert again.schema == first.schema
    assert again.equals(first)
    assert (vectors.rows, labels.rows) == (0, 0)


KILLS = 3
LONG = 20_000  # rows
PIECE_S = 0.0002  # that a worker takes for a row, at least
IN_FLIGHT = 2 * 2 * 256  # workers, batches that each has, rows of a batch


def test_a_killed_driver_pays_again_only_for_what_was_in_flight(
    con: sqlext.Connection, deploy: Callable[..., None], ray_cluster: cluster.ClusterInfo, tmp_path: Path
) -> None:
    """kill -9 of a process that fills a table, three times in the middle, then a run to the end: all rows are right."""
    deploy("", "slow", "infer_backend=fake_engines:load_counting", "num_workers=2", **{"backend.piece_s": PIECE_S})
    program = textwrap.dedent(f"""
        import sys, sqlext
        with sqlext.connect({str(tmp_path / "answers.duckdb")!r}) as con:
            con.execute('!llm setup "ray_address={ray_cluster.address}"')
            con.execute("RUN command AS LLM.`` WHERE action='infer' AND udfName='slow' AND reconnect='true'")
            con.execute("CREATE OR REPLACE TABLE answers AS SELECT i, slow('row ' || i) AS a FROM range({LONG}) r(i)")
            print(con.execute("SELECT count(*), count(DISTINCT i), count(*) FILTER (a = 'ROW ' || i) FROM answers").fetchall())
    """)
    before = paid(con, "slow")
    for kill in range(1, KILLS + 1):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as driver:
            while paid(con, "slow") - before < LONG * kill // (KILLS + 1):
                assert driver.poll() is None
                time.sleep(0.02)
            driver.kill()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[({LONG}, {LONG}, {LONG})]\n"
    assert LONG <= paid(con, "slow") - before <= LONG + KILLS * IN_FLIGHT
    assert stored(con) == LONG
