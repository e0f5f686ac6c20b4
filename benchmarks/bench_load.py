"""What the load generator adds to what it measures, against a server that knows its own times.

    python benchmarks/bench_load.py

The server (a process of its own) streams answers on a fixed schedule and notes when it really sent each piece; clocks
are shared on a machine. Compared are the figures that the load generator reports with those of the server's notes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from runtime.benchmark.bench import measure_endpoint
from runtime.benchmark.load import Load
from runtime.benchmark.observation import Observation
from runtime.benchmark.summary import METRICS, Plan, Summary, responses, summarize
from runtime.benchmark.workload import Request, arrivals


class Scheduled:
    """Answers of `tokens` tokens in pieces of `piece`: the first after `first_ms`, the others `token_ms` a token."""

    def __init__(self) -> None:
        self.notes: dict[str, list[float]] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One streamed answer; the prompt is `number first_ms token_ms tokens piece`."""
        came = time.perf_counter()
        asked = json.loads(await request.read())
        number, *figures = asked["messages"][-1]["content"].split()
        first_ms, token_ms, tokens, piece = (float(figure) for figure in figures)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        notes = self.notes[number] = [came]
        for sent in range(0, int(tokens), int(piece)):
            due = came + (first_ms + token_ms * sent) / 1000
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            delta = {"index": 0, "delta": {"content": "word " * int(piece)}, "finish_reason": None}
            await response.write(b"data: " + json.dumps({"choices": [delta]}).encode() + b"\n\n")
            notes.append(time.perf_counter())
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        last["usage"] = {"prompt_tokens": 5, "completion_tokens": int(tokens)}  # type: ignore[assignment]
        await response.write(b"data: " + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    async def told(self, _: web.Request) -> web.Response:
        """When each request came and each of its pieces went; forgotten then."""
        notes, self.notes = self.notes, {}
        return web.json_response(notes)


@contextmanager
def server() -> Iterator[str]:
    """The server's address."""
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.kill()


async def serve() -> None:
    """Serve until killed."""
    scheduled = Scheduled()
    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", scheduled.answer), web.get("/notes", scheduled.told)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
    await asyncio.Event().wait()


def run(url: str, count: int, schedule: str, **how: Any) -> tuple[Summary, Summary]:
    """What the load generator says of `count` requests, and what the server's notes come to."""
    load = Load([Request(f"{number} {schedule}") for number in range(count)], **how)
    seen = measure_endpoint(url, "scheduled", None, {}, load, lambda *_: None)
    with urllib.request.urlopen(url.removesuffix("/v1") + "/notes") as reply:
        notes = json.load(reply)
    true = [noted(one, notes[str(one.number)]) for one in seen]
    plan = Plan("scheduled", "custom", how.get("concurrency"), 0.0)
    return summarize(plan, responses(seen)), summarize(plan, responses(true))


def noted(one: Observation, notes: list[float]) -> Observation:
    """The same request by the server's notes; it began when it came there."""
    came, *sent = notes
    true = Observation(one.number, one.request, came, came, sent[-1], [], 5, one.output_tokens, "stop")
    true.pieces = [(at, chars) for at, (_, chars) in zip(sent, one.pieces, strict=True)]
    return true


def main() -> None:
    """Print how far the figures are apart."""
    with server() as url:
        run(url, 20, "5 1 5 1", concurrency=10)
        for schedule, what in (("100 20 30 1", "a token at a time"), ("100 20 30 3", "three tokens at a time")):
            said, true = run(url, 100, schedule, concurrency=10)
            print(f"100 answers of 30 tokens, {what}, 10 at once: by how much the figures differ from the server's")
            for metric in METRICS[:5]:
                mine, theirs = dict(said.spreads)[metric], dict(true.spreads)[metric]
                off = [abs(a / b - 1) for a, b in ((mine.mean, theirs.mean), (mine.p95, theirs.p95)) if a and b]
                print(f"  {metric:32} mean {off[0]:6.2%}   p95 {off[1]:6.2%}")
            total, real = said.total_output_throughput_token_per_s, true.total_output_throughput_token_per_s
            print(f"  {'total_output_throughput':32} {abs((total or 0) / (real or 1) - 1):11.2%}")
        said, _ = run(url, 2_000, "20 1 5 1", arrivals=arrivals(2_000, 200, "constant", 0))
        delay = said.start_delay_s
        print(f"open loop, 200 requests a second: late by {1000 * (delay.p50 or 0):.2f} ms (p50), ", end="")
        print(f"{1000 * (delay.p99 or 0):.2f} ms (p99), errors {said.errors}")
        said, true = run(url, 500, "2000 100 20 1", concurrency=500)
        mine, theirs = dict(said.spreads)["ttft_s"], dict(true.spreads)["ttft_s"]
        print(
            f"500 streams at once: time to the first token {mine.mean:.3f} s, the server's {theirs.mean:.3f} s, ",
            end="",
        )
        print(f"{(mine.mean or 0) / (theirs.mean or 1) - 1:.2%} more; errors {said.errors}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asyncio.run(serve()) if parser.parse_args().serve else main()
