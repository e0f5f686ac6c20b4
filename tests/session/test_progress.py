"""What is told beside results: the progress line, and the notices after a statement."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import sqlext
from sqlext.progress import Progress, rows_line


@pytest.mark.parametrize(
    ("answered", "still_open", "tokens", "seconds", "line"),
    [
        (50, 150, 2_000, 10.0, "50 of 200 answers · 5 rows/s · 200 tokens/s · 30 s left"),
        (1_000, 9_000, 0, 100.0, "1,000 of 10,000 answers · 10 rows/s · 0 tokens/s · 15 min left"),
        (1, 10_000, 10, 1.0, "1 of 10,001 answers · 1 rows/s · 10 tokens/s · 2 h 47 min left"),
        (7, 0, 70, 2.0, "7 answers · 4 rows/s · 35 tokens/s"),
    ],
)
def test_the_line_tells_how_far_and_how_long(
    answered: int, still_open: int, tokens: int, seconds: float, line: str
) -> None:
    """Of a known number the rest and its time; of an unknown one only what was done."""
    assert rows_line(answered, still_open, tokens, seconds) == line


def test_a_running_statement_knows_its_total(
    con: sqlext.Connection, deploy: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rows are answered, the calls that were asked ahead of them are the total."""
    monkeypatch.setattr("sqlext.progress.QUIET_S", 0.0)
    deploy("", "fake", "infer_backend=fake_engines:load", **{"backend.piece_s": 0.02})
    watch = Progress(con)
    told: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            told.add(watch._rows())

    looking = threading.Thread(target=look)
    looking.start()
    con.execute("SELECT fake(i::VARCHAR) FROM range(60) r(i)").fetchall()
    over.set()
    looking.join()
    assert any(" of 60 answers · " in line and line.endswith("s left") for line in told)


def test_answers_that_nobody_asked_to_be_short_are_told(
    con: sqlext.Connection, deploy: Callable[..., None], checkpoints: dict[str, Path]
) -> None:
    """A text that is longer than the model reads is told once for a statement; llm_calls counts it."""
    deploy(checkpoints["encoder"], "embed")
    con.execute(
        "SELECT embed(w) FROM (VALUES ('short'), (repeat('word ', 200)), (repeat('text ', 300))) t(w)"
    ).fetchall()
    assert con.session.notices == ['2 texts longer than "embed" reads; the rest was left out.']
    assert con.execute("SELECT cut FROM llm_calls").fetchall() == [(2,)]


def test_an_answer_cut_at_the_default_length_is_told(
    con: sqlext.Connection, deploy: Callable[..., None], checkpoints: dict[str, Path]
) -> None:
    """Where max_tokens was said, an answer that ends there is no news; where nobody said it, it is."""
    deploy(checkpoints["chat"], "chat", **{"generation.ignore_eos": "true"})
    con.execute("SELECT chat('hi', max_tokens := 2)").fetchall()
    assert con.session.notices == []
    con.execute("SELECT chat('hi')").fetchall()
    assert [notice.splitlines()[0] for notice in con.session.notices] == [
        '1 answer of "chat" cut off at the default length.'
    ]
    assert con.execute("SELECT cut FROM llm_calls").fetchall() == [(1,), (1,)]
