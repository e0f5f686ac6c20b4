"""Remote models against a real service on the loopback address that misbehaves on demand."""

from __future__ import annotations

import importlib
import itertools
import json
import pickle
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import pytest
from asking import Reply, ask

from runtime.engines import Engine, loader
from runtime.engines.openai_replies import retry_after_s
from runtime.errors import DeployError, Fatal, RowError, SqlextError, UserError
from runtime.spec import Batch, CallOptions, Message, ModelSpec, Task

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
serve = importlib.import_module("openai_server").serve

CANARY = "sk-canary-0123456789abcdef"
_numbers = itertools.count(1)


class Service:
    """The running service, and what to ask of it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def script(self, *faults: dict[str, Any], **settings: Any) -> None:
        self._post("/script", {"faults": faults, **settings})

    def reset(self) -> None:
        self._post("/reset", {})

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/stats") as reply:
            return json.load(reply)

    def _post(self, path: str, body: Any) -> None:
        urllib.request.urlopen(self.url.removesuffix("/v1") + path, json.dumps(body).encode()).close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve() as address:
        yield address


@pytest.fixture
def service(url: str) -> Service:
    found = Service(url)
    found.reset()
    return found


@pytest.fixture
def load(url: str, service: Service) -> Iterator[Callable[..., Engine]]:
    """load(model, options…): an engine that is closed after the test."""
    loaded: list[Engine] = []

    def make(model: str = "chat", defaults: CallOptions = CallOptions(), **options: Any) -> Engine:  # noqa: B008
        said = {"base_url": url, "model": model} | options
        loaded.append(loader("openai")(ModelSpec("m", "openai", options=tuple(said.items()), defaults=defaults)))
        return loaded[-1]

    yield make
    for engine in loaded:
        engine.close()


def one(engine: Engine, prompt: str = "hello", **options: Any) -> Reply:
    return ask(engine, [prompt], **options)[0]


def pieces(engine: Engine, prompts: list[str]) -> dict[int, float]:
    """Seconds to wait, by row, of the rows that may be asked again."""
    found: dict[int, float] = {}
    for piece in engine.run(Batch(1, CallOptions(), prompts), threading.Event()):
        found.update(piece.retry_after_s)
        assert set(piece.retry_after_s) <= set(piece.errors)
    return found


def test_every_prompt_gets_its_own_answer(service, load):
    """200 rows at once, each with the answer to its prompt, its tokens and one request."""
    prompts = [f"row {number} of many" for number in range(200)]
    replies = ask(load(), prompts)
    assert [reply.output for reply in replies] == [prompt.upper() for prompt in prompts]
    assert {(r.finish_reason, r.prompt_tokens, r.completion_tokens) for r in replies} == {("stop", 4, 4)}
    stats = service.stats()
    assert stats["requests"] == 200
    assert set(stats["prompts"].values()) == {1}


def test_the_bound_on_requests_in_flight_is_kept_and_reached(service, load):
    """Over several batches at once, no more than `concurrency`."""
    service.script(latency=[50, 0, 0])
    engine = load(concurrency=8)
    threads = [threading.Thread(target=ask, args=(engine, [f"{n} {i}" for i in range(12)])) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert service.stats()["most_in_flight"] == 8


def test_a_row_comes_when_it_is_there(service, load):
    """Rows do not wait for the slowest of their batch."""
    service.script({"hang": True, "contains": "slow"})
    rows = load().run(Batch(1, CallOptions(), ["quick", "slow"]), threading.Event())
    assert list(next(rows).rows) == [0]
    rows.close()


def test_options_are_sent_under_the_names_of_the_protocol(service, load):
    """Greedy unless said otherwise; what is not said is not sent; unknown names go along."""
    engine = load()
    one(engine, system="Be brief.")
    assert service.stats()["last"] == {
        "model": "chat",
        "temperature": 0,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
    }
    said = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 7, "stop": ("a", "b"), "max_tokens": 3}
    one(engine, **said, extra=(("guided_choice", ("x", "y")),))
    sent = service.stats()["last"]
    assert sent.items() >= {**said, "stop": ["a", "b"], "guided_choice": ["x", "y"]}.items()
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert ask(engine, [turns])[0].output == "C"
    assert [turn["role"] for turn in service.stats()["last"]["messages"]] == ["user", "assistant", "user"]


def test_max_tokens_has_another_name_at_some_providers(service, load):
    """It is sent under the name that was chosen; an answer that was cut says so."""
    reply = one(load(max_tokens_name="max_completion_tokens"), "one two three", max_tokens=2)
    assert (reply.output, reply.finish_reason) == ("ONE TWO", "length")
    assert "max_tokens" not in service.stats()["last"]


def test_a_field_that_decides_the_form_of_the_reply_is_refused(load):
    """A stream could not be read."""
    with pytest.raises(Fatal, match='"stream" cannot be set'):
        one(load(), extra=(("stream", True),))


@pytest.mark.parametrize(
    ("fault", "code", "waits"),
    [
        ({"status": 429}, "rate_limited", 0.0),
        ({"status": 429, "headers": {"Retry-After": "2"}}, "rate_limited", 2.0),
        ({"status": 429, "headers": {"Retry-After": "3600"}}, "rate_limited", 3600.0),
        ({"status": 429, "headers": {"Retry-After": "soon"}}, "rate_limited", 0.0),
        ({"status": 503, "headers": {"retry-after-ms": "1500", "Retry-After": "9"}}, "provider_failed", 1.5),
        ({"status": 408}, "provider_failed", 0.0),
        ({"status": 409}, "provider_failed", 0.0),
        ({"status": 500}, "provider_failed", 0.0),
        ({"status": 529}, "provider_failed", 0.0),
        ({"status": 502, "body": "<html>bad gateway</html>", "content_type": "text/html"}, "provider_failed", 0.0),
        ({"drop": True}, "unreachable", 0.0),
        ({"hang": True}, "timeout", 0.0),
    ],
)
def test_a_failure_that_may_pass_says_how_long_to_wait(service, load, fault, code, waits):
    """One request, one error with the seconds to wait; the neighbour is answered."""
    service.script({**fault, "contains": "bad"})
    engine = load(timeout=0.3)
    found: dict[int, Any] = {}
    for piece in engine.run(Batch(1, CallOptions(), ["good", "bad"]), threading.Event()):
        found |= {row: (piece.outputs[at], piece.errors.get(row)) for at, row in enumerate(piece.rows)}
        assert set(piece.retry_after_s.values()) <= {waits}
        assert set(piece.retry_after_s) == set(piece.errors)
    assert found[0] == ("GOOD", None)
    assert found[1][1].code == code
    assert service.stats()["requests"] == 2


def test_a_date_to_wait_for_becomes_seconds():
    """HTTP dates count from now; what lies behind, or is none, is no wait."""
    assert 50 < retry_after_s({"retry-after": formatdate(time() + 60, usegmt=True)}) <= 60
    for said in (formatdate(time() - 60, usegmt=True), "-3", "nan", "1e999", "", "Wed, 99 Foo"):
        assert retry_after_s({"retry-after": said}) == 0.0


def test_a_service_that_is_gone_may_come_back(load, service):
    """Nothing listens: an error that may pass, which names the address."""
    engine = load(base_url="http://127.0.0.1:9/v1")
    assert pieces(engine, ["a"]) == {0: 0.0}
    error = one(engine).error
    assert error
    assert error.code == "unreachable"
    assert "127.0.0.1:9" in error.message


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"status": 400, "code": "context_length_exceeded"}, "prompt_too_long"),
        ({"status": 400, "message": "This model's maximum context length is 9 tokens."}, "prompt_too_long"),
        ({"status": 400}, "rejected"),
        ({"status": 413}, "rejected"),
        ({"status": 422, "body": '{"detail": [{"loc": 1}]}'}, "rejected"),
        ({"body": "<html>Sign in</html>", "content_type": "text/html"}, "bad_reply"),
        ({"body": ""}, "bad_reply"),
        ({"body": "[]"}, "bad_reply"),
        ({"body": "{}"}, "bad_reply"),
        ({"body": "null"}, "bad_reply"),
        ({"body": '{"choices": []}'}, "bad_reply"),
        ({"body": '{"choices": [{"message": "x"}]}'}, "bad_reply"),
        ({"body": "[" * 100_000}, "bad_reply"),
        ({"body": '{"choices": [{"message": {"content": "\\ud800"}}]}'}, "bad_reply"),
        ({"choice": {"message": {"content": None}}}, "bad_reply"),
        ({"choice": {"message": {"content": 5}}}, "bad_reply"),
        ({"choice": {"message": {"content": None}, "finish_reason": "length"}}, "truncated"),
        ({"choice": {"message": {"content": ""}, "finish_reason": "length"}}, "truncated"),
        ({"choice": {"message": {"content": "half"}, "finish_reason": "content_filter"}}, "content_filter"),
        ({"choice": {"message": {"content": None, "refusal": "No."}}}, "refused"),
    ],
)
def test_a_row_that_cannot_be_answered_fails_alone(service, load, fault, code):
    """Its error has a code and is not tried again; its neighbour is answered."""
    service.script({**fault, "contains": "bad"})
    engine = load()
    good, bad = ask(engine, ["good", "bad"])
    assert good.output == "GOOD"
    assert (bad.output, bad.error and bad.error.code) == (None, code)
    service.script({**fault, "contains": "bad"})
    assert pieces(engine, ["bad"]) == {}


@pytest.mark.parametrize("packed", [False, True])
def test_a_reply_is_read_up_to_a_bound(service, load, packed):
    """However small it was on its way."""
    service.script({"size": 65 * 2**20, "packed": packed})
    error = one(load()).error
    assert error
    assert (error.code, "more than 64 MB" in error.message) == ("bad_reply", True)


@pytest.mark.parametrize(
    ("choice", "usage", "expected"),
    [
        ({"message": {"content": ""}}, None, ("", "stop", 1, 1)),
        ({"finish_reason": None}, False, ("BAD", "stop", 0, 0)),
        (
            {"finish_reason": "tool_calls"},
            {"prompt_tokens": -1, "completion_tokens": "7"},
            ("BAD", "tool_calls", 0, 0),
        ),
        ({"finish_reason": "length"}, {"prompt_tokens": 3}, ("BAD", "length", 3, 0)),
    ],
)
def test_unusual_answers_are_still_answers(service, load, choice, usage, expected):
    """An empty text that ends by itself is one; tokens that are not told count as 0."""
    service.script({"choice": choice, "usage": usage})
    reply = one(load(), "bad")
    assert (reply.output, reply.finish_reason, reply.prompt_tokens, reply.completion_tokens) == expected


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"status": 401}, "key_refused"),
        ({"status": 403}, "key_refused"),
        ({"status": 402}, "quota"),
        ({"status": 429, "code": "insufficient_quota"}, "quota"),
        ({"status": 404}, "model_missing"),
        ({"redirect": "http://127.0.0.1:9/elsewhere"}, "redirected"),
    ],
)
def test_what_no_row_survives_ends_the_batch(service, load, fault, code):
    """Rows that were finished come first; requests under way are ended; the error has a code and a hint."""
    service.script({**fault, "contains": "bad"}, {"hang": True, "contains": "slow"})
    found: list[int] = []
    batch = Batch(1, CallOptions(), ["good", "bad", "slow"])
    with pytest.raises(Fatal) as caught:
        found.extend(row for piece in load(concurrency=1).run(batch, threading.Event()) for row in piece.rows)
    assert found == [0]
    assert caught.value.code == code
    assert caught.value.hint


def test_a_prompt_that_is_no_unicode_is_never_sent(service, load):
    """Its row fails, its neighbour is answered, one request is made."""
    good, bad = ask(load(), ["good", "\ud800"])
    assert (good.output, bad.error and bad.error.code) == ("GOOD", "prompt_bad")
    assert service.stats()["requests"] == 1


def test_words_of_the_provider_that_repeat_the_prompt_are_not_shown(service, load):
    """Others are, without keys and short."""
    engine = load()
    service.script({"status": 400, "message": "Cannot read 'My name is Ann Smith' here."})
    assert "Ann" not in str(one(engine, "Hello! My name is Ann Smith.").error)
    service.script({"status": 400, "message": f"Unsupported value, says {CANARY}. " + "x" * 9000})
    said = str(one(engine, "Hello! My name is Ann Smith.").error)
    assert "Unsupported value" in said
    assert CANARY[:12] not in said
    assert len(said) < 400


def test_stopping_ends_the_requests(service, load):
    """The service sees its callers hang up; the rows are left out."""
    service.script({"hang": True, "times": 0})
    engine, stop = load(), threading.Event()
    ended: list[int] = []

    def run() -> None:
        ended.extend(row for piece in engine.run(Batch(1, CallOptions(), ["a"] * 20), stop) for row in piece.rows)

    thread = threading.Thread(target=run)
    thread.start()
    while service.stats()["in_flight"] < 20:
        pass
    stop.set()
    thread.join(timeout=5)
    while service.stats()["in_flight"]:
        pass
    assert not thread.is_alive()
    assert ended == []
    assert service.stats()["dropped"] == 20


def test_vectors_are_matched_to_their_texts(service, load):
    """One request for all; the dimension is found when the model is loaded."""
    engine = load("text-embedding-x")
    assert (engine.info.task, engine.info.dimension, engine.info.max_batch_rows) == (Task.EMBED, 16, 256)
    texts = [f"text {number}" for number in range(50)]
    alone = [one(engine, text).output for text in texts[:3]]
    service.reset()
    service.script({"vectors": "reordered"})
    replies = ask(engine, texts)
    assert service.stats()["requests"] == 1
    assert all(np.array_equal(reply.output, vector) for reply, vector in zip(replies, alone, strict=False))
    assert len({reply.output.tobytes() for reply in replies}) == 50
    assert {reply.output.dtype for reply in replies} == {np.dtype("float32")}
    assert sum(reply.prompt_tokens for reply in replies) == 100


@pytest.mark.parametrize(
    ("vectors", "failed"),
    [
        ("fewer", {2}),
        ("more", set()),
        ("twice", {0, 2}),
        ("nan", {0}),
        ("longer", {0}),
        ("text", {0}),
        ("unindexed", {0, 1, 2}),
    ],
)
def test_vectors_that_are_wrong_fail_their_rows_only(service, load, vectors, failed):
    """Too few or many, double, not a number or of another length: the neighbours keep theirs."""
    engine = load("x", task="embed")
    expected = ask(engine, ["a", "b", "c"])
    service.script({"vectors": vectors})
    replies = ask(engine, ["a", "b", "c"])
    assert {row for row, reply in enumerate(replies) if reply.error} == failed
    assert {reply.error.code for reply in replies if reply.error} <= {"bad_reply"}
    assert all(np.array_equal(replies[row].output, expected[row].output) for row in {0, 1, 2} - failed)


def test_texts_that_are_refused_together_are_not_all_to_blame(service, load):
    """A refused request for several texts is left to be halved; for one text it is that row's error."""
    engine = load("embed")
    service.script({"status": 400, "times": 0, "contains": "bad"})
    with pytest.raises(RowError) as caught:
        ask(engine, ["good", "bad"])
    assert caught.value.code == "rejected"
    assert one(engine, "bad").error.code == "rejected"
    service.script({"status": 503, "contains": "busy"})
    assert pieces(engine, ["busy", "idle"]) == {0: 0.0, 1: 0.0}


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        ({"status": 401}, Fatal, "key_refused"),
        ({"drop": True}, DeployError, "unreachable"),
        ({"vectors": "nan"}, DeployError, "bad_reply"),
    ],
)
def test_an_embedding_model_that_gives_no_vector_is_not_loaded(service, load, fault, kind, code):
    """Its dimension must be known."""
    service.script(fault)
    with pytest.raises(kind) as caught:
        load("embed")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"model": ""}, "option_missing", "which model"),
        ({"base_url": "127.0.0.1:8000"}, "option_value", "no address"),
        ({"base_url": "ftp://x/v1"}, "option_value", "no address"),
        ({"base_url": "http://me:hunter2hunter2@x/v1"}, "option_value", "no address"),
        ({"base_url": "http://x/v1?key=hunter2hunter2"}, "option_value", "no address"),
        ({"modle": "x"}, "option_unknown", "modle"),
        ({"api_key": "env:SQLEXT_NO_SUCH_VARIABLE"}, "secret_missing", "SQLEXT_NO_SUCH_VARIABLE"),
        ({"api_key": "file:/nowhere/key"}, "secret_missing", "/nowhere/key"),
        ({"api_key": "two words hunter2"}, "secret_bad", "no key"),
    ],
)
def test_options_that_are_wrong_are_found_before_a_request(service, load, options, code, says):
    """The message names the option or the place of the key, and shows neither key nor password."""
    with pytest.raises(UserError, match=says) as caught:
        load(**options)
    assert caught.value.code == code
    assert caught.value.hint
    assert "hunter2" not in str(caught.value)
    assert service.stats()["requests"] == 0


@pytest.mark.parametrize("form", ["env", "file", "literal"])
def test_a_key_is_sent_and_never_shown(service, load, monkeypatch, tmp_path, form):
    """However it is given: the service gets it, and no error, repr or pickle of what is told has it."""
    key = f"canary{next(_numbers)}-9f8e7d6c5b4a"
    monkeypatch.setenv("SQLEXT_TEST_KEY", key)
    (tmp_path / "key").write_text(key + "\n")
    said = {"env": "env:SQLEXT_TEST_KEY", "file": f"file:{tmp_path}/key", "literal": key}[form]
    service.script(api_key=key)
    engine = load(api_key=said)
    assert one(engine).output == "HELLO"
    shown = [repr(engine.info), str(vars(engine)), repr(engine), pickle.dumps(engine.info).decode("latin1")]
    service.script({"status": 400, "message": f"Your key {key} is odd."}, {"status": 500, "message": f"token {key}"})
    shown += [repr(one(engine).error), repr(one(engine).error)]
    service.script(api_key="another")
    with pytest.raises(SqlextError) as caught:
        one(engine)
    shown += [str(caught.value), repr(caught.value), repr(caught.value.info)]
    assert "Incorrect API key provided: ***" in str(caught.value)
    assert not [text for text in shown if key in text or key[:10] in text]


def test_what_the_environment_has_for_openai_does_not_go_elsewhere(service, load, monkeypatch):
    """Another service gets no key that was not named for it, and no organization."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    assert one(load()).output == "HELLO"
    names = set(service.stats()["headers"])
    assert not names & {"authorization", "openai-organization", "openai-project"}
