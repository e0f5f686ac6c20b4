"""Remote models in SQL, from the statement that deploys one to the rows that come back."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sqlext
from runtime import cluster
from runtime.errors import DeployError, Fatal, UserError
from sqlext.deploy import remote_spec

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
serve = importlib.import_module("openai_server").serve

KEY = "canary-5b4a39281706f5e4"
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve() as address:
        yield address


@pytest.fixture
def service(url: str) -> Callable[..., Any]:
    """service(path, body): scripts the service; without a body, what came in."""

    def say(path: str, **body: Any) -> Any:
        sent = None if path == "stats" else json.dumps(body).encode()
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/{path}", sent) as reply:
            return json.load(reply)

    say("reset")
    return say


@pytest.fixture
def remote(con: sqlext.Connection, url: str, service: object) -> Callable[..., str]:
    """remote(option=value, …): deploys the service's model and tells the function's name."""

    def deploy(**options: object) -> str:
        name = f"remote_{next(_numbers)}"
        said = {"saas.base_url": url, "saas.model": "chat"}
        said |= {key if "." in key else f"saas.{key}": value for key, value in options.items()}
        more = " ".join(f'AND `{key}`="{value}"' for key, value in said.items() if value is not None)
        con.execute(
            f'RUN command AS LLM.`` WHERE action="infer" AND pretrainedModelType="saas/openai" AND udfName="{name}" {more}'
        )
        return name

    return deploy


def test_a_remote_model_answers_in_sql(con, remote, service):
    """Every row its own answer, without a GPU, with several batches at once; equal prompts are asked once."""
    name = remote(**{"generation.max_tokens": 20})
    rows = con.execute(f"SELECT 'row ' || i AS q, {name}('row ' || i) FROM range(300) t(i)").fetchall()
    assert rows == [(f"row {i}", f"ROW {i}") for i in range(300)]
    asked = service("stats")
    assert set(asked["prompts"].values()) <= {1, 2}  # the first row of the deployment is asked too
    assert asked["last"]["max_tokens"] == 20
    assert con.execute(f"SELECT {name}_row('hello').output").fetchone() == ("HELLO",)
    (info,) = [info for info in cluster.deployments() if info.name == name]
    assert (info.pool.worker_concurrency, info.pool.gpus_per_worker) == (32, 0.0)
    assert info.info.max_answer_tokens == 20
    assert len(info.spec.fingerprint) == 64


def test_a_remote_embedding_model_answers_with_vectors(con, remote):
    """The function's type has the dimension that the service gave."""
    name = remote(model="text-embedding-x")
    assert con.execute(f"SELECT typeof({name}('a'))").fetchone() == ("FLOAT[16]",)
    rows = con.execute(f"SELECT {name}('t' || i) FROM range(40) t(i)").fetchall()
    assert len(set(rows)) == 40
    assert con.execute(f"SELECT abs(array_cosine_similarity({name}('a'), {name}('a')) - 1) < 1e-6").fetchone() == (
        True,
    )


def test_a_key_that_is_set_late_is_found_and_shown_nowhere(con, remote, service, monkeypatch, capfd):
    """Set in this process after Ray has started; no table, message or output has it."""
    service("script", api_key=KEY)
    monkeypatch.setenv("SQLEXT_LATE_KEY", KEY)
    names = [remote(api_key="env:SQLEXT_LATE_KEY"), remote(api_key=KEY)]
    for name in names:
        assert con.execute(f"SELECT {name}('hello')").fetchone() == ("HELLO",)
    service("script", faults=[{"status": 400, "message": f"Your key {KEY} is odd."}])
    con.execute(f"SELECT {names[0]}('broken')").fetchall()
    queries = ("!llm models", "!llm status", "!llm usage", "FROM llm_errors")
    told = [con.execute(query).df().to_string() for query in queries]
    told += [repr(info) for info in cluster.deployments()]
    told += [*con.session.notices, *capfd.readouterr()]
    assert "is odd" in told[3]
    assert not [text for text in told if KEY in text]


def test_a_refused_key_stops_the_statement_with_one_message(con, remote, service):
    """Many rows wait; one error says what to check, and few requests were made."""
    name = remote()
    service("reset")
    service("script", faults=[{"status": 401, "times": 0, "message": "No."}])
    with pytest.raises(Fatal) as caught:
        con.execute(f"SELECT {name}('row ' || i) FROM range(3000) t(i)").fetchall()
    assert caught.value.code == "key_refused"
    assert "saas.api_key" in str(caught.value)
    assert str(caught.value).count("401") == 1
    assert service("stats")["requests"] < 500


@pytest.mark.parametrize(
    ("options", "faults", "kind", "says"),
    [
        ({"base_url": "http://127.0.0.1:9/v1"}, [], DeployError, "no connection.*127.0.0.1:9"),
        ({"model": "missing-model"}, [], DeployError, "missing-model"),
        ({"model": "missing-embed"}, [], DeployError, "missing-embed"),
        ({}, [{"status": 401}], DeployError, "refuses the key"),
        ({}, [{"redirect": "http://127.0.0.1:9/"}], DeployError, "elsewhere"),
        ({"api_key": "env:SQLEXT_NOWHERE"}, [], UserError, "SQLEXT_NOWHERE"),
        ({"model": None}, [], UserError, "which model"),
        ({"task": "clasify"}, [], UserError, "saas.task"),
        ({"modle": "x"}, [], UserError, r"(?s)modle.*saas\.model"),
        ({"backend.dtype": "float16"}, [], UserError, "backend.dtype"),
    ],
)
def test_what_cannot_work_is_said_when_it_is_deployed(con, remote, service, options, faults, kind, says):
    """One error with what to do; nothing is registered and no worker left."""
    service("script", faults=faults)
    before = len(cluster.deployments())
    with pytest.raises(kind, match=says) as caught:
        remote(**options)
    assert caught.value.hint
    assert len(cluster.deployments()) == before


def test_a_model_that_thinks_before_it_writes_can_be_deployed(con, remote, service):
    """The first row's one token is spent on thinking; that is an answer enough to see that the model is there."""
    service("script", faults=[{"choice": {"message": {"content": None}, "finish_reason": "length"}}])
    assert con.execute(f"SELECT {remote()}('a')").fetchone() == ("A",)


def test_the_fingerprint_is_of_what_answers():
    """Another key or pace asks the same model; another address, model or task does not."""

    def of(**said: object) -> str:
        values = {"saas.base_url": "http://h/v1", "saas.model": "m"} | {f"saas.{key}": said[key] for key in said}
        return remote_spec("f", "openai", values, "", here=True).fingerprint

    assert len({of(), of(api_key=KEY), of(concurrency=2, timeout=1.0), of(base_url="http://h/v1/")}) == 1
    assert len({of(), of(model="n"), of(base_url="http://i/v1"), of(task="embed")}) == 4


def test_options_of_providers_mean_nothing_to_checkpoints(con, checkpoints):
    """They would be accepted and do nothing."""
    with pytest.raises(UserError, match=r"saas\.model"):
        con.execute(
            f'RUN command AS LLM.`{checkpoints["chat"]}` WHERE action="infer" AND udfName="m" AND `saas.model`="x"'
        )
