"""`!llm retry`: failed rows asked again, and what `llm_errors` says before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import sqlext
from runtime.errors import Fatal, UserError

QUERY = "SELECT chat(w) FROM (VALUES ('a'), ('bad 1'), ('bad 2'), ('bad 1'), ('z')) t(w)"
ERRORS = "SELECT statement, query, model, code, message, attempts FROM llm_errors ORDER BY input_key"


@pytest.fixture
def mood(con: sqlext.Connection, deploy: Callable[..., None], tmp_path: Path) -> Path:
    """While this file exists, two of the three prompts that begin with «bad» fail; the model is called chat."""
    path = tmp_path / "bad mood"
    path.touch()
    deploy(path, "chat", "infer_backend=fake_engines:load_moody")
    return path


def calls(con: sqlext.Connection) -> list[tuple[str, int, int, int]]:
    return con.execute("SELECT query, rows, calls, errors FROM llm_calls ORDER BY statement").fetchall()


def retry(con: sqlext.Connection, number: str = "") -> list[tuple[int, str, int, int, int]]:
    return con.execute(f"!llm retry {number}").fetchall()


def test_what_is_answered_now_costs_the_statement_nothing(con: sqlext.Connection, mood: Path) -> None:
    """Distinct failed calls are asked once; their rows leave llm_errors; the statement, run again, makes no call."""
    first = con.execute(QUERY).fetchall()
    assert sum(answer is None for (answer,) in first) == 3
    (failed, *_) = con.execute(ERRORS).fetchall()
    statement = failed[0]
    assert failed[1:] == (QUERY, "chat", "moody", "Not today.", 2)
    mood.unlink()
    assert retry(con) == [(statement, "chat", 2, 2, 0)]
    assert con.session.notices[-1] == f"hint: run the statement {statement} again: its answers are all stored."
    assert con.execute(ERRORS).fetchall() == []
    again = con.execute(QUERY).fetchall()
    assert sorted(again) == [("A",), ("BAD 1",), ("BAD 1",), ("BAD 2",), ("Z",)]
    assert calls(con) == [(QUERY, 5, 4, 3), ("!llm retry", 2, 2, 0), (QUERY, 5, 0, 0)]


def test_what_fails_again_stays_with_its_attempts(con: sqlext.Connection, mood: Path) -> None:
    """A row that fails again has the attempts of both; nobody is told that its answer is there."""
    con.execute(QUERY).fetchall()
    told = len(con.session.notices)
    ((_, _, asked, answered, wrong),) = retry(con)
    assert (asked, answered, wrong) == (2, 0, 2)
    assert len(con.session.notices) == told
    assert [row[5] for row in con.execute(ERRORS).fetchall()] == [4, 4, 4]


def test_a_statement_is_chosen_by_its_number(con: sqlext.Connection, mood: Path) -> None:
    """Without one it is the latest that has failed rows; each keeps its own."""
    con.execute(QUERY).fetchall()
    con.execute("SELECT chat('bad 9')").fetchall()
    con.execute("SELECT chat('good')").fetchall()
    first, second = con.execute("SELECT DISTINCT statement FROM llm_errors ORDER BY ALL").fetchall()
    assert retry(con)[0][:3] == (*second, "chat", 1)
    mood.unlink()
    assert retry(con, f'"{first[0]}"')[0][:4] == (*first, "chat", 2, 2)
    assert con.execute("SELECT statement FROM llm_errors").fetchall() == [second]


def test_a_conversation_and_its_options_are_asked_as_they_were(con: sqlext.Connection, mood: Path) -> None:
    """Options of the call decide what is asked again: the answer is found under them and only under them."""
    query = "SELECT chat(w, max_tokens := 7) FROM (VALUES ('bad 1')) t(w)"
    con.execute(query).fetchall()
    mood.unlink()
    retry(con)
    assert con.execute(query).fetchall() == [("BAD 1",)]
    con.execute("SELECT chat(w, max_tokens := 8) FROM (VALUES ('bad 1')) t(w)").fetchall()
    assert [made for _, _, made, _ in calls(con)] == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("before", "command", "code"),
    [
        ("SELECT 1", "!llm retry", "retry_nothing"),
        ("SELECT chat('good')", "!llm retry", "retry_nothing"),
        (QUERY, "!llm retry 4711", "retry_unknown"),
        (QUERY, '!llm retry "no number"', "retry_unknown"),
        (QUERY, '!llm setup "cache=off"; !llm retry', "retry_not_kept"),
        ("SELECT chat('bad', cache := 'off')", "!llm retry", "retry_nothing"),
        ("SELECT chat('bad', temperature := 1)", "!llm retry", "retry_not_kept"),
        (QUERY, "!llm model remove chat; !llm retry", "model_removed"),
    ],
)
def test_what_cannot_be_asked_again_is_said(
    con: sqlext.Connection, mood: Path, before: str, command: str, code: str
) -> None:
    """No failure, no such statement, nowhere to keep an answer, no model: one clear error each, and no call."""
    con.execute(before).fetchall()
    made = len(calls(con))
    with pytest.raises(UserError) as raised:
        con.execute(command)
    assert raised.value.code == code
    assert raised.value.hint
    assert len(calls(con)) == made


def test_budgets_hold_for_what_is_asked_again(con: sqlext.Connection, mood: Path) -> None:
    """A retry is a statement of its own: max_rows stops it, and what was answered before is kept."""
    con.execute(QUERY).fetchall()
    mood.unlink()
    with pytest.raises(Fatal) as raised:
        con.execute('!llm setup "max_rows=1"; !llm retry')
    assert raised.value.code == "budget"
    assert len(con.execute(ERRORS).fetchall()) == 3
    ((_, _, asked, answered, _),) = con.execute('!llm setup "max_rows=2"; !llm retry').fetchall()
    assert (asked, answered) == (2, 2)
    assert con.execute(ERRORS).fetchall() == []
