"""`sqlext chat`: a conversation through a pipe, and in a real terminal."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted import ScriptedPool

import sqlext
from runtime.gateway import Gateway
from sqlext.chat import Conversation

SQLEXT = str(Path(sys.executable).with_name("sqlext"))
DEPLOY = (
    '!llm setup "infer_backend=fake_engines:load_typing"; RUN command AS LLM.`` WHERE action="infer" '
    'AND udfName="m" AND `backend.piece_s`="{piece_s}";'
)


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    """A script that deploys a model which writes a word each 0.2 s."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    file = tmp_path / "deploy.sql"
    file.write_text(DEPLOY.format(piece_s=0.2))
    return file


def test_prompts_through_a_pipe(tmp_path, script):
    """One a line, each with the turns before it; JSON on stdout, figures on stderr, and a log for its owner only."""
    log = tmp_path / "chats" / "log.jsonl"
    done = subprocess.run(
        [SQLEXT, "chat", "m", "--script", script, "--system", "Be brief.", "--log", log, "--json", "-o", "seed=1"],
        input="one two\n\nthree\n/reset\n/system\nfour\none two\n/exit\nnever asked\n",
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    # the number is that of the turns: system, question; then two more; then alone; then question, answer, question
    assert [line["answer"] for line in said] == ["one two 2", "three 4", "four 1", "one two 3"]
    assert [line["completion_tokens"] for line in said] == [3, 2, 2, 3]
    assert 0 < said[0]["first_s"] < said[0]["seconds"] - 0.2
    assert said[0]["token_s"] >= 0.15
    assert said[0]["tokens_per_s"] == pytest.approx(3 / said[0]["seconds"])
    kept = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["prompt"], line["answer"]) for line in kept] == [(line["prompt"], line["answer"]) for line in said]
    assert [line["system"] for line in kept] == ["Be brief.", "Be brief.", "", ""]
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert str(log) in done.stderr
    assert done.stderr.count("tokens/s") == 4


class Terminal:
    """The chat in a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execv(SQLEXT, [SQLEXT, *map(str, arguments)])
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end within a character

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        """Until `text` appears behind what was waited for before."""
        begun = time.monotonic()
        while text not in self.text:
            assert time.monotonic() < begun + timeout_s, self.text
            self.text += re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", self._decoder.decode(os.read(self._fd, 4096)))
        self.text = self.text.partition(text)[2]

    def exit_code(self) -> int:
        try:
            while os.read(self._fd, 4096):
                pass
        except OSError:  # how Linux tells the end of a terminal
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_conversation_in_a_terminal(tmp_path, script):
    """Words appear as they come; Ctrl-C stops an answer and not the chat, and gives up a line; Ctrl-D leaves."""
    terminal = Terminal("chat", "m", "--script", script, "--log", tmp_path / "log.jsonl")
    terminal.wait_for("› ")
    terminal.type("one two three four five six seven eight nine ten eleven twelve\r")
    terminal.wait_for("twelve")  # the terminal shows what is typed
    terminal.wait_for("three")
    began = time.monotonic()
    terminal.type("\x03")
    terminal.wait_for("stopped")
    assert time.monotonic() - began < 2
    terminal.wait_for("› ")
    terminal.type("half a line\x03")
    terminal.wait_for("› ")
    terminal.type("red blue\r")
    terminal.wait_for("blue\r\n")
    terminal.wait_for("red blue 1")  # the stopped question is no turn of the conversation
    terminal.wait_for("3 tokens · ")
    terminal.wait_for("first token after ")
    terminal.wait_for("› ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stopped"], line["prompt"].split()[0]) for line in kept] == [(True, "one"), (False, "red")]
    assert kept[0]["answer"].startswith("one two three")
    assert "twelve" not in kept[0]["answer"]


@pytest.fixture
def con() -> Iterator[sqlext.Connection]:
    with sqlext.connect() as connection:
        connection.session.functions.put("chat", Gateway(ScriptedPool(), None))
        yield connection


@pytest.mark.parametrize(
    ("function", "options", "told"),
    [("chatt", {}, 'Did you mean "chat"'), ("chat", {"temprature": 1}, 'Did you mean "temperature"')],
)
def test_what_is_not_there_is_named(con, function, options, told):
    """Before anything is asked."""
    with pytest.raises(sqlext.UserError, match=told):
        Conversation(con, function, "", options)


def test_an_error_is_the_answers_and_not_the_chats(con):
    """It is told, and the next question is asked as if the failed one had not been."""
    talking = Conversation(con, "chat", "", {"max_tokens": 0})
    assert "max_tokens" in (talking.ask("one", shows=False).error or "")
