"""How statements that ask models end: errors, budgets and time, as a user's program meets them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import duckdb
import pyarrow as pa
import pytest
from scripted import ScriptedPool

import sqlext
from runtime.errors import Fatal
from runtime.gateway import Gateway


@pytest.fixture
def asked() -> Iterator[tuple[sqlext.Connection, ScriptedPool]]:
    """A connection with the model `chat`, which answers in capitals; no Ray."""
    pool = ScriptedPool()
    with sqlext.connect() as con:
        con.session.functions.put("chat", Gateway(pool, con.session.store))
        con.execute("CREATE TABLE t AS SELECT i, 's' || i AS s FROM range(5000) r(i)")
        yield con, pool


def test_a_query_that_fails_for_a_row_is_not_run_again(asked):
    """What it did before the error is done once, and the error is DuckDB's own."""
    con, _ = asked
    mails = []

    def send_mail(text: str) -> str:
        mails.append(text)
        return text

    con.create_function("send_mail", send_mail, ["VARCHAR"], "VARCHAR", side_effects=True)
    with pytest.raises(duckdb.Error, match="stop"):
        con.execute(
            "CREATE TABLE o AS SELECT send_mail(s), CASE WHEN i = 4000 THEN error('stop') END FROM t "
            "WHERE chat(s) <> 'q' AND i > 10"
        )
    assert mails
    assert len(mails) == len(set(mails))


def test_an_error_before_anything_is_done_shows_the_text_as_it_was_typed(asked):
    """The place of a binder error is that of the user's own text."""
    con, _ = asked
    with pytest.raises(duckdb.BinderException, match=r"(?s)WHERE i % 5 = 0 AND chat\(s\) LIKE 'A%' AND nobody = 1"):
        con.execute("SELECT i FROM t WHERE i % 5 = 0 AND chat(s) LIKE 'A%' AND nobody = 1")


def test_time_after_the_last_answer_is_the_user_s_own(asked):
    """session.max_seconds counts what statements wait for models, not a result that is read later."""
    con, _ = asked
    con.execute('!llm setup "session.max_seconds=0.5"')
    assert con.execute("SELECT chat('a')").fetchone() == ("A",)
    time.sleep(0.6)
    assert con.execute("SELECT chat('b')").fetchall() == [("B",)]


def test_max_seconds_ends_a_statement_that_hangs():
    """It stops with one error that names the setting; the session goes on."""
    release = threading.Event()
    pool = ScriptedPool(lambda batch: release.wait(20) if "slow" in batch.prompts else None)
    with sqlext.connect() as con:
        con.session.functions.put("chat", Gateway(pool, con.session.store))
        con.execute('!llm setup "max_seconds=0.2"')
        with pytest.raises(Fatal, match=r"max_seconds=0\.2"):
            con.execute("SELECT chat('slow')").fetchall()
        release.set()
        assert con.execute("SELECT chat('fast')").fetchall() == [("FAST",)]


def test_relations_are_under_the_session_s_budget_too(asked):
    """A query that DuckDB runs without us stops at the same bound."""
    con, pool = asked
    con.execute('!llm setup "session.max_rows=3"')
    with pytest.raises(duckdb.Error, match=r"session\.max_rows=3"):
        con.table("t").project("chat(s) AS c").fetchall()
    assert len(pool.prompts) == 3


def test_a_one_shot_reader_is_read_once(asked):
    """The run ahead does not use up a stream."""
    con, _ = asked
    reader = pa.table({"s": ["a", "b"]}).to_reader()  # noqa: F841 - found by its name
    assert sorted(con.execute("SELECT chat(s) FROM reader").fetchall()) == [("A",), ("B",)]
