"""`EXPLAIN LLM`: what it counts, against what the statement then does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pytest

import sqlext
from runtime import cluster
from runtime.errors import Fatal, UserError
from runtime.spec import ModelSpec, PoolSpec

TABLE = "CREATE TABLE t AS SELECT i, 'text ' || (i % 70) AS x FROM range(500) r(i)"
TOKENS = sum(len(f"text {i}") for i in range(70))


@pytest.fixture(scope="module")
def standing(ray_cluster: object) -> Iterator[None]:
    """Two models that echo, deployed once for all tests of this file."""
    for name in ("say", "tell"):
        cluster.deploy(ModelSpec(name, "echo", fingerprint=f"of {name}"), PoolSpec(gpus_per_worker=0.0))
    yield
    for name in ("say", "tell"):
        cluster.remove(name)


@pytest.fixture
def echo(standing: None, con: sqlext.Connection) -> sqlext.Connection:
    """A session with the models say and tell, and the table t of 500 rows with 70 different texts."""
    for name in ("say", "tell"):
        con.execute(f'RUN command AS LLM.`` WHERE action="infer" AND udfName="{name}" AND reconnect="true"')
    con.execute(TABLE)
    return con


def explained(con: sqlext.Connection, query: str, parameters: Any = None) -> dict[str, dict[str, Any]]:
    """The rows of EXPLAIN LLM by model."""
    rows = con.execute(f"EXPLAIN LLM {query}", parameters).arrow().to_pylist()
    return {row.pop("model"): row for row in rows}


def counts(con: sqlext.Connection, query: str) -> dict[str, tuple[int, int, int, int]]:
    return {
        model: (row["rows"], row["distinct"], row["stored"], row["calls"])
        for model, row in explained(con, query).items()
    }


def calls(con: sqlext.Connection) -> list[tuple[str, int, int, int]]:
    """Model, rows, calls and prompt tokens of all that was asked so far."""
    return con.execute("SELECT model, rows, calls, prompt_tokens FROM llm_calls ORDER BY ALL").fetchall()


@pytest.mark.parametrize(
    "query",
    [
        "SELECT say(x) FROM t",
        "CREATE TABLE u AS SELECT i, say(x) AS y FROM t",
        "INSERT INTO t SELECT i + 1000, say(x) FROM t",
        "COPY (SELECT say(x) FROM t) TO '{path}' (FORMAT csv)",
        "WITH c AS (SELECT say(x) AS y FROM t) SELECT count(y) FROM c",
    ],
)
def test_counts_are_those_of_the_statement(echo: sqlext.Connection, query: str, tmp_path: Path) -> None:
    """Rows, distinct calls and tokens are exactly what the statement then takes, and nothing is done before."""
    query = query.replace("{path}", str(tmp_path / "out.csv"))
    found = explained(echo, query)["say"]
    assert calls(echo) == []
    assert not list(tmp_path.iterdir())
    assert echo.execute("SELECT count(*) FROM t").fetchall() == [(500,)]
    assert (found["rows"], found["distinct"], found["stored"], found["calls"]) == (500, 70, 0, 70)
    echo.execute(query)
    if echo.has_rows:
        echo.fetchall()
    assert calls(echo) == [("say", 500, 70, TOKENS)]
    assert found["prompt_tokens"] == TOKENS
    assert counts(echo, "SELECT say(x) FROM t WHERE i < 500")["say"] == (500, 70, 70, 0)


def test_what_is_stored_costs_nothing(echo: sqlext.Connection) -> None:
    """Stored answers count as stored, also those of another session; cache := 'off' does not use them."""
    echo.execute("SELECT say(x) FROM t WHERE i < 20").fetchall()
    found = explained(echo, "SELECT say(x) FROM t")["say"]
    assert (found["stored"], found["calls"]) == (20, 50)
    echo.session.forget_answers()
    assert counts(echo, "SELECT say(x) FROM t")["say"] == (500, 70, 20, 50)
    assert counts(echo, "SELECT say(x, cache := 'off') FROM t")["say"] == (500, 70, 0, 70)
    done = explained(echo, "SELECT say(x) FROM t WHERE i < 20")["say"]
    assert [done[name] for name in ("calls", "prompt_tokens", "output_tokens")] == [0, 0, 0]
    assert done["seconds"] == 0.0


def test_estimates_come_from_what_was_measured(echo: sqlext.Connection) -> None:
    """Before the first call nothing is known of answers and time; afterwards the mean of all calls counts."""
    before = explained(echo, "SELECT say(x) FROM t")["say"]
    assert (before["output_tokens"], before["seconds"]) == (None, None)
    echo.execute("SELECT say('12345678') UNION ALL SELECT say('1234')").fetchall()
    after = explained(echo, "SELECT say(x) FROM t")["say"]
    assert after["output_tokens"] == 6 * 70
    ((seconds,),) = echo.execute("SELECT sum(seconds) FROM llm_calls").fetchall()
    assert after["seconds"] == pytest.approx(seconds / 2 * 70, rel=0.05, abs=0.07)
    bounded = explained(echo, "SELECT say(x, max_tokens := 3) FROM t")["say"]
    assert bounded["output_tokens"] == 210


def test_a_call_on_an_unknown_answer_is_told_apart(echo: sqlext.Connection) -> None:
    """The outer call is listed with what is known of it; when the inner one is stored, the count is exact."""
    query = "SELECT tell(say(x)) FROM t"
    found = explained(echo, query)
    assert (found["say"]["calls"], found["tell"]["rows"], found["tell"]["calls"]) == (70, 0, 0)
    assert {row["notes"] for row in found.values()} == {"answers that are not known yet may decide about more calls"}
    echo.execute("SELECT say(x) FROM t").fetchall()
    found = explained(echo, query)
    assert (found["say"]["calls"], found["tell"]["rows"], found["tell"]["calls"]) == (0, 500, 70)
    echo.execute(query).fetchall()
    assert {row["notes"] for row in explained(echo, query).values()} == {None}


def test_a_limit_is_counted_as_duckdb_reads(echo: sqlext.Connection) -> None:
    """A LIMIT below the calls bounds them; one above a filter on answers makes the count an upper bound."""
    first = explained(echo, "SELECT say(x) FROM t LIMIT 10")["say"]
    assert (first["calls"], first["notes"]) == (10, None)
    filtered = explained(echo, "SELECT x FROM t WHERE say(x) = 'text 3' LIMIT 1")["say"]
    assert (filtered["calls"], filtered["notes"]) == (70, "at most: a LIMIT may be reached earlier")


def test_sampled_and_random_calls_are_counted_one_by_one(echo: sqlext.Connection) -> None:
    """A sampled call is one for every row, and so is one on a random text."""
    assert counts(echo, "SELECT say(x, temperature := 1) FROM t")["say"] == (500, 500, 0, 500)
    assert counts(echo, "SELECT say(random()::VARCHAR) FROM t")["say"] == (500, 500, 0, 500)


def test_null_constants_parameters_and_frames(echo: sqlext.Connection) -> None:
    """NULL is no row; a constant is one call; placeholders and Python's data frames mean what they mean in queries."""
    frame = pd.DataFrame({"w": ["a", "bb", "bb"]})
    assert counts(echo, "SELECT say(NULL), say(x) FROM t WHERE i < 3")["say"] == (3, 3, 0, 3)
    assert counts(echo, "SELECT say('a constant') FROM t")["say"][1:] == (1, 0, 1)
    assert explained(echo, "SELECT say(x || ?) FROM t WHERE i < ?", ["!", 2])["say"]["prompt_tokens"] == 14
    assert echo.execute("EXPLAIN LLM SELECT say(w) FROM frame").df()["prompt_tokens"].tolist() == [3]
    assert len(frame) == 3


def test_row_forms_views_macros_and_dialects(echo: sqlext.Connection) -> None:
    """The row form counts as its model, behind views and macros too; Spark SQL and a trailing name are understood."""
    echo.execute("CREATE VIEW v AS SELECT say_row(x) AS r FROM t; CREATE MACRO m(a) AS say(a)")
    assert counts(echo, "SELECT r.output FROM v")["say"] == (500, 70, 0, 70)
    assert counts(echo, "SELECT m(x) FROM t WHERE i < 5")["say"] == (5, 5, 0, 5)
    assert counts(echo, "SELECT say(x) AS y FROM t WHERE i < 5 AS named")["say"] == (5, 5, 0, 5)
    echo.execute("SET dialect='spark'")
    assert counts(echo, 'SELECT say(concat(x, "s")) FROM t')["say"] == (500, 70, 0, 70)


def test_a_query_without_a_model_says_so(echo: sqlext.Connection) -> None:
    """An empty table and one line, whether or not any model is registered."""
    assert explained(echo, "SELECT count(*) FROM t") == {}
    assert echo.session.notices == ["The query calls no model."]
    with sqlext.connect() as bare:
        bare.session.notify = lambda _: None
        assert explained(bare, "SELECT 1") == {}


def test_budgets_are_looked_at_before_they_are_spent(echo: sqlext.Connection) -> None:
    """The setting that would stop the statement is named; what the session has used counts; nothing is used up."""
    query = "SELECT say(x, max_tokens := 3) FROM t"

    def budget(*settings: str) -> str:
        echo.execute("!llm setup single " + " ".join(f'"{setting}"' for setting in settings))
        return str(explained(echo, query)["say"]["budget"])

    assert budget() == "within"
    assert (budget("max_rows=70"), budget("max_rows=69")) == ("within", "max_rows")
    most = TOKENS + 3 * 70
    assert budget(f"max_tokens_total={most}") == "within"
    assert budget(f"max_tokens_total={most - 1}") == "max_tokens_total"
    assert budget("session.max_rows=70") == "within"
    echo.execute("SELECT say('one more')").fetchall()
    assert budget("session.max_rows=70") == "session.max_rows"
    with pytest.raises(Fatal):
        echo.execute(query).fetchall()


def test_an_engine_that_cannot_count_leaves_tokens_open(con: sqlext.Connection, deploy: Callable[..., None]) -> None:
    """Its prompt tokens are NULL, and a token budget is unknown; calls are counted all the same."""
    deploy("", "fake", "infer_backend=fake_engines:load", "max_tokens_total=1000")
    found = explained(con, "SELECT fake(w) FROM (VALUES ('a'), ('b')) t(w)")["fake"]
    assert (found["calls"], found["prompt_tokens"], found["budget"]) == (2, None, "unknown")


def test_tokens_of_a_real_model_are_exact(
    con: sqlext.Connection, deploy: Callable[..., None], checkpoints: dict[str, Path]
) -> None:
    """The tokens that are told, chat template and all, are those that the statement is then charged."""
    deploy(checkpoints["chat"], "chat")
    query = "SELECT chat(w, system := 'be kind', max_tokens := 4) FROM (VALUES ('good morning'), ('Grüße')) t(w)"
    found = explained(con, query)["chat"]
    con.execute(query).fetchall()
    ((tokens,),) = con.execute("SELECT prompt_tokens FROM llm_calls").fetchall()
    assert found["prompt_tokens"] == tokens


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE t SET x = say(x)",
        "DELETE FROM t WHERE say(x) = 'text 1'",
        "MERGE INTO t USING (SELECT 1 AS i) s ON t.i = s.i WHEN MATCHED THEN UPDATE SET x = say(t.x)",
        "CREATE VIEW v AS SELECT say(x) FROM t",
        "DROP TABLE t",
        "COPY t TO 'nowhere.csv'",
        "SELECT say(x), nextval('numbers') FROM t",
        "SELECT say(x), setval('numbers', 7) FROM t",
        "SELECT say(x), counted(x) FROM t",
        "SELECT say(x) FROM stream",
        "WITH stream AS (FROM stream) SELECT say(x) FROM stream",
        "SELECT say(content) FROM read_text('/dev/stdin')",
        "WITH RECURSIVE r AS (SELECT 'a' AS a UNION ALL SELECT say(a) FROM r WHERE a <> '') SELECT * FROM r",
    ],
)
def test_what_cannot_be_run_for_its_count_is_refused(echo: sqlext.Connection, statement: str) -> None:
    """Nothing that changes, uses up or never ends is run: one clear error at the statement's place."""
    batches = iter([pa.record_batch({"x": ["once"]})])
    echo.register("stream", pa.RecordBatchReader.from_batches(pa.schema({"x": pa.string()}), batches))
    echo.execute("CREATE SEQUENCE numbers")
    echo.create_function("counted", lambda text: f"{text}!", ["VARCHAR"], "VARCHAR", side_effects=True)
    with pytest.raises(UserError) as raised:
        explained(echo, statement)
    assert (raised.value.code, raised.value.place is not None) == ("explain_statement", True)
    assert raised.value.hint
    assert echo.execute("SELECT nextval('numbers'), count(*) FROM stream").fetchall() == [(1, 1)]
    assert calls(echo) == []


def test_a_wrong_query_is_duckdbs_error(echo: sqlext.Connection) -> None:
    """DuckDB's own words for what does not parse, bind or run; the next statement works."""
    for wrong, kind in (
        ("SELECT say(", duckdb.ParserException),
        ("SELECT say(nothing) FROM t", duckdb.BinderException),
        ("SELECT say(x), error('on purpose') FROM t", duckdb.Error),
    ):
        with pytest.raises(kind) as raised:
            explained(echo, wrong)
        assert "in the statement at line 1" in " ".join(raised.value.__notes__)
    with pytest.raises(UserError):
        explained(echo, "SELECT say(x, temperature := -1) FROM t")
    assert counts(echo, "SELECT say(x) FROM t")["say"] == (500, 70, 0, 70)
