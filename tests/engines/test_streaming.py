"""What whoever follows an answer while it is written may rely on, engine by engine."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.engines import Engine, loader, telling
from runtime.engines.telling import Telling, without_beginning
from runtime.prompts.format import PromptFormat
from runtime.spec import Answers, Batch, CallOptions, Delta, ModelSpec

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
serve = importlib.import_module("openai_server").serve


def followed(engine: Engine, prompts: list[str], rows: set[int], **options: Any) -> tuple[Any, Any, list[Answers]]:
    """The parts that were told, and the outputs, by row; and what came else."""
    told: dict[int, list[str]] = defaultdict(list)
    outputs: dict[int, Any] = {}
    answers = []
    for piece in engine.run(Batch(1, CallOptions(**options), prompts, frozenset(rows)), threading.Event()):
        if isinstance(piece, Delta):
            assert piece.row not in outputs
            told[piece.row].append(piece.text)
        else:
            answers.append(piece)
            outputs.update(zip(piece.rows, piece.outputs, strict=True))
    return told, outputs, answers


@pytest.fixture
def every_token(monkeypatch):
    """Parts are told after every token, however fast they come."""
    monkeypatch.setattr(telling, "PAUSE_S", 0.0)


@pytest.mark.usefixtures("every_token")
@pytest.mark.parametrize("stop", [(), ("e",), ("th", "st is", "1 2")])
def test_what_is_told_is_what_the_answer_begins_with(engine, stop):
    """Only of the rows that are followed; the parts are whole characters and hold nothing of a stop text."""
    chat = engine("transformers", "plain")
    prompts = ["one", "two é", "three", "NULL is a"]
    told, outputs, _ = followed(chat, prompts, {0, 2, 3}, max_tokens=60, stop=stop)
    assert set(told) <= {0, 2, 3}
    assert any(len(parts) > 3 for parts in told.values())
    for row, parts in told.items():
        assert outputs[row].startswith("".join(parts))
        assert all(parts)
        assert not any(end in "".join(parts) for end in stop)
    assert outputs == followed(chat, prompts, set(), max_tokens=60, stop=stop)[1]


@pytest.mark.usefixtures("every_token")
def test_half_a_character_is_waited_for():
    """Bytes that are no character yet are not told; those that never become one are, with what follows them."""
    rows = Telling([0])
    texts = ("a", "a\ufffd", "aé", "aé\ufffd", "aé\ufffdb")
    parts = [rows.more(0, partial(str, text)) for text in texts]
    assert [part and part.text for part in parts] == ["a", None, "é", None, "\ufffdb"]


@pytest.mark.parametrize(
    ("text", "told"),
    [("abc", "abc"), ("abcST", "abc"), ("abcSTOP", "abc"), ("abcSTOPde", "abc"), ("abcSS", "abcS"), ("S", "")],
)
def test_what_may_become_a_stop_text_is_waited_for(text, told):
    """The end of a text that a stop text may begin with is held back."""
    assert without_beginning(text, ("STOP", "zz")) == told


def test_what_a_prompt_format_puts_around_an_answer_is_not_told():
    """Letter by letter, what is told is what the answer will begin with."""
    written = PromptFormat(system="{instruction}", user="U {instruction}", assistant="Bot: {instruction} </s>")
    whole = " Bot: A list holds < 3 </s>"
    told = ""
    for end in range(len(whole) + 1):
        settled = written.settled(whole[:end])
        assert settled.startswith(told)
        told = settled
    assert told == written.content(whole) == "A list holds < 3"


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with serve() as url:
        yield url


@pytest.fixture
def remote(service: str) -> Iterator[Callable[..., Engine]]:
    """remote(fault…): the engine of a provider that misbehaves so."""
    loaded = []

    def make(*faults: dict[str, Any], **settings: Any) -> Engine:
        body = json.dumps({"faults": faults, **settings}).encode()
        urllib.request.urlopen(service.removesuffix("/v1") + "/script", body).close()
        loaded.append(loader("openai")(ModelSpec("m", "openai", options=(("base_url", service), ("model", "chat")))))
        return loaded[-1]

    yield make
    for engine in loaded:
        engine.close()


def test_a_provider_is_asked_for_events_where_someone_follows(remote):
    """Its words are told as they come; text, reason and tokens of the answer are those without a stream."""
    prompts = ["one  two\nthree", "four", "ünï ☃"]
    told, outputs, answers = followed(remote(), prompts, {0, 2})
    assert ["".join(told[row]) for row in (0, 2)] == [outputs[0], outputs[2]] == ["ONE  TWO\nTHREE", "ÜNÏ ☃"]
    assert (len(told[0]), 1 in told) == (3, False)
    for piece in answers:
        assert set(piece.finish_reasons) == {"stop"}
        assert list(piece.completion_tokens) == [len(prompts[row].split()) for row in piece.rows]


def test_a_stream_that_breaks_off_may_be_tried_again(remote):
    """What came before is told; the row is no answer, but one to be asked anew."""
    told, outputs, answers = followed(remote({"events": 3}), ["one two three four"], {0})
    assert "".join(told[0]) == "ONE TWO "
    assert outputs == {0: None}
    assert list(answers[0].retry_after_s) == [0]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"status": 400}, "rejected"),
        ({"status": 503}, "provider_failed"),
        ({"body": "data: {\n\n", "content_type": "text/event-stream"}, "bad_reply"),
        ({"body": 'data: {"error": {"message": "no"}}\n\n', "content_type": "text/event-stream"}, "bad_reply"),
        ({"body": "data: [DONE]\n\n", "content_type": "text/event-stream"}, "provider_failed"),
        ({"size": 65 * 2**20, "packed": True}, "bad_reply"),
        ({"drop": True}, "unreachable"),
    ],
)
def test_a_stream_that_is_refused_or_broken_is_the_rows_error(remote, fault, code):
    """As without a stream: nothing of it is believed, and not without bound."""
    _, outputs, answers = followed(remote(fault), ["one"], {0})
    assert outputs == {0: None}
    assert answers[0].errors[0].code == code


def test_a_service_without_streams_is_understood(remote):
    """One that answers as if no stream had been asked for: the answer comes in one piece."""
    body = json.dumps({"choices": [{"message": {"content": "WHOLE"}, "finish_reason": "stop"}]})
    told, outputs, _ = followed(remote({"body": body}), ["one"], {0})
    assert (dict(told), outputs) == ({}, {0: "WHOLE"})
