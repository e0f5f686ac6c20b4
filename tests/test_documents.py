"""What the documents show is run: README's blocks, and every script in examples/sql against what it prints."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sqlext
from runtime import cluster

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted((ROOT / "examples" / "sql").glob("*.sql"))
BIN = Path(sys.executable).parent
PROVIDER = "http://localhost:8000/v1"  # where README's provider is

sys.path.append(str(ROOT / "benchmarks"))
serve = importlib.import_module("openai_server").serve


def blocks(language: str) -> list[str]:
    """The fenced blocks of README in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch, checkpoints):
    """A folder like a user's: models/chat, a script, and a table of questions."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "chat").symlink_to(checkpoints["chat"])
    (tmp_path / "job.sql").write_text("SELECT '${day}' AS day;")
    (tmp_path / "chat.sql").write_text('RUN command AS LLM.`models/chat` WHERE action="infer" AND udfName="chat";')
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_sql(ray_cluster, workplace, monkeypatch):
    """Every SQL block of README runs, in order, in one session; the provider is a server of this machine."""
    monkeypatch.setenv("OPENAI_API_KEY", "the-key-of-the-readme")
    monkeypatch.setenv("SQLEXT_MODELS", str(workplace / "store"))
    with serve() as url, sqlext.connect() as con:
        con.execute("CREATE TABLE questions AS SELECT i AS id, 'question ' || i AS question FROM range(3) r(i)")
        con.execute('!llm setup "num_gpus=0"')  # those of the test cluster do not exist
        assert any(PROVIDER in block for block in blocks("sql"))
        for block in blocks("sql"):
            con.execute(block.replace(PROVIDER, url))
            con.fetchall()
        for table, column in (("answers", "answer"), ("titles", "title")):
            assert con.execute(f"SELECT count({column}) FROM {table}").fetchone() == (3,)
    assert not cluster.exists("chat")
    assert not cluster.exists("gpt")


def test_readme_python(ray_cluster, workplace):
    """Every Python block of README runs."""
    for block in blocks("python"):
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
        assert len(names["frame"]) == 1
        assert names["table"].to_pylist() == [{"answer": 42}]
    cluster.remove("chat")


def test_readme_shell(workplace):
    """Every command line of README but the two of make runs and succeeds."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    lines = [line for block in blocks("bash") for line in block.splitlines() if not line.startswith("make ")]
    assert len(lines) >= 4
    for line in lines:
        done = subprocess.run(
            line, shell=True, capture_output=True, text=True, env=environment, check=False, timeout=120
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_readme_names_the_two_commands_that_ci_runs():
    """`.ci/run` calls what README tells a user to call."""
    assert "make quickstart" in README
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def run_example(script: Path, folder: Path, **variables: str) -> str:
    """What `sqlext run` prints for a script when it is run in `folder`."""
    done = subprocess.run(
        [BIN / "sqlext", "run", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "COLUMNS": "120", **variables},
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder in which the quickstart was run, with the model that it trained, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    cache = str(tmp_path_factory.mktemp("cache"))
    return folder, run_example(ROOT / "examples" / "sql" / "quickstart.sql", folder, SQLEXT_CACHE_DIR=cache)


@pytest.mark.timeout(900)  # a model is trained from nothing in two of them
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_examples_print_what_they_show(script: Path, quickstart: tuple[Path, str]):
    """sqlext run examples/sql/X.sql prints X.out; `...` there stands for what differs between machines."""
    folder, shown = quickstart
    if script.stem != "quickstart":
        shown = run_example(script, folder)
    expected = script.with_suffix(".out").read_text(encoding="utf-8")
    same = doctest.OutputChecker().check_output(expected, shown, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert same, shown
