"""Which statements are worth running ahead: DuckDB's own trees and plans, with functions that count what they see."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pytest

from sqlext.probe import Probe, plan

# As the session makes them: the Python function, and the temporary macro over it.
MODELS = {"chat": "chat__udf12", "judge": "judge__udf13"}


def is_model(name: str) -> bool:
    return name in MODELS or name in MODELS.values()


class Models:
    """Two model functions and what they were asked; `answering` is off in a probe."""

    def __init__(self, con: duckdb.DuckDBPyConnection) -> None:
        self.asked: set[tuple[str, str]] = set()
        self.answering = True
        for name, function in MODELS.items():
            con.create_function(
                function, self._function(name), ["VARCHAR"], "VARCHAR", type="arrow", null_handling="special"
            )
            con.execute(f"CREATE TEMP MACRO {name}(prompt) AS {function}(prompt::VARCHAR)")

    def _function(self, name: str) -> Callable[[pa.ChunkedArray], pa.Array]:
        def answer(prompts: pa.ChunkedArray) -> pa.Array:
            texts = prompts.to_pylist()
            self.asked |= {(name, text) for text in texts if text is not None}
            return pa.array([self._answer(text) for text in texts], pa.string())

        return answer

    def _answer(self, text: str | None) -> str | None:
        if text is None or not self.answering:
            return None
        return ("A" if text.endswith(("1", "3", "7")) else "B") + text

    def asked_by(self, con: duckdb.DuckDBPyConnection, query: str, *, answering: bool) -> set[tuple[str, str]]:
        self.asked, self.answering = set(), answering
        con.execute(query).fetchall()
        self.answering = True
        return self.asked


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[duckdb.DuckDBPyConnection, Models]]:
    con = duckdb.connect()
    models = Models(con)
    con.execute("CREATE TABLE t AS SELECT i, 's' || i AS s, i % 7 AS g FROM range(400) r(i)")
    con.execute("CREATE TABLE k AS SELECT i, 's' || i AS v FROM range(20) r(i)")
    con.execute("CREATE VIEW answers AS SELECT i, chat(s) AS a, s FROM t")
    con.execute("CREATE VIEW named (z, y) AS SELECT i, chat(s) FROM t")
    con.execute("CREATE VIEW drawn AS SELECT i, random() AS r FROM t")
    con.execute("CREATE MACRO polite(x) AS chat('please ' || x)")
    con.execute("CREATE MACRO either(x, y) AS coalesce(x, judge(y))")
    con.execute("CREATE MACRO dice() AS floor(random() * 6)")
    con.execute("CREATE MACRO asked(low) AS TABLE SELECT chat(s) AS a FROM t WHERE i < low")
    con.execute("CREATE MACRO joined(x) AS string_agg(x, ' ')")
    con.execute("CREATE VIEW joint (v) AS SELECT string_agg(s, ' ') FROM t GROUP BY g")
    con.execute("CREATE SEQUENCE ids")
    yield con, models
    con.close()


@pytest.fixture
def con(world: tuple[duckdb.DuckDBPyConnection, Models]) -> duckdb.DuckDBPyConnection:
    return world[0]


def planned(con: duckdb.DuckDBPyConnection, text: str, parameters: Any = None) -> Probe | None:
    return plan(con, text, parameters, is_model, sys._getframe(1))


WORTH = [
    ("SELECT chat(s) FROM t", 1),
    ("SELECT chat__udf12(s) AS random FROM t", 1),
    ("select CHAT(s) from t", 1),
    ('SELECT "chat" (s) FROM t', 1),
    ("FROM Answers", 1),
    ("FROM t SELECT chat(s) AS s", 1),
    ("SELECT i FROM t WHERE i % 5 = 0 AND chat(s) LIKE 'A%'", 1),
    ("SELECT chat(s) FROM t WHERE chat(s) LIKE 'A%'", 1),
    ("SELECT chat(s) AS a FROM t WHERE chat(s) IS NULL", 1),
    ("SELECT * FROM answers WHERE a > 'B'", 1),
    ("SELECT chat(s) FROM t LIMIT 5", 1),
    ("SELECT t.i FROM (FROM t LIMIT 20) t JOIN (FROM k LIMIT 2) k ON chat(t.s) = 'B' || k.v", 1),
    ("SELECT chat(s) AS a FROM t WHERE i % 3 = 0 LIMIT 5", 1),
    ("SELECT * FROM answers ORDER BY a LIMIT 5", 1),
    ("SELECT chat(t.s) FROM t JOIN k USING (i)", 1),
    ("SELECT t.i FROM t JOIN k ON chat(t.s) = k.v", 1),
    ("SELECT x.a FROM answers x JOIN k ON x.i = k.i LIMIT 5", 1),
    ("SELECT chat(s), count(*) FROM t GROUP BY 1", 1),
    ("SELECT chat(s) AS a, count(*) FROM t GROUP BY a ORDER BY 2 DESC LIMIT 5", 1),
    ("SELECT DISTINCT chat(s) FROM t", 1),
    ("SELECT s FROM t QUALIFY row_number() OVER (PARTITION BY g ORDER BY chat(s)) = 1", 1),
    ("SELECT list_transform([s, s || 'x'], lambda x: chat(x)) FROM t", 1),
    ("SELECT i, (SELECT chat(k.v) FROM k WHERE k.i = t.i) FROM t", 1),
    ("SELECT CASE WHEN g = 1 THEN chat(s) END FROM t", 1),
    ("SELECT CASE WHEN g = 1 THEN chat(s) ELSE judge(s) END FROM t", 2),
    ("SELECT coalesce(chat(s), 'none') FROM t", 1),
    ("WITH x AS (SELECT chat(s) AS a FROM t) SELECT * FROM x WHERE coalesce(a, '') <> 'x'", 1),
    ("SELECT polite(s) FROM t WHERE polite(s) LIKE 'A%'", 1),
    ("SELECT a FROM asked(10)", 1),
    ("SELECT chat(s), judge(s), upper(coalesce(judge(s), '')) FROM t WHERE g = 2", 2),
    ("SELECT max(chat(s)), min(judge(s)) FROM t", 2),
    ("SELECT judge(s) FROM t WHERE chat(s) LIKE 'A%'", 2),
    ("SELECT judge(s) FROM t WHERE chat(s) LIKE 'A%' AND NOT (g = 3 AND chat(s) = 'x')", 2),
    ("SELECT judge(a) FROM answers WHERE i < 100", 2),
    ("SELECT chat(judge(s)) FROM t", 2),
    ("WITH x AS (SELECT chat(s) AS a FROM t) SELECT judge('is it: ' || a) FROM x WHERE a LIKE 'A%'", 2),
    ("SELECT chat(s) FROM t UNION ALL SELECT judge(v) FROM k", 2),
    ("SELECT chat(s || current_date) FROM t", 1),
    ("SELECT chat(x) FROM unnest(['a', 'b']) u(x)", 1),
    ("VALUES (chat('a')), (chat('b'))", 2),
    ("SELECT avg(length(chat(s))) FROM t", 1),
    ("SELECT g, string_agg(chat(s), ' '), sum(i), count(*) FROM t GROUP BY 1 ORDER BY 3", 1),
    ("SELECT g, avg(length(polite(s))) FROM t GROUP BY ALL ORDER BY 2 LIMIT 3", 1),
    ("SELECT g, avg(length(chat(s))) AS a FROM t GROUP BY g HAVING a > 3", 1),
    ("SELECT g, avg(length(chat(s))) FROM t GROUP BY g HAVING avg(length(chat(s))) > 3", 1),
    ("SELECT * FROM (SELECT g, avg(length(chat(s))) AS a FROM t GROUP BY g) WHERE a > 3", 1),
    ("SELECT g, a FROM (SELECT g, avg(length(chat(s))) AS a FROM t GROUP BY g) ORDER BY a LIMIT 2", 1),
    ("SELECT chat(s), row_number() OVER (), sum(i) OVER () FROM t", 1),
    ("SELECT chat(string_agg(s, ' ' ORDER BY i)) FROM t GROUP BY g", 1),
    ("SELECT chat(max(s) || count(*)) FROM t GROUP BY g", 1),
    ("SELECT chat(s || rank() OVER (ORDER BY g)) FROM t", 1),
    ("SELECT chat(s), count(*) FROM t GROUP BY 1 LIMIT 5", 1),
    ("SELECT g, count(chat(s)) FROM t GROUP BY g ORDER BY g LIMIT 5", 1),
    ("SELECT g, avg(length(chat(s))) FROM t GROUP BY g LIMIT 5", 1),
    ("WITH x AS (SELECT chat(s) AS a FROM t) SELECT a, count(*) FROM x GROUP BY a LIMIT 5", 1),
]

WASTE = [
    # nothing to ask
    "SELECT s, 'chat(s)' AS \"chat(s)\" FROM t WHERE s <> 'chat__udf12('",
    "SELECT i FROM t",
    "SELECT chat(s) FROM t WHERE false",
    # looking for what NULL never is
    "SELECT i FROM t WHERE chat(s) LIKE 'A%' LIMIT 5",
    "WITH c AS (SELECT i FROM t WHERE chat(s) LIKE 'A%') SELECT * FROM (FROM c LIMIT 5)",
    "SELECT * FROM (SELECT chat(s) AS a, i FROM t) WHERE a LIKE 'A%' LIMIT 5",
    "SELECT z FROM named WHERE y LIKE 'A%' LIMIT 5",
    "SELECT i FROM t WHERE chat(s) LIKE 'A%' ORDER BY i LIMIT 5",
    "SELECT t.i FROM t JOIN k ON chat(t.s) = 'B' || k.v LIMIT 1",
    "SELECT t.i FROM (SELECT i, chat(s) AS v FROM t) t JOIN k USING (v) LIMIT 1",
    "SELECT DISTINCT chat(s) FROM t LIMIT 2",
    "SELECT chat(s) FROM t INTERSECT SELECT 'B' || v FROM k LIMIT 1",
    "SELECT EXISTS (FROM answers WHERE a = 'As1')",
    "SELECT i FROM t QUALIFY row_number() OVER (PARTITION BY chat(s)) = 1 LIMIT 3",
    # two runs see other arguments
    "SELECT chat(s || random()) FROM t",
    "SELECT random() AS i, chat(s) FROM t",
    "SELECT chat(uuid()::VARCHAR) FROM t",
    "SELECT chat(s || now()) FROM t",
    "SELECT chat(s || current_timestamp) FROM t",
    "SELECT chat(s || nextval('ids')) FROM t",
    "SELECT chat(s || dice()) FROM t",
    "SELECT chat(r::VARCHAR) FROM drawn",
    "SELECT chat(s || current_localtimestamp()) FROM t",
    "SELECT chat(s || current_localtime()) FROM t",
    "SELECT chat(s || txid_current()) FROM t",
    # threads give rows in another order each time
    "SELECT g, chat(string_agg(s, ' ')) FROM t GROUP BY g",
    "SELECT chat(list(s)::VARCHAR) FROM t GROUP BY g",
    "SELECT chat(any_value(s)) FROM t GROUP BY g",
    "SELECT chat('mean ' || avg(i)) FROM t GROUP BY g",
    "SELECT chat(json_group_array(s)::VARCHAR) FROM t",
    "SELECT chat(arg_max(s, g)) FROM t",
    "SELECT chat(joined(s)) FROM t GROUP BY g",
    "SELECT chat(a) FROM (SELECT string_agg(s, ' ') AS a FROM t GROUP BY g)",
    "SELECT chat(a) FROM (SELECT string_agg(s, ' ') FROM t GROUP BY g) u(a)",
    "SELECT chat(first(s)) FROM t",
    'SELECT chat("avg(i)"::VARCHAR) FROM (SELECT avg(i) FROM t)',
    "SELECT chat(s) FROM (SELECT * REPLACE (string_agg(s, ' ') OVER () AS s) FROM t)",
    "SELECT chat(b) FROM (SELECT * RENAME (a AS b) FROM (SELECT string_agg(s, ' ') AS a FROM t))",
    "SELECT chat(b) FROM (SELECT x.* FROM (SELECT first({'b': s}) AS x FROM t))",
    "SELECT chat(b) FROM (SELECT unnest(x) FROM (SELECT first({'b': s}) AS x FROM t))",
    "SELECT chat(s) FROM (SELECT t.s FROM t NATURAL JOIN (SELECT first(i) AS i FROM k))",
    "SELECT chat(a) FROM (SELECT '' AS a UNION ALL SELECT list(s)::VARCHAR FROM t)",
    "SELECT chat(v) FROM joint",
    "SELECT chat(to_json(u)::VARCHAR) FROM (SELECT list(s) AS a FROM t) u",
    "WITH x AS (SELECT sum(i) AS n, g FROM t GROUP BY g) SELECT chat('n = ' || n) FROM x",
    "SELECT chat(x) FROM unnest((SELECT list(s) FROM t)) u(x)",
    "SELECT list_transform(list(s), lambda x: chat(x)) FROM t",
    "SELECT polite((SELECT list(s) FROM t)::VARCHAR) FROM k",
    "SELECT chat(s || row_number() OVER (ORDER BY g)) FROM t",
    "SELECT chat(s || sum(i) OVER (ORDER BY g)) FROM t",
    "SELECT chat(s || count(*) OVER (ORDER BY g ROWS 3 PRECEDING)) FROM t",
    "SELECT chat(s) FROM t QUALIFY row_number() OVER (PARTITION BY g ORDER BY i % 7) = 1",
    "SELECT chat(s) FROM (SELECT s, row_number() OVER (PARTITION BY g) AS rn FROM t) WHERE rn = 1",
    "SELECT list(chat(s)) FROM (SELECT s, row_number() OVER () AS rn FROM t) WHERE rn < 9",
    "SELECT chat(s) FROM t WHERE i > (SELECT avg(i) FROM t)",
    "SELECT chat(min(s)) FROM t GROUP BY g HAVING avg(i) > 3",
    "SELECT chat(s) FROM t JOIN (SELECT max(i) AS m, list(i) AS l FROM k) ON l[1] = t.i",
    "SELECT t.i FROM t JOIN (SELECT first(i) AS i FROM k) USING (i) WHERE chat(s) LIKE 'A%'",
    "SELECT CASE WHEN i > avg(i) OVER () THEN chat(s) END FROM t",
    "SELECT chat(min(s)) FROM t GROUP BY g ORDER BY avg(i) LIMIT 2",
    "SELECT avg(i), chat(min(s)) FROM t GROUP BY g ORDER BY 1 LIMIT 2",
    "SELECT i, chat(s) AS a FROM t ORDER BY i LIMIT 3 OFFSET 2",
    "SELECT chat(t.s), judge(k.v) FROM t JOIN k ON t.i = k.i ORDER BY k.v LIMIT 7",
    "SELECT a FROM answers ORDER BY i LIMIT 3",
    "SELECT chat(s) AS s FROM t GROUP BY s LIMIT 3",
    "SELECT chat(s) FROM (SELECT s FROM t GROUP BY s) LIMIT 5",
    "SELECT chat(s) FROM (SELECT DISTINCT ON (g) s FROM t)",
    "SELECT chat(s) FROM (SELECT DISTINCT ON (g) * FROM t)",
    "SELECT chat(min(s)) FROM (SELECT mode(g) AS m, s FROM t GROUP BY s) GROUP BY m",
    "SELECT chat(s) FROM t USING SAMPLE 10",
    "SELECT chat(s) FROM t TABLESAMPLE 10%",
    # NULL for one answer makes another call
    "SELECT coalesce(chat(s), judge(s)) FROM t",
    "SELECT either(chat(s), s) FROM t",
    "SELECT chat(s), coalesce(chat(s), judge(s), '') IS NULL FROM t",
    "SELECT CASE WHEN chat(s) = 'x' THEN NULL ELSE judge(s) END FROM t",
    "SELECT CASE WHEN a = 'x' THEN NULL ELSE judge(s) END FROM answers",
    "SELECT judge(s) FROM t WHERE chat(s) IS NULL",
    "SELECT judge(s) FROM answers WHERE coalesce(a, '') <> 'x'",
    "SELECT i FROM t WHERE chat(s) LIKE 'A%' OR judge(s) LIKE 'A%'",
    "SELECT judge(concat('about: ', chat(s))) FROM t",
    "SELECT judge(concat('about: ', a)) FROM answers",
    "SELECT judge(to_json(answers)::VARCHAR) FROM answers",
    "SELECT judge(list(a)::VARCHAR) FROM answers GROUP BY i % 3",
    "SELECT judge('n = ' || n) FROM (SELECT count(*) AS n FROM t WHERE chat(s) LIKE 'A%')",
    "SELECT judge(max(s)) FROM t GROUP BY chat(s)",
    "SELECT judge(t.s) FROM t LEFT JOIN k ON chat(t.s) = k.v WHERE k.v IS NULL",
    "SELECT judge(s) FROM t WHERE s NOT IN (SELECT v FROM k WHERE chat(v) LIKE 'A%')",
    "SELECT judge(s) FROM t ORDER BY chat(s) LIMIT 3",
    "SELECT list_transform([chat(s)], lambda x: judge(coalesce(x, ''))) FROM t",
    "WITH RECURSIVE r AS (SELECT 's1' AS s UNION ALL SELECT chat(s) FROM r WHERE length(s) < 5) FROM r",
    # not a query that can be run by itself
    "UPDATE t SET s = chat(s)",
    "DELETE FROM t WHERE chat(s) = 'x'",
    "MERGE INTO k USING t ON k.i = t.i WHEN MATCHED THEN UPDATE SET v = chat(t.s)",
    "EXPLAIN SELECT chat(s) FROM t",
    "SUMMARIZE SELECT chat(s) FROM t",
    "PREPARE p AS SELECT chat(s) FROM t",
    "CREATE VIEW w AS SELECT chat(s) FROM t",
    "CREATE MACRO w(x) AS chat(x)",
    "SELECT chat(s) FROM t; SELECT 1",
    "SELECT chat(s) FROM query('FROM t')",
    "PIVOT t ON g USING first(chat(s))",
    # DuckDB will refuse them
    "SELECT chat(nope) FROM t",
    "SELEC chat(s) FROM t",
    "CREATE TABLE k AS SELECT chat(s) FROM t",
    "CREATE TABLE IF NOT EXISTS k AS SELECT chat(s) AS a FROM t",
    "CREATE TABLE new AS SELECT chat(s) FROM t WITH NO DATA",
    "INSERT INTO nope SELECT chat(s) FROM t",
    "INSERT INTO k SELECT chat(s) FROM t",
    "INSERT INTO k VALUES (DEFAULT, chat('a'))",
    "INSERT INTO k DEFAULT VALUES",
]


@pytest.mark.parametrize(("query", "calls"), WORTH)
def test_queries_worth_it(con, query, calls):
    """A query whose rows do not hang on the answers is run ahead as it is, with its different calls counted."""
    assert planned(con, query) == Probe(query, calls)


@pytest.mark.parametrize("query", WASTE)
def test_queries_not_worth_it(con, query):
    """What would ask for nothing, ask in vain, or not be what the user's statement asks, is not run ahead."""
    assert planned(con, query) is None


@pytest.mark.parametrize("query", [query for query, _ in WORTH])
def test_a_probe_asks_for_nothing_else(world, query):
    """With NULL for every answer, a probe asks only what the query itself asks, and at least something."""
    con, models = world
    real = models.asked_by(con, query, answering=True)
    ahead = models.asked_by(con, query, answering=False)
    assert ahead
    assert ahead <= real


@pytest.mark.parametrize(
    ("statement", "query"),
    [
        ("CREATE TABLE new AS SELECT chat(s) AS a FROM t", "SELECT chat(s) AS a FROM t"),
        ("create or replace temp table k as (from t select chat(s)) with data", "(from t select chat(s))"),
        ('CREATE TABLE IF NOT EXISTS "as" AS /* as */ WITH x AS (FROM t) SELECT chat(s) AS a FROM x;', None),
        ("INSERT INTO k (v) SELECT chat(s) FROM t RETURNING v", "SELECT chat(s) FROM t"),
        ("INSERT INTO main.k AS kk SELECT i, chat(s) FROM t WHERE i = ?", "SELECT i, chat(s) FROM t WHERE i = ?"),
        ("INSERT INTO k BY NAME (SELECT chat(s) AS v FROM t)", "(SELECT chat(s) AS v FROM t)"),
        ("INSERT INTO k VALUES (1, chat('a;b')), (2, chat('c'))", "VALUES (1, chat('a;b')), (2, chat('c'))"),
        ("COPY (SELECT chat(s) FROM t) TO 'out.csv' (HEADER)", "SELECT chat(s) FROM t"),
    ],
)
def test_the_query_inside(con, statement, query):
    """CREATE TABLE AS, INSERT and COPY give their query, to the letter."""
    found = planned(con, statement, [3] if "?" in statement else None)
    assert found is not None
    assert found.query == (query or "WITH x AS (FROM t) SELECT chat(s) AS a FROM x")


def test_parameters_are_passed_on(con):
    """Placeholders take the statement's values; one outside the query leaves it without a probe."""
    assert planned(con, "SELECT chat(s || ?) FROM t WHERE i < ?", ["x", 3])
    assert planned(con, "SELECT chat(s || $x) FROM t", {"x": "x"})
    assert planned(con, "SELECT chat(s) FROM t WHERE i = ?", []) is None
    con.execute("CREATE OR REPLACE TABLE one (i INT PRIMARY KEY, v VARCHAR)")
    insert = "INSERT INTO one SELECT i, chat(s) FROM t ON CONFLICT DO UPDATE SET v = ?"
    assert planned(con, insert, ["x"]) is None
    assert planned(con, insert.replace("?", "'x'"))


def test_an_open_transaction_is_left_alone(con):
    """An error in a probe would abort the user's transaction, so there is none inside; an aborted one stays so."""
    with con.cursor() as cursor:
        cursor.execute("BEGIN")
        assert plan(cursor, "SELECT chat__udf12(s) FROM t", None, is_model) is None
        assert plan(cursor, "SELECT chat__udf12(nope) FROM t", None, is_model) is None
        assert cursor.execute("SELECT 1").fetchone() == (1,)
        with pytest.raises(duckdb.Error):
            cursor.execute("SELECT error('x')")
        assert plan(cursor, "SELECT chat__udf12(s) FROM t", None, is_model) is None
        cursor.execute("ROLLBACK")
        assert plan(cursor, "SELECT chat__udf12(s) FROM t", None, is_model)


def test_files_and_frames_are_read_twice(con, tmp_path):
    """Files, data frames and Arrow tables can be read again, whether registered or in a variable."""
    frame = pd.DataFrame({"s": ["a", "b"]})
    rows = pa.table({"s": ["a", "b"]})
    con.register("registered_frame", frame)
    con.register("registered_table", rows)
    con.execute(f"COPY t TO '{tmp_path}/rows.parquet'; COPY t TO '{tmp_path}/rows.csv'")
    for source in (
        "frame",
        "rows",
        "registered_frame",
        "registered_table",
        f"'{tmp_path}/rows.parquet'",
        f"read_csv(['{tmp_path}/rows.csv'], header = true)",
    ):
        assert planned(con, f"SELECT chat(s) FROM {source}"), source
    del frame, rows


def test_what_flows_is_read_once(con, tmp_path):
    """A reader, a stream, a pipe or a URL is never read ahead, and planning takes nothing from it."""
    rows = pa.table({"s": ["a", "b"]})

    def reader() -> pa.RecordBatchReader:
        return pa.RecordBatchReader.from_batches(rows.schema, (batch for batch in rows.to_batches()))

    class Stream:
        def __init__(self) -> None:
            self.reader = reader()

        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            return self.reader.__arrow_c_stream__(requested_schema)

    variable, stream, capsule, relation = reader(), Stream(), rows.__arrow_c_stream__(), con.from_arrow(reader())
    con.register("registered_reader", reader())
    con.execute("CREATE OR REPLACE TEMP VIEW behind AS SELECT * FROM registered_reader")
    for source in ("variable", "stream", "capsule", "relation", "registered_reader"):
        assert planned(con, f"SELECT chat(s) FROM {source}") is None
        assert planned(con, f"SELECT chat(v) FROM k WHERE v IN (SELECT s FROM {source})") is None
    assert planned(con, "SELECT chat(s) FROM behind") is None
    for source in ("variable", "stream", "capsule", "relation", "behind"):
        assert len(con.execute(f"FROM {source}").fetchall()) == 2, source
    os.mkfifo(tmp_path / "pipe")  # opening it would block
    for source in (f"'{tmp_path}/pipe'", f"read_csv('{tmp_path}/pipe')", "read_csv('/dev/stdin')"):
        assert planned(con, f"SELECT chat(s) FROM {source}") is None
    assert planned(con, "SELECT chat(s) FROM read_json('https://localhost:1/rows.json')") is None
    assert planned(con, "SELECT chat(s) FROM read_csv(?)", ["/dev/stdin"]) is None
    del variable, stream, capsule, relation


def test_a_relation_may_hold_anything(con):
    """A relation in a variable is a query that cannot be seen into."""
    relation = con.sql("SELECT chat(s) AS s FROM t")
    assert planned(con, "SELECT chat(s) FROM relation") is None
    del relation


def test_functions_of_the_users(con):
    """What a Python function of the user's does beside answering is not known, so it runs once."""
    for name, side_effects in (("clean", False), ("counted", True)):
        con.create_function(name, lambda text: text, ["VARCHAR"], "VARCHAR", side_effects=side_effects)
        assert planned(con, f"SELECT chat({name}(s)) FROM t") is None
        assert planned(con, f"SELECT chat(s), {name}(s) AS n FROM t") is None
    assert planned(con, "SELECT chat__udf12(s) FROM t")


def test_a_stream_behind_a_name_of_the_query(con):
    """A CTE or a view in another schema with the name of a stream hides nothing."""
    rows = pa.table({"s": ["a", "b"]})
    variable, other = (pa.RecordBatchReader.from_batches(rows.schema, iter(rows.to_batches())) for _ in range(2))
    con.register("enlisted", pa.RecordBatchReader.from_batches(rows.schema, iter(rows.to_batches())))
    con.execute("CREATE SCHEMA far; CREATE VIEW far.other AS SELECT s FROM t")
    for name in ("variable", "enlisted", "other"):
        assert planned(con, f"WITH {name} AS (FROM {name}) SELECT chat(s) FROM {name}") is None
        assert planned(con, f"WITH x AS (FROM {name}), {name} AS (FROM x) SELECT chat(s) FROM {name}") is None
    assert planned(con, "SELECT chat(s) FROM other") is None
    assert planned(con, "SELECT chat(s) FROM far.other")
    assert planned(con, "WITH variable AS (FROM t) SELECT chat(s) FROM variable")
    for name in ("variable", "enlisted", "other"):
        assert len(con.execute(f"FROM {name}").fetchall()) == 2
    del variable, other


def test_all_definitions_of_a_name_count(con):
    """Views of several schemas with the same name are all looked at."""
    con.execute("CREATE SEQUENCE more; CREATE SCHEMA one_side; CREATE SCHEMA other_side; CREATE SCHEMA third_side")
    for schema, number in (("one_side", "1"), ("other_side", "nextval('more')"), ("third_side", "1")):
        con.execute(f"CREATE VIEW {schema}.twin AS SELECT {number} AS n, s FROM t")
        assert (planned(con, f"SELECT n, chat(s) FROM {schema}.twin") is None) == (schema != "one_side")


def test_a_limit_without_an_order(con):
    """Rows that DuckDB may give in any order are not the same twice under a LIMIT."""
    for query, kept, free in (
        ("SELECT chat(s) FROM t LIMIT 5", True, False),
        ("SELECT s FROM t ORDER BY chat(s) LIMIT 5", True, True),
        ("SELECT chat(s) FROM t", True, True),
    ):
        assert (planned(con, query) is not None) == kept
        con.execute("SET preserve_insertion_order = false")
        assert (planned(con, query) is not None) == free
        con.execute("RESET preserve_insertion_order")
