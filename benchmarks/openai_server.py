"""A service that speaks OpenAI's protocol without a model: for tests and benchmarks of remote models.

It stands alone, in its own process, so that what is measured or broken is the way to a provider and nothing else.
Every answer follows from its prompt: a text comes back in capitals, a vector is drawn from the hash of the text. It
listens on the loopback address only.

    python benchmarks/openai_server.py --port 0        prints the base URL, such as http://127.0.0.1:40123/v1

Beside /v1/chat/completions and /v1/embeddings there are GET /stats (what came in since the last reset), POST /reset,
and POST /script, which makes the service misbehave: a list of faults (see `Fault`).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import math
import random
import re
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

DIMENSION = 16
MAX_REQUEST_BYTES = 64 * 1024 * 1024
START_TIMEOUT_S = 30.0


@contextmanager
def serve(*arguments: str) -> Iterator[str]:
    """The service in a process of its own; yields its base URL. It ends with the block, or with this process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--port", "0", "--with-stdin", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError(f"The service did not start: exit status {process.wait()}.")
            yield url
        finally:
            process.kill()


@dataclass
class Fault:
    """One way to misbehave, taken by the next requests that fit.

    Attributes:
        times: how many requests take it; 0: all of them.
        contains: only requests with this text in a prompt.
        status, code, message: an error in the provider's form; `headers` go with it.
        body, content_type: this text instead of an answer, with `status` 200 unless said.
        size: a body of so many bytes; `packed`: compressed, so that few of them travel.
        drop, hang: close the connection; never answer.
        redirect: send the caller there.
        choice: fields of the answer's choice; `message` among them replaces the whole message.
        usage: what the answer says was used; False: nothing.
        events: a streamed answer breaks off after so many.
        vectors: 'fewer', 'more', 'reordered', 'twice', 'nan', 'longer', 'text' or 'unindexed'.
    """

    times: int = 1
    contains: str = ""
    status: int = 0
    code: str | None = None
    message: str = "It was told to fail."
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    content_type: str = "application/json"
    size: int = 0
    packed: bool = False
    drop: bool = False
    hang: bool = False
    redirect: str = ""
    choice: dict[str, Any] = field(default_factory=dict)
    usage: Any = None
    events: int = 0
    vectors: str = ""
    left: int = 0


class Service:
    """What the requests came to, and what is to go wrong.

    Args:
        base_ms, token_ms, spread: an answer takes base_ms and token_ms for each of its tokens, times a factor between
            1 - spread and 1 + spread that follows from the prompt.
        api_key: when set, requests must bring it.
    """

    def __init__(self, base_ms: float, token_ms: float, spread: float, api_key: str) -> None:
        self.latency = (base_ms, token_ms, spread)
        self.first_key = api_key
        self.reset()

    def reset(self) -> None:
        """Forget everything; no faults."""
        self.faults: list[Fault] = []
        self.api_key = self.first_key
        self.statuses: Counter[str] = Counter()
        self.prompts: Counter[str] = Counter()
        self.header_names: set[str] = set()
        self.last: Any = None
        self.requests = self.inputs = self.in_flight = self.most_in_flight = self.dropped = 0

    def stats(self) -> dict[str, Any]:
        """Everything that was counted; prompts by the hash of their text."""
        return {
            "requests": self.requests,
            "statuses": self.statuses,
            "prompts": self.prompts,
            "inputs": self.inputs,
            "in_flight": self.in_flight,
            "most_in_flight": self.most_in_flight,
            "dropped": self.dropped,
            "headers": sorted(self.header_names),
            "last": self.last,
        }

    def fault(self, texts: list[str]) -> Fault | None:
        """The first fault that fits."""
        for fault in self.faults:
            if any(fault.contains in text for text in texts):
                if fault.times:
                    fault.left -= 1
                    if not fault.left:
                        self.faults.remove(fault)
                return fault
        return None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One request to the provider's interface, counted."""
        self.requests += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            response = await self._answered(request)
            self.statuses[str(response.status)] += 1
            return response
        except asyncio.CancelledError:  # the caller closed the connection
            self.dropped += 1
            raise
        finally:
            self.in_flight -= 1

    async def _answered(self, request: web.Request) -> web.StreamResponse:
        self.header_names.update(name.lower() for name in request.headers)
        asked = json.loads(await request.read())
        self.last = asked
        sent = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.api_key and sent != self.api_key:  # some providers quote the key, as here
            return refusal(401, f"Incorrect API key provided: {sent}.", "invalid_api_key")
        chat = request.path.endswith("/chat/completions")
        texts = [str(asked["messages"][-1]["content"])] if chat else texts_of(asked["input"])
        self.prompts.update(hashlib.sha256(text.encode()).hexdigest() for text in texts)
        fault = self.fault(texts)
        if fault and (broken := await misbehave(fault, request)):
            return broken
        if str(asked["model"]).startswith("missing"):
            return refusal(404, f"The model `{asked['model']}` does not exist.", "model_not_found")
        reply = completion(asked, texts[0], fault) if chat else embeddings(asked, texts, fault)
        if not chat:
            self.inputs += len(texts)
        seconds = self._seconds(texts[0], reply["usage"] if chat and fault is None else {})
        if chat and asked.get("stream"):
            return await stream(request, reply, seconds, fault)
        await asyncio.sleep(seconds)
        return web.json_response(reply)

    def _seconds(self, text: str, usage: dict[str, int]) -> float:
        base_ms, token_ms, spread = self.latency
        milliseconds = base_ms + token_ms * usage.get("completion_tokens", 1)
        return milliseconds * (1 + spread * random.Random(text).uniform(-1, 1)) / 1000 if milliseconds else 0.0


def texts_of(said: Any) -> list[str]:
    """The texts of an embedding request."""
    return [said] if isinstance(said, str) else said


def tokens(text: str) -> list[str]:
    """A token is a word."""
    return text.split()


def completion(asked: dict[str, Any], prompt: str, fault: Fault | None) -> dict[str, Any]:
    """The reply to a chat request: the prompt in capitals, or its last word for the model `last-word`."""
    words = tokens(prompt)
    limit = asked.get("max_tokens") or asked.get("max_completion_tokens")
    full = words[-1:] if asked["model"] == "last-word" else words
    cut = limit is not None and len(full) > limit
    text = " ".join(full[:limit]).upper() if cut or asked["model"] == "last-word" else prompt.upper()
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "length" if cut else "stop",
    }
    used = sum(len(tokens(str(turn["content"]))) for turn in asked["messages"])
    usage: Any = {"prompt_tokens": used, "completion_tokens": len(tokens(text))}
    if fault:
        choice |= fault.choice
        usage = usage if fault.usage is None else fault.usage or None
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": asked["model"],
        "choices": [choice],
        "usage": usage,
    }


async def stream(
    request: web.Request, reply: dict[str, Any], seconds: float, fault: Fault | None
) -> web.StreamResponse:
    """The same reply as events, a word at a time."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    choice = reply["choices"][0]
    words = re.findall(r"\S+\s*|\s+", choice["message"].get("content") or "")
    deltas: list[dict[str, Any]] = [{"role": "assistant"}, *({"content": word} for word in words)]
    parts = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    parts.append({"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]})
    events = [{**reply, "choices": [part], "usage": None} for part in parts]
    events.append({**reply, "choices": []})
    if fault and fault.events:
        events = events[: fault.events]
    for event in events:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await asyncio.sleep(seconds / len(events))
    if fault and fault.events:
        if request.transport:
            request.transport.close()
    else:
        await response.write(b"data: [DONE]\n\n")
    return response


def embeddings(asked: dict[str, Any], texts: list[str], fault: Fault | None) -> dict[str, Any]:
    """The reply to an embedding request."""
    rows: list[tuple[Any, list[float]]] = [(index, vector(text)) for index, text in enumerate(texts)]
    kind = fault.vectors if fault else ""
    if kind == "fewer":
        rows = rows[:-1]
    elif kind == "more":
        rows.append((len(rows), vector("")))
    elif kind == "reordered":
        rows.reverse()
    elif kind == "twice":
        rows[-1] = (0, rows[-1][1])
    elif kind == "nan":
        rows[0] = (0, [math.nan] * DIMENSION)
    elif kind == "longer":
        rows[0] = (0, [*rows[0][1], 0.0])
    elif kind == "text":
        rows[0] = (0, ["a"] * DIMENSION)  # type: ignore[list-item]
    elif kind == "unindexed":
        rows = [(None, values) for _, values in rows]
    packed = asked.get("encoding_format") == "base64" and kind not in ("nan", "text")
    return {
        "object": "list",
        "model": asked["model"],
        "data": [
            {"object": "embedding", "index": index, "embedding": pack(values) if packed else values}
            for index, values in rows
        ],
        "usage": {"prompt_tokens": sum(len(tokens(text)) for text in texts)},
    }


def vector(text: str) -> list[float]:
    """A vector of length 1 that follows from the text."""
    draw = random.Random(text)
    values = [draw.gauss(0, 1) for _ in range(DIMENSION)]
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values]


def pack(values: list[float]) -> str:
    """float32 in base64, as OpenAI sends vectors when asked to."""
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


async def misbehave(fault: Fault, request: web.Request) -> web.StreamResponse | None:
    """The response of a fault; None when it only changes the answer."""
    if fault.hang:
        await asyncio.sleep(3600)
    if fault.drop and request.transport:
        request.transport.abort()
    if fault.drop:
        return web.Response(status=499)
    if fault.redirect:
        return web.Response(status=307, headers={"Location": fault.redirect})
    if fault.body is not None or fault.size:
        text = "x" * fault.size if fault.body is None else fault.body
        reply = web.Response(
            text=text, status=fault.status or 200, headers=fault.headers, content_type=fault.content_type
        )
        if fault.packed:
            reply.enable_compression(web.ContentCoding.gzip)
        return reply
    return refusal(fault.status, fault.message, fault.code, fault.headers) if fault.status else None


def refusal(
    status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
) -> web.StreamResponse:
    """An error in the provider's form."""
    error = {"message": message, "type": "error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


def application(service: Service) -> web.Application:
    """The routes."""

    async def stats(_: web.Request) -> web.Response:
        return web.json_response(service.stats())

    async def reset(_: web.Request) -> web.Response:
        service.reset()
        return web.json_response({})

    async def script(request: web.Request) -> web.Response:
        said = await request.json()
        service.api_key = said.get("api_key", service.api_key)
        service.latency = tuple(said.get("latency", service.latency))
        for fault in said.get("faults", []):
            service.faults.append(Fault(**fault, left=fault.get("times", 1)))
        return web.json_response({})

    app = web.Application(client_max_size=MAX_REQUEST_BYTES)
    app.add_routes(
        [
            web.post("/v1/chat/completions", service.answer),
            web.post("/v1/embeddings", service.answer),
            web.get("/stats", stats),
            web.post("/reset", reset),
            web.post("/script", script),
        ]
    )
    return app


async def run(service: Service, port: int, with_stdin: bool) -> None:
    """Serve until the process is ended; with `with_stdin` also until standard input ends."""
    # A caller who hangs up cancels the work for it, as at a real provider.
    runner = web.AppRunner(application(service), access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=2048)
    await site.start()
    host, bound = runner.addresses[0][:2]
    print(f"http://{host}:{bound}/v1", flush=True)
    ended = asyncio.Event()
    if with_stdin:
        loop = asyncio.get_running_loop()

        def wait() -> None:
            sys.stdin.read()
            loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=wait, daemon=True).start()
    await ended.wait()
    await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--base-ms", type=float, default=0.0, help="milliseconds that every answer takes")
    parser.add_argument("--token-ms", type=float, default=0.0, help="and for each of its tokens")
    parser.add_argument("--spread", type=float, default=0.0, help="times 1 - spread to 1 + spread, by the prompt")
    parser.add_argument("--api-key", default="", help="refuse requests without it")
    parser.add_argument("--with-stdin", action="store_true", help="end when standard input ends")
    said = parser.parse_args()
    service = Service(said.base_ms, said.token_ms, said.spread, said.api_key)
    asyncio.run(run(service, said.port, said.with_stdin))


if __name__ == "__main__":
    main()
