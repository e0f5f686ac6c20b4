"""The command line: stdout is data, stderr is talk, and the exit code tells how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SQLEXT = str(Path(sys.executable).with_name("sqlext"))


def sqlext(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([SQLEXT, *arguments], input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_a_script_prints_its_results_as_boxes(tmp_path):
    """sqlext run FILE shows what a person wants to read, and nothing for statements without rows."""
    (tmp_path / "a.sql").write_text("CREATE TABLE t AS SELECT 42 AS answer; INSERT INTO t VALUES (43); FROM t;")
    done = sqlext("run", str(tmp_path / "a.sql"))
    assert done.returncode == 0
    assert done.stdout.count("answer") == 1
    assert "43" in done.stdout
    assert done.stderr == ""


def test_json_lines_for_programs():
    """--json prints a JSON object for each row, of any type."""
    done = sqlext("--json", "-c", "SELECT 1 AS i, [1, 2] AS l, {'a': 'x'} AS s, DATE '2026-01-02' AS d, NULL AS n")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"i": 1, "l": [1, 2], "s": {"a": "x"}, "d": "2026-01-02", "n": None}
    ]


def test_stdin_and_several_files_share_a_session(tmp_path):
    """SQL comes from stdin, too; files run one after the other in one session."""
    assert '"x":1' in sqlext("--json", stdin="SELECT 1 AS x;").stdout
    (tmp_path / "a.sql").write_text("SET v='7';")
    (tmp_path / "b.sql").write_text("SELECT ${v} AS x;")
    assert sqlext("run", "--json", str(tmp_path / "a.sql"), str(tmp_path / "b.sql")).stdout == '{"x":7}\n'
    assert sqlext("run", "--json", "-", stdin="SELECT 3 AS x").stdout == '{"x":3}\n'


def test_variables_database_and_dialect(tmp_path):
    """--set gives ${…} a value, --db keeps the tables, --dialect translates."""
    file = str(tmp_path / "my.duckdb")
    assert (
        sqlext("--db", file, "--set", "day=2026-11-20", "-c", "CREATE TABLE t AS SELECT '${day}' AS day").returncode
        == 0
    )
    assert sqlext("--db", file, "--json", "-c", "FROM t").stdout == '{"day":"2026-11-20"}\n'
    assert sqlext("--dialect", "spark", "--json", "-c", 'select map("k","v")["k"] as x').stdout == '{"x":"v"}\n'


def test_options_may_stand_before_or_behind_the_command(tmp_path):
    """`sqlext --db x run f` and `sqlext run --db x f` mean the same."""
    (tmp_path / "a.sql").write_text("CREATE TABLE IF NOT EXISTS t AS SELECT '${v}' AS v; FROM t;")
    file, script = str(tmp_path / "my.duckdb"), str(tmp_path / "a.sql")
    assert sqlext("--db", file, "--set", "v=1", "--json", "run", script).stdout == '{"v":"1"}\n'
    assert sqlext("run", "--db", file, "--set", "v=2", "--json", script).stdout == '{"v":"1"}\n'


def test_json_is_json():
    """NaN and Infinity, which JSON does not have, are null; a user's table of any name stands in no way."""
    done = sqlext("--json", "-c", "CREATE TABLE sqlext_rows AS SELECT 1 AS i; SELECT 'nan'::DOUBLE AS n, 'NaN' AS t")
    assert done.stdout == '{"n":null,"t":"NaN"}\n'


def test_explain_is_shown_as_duckdb_shows_it():
    """A plan is printed, not put into a cell."""
    assert sqlext("-c", "EXPLAIN SELECT 1 AS x FROM range(10)").stdout.startswith("╭")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["-c", "SELECT 1"], 0, ""),
        (["-c", "SELECT * FROM nope"], 1, "nope does not exist"),
        (["-c", "RUN command AS LLM"], 2, "line 1"),
        (["-c", '!llm setup "num_wrkers=1"'], 2, "num_workers"),
        (["run", "missing.sql"], 2, "missing.sql cannot be read"),
        (["job.sql"], 2, "sqlext run job.sql"),
        (["docter"], 2, "sqlext doctor"),
        (["run"], 2, "FILE"),
        (["--nonsense"], 2, "nonsense"),
        (["--set", "x", "-c", "SELECT 1"], 2, "--set name=value"),
        (["--dialect", "sparc", "-c", "SELECT 1"], 2, "spark"),
        (["--help"], 0, ""),
    ],
)
def test_exit_codes(arguments, code, told):
    """0 done, 1 a statement failed, 2 something to correct; the cause is on stderr."""
    done = sqlext(*arguments)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_name_the_file_and_the_line(tmp_path):
    """A mistake in a script is told with file, line, column and a caret."""
    script = tmp_path / "job.sql"
    script.write_text('SELECT 1;\n!llm setup "num_workers=many";\n')
    done = sqlext("run", str(script))
    assert done.returncode == 2
    assert f"{script}: line 2" in done.stderr
    assert "^" in done.stderr


def test_duckdbs_errors_name_the_file_and_the_line(tmp_path):
    """DuckDB's own error of a statement in a script is told with the statement's place."""
    script = tmp_path / "job.sql"
    script.write_text("SELECT 1;\n\nSELECT *\nFROM nosuch;\n")
    assert f"in the statement at {script}: line 3, column 1" in sqlext("run", str(script)).stderr


def test_a_model_that_does_not_come_up_is_exit_code_3():
    """More GPUs than the machine has: one message, code 3."""
    done = sqlext(
        "-c",
        '!llm setup "infer_backend=echo" "gpus_per_worker=64"; RUN command AS LLM.`` WHERE action="infer" AND udfName="m"',
    )
    assert done.returncode == 3, done.stderr
    assert "GPU" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 6


@pytest.mark.parametrize(
    ("engine", "query", "sign"),
    [
        ("echo", "SELECT count(m(i)) FROM range(1000000000) t(i)", "answers"),
        ("fake_engines:load_sleep", "SELECT 1", "loading m"),
    ],
)
def test_ctrl_c_ends_with_130_and_leaves_no_process(engine, query, sign):
    """Ctrl-C while rows run or while a model loads: said within a second, exit code 130, every process gone."""
    script = (
        f'!llm setup "infer_backend={engine}"; RUN command AS LLM.`` WHERE action="infer" AND udfName="m"; {query}'
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [SQLEXT, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert any(sign in line for line in process.stderr)
    children = psutil.Process(process.pid).children(recursive=True)
    pressed = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert any("cancelled" in line for line in process.stderr)
    assert time.monotonic() - pressed < 1
    process.communicate(timeout=60)
    assert process.returncode == 130
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_asking_for_models_starts_no_cluster():
    """Where nothing can be deployed the answer is there at once, without Ray."""
    check = (
        "import sys, sqlext; con = sqlext.connect(); "
        "print(con.execute('!llm models').fetchall(), con.execute('!llm model exists \"m\"').fetchall(), "
        "con.execute('!llm model remove \"m\"').fetchall(), 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[] [(False,)] [(False,)] False"


def test_doctor_tells_what_is_there():
    """Versions, engines, devices, extras; also as JSON."""
    found = {line["what"]: line for line in map(json.loads, sqlext("doctor", "--json").stdout.splitlines())}
    assert found["duckdb"]["state"] == "ok"
    assert "transformers" in found["engines"]["detail"]
    assert "cores" in found["cpu"]["detail"]
    assert "extra demo" in found


@pytest.mark.parametrize("module", ["sqlext", "sqlext.cli"])
def test_start_up_loads_nothing_heavy(module):
    """import sqlext and sqlext --help load no ray, torch, transformers, pandas, duckdb or pyarrow."""
    heavy = ("ray", "torch", "transformers", "pandas", "duckdb", "pyarrow", "sqlglot", "rich")
    check = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )


def test_a_foreign_package_of_the_same_name_is_named(tmp_path):
    """A `runtime` of somebody else's on the path is told, not met with a strange error later."""
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__init__.py").touch()
    (tmp_path / "runtime" / "errors.py").write_text(
        "SqlextError = Cancelled = DeployError = Fatal = Retryable = RowError = SqlSyntaxError = UserError = Exception"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import sqlext"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert "another one" in done.stderr
