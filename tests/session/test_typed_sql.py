"""Typed answers in whole sessions: counted before, kept, listed when they fail, asked again, and asked ahead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import sqlext
from runtime.errors import UserError

KIND = "STRUCT(a ENUM(''x'', ''y''), b TINYINT)"


@pytest.fixture
def chat(con: sqlext.Connection, deploy: Callable[..., None], checkpoints: dict[str, Path]) -> sqlext.Connection:
    deploy(checkpoints["chat"], "chat")
    return con


def test_typed_calls_are_counted_kept_and_reused(chat: sqlext.Connection):
    """EXPLAIN LLM counts a typed call as it is asked, and a statement run again, or over other rows, pays only for new ones."""
    query = f"SELECT i, chat_as('row ' || i % 30, '{KIND}') AS x FROM range(100) r(i)"
    assert chat.execute(f"EXPLAIN LLM {query}").fetchall()[0][:5] == ("chat", 100, 30, 0, 30)
    chat.execute(f"CREATE TABLE first AS {query}")
    assert chat.execute("SELECT rows, calls, errors FROM llm_calls").fetchall() == [(100, 30, 0)]
    assert chat.execute("SELECT count(x.a), count(DISTINCT x) > 1 FROM first").fetchone() == (100, True)
    assert chat.execute(f"EXPLAIN LLM {query}").fetchall()[0][:5] == ("chat", 100, 30, 30, 0)
    assert chat.execute(f"SELECT * FROM ({query}) EXCEPT FROM first").fetchall() == []
    chat.execute(f"CREATE TABLE again AS {query}")
    assert chat.execute("SELECT calls, reused FROM llm_calls ORDER BY statement DESC LIMIT 1").fetchone() == (0, 100)


def test_an_answer_that_was_cut_is_listed_and_can_be_asked_again(chat: sqlext.Connection):
    """The row is NULL and in llm_errors with its code; `!llm retry` asks it again."""
    assert chat.execute(f"SELECT chat_as('row', '{KIND}', max_tokens := 3)").fetchall() == [(None,)]
    assert chat.execute("SELECT model, code FROM llm_errors").fetchall() == [("chat", "answer_cut")]
    assert chat.execute("!llm retry").fetchall()[0][1:] == ("chat", 1, 0, 1)
    [(row,)] = chat.execute(f"SELECT chat_row('row', schema := '{KIND}', max_tokens := 3)").fetchall()
    assert row["output"] is None
    assert row["error"].startswith("answer_cut: ")


def test_a_type_that_no_model_can_answer_with_is_one_error(chat: sqlext.Connection):
    """It stops the statement as DuckDB plans it, also where the query would be run ahead."""
    with pytest.raises(UserError) as caught:
        chat.execute("CREATE TABLE t AS SELECT chat_as('row ' || i, 'BLOB') FROM range(3000) r(i)")
    assert caught.value.code == "schema_type"
    assert chat.execute("SELECT count(*) FROM llm_calls").fetchone() == (0,)


def test_names_of_other_forms_are_taken(chat: sqlext.Connection, deploy: Callable[..., None], checkpoints):
    """No model can be called as another model's typed form is."""
    with pytest.raises(UserError, match="already a function"):
        deploy(checkpoints["chat"], "chat_as")


def test_a_type_can_be_the_models_default(con: sqlext.Connection, checkpoints: dict[str, Path]):
    """`generation.schema` makes every answer one of a kind; a call may say another."""
    con.execute(
        f"""RUN command AS LLM.`{checkpoints["chat"]}` WHERE action="infer" AND udfName="judge"
            AND `generation.schema`='ENUM(''yes'', ''no'')'"""
    )
    assert con.execute("SELECT judge('Well?') IN ('yes', 'no'), typeof(judge_as('When?', 'DATE'))").fetchall() == [
        (True, "DATE")
    ]
