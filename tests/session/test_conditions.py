"""Which rows a model is asked for: conditions on its answers come last, and nothing else of a query changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from runtime.spec import CallOptions, EngineInfo, Task
from sqlext.conditions import models_last
from udfs import signatures

MODELS = ("chat", "judge")
ROWS = 300


class Models:
    """Model functions behind the session's own macros, and what they were asked; `answering` is off in a probe."""

    def __init__(self, con: duckdb.DuckDBPyConnection) -> None:
        self.asked: set[tuple[str, str]] = set()
        self.answering = True
        kinds = [duckdb.dtype(kind) for kind in signatures.PARAMETERS]
        con.execute("CREATE TEMP MACRO schema__udf1(context, said) AS said")
        for name in MODELS:
            con.create_function(
                f"{name}__udf1",
                self._function(name, len(kinds)),
                kinds,
                "VARCHAR",
                type="arrow",
                null_handling="special",
            )
            info = EngineInfo(engine="fake", task=Task.GENERATE)
            con.execute(signatures.macro(name, f"{name}__udf1", info, CallOptions(), "schema__udf1"))

    def _function(self, name: str, arity: int) -> Callable[..., pa.Array]:
        def answer(*columns: pa.ChunkedArray) -> pa.Array:
            texts = columns[1].to_pylist()
            self.asked |= {(name, text) for text in texts if text is not None}
            return pa.array([_answer(text) if self.answering else None for text in texts], pa.string())

        answer.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(f"c{n}", inspect.Parameter.POSITIONAL_ONLY) for n in range(arity)]
        )
        return answer

    def run(self, con: duckdb.DuckDBPyConnection, query: str) -> tuple[set[tuple[str, str]], list[Any]]:
        self.asked = set()
        rows = con.execute(query).fetchall()
        return self.asked, sorted(rows, key=repr)


def _answer(text: str | None) -> str | None:
    if text is None or text.endswith("9"):
        return None
    return ("A" if text.endswith(("1", "3", "7", "5")) else "B") + text


def is_model(name: str) -> bool:
    return name in MODELS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[duckdb.DuckDBPyConnection, Models]]:
    con = duckdb.connect()
    models = Models(con)
    con.execute(
        "CREATE TABLE t AS SELECT i, 's' || i AS s, i % 7 AS g, CASE WHEN i % 3 = 0 THEN i % 5 END AS x, "
        f"i % 20 AS k, i % 4 = 0 AS b FROM range({ROWS}) r(i)"
    )
    con.execute("CREATE TABLE few AS SELECT i AS k, 'v' || i AS v FROM range(2) r(i)")
    con.execute("CREATE VIEW all_t AS SELECT * FROM t")
    folder = tmp_path_factory.mktemp("rows")
    con.execute(f"COPY t TO '{folder}/t.parquet'; COPY t TO '{folder}/t.csv'")
    con.execute(f"CREATE MACRO parquet_rows() AS TABLE FROM '{folder}/t.parquet'")
    con.execute(f"CREATE MACRO csv_rows() AS TABLE FROM '{folder}/t.csv'")
    con.register("frame", con.execute("FROM t").df())
    con.register("rows", con.sql("FROM t").to_arrow_table())
    yield con, models
    con.close()


ASKING = [
    "chat(s) LIKE 'A%'",
    "chat(s) ILIKE 'a%'",
    "chat(s) = 'As1'",
    "chat(s) <> 'As1'",
    "chat(s) IN ('As1', 'As3')",
    "chat(s) IS NOT NULL",
    "chat(s) IS NULL",
    "NOT chat(s) LIKE 'A%'",
    "CASE WHEN chat(s) = 'As1' AND true THEN false ELSE true END",
    "(chat(s) = 'As1' OR judge(s) LIKE 'A%')",
    "chat(s) BETWEEN 'A' AND 'B'",
    "regexp_matches(chat(s), '^A')",
    "chat(s) IS DISTINCT FROM 'x'",
    "(chat(s) LIKE 'A%') IS TRUE",
    "length(chat(s))",
    "chat(s, max_tokens := 5) > 'A'",
    "chat(s) <> s",
    "\"chat\"(s) SIMILAR TO 'A.*'",
]
OTHER = [
    "i % 5 = 0",
    "i % 5 IN (0)",
    "i < 40",
    "s LIKE '%5'",
    "g IN (1, 2)",
    "x IS NOT NULL",
    "length(s) = 3",
    "i % 9 BETWEEN 1 AND 2",
    "(g = 1 OR i % 11 = 2)",
    "g <> x",
    "b",
    "NOT b",
    "TRY_CAST(substr(s, 2) AS INTEGER) % 5 = 0",
    "i + g BETWEEN 5 AND 30",
    "s::VARCHAR = 's11'",
    "CASE WHEN g = 1 AND x = 0 THEN i % 2 = 0 ELSE b END",
]


def expected(con: duckdb.DuckDBPyConnection, source: str, other: str) -> set[str]:
    return {s for (s,) in con.execute(f"SELECT s FROM {source} WHERE {other}").fetchall()}


@pytest.mark.parametrize("written", ["{other} AND {asking}", "{asking} AND {other}"])
@pytest.mark.parametrize("asking", ASKING)
def test_only_rows_that_pass_the_rest_are_asked(world, asking, written):
    """A model is asked for the rows that pass all other conditions, whatever the form and order of the conditions."""
    con, models = world
    for other in OTHER:
        query = "SELECT i FROM t WHERE " + written.format(asking=asking, other=other)
        edited = models_last(con, query, is_model)
        assert edited != query, query
        asked, rows = models.run(con, edited)
        assert {text for _, text in asked} == expected(con, "t", other), edited
        assert rows == models.run(con, query)[1], edited


@pytest.mark.parametrize(
    "source",
    [
        "t",
        "all_t",
        "parquet_rows()",
        "csv_rows()",
        "frame",
        "rows",
        "(FROM t)",
        "(SELECT * FROM t WHERE i < 200)",
        "(FROM t ORDER BY i LIMIT 150)",
        "(SELECT DISTINCT * FROM t)",
        "(FROM t UNION ALL FROM t)",
        f"(SELECT i, 's' || i AS s, i % 7 AS g, i AS x, i % 20 AS k FROM range({ROWS}) r(i))",
    ],
)
def test_every_source(world, source):
    """It holds for tables, views, files, data frames, Arrow tables and subqueries."""
    con, models = world
    for other in ("i % 5 = 0", "i < 40", "g <> x", "s LIKE '%5'"):
        query = f"SELECT i FROM {source} q WHERE chat(s) LIKE 'A%' AND {other}"
        asked, rows = models.run(con, models_last(con, query, is_model))
        assert {text for _, text in asked} == expected(con, source, other), query
        assert rows == models.run(con, query)[1]


PLACES = [
    ("WITH q AS (SELECT * FROM t WHERE chat(s) = 'As5' AND i % 5 = 0) SELECT i FROM q", ROWS // 5),
    ("SELECT * FROM (FROM t SELECT s WHERE chat(s) LIKE 'A%' AND i % 5 = 0)", ROWS // 5),
    ("SELECT count(i) FROM t WHERE (chat(s) LIKE 'A%' AND (i % 5 = 0 AND i % 2 = 0))", ROWS // 10),
    ("SELECT i FROM t WHERE i % 5 = 0 AND chat(s) LIKE 'A%' UNION ALL SELECT k FROM few", ROWS // 5),
    ("SELECT (SELECT count(i) FROM t WHERE chat(s) > 'A' AND i % 5 = 0)", ROWS // 5),
    ("SELECT v FROM few WHERE k IN (SELECT g FROM t WHERE chat(s) > 'A' AND i % 5 = 0)", None),
    ("SELECT g, count(*) FROM t WHERE i % 5 = 0 AND chat(s) > 'A' GROUP BY g HAVING count(*) > 2", ROWS // 5),
    ("SELECT k FROM t GROUP BY k HAVING count(*) + k > 30 AND chat(k) LIKE 'A%'", 4),
    ("SELECT k FROM t GROUP BY k HAVING chat(max(s)) LIKE 'A%' AND count(*) + k > 30", 4),
    ("SELECT i FROM t QUALIFY chat(s) LIKE 'A%' AND row_number() OVER (PARTITION BY k ORDER BY i) <= 2", 40),
    ("SELECT i FROM t WHERE i % 5 = 0 AND chat(s) LIKE 'A%' AND judge(s) > 'A' ORDER BY i LIMIT 7", None),
    ("SELECT i FROM t WHERE chat(s) LIKE 'A%' /* a */ AND -- b\n i % 5 = 0 -- c\n ORDER BY i", ROWS // 5),
    ("SELECT i FROM t WHERE s <> 'ä\"' AND chat(s) LIKE 'A%' AND i % 5 = 0", ROWS // 5),
    ("SELECT count(*) FILTER (WHERE g = 1 AND b), count(i) FROM t WHERE i % 5 = 0 AND chat(s) > 'A'", ROWS // 5),
    ("SELECT t.i FROM t JOIN few ON t.k = few.k WHERE chat(t.s) = 'As1'", ROWS // 10),
    ("SELECT t.i FROM few JOIN t USING (k) WHERE chat(t.s) = 'As1' AND i % 3 = 0", ROWS // 30),
    ("SELECT t.i FROM t, few WHERE chat(t.s) LIKE 'A%' AND t.k = few.k", ROWS // 10),
    ("SELECT i FROM t WHERE chat(s) = 'As1' AND k IN (SELECT k FROM few)", ROWS // 10),
]


@pytest.mark.parametrize(("query", "calls"), PLACES)
def test_every_clause(world, query, calls):
    """It holds in subqueries, CTEs, set operations, joins, HAVING and QUALIFY; results stay what they were, and a run
    ahead, without answers, asks for nothing else."""
    con, models = world
    edited = models_last(con, query, is_model)
    assert edited != query
    asked, rows = models.run(con, edited)
    unedited, unedited_rows = models.run(con, query)
    assert rows == unedited_rows
    assert len(asked) <= len(unedited)
    if calls is not None:
        assert len(asked) == calls, edited
    models.answering = False
    ahead, _ = models.run(con, edited)
    models.answering = True
    assert ahead <= asked


@pytest.mark.parametrize(
    ("statement", "edited"),
    [
        (
            "CREATE TABLE new AS SELECT i FROM t WHERE i % 5 = 0 AND chat(s) = 'x';",
            "CREATE TABLE new AS SELECT i FROM t WHERE i % 5 = 0 AND (CASE WHEN (chat(s) = 'x') THEN 1 END > 0);",
        ),
        (
            "INSERT INTO few SELECT i, s FROM t WHERE chat(s) = 'x' AND i % 5 = 0 RETURNING k",
            "INSERT INTO few SELECT i, s FROM t WHERE true AND i % 5 = 0 AND (CASE WHEN (chat(s) = 'x') THEN 1 END > 0) "
            "RETURNING k",
        ),
        (
            "COPY (FROM t WHERE b AND chat(s) IS NULL) TO 'out.csv' (HEADER)",
            "COPY (FROM t WHERE b AND (CASE WHEN (chat(s) IS NULL) THEN 1 END > 0)) TO 'out.csv' (HEADER)",
        ),
        (
            "FROM t WHERE i % ? = 0 AND chat(s) = 'x' AND i < ?",
            "FROM t WHERE i % ? = 0 AND (CASE WHEN (chat(s) = 'x') THEN 1 END > 0) AND i < ?",
        ),
        (
            "FROM t WHERE chat(s) = $word AND i < $most",
            "FROM t WHERE true AND i < $most AND (CASE WHEN (chat(s) = $word) THEN 1 END > 0)",
        ),
        (
            "UPDATE few SET v = 'WHERE' WHERE chat(v) = 'x' AND k % 5 = 0 RETURNING v",
            "UPDATE few SET v = 'WHERE' WHERE true AND k % 5 = 0 AND (CASE WHEN (chat(v) = 'x') THEN 1 END > 0) "
            "RETURNING v",
        ),
        (
            "DELETE FROM few USING (FROM t WHERE b) x WHERE few.k = x.k AND chat(v) = 'x';",
            "DELETE FROM few USING (FROM t WHERE b) x WHERE few.k = x.k AND (CASE WHEN (chat(v) = 'x') THEN 1 END > 0);",
        ),
        (  # it may overflow for rows that the answer keeps away from it
            "SELECT i FROM t WHERE chat(s) = 'x' AND i * 3 > 1",
            "SELECT i FROM t WHERE (CASE WHEN (chat(s) = 'x') THEN 1 END > 0) AND (CASE WHEN (i * 3 > 1) THEN 1 END > 0)",
        ),
        (  # the cast would fail for rows that the answer keeps away from it
            "FROM t WHERE i % 5 = 0 AND chat(s) = 'number' AND s::INTEGER > 3",
            "FROM t WHERE i % 5 = 0 AND (CASE WHEN (chat(s) = 'number') THEN 1 END > 0) "
            "AND (CASE WHEN (s::INTEGER > 3) THEN 1 END > 0)",
        ),
    ],
)
def test_what_becomes_of_a_text(world, statement, edited):
    """Characters are put around a condition; it moves only if another one stands behind it."""
    assert models_last(world[0], statement, is_model) == edited


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT i FROM t, few WHERE chat(t.s) = few.v AND t.i > 3",  # tables are joined by it
        "SELECT i FROM t JOIN few ON true WHERE few.v = chat(t.s)",
        "SELECT i FROM t WHERE i % 5 = 0",
        "SELECT chat(s) FROM t WHERE i % 5 = 0",
        "SELECT i FROM t WHERE chat(s) LIKE 'A%'",
        "SELECT i FROM t WHERE chat(s) LIKE 'A%' AND judge(s) = 'x'",
        "SELECT i FROM t WHERE i % 5 = 0 AND chat(s) LIKE 'A%' OR g = 1",
        "SELECT 'WHERE a AND chat(s)' FROM t",
        "SELECT i FROM t WHERE s = 'AND chat(s)' AND i % 5 = 0 -- chat(s)",
        "SELECT count(*) FILTER (WHERE b AND chat(s) = 'x') FROM t",
        "SELECT i FROM t WHERE b AND chat(s) IN (SELECT v FROM few)",
        "SELECT i FROM t WHERE b AND chat(s) = 'x",
        "SELEC i FROM t WHERE b AND chat(s) = 'x'",
        "SELECT 1; SELECT i FROM t WHERE b AND chat(s) = 'x'",
        "PIVOT (FROM t WHERE b AND chat(s) = 'x') ON g USING count(*)",
        "CREATE VIEW w AS SELECT i FROM t WHERE b AND chat(s) = 'x'",
        "CREATE MACRO w(z) AS TABLE SELECT i FROM t WHERE b AND chat(s) = z",
        "EXPLAIN SELECT i FROM t WHERE b AND chat(s) = 'x'",
        "PREPARE p AS SELECT i FROM t WHERE b AND chat(s) = ?",
    ],
)
def test_what_is_left_alone(world, statement):
    """Where nothing is gained, or DuckDB cannot show that nothing is lost, the text stays to the letter."""
    assert models_last(world[0], statement, is_model) == statement


def test_a_condition_that_may_fail_waits_for_the_answer(world):
    """What fails for rows that a model's answer keeps away goes on to be kept away."""
    con, models = world
    con.execute("CREATE OR REPLACE TABLE mixed AS SELECT unnest(['11', 'a2', '31', 'b4']) AS s, 1 AS g")
    for condition in ("s::INTEGER > 12", "CAST(s AS INTEGER) > 12", "decode(s::BLOB) = '31' AND json_valid(s)"):
        query = f"SELECT s FROM mixed WHERE g = 1 AND chat(s) LIKE '%1' AND {condition}"
        assert models.run(con, models_last(con, query, is_model))[1] == [("31",)]


def conditions() -> st.SearchStrategy[str]:
    leaves = st.sampled_from([*ASKING, *OTHER, "x = 1", "true", "NULL", "chat(x::VARCHAR) IS NULL"])

    def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        pair = st.tuples(inner, inner)
        return st.one_of(
            pair.map(lambda it: f"{it[0]} AND {it[1]}"),
            pair.map(lambda it: f"({it[0]} AND {it[1]})"),
            pair.map(lambda it: f"({it[0]} OR {it[1]})"),
            pair.map(lambda it: f"{it[0]} OR {it[1]}"),
            inner.map(lambda it: f"NOT ({it})"),
            st.tuples(inner, inner, inner).map(lambda it: f"CASE WHEN {it[0]} THEN {it[1]} ELSE {it[2]} END"),
            pair.map(lambda it: f"({it[0]}) IS DISTINCT FROM ({it[1]})"),
            pair.map(lambda it: f"({it[0]})::INTEGER BETWEEN ({it[1]})::INTEGER AND 1"),
            inner.map(lambda it: f"/* AND */ ({it}) -- OR\n"),
        )

    return st.recursive(leaves, grown, max_leaves=4)


@settings(max_examples=100, deadline=None)
@given(
    condition=st.lists(conditions(), min_size=1, max_size=4).map(" AND ".join),
    clause=st.sampled_from(["WHERE {}", "GROUP BY ALL HAVING {}", "QUALIFY {}"]),
)
def test_no_result_changes(world, condition, clause):
    """Whatever the conditions, the rows are the same."""
    con, models = world
    window = ", row_number() OVER (ORDER BY i) AS n" if clause.startswith("QUALIFY") else ""
    query = f"SELECT i, s, g, x, b{window} FROM t " + clause.format(condition)
    edited = models_last(con, query, is_model)
    event("edited" if edited != query else "left alone")
    assert models.run(con, edited)[1] == models.run(con, query)[1]
