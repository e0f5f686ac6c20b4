"""`sqlext shell` at a real terminal: what is typed, completed, cancelled and shown."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

import sqlext
from sqlext.completion import Completer
from sqlext.shell import complete

SQLEXT = Path(sys.executable).with_name("sqlext")


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[pexpect.spawn[str]]:
    """A shell that waits at its prompt."""
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(
        str(SQLEXT), ["shell"], env=environment, encoding="utf-8", dimensions=(40, 120), timeout=60, cwd=tmp_path
    )
    child.expect(READS)
    yield child
    child.close(force=True)


READS, HAS_READ = r"\x1b\[\?2004h", r"\x1b\[\?2004l"  # a terminal is told when a line is being typed: bracketed paste


def answer(shell: pexpect.spawn[str], typed: str, expected: str = "") -> None:
    """Type something, and wait for what is to come, and for the prompt after it."""
    shell.send(typed + "\r")
    shell.expect(HAS_READ)
    shell.expect(expected)
    shell.expect(READS)


def test_a_statement_of_several_lines(shell: pexpect.spawn[str]) -> None:
    """It is read to its semicolon, and the answer is DuckDB's box."""
    shell.send("SELECT 6 * 7\r")
    shell.expect(r"\.\.\.>")
    answer(shell, "AS answer;", r"│ +42 │")


def test_modes_timer_and_output(shell: pexpect.spawn[str], tmp_path: Path) -> None:
    """What is shown, how, and where."""
    answer(shell, "CREATE TABLE ducks AS SELECT 'Dot' AS name, 3 AS age;")
    answer(shell, ".mode csv")
    answer(shell, "FROM ducks;", "name,age\r\nDot,3")
    answer(shell, ".mode json")
    answer(shell, "FROM ducks;", '{"name":"Dot","age":3}')
    answer(shell, ".timer on", r"\d\.\d{3} s")
    answer(shell, ".timer off")
    answer(shell, f".output {tmp_path}/out.txt")
    answer(shell, "FROM ducks;")
    answer(shell, ".output")
    assert (tmp_path / "out.txt").read_text() == '{"name":"Dot","age":3}\n'
    (tmp_path / "more.sql").write_text("SELECT 'from a file' AS told;")
    answer(shell, f".read {tmp_path}/more.sql", "from a file")
    answer(shell, ".schema ducks", "column_name")


def test_mistakes_do_not_end_it(shell: pexpect.spawn[str]) -> None:
    """Each is told with what to type."""
    answer(shell, "SELEC 1;", "[Ss]yntax [Ee]rror")
    answer(shell, ".tabels", r"Did you mean \.tables")
    answer(shell, ".mode", r"\.mode MODE")
    answer(shell, ".read nothing.sql", "nothing.sql")
    answer(shell, '!llm setup "num_worker=2";', "num_workers")
    answer(shell, "SELECT 1 AS still_here;", "still_here")


def test_ctrl_c_stops_the_query_and_ctrl_d_leaves(shell: pexpect.spawn[str], tmp_path: Path) -> None:
    """The session stays usable; typed lines are kept for the next time, readable by their owner only."""
    shell.send("SELECT sum(a.i * b.i) FROM range(10000000) a(i), range(10000000) b(i);\r")
    shell.expect(HAS_READ)
    for _ in range(20):  # again, if it came before the query had begun
        shell.sendintr()
        if shell.expect(["cancelled", pexpect.TIMEOUT], timeout=1) == 0:
            break
    shell.expect(READS)
    answer(shell, "SELECT 'and on' AS it_goes;", "and on")
    shell.sendeof()
    shell.expect(pexpect.EOF)
    shell.wait()
    assert shell.exitstatus == 0
    history = tmp_path / "sqlext" / "history"
    assert "and on" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_tab_completes(shell: pexpect.spawn[str]) -> None:
    """A table's name, from its beginning."""
    answer(shell, "CREATE TABLE long_name_of_a_table AS SELECT 7 AS seven;")
    shell.send("FROM long_na\t")
    shell.expect(re.escape("me_of_a_table"))
    answer(shell, ";", r"│ +7 │")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("!llm set", "setup"),
        ('!llm setup "num_w', "num_workers="),
        ('!llm setup "on_error=nu', "null"),
        ("RUN command AS LLM.`` WHERE act", 'action="'),
        ('RUN command AS LLM.`` WHERE action="ben', "benchmark"),
        ('RUN command AS LLM.`` WHERE action="infer" AND udf', 'udfName="'),
        ('RUN command AS LLM.`` WHERE action="benchmark" AND mode="cus', "custom"),
        ('RUN command AS LLM.`` WHERE action="infer" AND saas.base', '`saas.base_url`="'),
        ("SELECT array_cosine_sim", "array_cosine_similarity"),
        ("SELECT 1; SELECT list_transf", "list_transform"),
        ("ru", "RUN command AS LLM.`` WHERE "),
    ],
)
def test_what_is_offered(typed: str, offered: str) -> None:
    """SQL, functions, our statements, options of the action, and their values."""
    with sqlext.connect() as con:
        found = Completer(con).get_completions(Document(typed), CompleteEvent())
        assert offered in [completion.text for completion in found]


@pytest.mark.parametrize(
    ("typed", "whole"),
    [
        ("", True),
        (".tables", True),
        ("SELECT 1;", True),
        ("SELECT 1; -- done", True),
        ("SELECT 1", False),
        ("SELECT 1; SELECT 2", False),
        ("SELECT ';", False),
        ("SET prompt='''You are;", False),
        ("SELECT $$;$$", False),
    ],
)
def test_what_is_a_whole_input(typed: str, whole: bool) -> None:
    """A semicolon within a string or comment ends nothing."""
    assert complete(typed) is whole
