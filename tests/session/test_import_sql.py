"""action="import" and !llm imports: from statements to rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import models
import pytest

import sqlext
from runtime.errors import UserError


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQLEXT_MODELS", str(tmp_path / "store"))


@pytest.fixture
def alone() -> Iterator[sqlext.Connection]:
    """A connection without a cluster: none is needed."""
    with sqlext.connect() as connection:
        connection.session.notices = []
        connection.session.notify = connection.session.notices.append
        yield connection


def test_one_checkpoint_and_its_status(alone, tmp_path):
    """Imported, then present; the store's table tells what it is."""
    folder = models.placeholder(tmp_path / "my-model")
    statement = f'RUN command AS LLM.`{folder}` WHERE action="import"'
    size = sum(file.stat().st_size for file in folder.iterdir())
    for state in ("imported", "present"):
        (row,) = alone.execute(statement).arrow().to_pylist()
        assert (row["name"], row["state"], row["bytes"], row["files"]) == ("my-model", state, size, 3)
        assert row["error"] is None
    (row,) = alone.execute("!llm imports").arrow().to_pylist()
    assert (row["name"], row["state"], row["progress"], row["model_arch"]) == ("my-model", "ready", 100.0, "llama")
    assert row["source"] == str(folder)
    alone.execute(f'RUN command AS LLM.`{folder}` WHERE action="import" AND name="other" AND store="{tmp_path}/two"')
    (row,) = alone.execute(f'!llm imports "{tmp_path}/two"').arrow().to_pylist()
    assert row["name"] == "other"


def test_a_config_imports_many_and_failures_are_rows(alone, tmp_path):
    """The YAML file of the document: each checkpoint one row, the other sections checked and told."""
    good, bad = models.placeholder(tmp_path / "good"), models.placeholder(tmp_path / "bad")
    (bad / "model.safetensors").write_bytes(b"\x80\x04\x95\x00\x00\x00\x00\x00" * 4)
    (tmp_path / "config.yaml").write_text(
        f"checkpoints:\n  - {{model_name: a, checkpoint_path: '{good}', vocab_size: 10}}\n"
        f"  - {{model_name: b, checkpoint_path: '{bad}'}}\n"
        "composite_model: {model_name: ab, model_list: [a, b]}\n"
    )
    statement = (
        f'RUN command AS LLM.`` WHERE action="import" AND config="{tmp_path}/config.yaml" AND retries="0" AS done'
    )
    alone.execute(statement)
    rows = alone.execute("SELECT name, state, error FROM done ORDER BY name").fetchall()
    assert [row[:2] for row in rows] == [("a", "imported"), ("b", "failed")]
    assert "checkpoint_pickled" in rows[1][2]
    assert any("composite_model" in notice for notice in alone.session.notices)


def test_a_mistake_in_the_config_is_told_with_its_place(alone, tmp_path):
    """The line of the file, not of the statement; a member of the bundle that is nowhere, too."""
    folder = models.placeholder(tmp_path / "model")
    file = tmp_path / "config.yaml"
    for content, line in (
        (f"checkpoints:\n  - model_name: a\n    checkpoint_path: {folder}\n    vocab_sise: 10\n", 4),
        (
            f"checkpoints:\n  - model_name: a\n    checkpoint_path: {folder}\n"
            "composite_model:\n  model_name: m\n  model_list: [a, nowhere]\n",
            6,
        ),
    ):
        file.write_text(content)
        with pytest.raises(UserError) as raised:
            alone.execute(f'RUN command AS LLM.`` WHERE action="import" AND config="{file}"')
        assert raised.value.code == "import_config"
        assert (raised.value.place.file, raised.value.place.line) == (str(file), line)
    assert alone.execute("!llm imports").fetchall() == []


def test_a_stored_model_is_deployed_by_its_name(con, deploy, checkpoints):
    """Between the backquotes, as a folder would be; it answers as the folder's model does."""
    con.execute(f'RUN command AS LLM.`{checkpoints["chat"]}` WHERE action="import" AND name="stored-chat"')
    deploy(checkpoints["chat"], "of_folder")
    deploy("stored-chat", "of_store")
    folder, store = con.execute("SELECT of_folder('hi', max_tokens := 8), of_store('hi', max_tokens := 8)").fetchone()
    assert folder == store
    rendered = con.execute(
        """RUN command AS LLM.`stored-chat` WHERE action="render" AND messages='[{"role": "user", "content": "hi"}]'"""
    ).arrow()
    assert rendered["text"].to_pylist() == ["<|user|>hi<|end|><|assistant|>"]


def test_what_is_wrong_is_said(alone, tmp_path):
    """A table, no path, both path and config, an unreachable store, a bad number: one clear error each."""
    folder = models.placeholder(tmp_path / "model")
    for statement, code in (
        (f'RUN t AS LLM.`{folder}` WHERE action="import"', "input_table"),
        ('RUN command AS LLM.`` WHERE action="import"', "checkpoint_missing"),
        (f'RUN command AS LLM.`{folder}` WHERE action="import" AND config="c.yaml"', "option_value"),
        ('RUN command AS LLM.`` WHERE action="import" AND config="c.yaml"', "import_config"),
        (f'RUN command AS LLM.`{folder}` WHERE action="import" AND store="nosuch://x"', "store_location"),
        (f'RUN command AS LLM.`{folder}` WHERE action="import" AND retries="-1"', "option_value"),
        ('!llm imports "nosuch://x"', "store_location"),
    ):
        with pytest.raises(UserError) as raised:
            alone.execute(statement)
        assert raised.value.code == code, statement
        assert raised.value.hint
        assert raised.value.place


def test_the_command_line_prints_rows(tmp_path):
    """As JSON for programs; a failed checkpoint is a row there as well."""
    folder = models.placeholder(tmp_path / "model")
    script = (
        f'RUN command AS LLM.`{folder}` WHERE action="import"; RUN command AS LLM.`{folder}x` WHERE action="import";'
    )
    command = str(Path(sys.executable).with_name("sqlext"))
    done = subprocess.run([command, "--json", "-c", script], capture_output=True, text=True, check=True)
    assert [json.loads(line)["state"] for line in done.stdout.splitlines()] == ["imported", "failed"]
