"""`action="benchmark"` and `sqlext bench`, on a real deployed function and on a real server."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sqlext
from runtime import cluster
from runtime.errors import UserError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
serve = importlib.import_module("openai_server").serve
SHORT = "AND mean_input_tokens=12 AND stddev_input_tokens=3 AND mean_output_tokens=6 AND stddev_output_tokens=1"


@pytest.fixture(scope="module")
def con(ray_cluster: object, checkpoints: dict[str, Path]) -> Iterator[sqlext.Connection]:
    """A session with a function."""
    connection = sqlext.connect()
    connection.execute('!llm setup "num_gpus=0"')
    connection.execute(
        f'RUN command AS LLM.`{checkpoints["chat"]}` WHERE action="infer" AND udfName="tested"'
        ' AND `generation.ignore_eos`="true"'
    )
    yield connection
    connection.close()
    cluster.remove("tested")


def test_a_function_with_several_loads(con: sqlext.Connection, tmp_path: Path) -> None:
    """A run for each number of requests in flight; rows, files and the page tell the same."""
    con.execute(
        'RUN command AS LLM.`` WHERE action="benchmark" AND udfName="tested" AND mode="synthetic" AND num_requests=8'
        f' AND num_concurrent_requests="1,4" {SHORT} AND results_dir="{tmp_path}" AS bench'
    )
    runs = con.execute("SELECT run, concurrency, started, completed, errors, ttft_s.p50 > 0 FROM bench").fetchall()
    assert runs == [(1, 1, 8, 8, 0, True), (2, 4, 8, 8, 0, True)]
    rows = con.execute("SELECT * FROM llm_benchmark_requests").fetchall()
    assert len(rows) == 16
    # max_tokens is drawn for each request, and the engine itself counts what came of it
    assert con.execute(
        "SELECT count(*) FROM llm_benchmark_requests WHERE output_tokens = max_tokens AND len(itl_s) < output_tokens"
    ).fetchone() == (16,)
    summary, responses, page = con.execute(
        "SELECT summary, individual_responses, report FROM bench WHERE run = 2"
    ).fetchone()
    told = json.loads(Path(summary).read_text())
    assert told["results_num_completed_requests"] == len(json.loads(Path(responses).read_text())) == 8
    assert told["num_concurrent_requests"] == 4
    assert told["results_ttft_s_quantiles_p50"] > 0
    html = Path(page).read_text()
    assert html.count("<svg") >= 7
    assert "tested, 4 at once" in html
    assert "http" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_prompts_of_a_table(con: sqlext.Connection) -> None:
    """Mode custom asks each prompt once, at times of its own in an open loop."""
    con.execute("CREATE OR REPLACE TABLE asked AS SELECT 'question ' || i AS prompt FROM range(5) r(i)")
    con.execute(
        'RUN asked AS LLM.`` WHERE action="benchmark" AND udfName="tested" AND mode="custom" AND max_tokens=3'
        ' AND num_concurrent_requests=2 AND warmup="false" AS bench'
    )
    assert con.execute("SELECT started, completed, output_tokens.max FROM bench").fetchall() == [(5, 5, 3.0)]
    con.execute(
        'RUN command AS LLM.`` WHERE action="benchmark" AND udfName="tested" AND mode="real_workload" AND qps=200'
        f' AND qps_distribution="exponential" AND num_requests=6 {SHORT} AS bench'
    )
    assert con.execute("SELECT concurrency, qps, completed FROM bench").fetchall() == [(None, 200.0, 6)]


def test_nothing_is_taken_from_stored_answers(con: sqlext.Connection) -> None:
    """The same load twice makes the same calls twice."""
    for _ in range(2):
        con.execute(
            'RUN command AS LLM.`` WHERE action="benchmark" AND udfName="tested" AND num_requests=3'
            f' AND warmup="false" {SHORT} AS bench'
        )
        assert con.execute("SELECT completed, ttft_s.min > 0 FROM bench").fetchall() == [(3, True)]


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("", "option_missing"),
        ('AND udfName="testd"', "model_unknown"),
        ('AND udfName="tested" AND url="http://127.0.0.1:1/v1"', "option_missing"),
        ('AND url="http://127.0.0.1:1/v1"', "option_missing"),
        ('AND url="localhost" AND `saas.model`="m"', "option_value"),
        ('AND url="http://127.0.0.1:1/v1" AND `saas.model`="m"', "tokenizer_missing"),
        ('AND udfName="tested" AND num_concurrent_requests="0"', "option_value"),
        ('AND udfName="tested" AND mode="custom"', "option_missing"),
        ('AND udfName="tested" AND mean_input_tokens=1 AND concurency=4', "option_unknown"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(con: sqlext.Connection, where: str, code: str) -> None:
    """With what to type."""
    with pytest.raises(UserError) as error:
        con.execute(f'RUN command AS LLM.`` WHERE action="benchmark" {where}')
    assert error.value.code == code
    assert error.value.hint


def test_a_service_from_the_command_line(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """`sqlext bench --url` needs no model here; its rows are JSON lines; the key is nowhere."""
    with serve("--api-key", "a-planted-key") as url:
        done = subprocess.run(
            [
                *(Path(sys.executable).with_name("sqlext"), "bench", "--url", url, "--model", "echo", "--json"),
                *("--concurrency", "2,3", "--results-dir", tmp_path, "-o", f"tokenizer={checkpoints['minilm']}"),
                *("-o", "num_requests=6", "-o", "mean_input_tokens=9", "-o", "stddev_input_tokens=0"),
                *("-o", "saas.api_key=env:THE_KEY"),
            ],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "THE_KEY": "a-planted-key"},
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["concurrency"], row["completed"], row["errors"]) for row in rows] == [(2, 6, 0), (3, 6, 0)]
    everything = done.stdout + done.stderr + "".join(file.read_text() for file in tmp_path.rglob("*.[jh]*"))
    assert "a-planted-key" not in everything
