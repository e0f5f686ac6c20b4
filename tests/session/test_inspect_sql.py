"""action="inspect": a checkpoint told as one row, in SQL and in the shell."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import models
import pytest

import sqlext
from runtime.errors import UserError


@pytest.fixture
def con() -> Iterator[sqlext.Connection]:
    """A connection without a cluster: none is needed."""
    with sqlext.connect() as connection:
        yield connection


def test_one_row_tells_the_checkpoint_and_its_engines(con, tmp_path):
    """Columns for SQL: numbers as numbers, engines and files as lists of structs."""
    folder = models.placeholder(tmp_path / "model")
    con.execute(f'RUN command AS LLM.`{folder}` WHERE action="inspect" AND hashes="true" AS found')
    row = con.execute(
        "SELECT model_arch, seq_length, vocab_size, parameters, task, has_chat_template, adapter.r,"
        " list_transform(files, lambda f: f.name), len(files[1].sha256) FROM found"
    ).fetchone()
    assert row[:7] == ("llama", 128, 10, 6, "generate", False, None)
    assert row[7:] == (["config.json", "model.safetensors", "tokenizer.json"], 64)
    engines = dict(con.execute("SELECT e.engine, e.runs FROM (SELECT unnest(engines) AS e FROM found)").fetchall())
    assert engines["transformers"]
    assert not engines["classification"]


def test_the_machines_of_a_cluster_are_looked_at(ray_cluster, con, tmp_path):
    """Once a cluster is connected its nodes are there; this machine stands for the node it is."""
    folder = models.placeholder(tmp_path / "model")
    rows = con.execute(f'RUN command AS LLM.`{folder}` WHERE action="inspect"').arrow().to_pylist()
    assert rows[0]["engines"][0]["machines"] == ["this machine"]


def test_other_nodes_are_known_from_rays_books():
    """Name, memory and GPUs, with the memory of a known kind of GPU; no process is started to look."""
    from runtime.cluster.nodes import machine

    resources = {"CPU": 8.0, "memory": 6e9, "object_store_memory": 2e9, "GPU": 2.0, "accelerator_type:A100-80G": 1.0}
    found = machine({"NodeManagerHostname": "gpu-1", "Resources": resources})
    assert (found.name, found.memory_bytes, found.gpus) == ("gpu-1", 8 * 10**9, (80 * 10**9, 80 * 10**9))
    found = machine({"NodeManagerHostname": "cpu-1", "Resources": {"memory": 6e9}})
    assert (found.memory_bytes, found.gpus) == (6 * 10**9, ())


def test_what_is_wrong_is_said_with_its_place(con, tmp_path):
    """A table, a missing folder and an unknown option are one clear error each."""
    folder = models.placeholder(tmp_path / "model")
    for statement, code in (
        (f'RUN t AS LLM.`{folder}` WHERE action="inspect"', "input_table"),
        (f'RUN command AS LLM.`{folder}/no` WHERE action="inspect"', "checkpoint_missing"),
        ('RUN command AS LLM.`` WHERE action="inspect"', "checkpoint_path"),
        (f'RUN command AS LLM.`{folder}` WHERE action="inspect" AND hash="true"', "option_unknown"),
    ):
        with pytest.raises(UserError) as raised:
            con.execute(statement)
        assert raised.value.code == code
        assert raised.value.hint
        assert raised.value.place


def test_the_shell_shows_the_row_downwards(tmp_path):
    """Too wide for a box: a line for each column, a line for each engine, nothing cut."""
    folder = models.placeholder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }}\n{% endfor %}")
    statement = f'RUN command AS LLM.`{folder}` WHERE action="inspect"'
    sqlext_command = str(Path(sys.executable).with_name("sqlext"))
    done = subprocess.run([sqlext_command, "-c", statement], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["path", str(folder)]
    starts = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert starts[-3:] == ["has_chat_template", "chat_template", "files"]
    at = next(i for i, line in enumerate(lines) if line.startswith("chat_template"))
    assert lines[at].endswith("{% for m in messages %}")
    assert lines[at + 1].strip() == "{{ m.content }}"
    assert any(line.split()[:2] == ["transformers", "true"] for line in lines)
