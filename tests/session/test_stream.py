"""con.stream: an answer piece by piece, as it is written."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import duckdb
import pytest
from scripted import ScriptedPool

import sqlext
from runtime.errors import Cancelled, ErrorInfo, Fatal, UserError, WorkerLost
from runtime.gateway import Gateway
from runtime.spec import Answers, Batch, Delta


class WritingPool(ScriptedPool):
    """Writes the words of the prompt in capitals, one by one; `go_on` is waited for before the last.

    `attempts` holds, for each attempt, the words it writes before its worker is lost; the attempt after them succeeds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spec = type(self.spec)("chat", "scripted", fingerprint="the same model")
        self.go_on = threading.Event()
        self.go_on.set()
        self.attempts: list[str] = []
        self.stopped = threading.Event()

    def run(self, worker: int, batch: Batch) -> Iterator[Answers | Delta]:
        self.batches.append((worker, list(batch.prompts)))
        lost = self.attempts.pop(0) if self.attempts else None
        for row, prompt in enumerate(batch.prompts):
            text = str(prompt).upper() if lost is None else lost
            words = text.split(" ")
            for number, word in enumerate(words[:-1]):
                if row in batch.stream:
                    yield Delta(row, word + " ")
                    assert number < 10
            self.go_on.wait(20)
            if lost is not None:
                yield Delta(row, words[-1])
                raise WorkerLost("It died.")
            if text == "BAD":
                yield Answers([row], [None], [""], [1], [0], 1.0, {row: ErrorInfo("bad_row", "It is bad.")})
            else:
                yield Answers([row], [text], ["stop"], [len(words)], [len(words)], 1.0)

    def cancel(self, worker: int, batch_id: int) -> None:
        self.stopped.set()
        self.go_on.set()


@pytest.fixture
def pool() -> WritingPool:
    return WritingPool()


@pytest.fixture
def con(pool: WritingPool) -> Iterator[sqlext.Connection]:
    with sqlext.connect() as connection:
        connection.session.functions.put("chat", Gateway(pool, connection.session.store))
        yield connection


def test_pieces_come_while_the_answer_is_written(con, pool):
    """The first ones are there before the last word is; joined, they are the answer."""
    pool.go_on.clear()
    pieces = con.stream("SELECT chat('one two three')")
    assert [next(pieces), next(pieces)] == ["ONE ", "TWO "]
    pool.go_on.set()
    assert "".join(pieces) == "THREE"
    assert pieces.statement.usage["chat"].completion_tokens == 3
    assert con.execute("SELECT calls, prompt_tokens FROM llm_calls").fetchall() == [(1, 3)]


@pytest.mark.parametrize(
    ("query", "parameters"),
    [
        ("SELECT chat($1)", ["one two"]),
        ("SELECT chat($1, temperature := 1)", ["one two"]),
        ("SELECT chat(q) FROM (VALUES ('one two')) t(q)", None),
        ("FROM (VALUES ('one two'), ('three')) t(q) SELECT chat(q, max_tokens := 9) AS a LIMIT 1;", None),
        ("WITH t AS (SELECT 'one two' AS q) SELECT CHAT(q) FROM t WHERE q <> ''", None),
    ],
)
def test_the_query_may_be_any_whose_one_column_is_the_call(con, query, parameters):
    """With parameters, named options, tables and conditions."""
    assert "".join(con.stream(query, parameters)) == "ONE TWO"


def test_a_stored_answer_is_one_piece(con, pool):
    """No call is made for it."""
    first = list(con.stream("SELECT chat('one two three')"))
    con.session.forget_answers()
    assert (len(first), list(con.stream("SELECT chat('one two three')"))) == (3, ["ONE TWO THREE"])
    assert con.execute("SELECT chat('one two three')").fetchall() == [("ONE TWO THREE",)]
    assert len(pool.batches) == 1


def test_who_comes_later_hears_the_whole(con, pool):
    """Two streams of one question share one call."""
    pool.go_on.clear()
    first = con.stream("SELECT chat('one two three')")
    assert next(first) == "ONE "
    other = con.cursor()
    second = other.stream("SELECT chat('one two three')")
    assert next(second).startswith("ONE ")
    pool.go_on.set()
    assert "".join(first) == "TWO THREE"
    assert "".join(second) in ("TWO THREE", "THREE")
    assert len(pool.batches) == 1
    other.close()


def test_a_lost_worker_is_not_noticed(con, pool):
    """An attempt that writes the same again is waited for, and goes on where the first one ended."""
    pool.attempts = ["ONE TWO"]
    pieces = list(con.stream("SELECT chat('one two three')"))
    assert "".join(pieces) == "ONE TWO THREE"
    assert not any(piece.anew for piece in pieces)


def test_an_answer_that_begins_anew_says_so(con, pool):
    """Another attempt that writes something else: what came before does not count."""
    pool.attempts = ["ONE of"]
    pieces = list(con.stream("SELECT chat('one two three')"))
    last = max(number for number, piece in enumerate(pieces) if piece.anew)
    assert "".join(pieces[last:]) == "ONE TWO THREE"


def test_closing_cancels(con, pool):
    """The batch is cancelled, and the connection is free for the next statement; reading on gives nothing."""
    pool.go_on.clear()
    with con.stream("SELECT chat('one two three')") as pieces:
        assert next(pieces) == "ONE "
    assert pool.stopped.wait(5)
    assert list(pieces) == []
    assert con.execute("SELECT 42").fetchone() == (42,)


def test_the_next_statement_ends_a_stream(con, pool):
    """As it ends a result that was not read to its end."""
    pool.go_on.clear()
    pieces = con.stream("SELECT chat('one two three')")
    assert con.execute("SELECT 42").fetchone() == (42,)
    assert list(pieces) == []


def test_interrupt_ends_a_stream_with_the_error_of_any_query(con, pool):
    """From another thread, as Ctrl-C does."""
    pool.go_on.clear()
    pieces = con.stream("SELECT chat('one two three')")
    assert next(pieces) == "ONE "
    threading.Timer(0.1, con.interrupt).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        list(pieces)
    assert time.monotonic() - began < 10


def test_a_failed_row_is_an_error(con):
    """There is no NULL among pieces, whatever on_error says."""
    con.execute('!llm setup "on_error=null"')
    with pytest.raises(Fatal, match="It is bad"):
        list(con.stream("SELECT chat('bad')"))


def test_null_is_no_piece(con, pool):
    """NULL in, nothing out, without a call."""
    assert list(con.stream("SELECT chat(NULL)")) == []
    assert pool.batches == []


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("SELECT 42", "stream_query"),
        ("SELECT chat('a'), 1", "stream_query"),
        ("SELECT upper(chat('a'))", "stream_query"),
        ("SELECT chat_row('a')", "stream_query"),
        ("SELECT 1; SELECT chat('a')", "stream_query"),
        ("!llm models", "stream_query"),
        ("CREATE TABLE t AS SELECT chat('a')", "stream_query"),
        ("SELECT chat(q) FROM (VALUES ('a'), ('b')) t(q)", "stream_rows"),
        ("SELECT chat(q) FROM (VALUES ('a'), ('a')) t(q)", "stream_rows"),
    ],
)
def test_another_query_is_refused(con, query, code):
    """With what it has to be instead."""
    with pytest.raises(UserError) as caught:
        list(con.stream(query))
    assert caught.value.code == code


def test_duckdbs_errors_are_duckdbs(con):
    """As with execute."""
    with pytest.raises(duckdb.Error, match="nosuch"):
        list(con.stream("SELECT chat(a) FROM nosuch"))
    with pytest.raises(duckdb.ParserException):
        con.stream("SELEC chat('a')")
