"""The load generator against a real server that answers, fails, breaks off and hangs."""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.benchmark.bench import measure_endpoint
from runtime.benchmark.load import Load, drive
from runtime.benchmark.observation import Observation
from runtime.benchmark.summary import Plan, responses, summarize
from runtime.benchmark.workload import Request
from runtime.errors import Cancelled

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
serve = importlib.import_module("openai_server").serve


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A service whose answers are the prompts in capitals, a word for each token."""
    with serve("--token-ms", "2") as url:
        yield url


def script(url: str, faults: str) -> None:
    """What is to go wrong."""
    base = url.removesuffix("/v1")
    for path, body in (("/reset", b""), ("/script", b'{"faults": %s}' % faults.encode())):
        urllib.request.urlopen(urllib.request.Request(base + path, data=body, method="POST")).read()


def ask(url: str, prompts: list[str], **more: object) -> list[Observation]:
    """Put a load on the server."""
    load = Load([Request(prompt) for prompt in prompts], concurrency=4, **more)  # type: ignore[arg-type]
    return measure_endpoint(url, "echo", None, {}, load, lambda *_: None)


def test_tokens_and_pieces_come_from_the_service(server: str) -> None:
    """Usage is the service's own, and every token has its time."""
    script(server, "[]")
    found = ask(server, ["one two three", "four five"])
    assert [(one.input_tokens, one.output_tokens, len(one.pieces)) for one in found] == [(3, 3, 3), (2, 2, 2)]
    rows = responses(found)
    assert [row["finish_reason"] for row in rows] == ["stop", "stop"]
    assert [len(row["itl_s"]) for row in rows] == [2, 1]
    assert all(row["ttft_s"] <= row["end_to_end_latency_s"] for row in rows)


def test_nothing_that_goes_wrong_breaks_the_run_or_vanishes(server: str) -> None:
    """Refused, cut, hanging, dropped and one-token requests are all there, each with its code."""
    script(
        server,
        '[{"contains": "busy", "status": 429}, {"contains": "cut", "events": 3},'
        ' {"contains": "hang", "hang": true}, {"contains": "drop", "drop": true}]',
    )
    found = ask(server, ["busy", "cut one two three", "hang", "drop", "one", "fine by me"], request_timeout_s=1.0)
    rows = responses(found)
    assert [row["error_code"] for row in rows] == ["429", "cut", "timeout", "cut", None, None]
    assert rows[1]["ttft_s"] is not None  # what came before it was cut is kept
    assert rows[4]["tpot_s"] is None
    summary = summarize(Plan("echo", "custom", 4), rows)
    assert (summary.started, summary.completed, dict(summary.error_codes)) == (
        6,
        2,
        {"cut": 2, "429": 1, "timeout": 1},
    )


def test_no_message_repeats_a_prompt(server: str) -> None:
    """Also where the service does."""
    script(server, '[{"times": 0, "status": 400, "message": "bad: the words of the prompt"}]')
    (row,) = responses(ask(server, ["the words of the prompt"]))
    assert (row["error_code"], row["error_msg"]) == ("400", None)


def test_nobody_is_there() -> None:
    """No connection is an error of each request."""
    rows = responses(ask("http://127.0.0.1:9/v1", ["a", "b"]))
    assert [row["error_code"] for row in rows] == ["unreachable"] * 2


class Still:
    """A target that answers after 0.05 s."""

    def __init__(self) -> None:
        self.most = self.now = 0

    async def ask(self, seen: Observation) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.05)
        seen.piece(time.perf_counter(), 1)
        self.now -= 1


def test_a_closed_loop_keeps_so_many_in_flight() -> None:
    """Neither more nor fewer, also where the requests cannot be shared out evenly."""
    target = Still()
    found = asyncio.run(drive(target, Load([Request(str(i)) for i in range(7)], concurrency=3)))
    assert (target.most, len(found)) == (3, 7)
    assert [one.request.prompt for one in found] == [str(i) for i in range(7)]


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """All are sent before the first one ends."""
    target = Still()
    load = Load([Request(str(i)) for i in range(5)], arrivals=[0.0] * 5)
    assert len(asyncio.run(drive(target, load))) == 5
    assert target.most == 5


def test_after_the_timeout_nothing_more_is_sent() -> None:
    """What was sent is waited for; what was not is left out."""
    for how in ({"concurrency": 1}, {"arrivals": [0.1 * i for i in range(50)]}):
        load = Load([Request(str(i)) for i in range(50)], timeout_s=0.12, **how)  # type: ignore[arg-type]
        found = asyncio.run(drive(Still(), load))
        assert 1 <= len(found) < 50
        assert all(one.pieces for one in found)


def test_a_cancelled_run_ends() -> None:
    """What the progress raises ends the run, and everything in flight."""

    def tell(sent: int, ended: int) -> None:
        if ended:
            raise Cancelled("enough")

    target = Still()
    with pytest.raises(Cancelled):
        asyncio.run(drive(target, Load([Request(str(i)) for i in range(1_000)], concurrency=2), tell))
    assert target.most == 2
