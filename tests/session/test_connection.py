"""`sqlext.connect()` is a DuckDB connection that also speaks the language; no model is needed for any of this."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import duckdb
import pandas as pd
import pyarrow as pa
import pytest

import sqlext
from runtime.errors import SqlSyntaxError, UserError


@pytest.fixture
def db() -> Iterator[sqlext.Connection]:
    with sqlext.connect() as connection:
        yield connection


def test_results_in_every_form(db):
    """execute, sql, df, arrow, fetch…: as DuckDB's own connection gives them."""
    assert db.execute("SELECT 1, 'a'").fetchall() == [(1, "a")]
    assert db.execute("SELECT 1 AS x").df().to_dict("list") == {"x": [1]}
    assert db.execute("SELECT 1 AS x").arrow().to_pylist() == [{"x": 1}]
    assert db.sql("SELECT 1 AS x").df()["x"].tolist() == [1]
    assert db.sql("SELECT 2 AS x").fetchall() == [(2,)]
    assert db.sql("CREATE TABLE t (i INT)") is None
    assert db.execute("FROM range(3)").fetchmany(2) == [(0,), (1,)]
    assert [column[0] for column in db.execute("SELECT 1 AS x").description] == ["x"]


def test_parameters_belong_to_the_last_statement(db):
    """Placeholders work as in DuckDB, also behind other statements of a script."""
    assert db.execute("SELECT ? + 1", [41]).fetchone() == (42,)
    assert db.execute("CREATE TABLE t AS SELECT 1 AS i; SELECT i + $x FROM t", {"x": 1}).fetchone() == (2,)
    db.executemany("INSERT INTO t VALUES (?)", [[2], [3]])
    assert db.execute("SELECT sum(i) FROM t").fetchone() == (6,)


def test_data_frames_in_variables_are_tables(db):
    """A pandas frame or Arrow table in a local or global variable can be queried by its name."""
    frame = pd.DataFrame({"a": [1, 2]})
    arrow = pa.table({"b": [3]})
    assert db.execute("SELECT sum(a) FROM frame").fetchone() == (3,)
    assert db.sql("SELECT b FROM arrow").fetchall() == [(3,)]
    del frame, arrow


def test_attach_adds_the_language_to_a_connection():
    """An existing connection stays usable by itself and shares its tables."""
    raw = duckdb.connect()
    raw.execute("CREATE TABLE t AS SELECT 7 AS i")
    with sqlext.attach(raw) as con:
        con.execute("SET column='i'")
        assert con.execute("SELECT ${column} FROM t").fetchone() == (7,)
    assert raw.execute("FROM t").fetchone() == (7,)
    raw.close()


def test_cursors_share_the_session(db):
    """Variables and settings are the session's; results are the cursor's own, also across threads."""
    db.execute("SET x='5'; CREATE TABLE t AS FROM range(10)")
    seen = []

    def run() -> None:
        with db.cursor() as cursor:
            seen.append(cursor.execute("SELECT ${x} + count(*) FROM t").fetchone()[0])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [15] * 4


def test_duckdbs_errors_are_duckdbs(db):
    """A mistake in plain SQL raises what DuckDB raises."""
    with pytest.raises(duckdb.CatalogException, match="nope"):
        db.execute("SELECT * FROM nope")
    with pytest.raises(duckdb.ParserException):
        db.execute("SELEC 1")
    with pytest.raises(duckdb.BinderException):
        db.execute("SELECT x FROM range(1) t(i)")


def test_transactions_are_the_users(db):
    """BEGIN, an error and ROLLBACK behave as without us; functions survive a rollback."""
    db.execute("CREATE TABLE t (i INT); BEGIN; INSERT INTO t VALUES (1)")
    with pytest.raises(duckdb.Error):
        db.execute("SELECT * FROM nope")
    with pytest.raises(duckdb.TransactionException):
        db.execute("SELECT 1")
    db.execute("ROLLBACK")
    assert db.execute("SELECT count(*) FROM t").fetchone() == (0,)
    assert db.execute("SELECT llm_prompt('{0}', ['x'])").fetchone() == ("x",)


@pytest.mark.parametrize(
    ("script", "rows"),
    [
        ("SET a='1'; SELECT ${a} + 1", [(2,)]),
        ("SET a='x'; SET b='${a}y'; SELECT '${b}'", [("xy",)]),
        ("SELECT '${unknown}'", [("${unknown}",)]),
        ("SET n='SELECT 6 * 7' WHERE type=\"sql\"; SELECT ${n}", [(42,)]),
        ("SET a='1'; SET a='2' WHERE type=\"defaultParam\"; SELECT ${a}", [(1,)]),
        ("SET threads=3; SELECT current_setting('threads')", [(3,)]),
        ("SET VARIABLE v = 5; SELECT getvariable('v')", [(5,)]),
        ("SET a='''it''s '''; SELECT length($$${a}$$)", [(6,)]),
        ("select 1 as q as q1; select q from q1", [(1,)]),
        ("select i as a from range(3) t(i) as named; select count(*) from named", [(3,)]),
        ("create table t as select 1 as i; from t as u; select count(*) from u", [(1,)]),
        ("select 'no ; split' as a -- ; here\n; select 2", [(2,)]),
    ],
)
def test_scripts(db, script, rows):
    """Variables, settings and named results, as a script uses them."""
    assert db.execute(script).fetchall() == rows


def test_an_alias_never_hides_a_table(db):
    """`… FROM x AS t` is DuckDB's alias; a table t of the user's stays what it is."""
    db.execute("CREATE TABLE orders AS SELECT 1 AS i; SELECT 2 AS i FROM range(5) AS orders")
    assert db.execute("SELECT i FROM orders").fetchall() == [(1,)]


def test_spark_dialect(db):
    """SET dialect='spark' translates what follows."""
    db.execute("SET dialect='spark'")
    assert db.execute('select map("k", "v")["k"], size(array(1, 2))').fetchone() == ("v", 2)
    db.execute("SET dialect='duckdb'")
    with pytest.raises(UserError, match="spark"):
        db.execute("SET dialect='sparc'")


def test_load_and_save(db, tmp_path):
    """LOAD reads json, csv, parquet, text and JSON in variables; SAVE writes and minds what is there."""
    db.execute(f"""
        CREATE TABLE t AS SELECT i, 'row ' || i AS s FROM range(5) r(i);
        SAVE overwrite t AS json.`{tmp_path}/t.json`;
        SAVE t AS csv.`{tmp_path}/t.csv` WHERE header="true";
        SAVE t AS parquet.`{tmp_path}/t.parquet`;
        LOAD json.`{tmp_path}/t.json` WHERE inferSchema="true" AS from_json;
        LOAD csv.`{tmp_path}/t.csv` AS from_csv;
        LOAD parquet.`file://{tmp_path}/t.parquet` AS from_parquet;
    """)
    for name in ("from_json", "from_csv", "from_parquet"):
        assert db.execute(f"SELECT sum(i), min(s) FROM {name}").fetchone() == (10, "row 0")
    (tmp_path / "a.txt").write_text('one\ntwo, "three"\n')
    db.execute(f'LOAD text.`{tmp_path}/*.txt` AS lines; LOAD text.`{tmp_path}/*.txt` WHERE wholetext="true" AS whole')
    assert db.execute("SELECT value FROM lines").fetchall() == [("one",), ('two, "three"',)]
    assert db.execute("SELECT value, file LIKE '%a.txt' FROM whole").fetchall() == [('one\ntwo, "three"\n', True)]
    db.execute("""SET rows='''{"a": 1}\n{"a": 2}'''; LOAD jsonStr.`rows` AS inline""")
    assert db.execute("SELECT sum(a) FROM inline").fetchone() == (3,)
    with pytest.raises(UserError, match="exists already"):
        db.execute(f"SAVE t AS parquet.`{tmp_path}/t.parquet`")
    db.execute(f"SAVE ignore t AS parquet.`{tmp_path}/t.parquet`")
    db.execute(f"SAVE append t AS parquet.`{tmp_path}/many`; SAVE append t AS parquet.`{tmp_path}/many`")
    assert db.execute(f"SELECT count(*) FROM '{tmp_path}/many/*.parquet'").fetchone() == (10,)
    with pytest.raises(UserError, match="parquet"):
        db.execute(f"LOAD parket.`{tmp_path}/t.parquet` AS x")


def test_syntax_errors_have_a_place(db):
    """A statement of ours that does not parse names line, column and the nearest word."""
    with pytest.raises(SqlSyntaxError) as caught:
        db.execute("SELECT 1;\n\nRUN command AS LLM.`` WHERE action=;")
    assert caught.value.place.line == 3
    assert "^" in str(caught.value)


def test_statements_before_an_error_are_done(db):
    """A script stops at its first error; what came before it stays."""
    with pytest.raises(duckdb.Error):
        db.execute("CREATE TABLE t (i INT); SELECT * FROM nope; CREATE TABLE u (i INT)")
    assert [name for (name,) in db.execute("SHOW TABLES").fetchall() if not name.startswith("llm_")] == ["t"]


def test_an_unread_result_blocks_nothing(db):
    """What nobody has read yet stands in the way of no later statement, ours or DuckDB's."""
    for unread in ("FROM range(100000)", "!llm help"):
        db.execute(unread)
        db.execute("SET rows='{\"a\": 1}'; LOAD jsonStr.`rows` AS inline; SELECT a FROM inline")
        db.execute(unread)
        db.execute("CREATE OR REPLACE TABLE t AS SELECT 1 AS i")
        db.execute(unread)
        assert db.sql("FROM t").fetchall() == [(1,)]


def test_a_users_table_never_stands_in_for_our_results(db):
    """Whatever a table is called, our statements show their own rows, also without replacement scans."""
    db.execute('CREATE TABLE "table" AS SELECT 1 AS mine; CREATE TABLE rows AS SELECT 1 AS mine')
    db.execute("CREATE TABLE sqlext_own_result AS SELECT 1 AS mine; SET python_enable_replacements=false")
    assert "name" in db.execute("!llm help").df()
    db.execute("SET rows='{\"a\": 1}'; LOAD jsonStr.`rows` AS inline")
    assert db.execute("FROM inline").fetchall() == [(1,)]


def test_attach_uses_the_connection_itself():
    """Temporary tables and an open transaction are seen; the connection stays open and has our macros."""
    raw = duckdb.connect()
    raw.execute("CREATE TEMP TABLE t AS SELECT 1 AS i; BEGIN; INSERT INTO t VALUES (2)")
    con = sqlext.attach(raw)
    assert con.execute("SELECT count(*) FROM t").fetchone() == (2,)
    con.rollback()
    assert con.execute("SELECT count(*), llm_prompt('{0}', ['x']) FROM t").fetchone() == (1, "x")
    con.close()
    assert raw.execute("SELECT count(*) FROM t").fetchone() == (1,)
    raw.close()


def test_two_connections_to_one_file(tmp_path):
    """A program may connect to the same file twice, each with a session of its own."""
    with sqlext.connect(tmp_path / "a.duckdb") as one, sqlext.connect(tmp_path / "a.duckdb") as two:
        one.execute("CREATE TABLE t AS SELECT 1 AS i; SET x='one'")
        assert two.execute("SELECT i, '${x}', llm_prompt('{0}', ['p']) FROM t").fetchone() == (1, "${x}", "p")


def test_names_of_results_are_given_again_and_again(db, tmp_path):
    """LOAD … AS q; SELECT … FROM q AS q; and back: each replaces what had the name, as in Byzer."""
    (tmp_path / "a.json").write_text('{"i": 1}')
    load = f"LOAD json.`{tmp_path}/a.json` AS q;"
    for _ in range(2):
        db.execute(load)
        db.execute("select i + 1 as j from q where true as q; select j + 1 as k from q where true as q")
        assert db.execute("FROM q").fetchall() == [(3,)]


def test_errors_of_load_and_save_are_placed_and_show_no_sql_of_ours(db, tmp_path):
    """What cannot be read or written is told with its place in the script."""
    for script in (f"LOAD json.`{tmp_path}/none.json` AS x", f"SAVE nothing AS parquet.`{tmp_path}/x`"):
        with pytest.raises(UserError, match="line 2") as caught:
            db.execute(f"SELECT 1;\n{script}")
        assert "CREATE" not in str(caught.value)
        assert "COPY" not in str(caught.value)


def test_duckdbs_errors_say_which_statement(db):
    """An error of DuckDB's carries the place of its statement in the script."""
    with pytest.raises(duckdb.Error) as caught:
        db.execute("SELECT 1;\n\nSELECT * FROM nope")
    assert caught.value.__notes__ == ["in the statement at line 3, column 1"]


def test_help_and_settings_answer_as_tables(db):
    """!llm help lists actions and settings; a word narrows it; a wrong word names the nearest."""
    everything = db.execute("!llm help").df()
    assert {"infer", "num_workers"} <= set(everything["name"])
    assert db.execute('!llm help "num_workers"').df()["aliases"].tolist() == ["maxConcurrency"]
    with pytest.raises(UserError, match="num_workers"):
        db.execute('!llm help "num_wrkers"')


def test_interrupt_from_another_thread(db):
    """con.interrupt() stops a running query of DuckDB's own."""
    timer = threading.Timer(0.3, db.interrupt)
    timer.start()
    with pytest.raises((duckdb.InterruptException, sqlext.Cancelled)):
        db.execute("SELECT count(*) FROM range(100000000000) a, range(1000) b").fetchall()
    assert db.execute("SELECT 1").fetchone() == (1,)


def test_duckdb_draws_no_progress_bar_into_the_output_of_a_program(con):
    """Its bar goes to stdout, where a pipeline reads rows."""
    for each in (con, con.cursor()):
        assert each.execute("SELECT current_setting('enable_progress_bar_print')").fetchall() == [(False,)]
