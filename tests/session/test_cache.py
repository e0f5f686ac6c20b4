"""Stored answers as a person handles them: `!llm cache`, `llm_results`, `llm_calls`, and across sessions."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

import sqlext
from runtime.errors import UserError
from runtime.gateway import ResultStore, default_path

ECHO = "infer_backend=echo"
ASK = "SELECT count(say(x || '')) FROM (SELECT 'text ' || i AS x FROM range(100) r(i))"


@pytest.fixture
def say(con: sqlext.Connection, deploy: Callable[..., None]) -> None:
    """The model say, which answers with the prompt."""
    deploy("", "say", ECHO)


def last(con: sqlext.Connection) -> tuple[int, int]:
    """Calls and reused rows of the last statement that asked a model."""
    row = con.execute("SELECT calls, reused FROM llm_calls ORDER BY statement DESC LIMIT 1").fetchone()
    assert row is not None
    return row


def removed(con: sqlext.Connection, command: str) -> int:
    ((count,),) = con.execute(f"!llm cache {command}").fetchall()
    return int(count)


def test_answers_outlive_the_session(con: sqlext.Connection, say: None) -> None:
    """Another session on the same model finds every answer; its table tells model, number, size, times and file."""
    con.execute(ASK)
    before = datetime.now(UTC) - timedelta(seconds=60)
    with sqlext.connect() as other:
        other.execute("RUN command AS LLM.`` WHERE action='infer' AND udfName='say' AND reconnect='true'")
        assert other.execute(ASK).fetchall() == [(100,)]
        assert last(other) == (0, 100)
        (line,) = other.execute("!llm cache").arrow().to_pylist()
    assert (line["model"], line["results"], line["file"]) == ("say", 100, str(default_path()))
    assert 0 < line["mb"] < 1
    assert before < line["oldest"] <= line["newest"]


def test_clearing_is_seen_by_the_next_statement(
    con: sqlext.Connection, say: None, deploy: Callable[..., None]
) -> None:
    """Cleared answers are asked for again, also those in memory; a name clears its model only."""
    deploy("", "tell", ECHO, **{"backend.x": 1})
    con.execute(ASK)
    con.execute(ASK.replace("say", "tell"))
    assert removed(con, "clear SAY") == 100
    con.execute(ASK)
    assert last(con) == (100, 0)
    con.execute(ASK.replace("say", "tell"))
    assert last(con) == (0, 100)
    assert removed(con, "clear") == 200
    assert con.execute("!llm cache").fetchall() == []
    con.execute(ASK.replace("say", "tell"))
    assert last(con) == (100, 0)


def test_pruning_leaves_what_is_young(con: sqlext.Connection, say: None) -> None:
    """Only answers older than the age go, and their rows are asked again."""
    con.execute(ASK)
    with sqlite3.connect(default_path()) as file:
        file.execute("UPDATE blocks SET created = created - 3 * 86400")
    con.execute(ASK.replace("text", "newer"))
    assert removed(con, "prune 4d") == 0
    assert removed(con, 'prune "50 h"') == 100
    con.execute(ASK.replace("text", "newer"))
    assert last(con) == (0, 100)
    con.execute(ASK)
    assert last(con) == (100, 0)


@pytest.mark.parametrize("age", ["30", "d", "3y", "-3d", "1e3d", "3 d d", ""])
def test_an_age_that_is_none_is_refused(age: str) -> None:
    """Number and unit, or an error that says how to write it."""
    with sqlext.connect() as con, pytest.raises(UserError) as raised:
        con.execute(f'!llm cache prune "{age}"')
    assert raised.value.code == "option_value"
    assert "30d" in str(raised.value.hint)


def test_without_a_model_and_without_a_store() -> None:
    """All forms answer, and no file is made by looking."""
    with sqlext.connect() as con:
        assert con.execute("!llm cache").fetchall() == []
        assert (removed(con, "clear"), removed(con, "clear chat"), removed(con, "prune 1m")) == (0, 0, 0)
        assert con.execute("SELECT count(*) FROM llm_results").fetchall() == [(0,)]
        assert con.execute("SELECT * FROM llm_calls").fetchall() == []
        assert con.execute("SELECT * FROM llm_errors").fetchall() == []
        con.execute('!llm setup "cache=off"; !llm cache')
    assert not default_path().exists()


def test_the_store_is_a_table() -> None:
    """Texts and labels stand in one column, vectors in another."""
    store = ResultStore(default_path())
    store.put("chat", "f1", [(b"k" * 16, "text", "stop", 3, 4, 1.5)])
    store.put("clf", "f2", [(b"l" * 16, '["good", 0.9]', "stop", 3, 0, 2.5)])
    store.put("embed", "f3", [(b"v" * 16, b"\x00\x00\x80\x3f\x00\x00\x00\x40", "length", 8, 0, 3.5)])
    store.close()
    with sqlext.connect() as con:
        assert con.execute("SELECT * EXCLUDE (created) FROM llm_results ORDER BY model").fetchall() == [
            ("6b" * 16, "chat", "text", None, "stop", 3, 4, 1.5),
            ("6c" * 16, "clf", '["good", 0.9]', None, "stop", 3, 0, 2.5),
            ("76" * 16, "embed", None, [1.0, 2.0], "length", 8, 0, 3.5),
        ]
        age = con.execute(
            "SELECT typeof(created), max(now() - created) < INTERVAL 1 MINUTE FROM llm_results GROUP BY 1"
        )
        assert age.fetchall() == [("TIMESTAMP WITH TIME ZONE", True)]


def test_a_large_store_is_read_a_piece_at_a_time() -> None:
    """Reading 150 MB of answers takes less memory than they would, with all that is loaded besides."""
    script = (
        "import sqlext\n"
        "from runtime.gateway import ResultStore, default_path\n"
        "store = ResultStore(default_path())\n"
        "for n in range(150):\n"
        "    rows = [((n * 1000 + i).to_bytes(16, 'big'), 'x' * 1000, 'stop', 1, 1, 1.0) for i in range(1000)]\n"
        "    store.put('chat', 'f', rows)\n"
        "store.close()\n"
        "con = sqlext.connect()\n"
        "con.execute('SELECT count(*) FROM llm_results').fetchall()\n"
        "print(con.execute('SELECT sum(length(output)) FROM llm_results').fetchone()[0])\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(peak.split()[1]) // 1024)\n"
        "con.close()\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=os.environ)
    total, peak_mb = map(int, ran.stdout.split())
    assert total == 150_000_000
    assert peak_mb < 270


def test_failed_rows_are_never_stored(con: sqlext.Connection, deploy: Callable[..., None]) -> None:
    """What failed, and NULL, has no answer to keep; its neighbours have."""
    deploy("", "fake", "infer_backend=fake_engines:load")
    con.execute("SELECT fake(w) FROM (VALUES ('a'), ('row error'), (NULL)) t(w)").fetchall()
    assert con.execute("SELECT output FROM llm_results").fetchall() == [("A",)]


def test_figures_are_those_of_usage(con: sqlext.Connection, say: None) -> None:
    """llm_calls has all that !llm usage shows, and the query beside it, without its keys."""
    con.execute("SELECT say(x), 'sk-live-0123456789' FROM (VALUES ('ab'), ('c'), ('c')) t(x)").fetchall()
    shared = "statement, model, rows, calls, reused, errors, prompt_tokens, completion_tokens, seconds"
    rows = con.execute(f"SELECT {shared} FROM llm_calls").fetchall()
    assert con.execute("!llm usage").fetchall() == rows
    assert rows[0][1:8] == ("say", 3, 2, 1, 0, 3, 3)
    ((query, cut),) = con.execute("SELECT query, cut FROM llm_calls").fetchall()
    assert (query, cut) == ("SELECT say(x), '***' FROM (VALUES ('ab'), ('c'), ('c')) t(x)", 0)
