"""An OpenAI-compatible address as the target of a load test.

Alone because it speaks HTTP and measures: the stream is read as it comes, without a client in between that would
gather it, and the time is taken before anything is parsed.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any

import aiohttp

from runtime.address import service_address
from runtime.benchmark.observation import Observation
from runtime.errors import UserError
from runtime.secrets import Secret, quotes, redact

MAX_BYTES = 64 * 1024 * 1024  # of one reply
MAX_SAID_CHARS = 200
RESERVED = ("model", "messages", "stream", "stream_options")
"""Fields of a request that decide the form of its reply."""


class Endpoint:
    """`POST base_url/chat/completions`, streamed. Use it in an `async with`.

    Args:
        base_url: such as http://127.0.0.1:8000/v1.
        model: as the service calls it.
        key: goes to this address only; redirects are not followed.
        parameters: further fields of each request, such as temperature or ignore_eos.

    Raises:
        UserError: option_value, the address is none.
    """

    def __init__(
        self, base_url: str, model: str, key: Secret | None = None, parameters: Mapping[str, Any] | None = None
    ) -> None:
        self._url = service_address(base_url, "url") + "/chat/completions"
        self._headers = {"Authorization": f"Bearer {key.reveal()}"} if key else {}
        self._body = {**(parameters or {}), "model": model, "stream": True, "stream_options": {"include_usage": True}}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Endpoint:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(None),
            headers=self._headers,
            trace_configs=[_sending()],
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session:
            await self._session.close()

    async def ask(self, seen: Observation) -> None:
        """Send one request and watch its stream; what goes wrong is noted in `seen`."""
        assert self._session, "an Endpoint is used in an `async with`"
        body = {**self._body, "messages": [{"role": "user", "content": seen.request.prompt}]}
        if seen.request.max_tokens is not None:
            body["max_tokens"] = seen.request.max_tokens
        try:
            async with self._session.post(
                self._url, json=body, allow_redirects=False, trace_request_ctx=seen
            ) as response:
                if response.status != 200:
                    said = (await response.content.read(MAX_BYTES)).decode("utf-8", "replace")
                    seen.failed(str(response.status), _said(said, seen.request.prompt))
                    return
                await _watch(response.content, seen)
        except aiohttp.ClientConnectorError:
            seen.failed("unreachable", "There is no connection to the address.")
        except (aiohttp.ClientError, ConnectionError) as error:
            seen.failed("cut", f"The connection was lost: {type(error).__name__}.")


def _sending() -> aiohttp.TraceConfig:
    """Lets a request start when it leaves: where hundreds begin at once, each waits for the others to be written."""

    async def sent(session: aiohttp.ClientSession, context: Any, sending: Any) -> None:
        context.trace_request_ctx.start = time.perf_counter()

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(sent)
    return trace


def refuse_reserved(parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that decide the form of the reply.

    Raises:
        UserError: option_value.
    """
    if wrong := next((name for name in RESERVED if name in parameters), None):
        raise UserError(
            f'"{wrong}" cannot be set in a load test.',
            code="option_value",
            hint="Leave it out of sampling_params.",
        )


async def _watch(content: aiohttp.StreamReader, seen: Observation) -> None:
    """Read a stream of server-sent events to its end."""
    async for at, data in _events(content, seen):
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            seen.failed("bad_reply", "An event of the stream is no JSON.")
            return
        if error := event.get("error"):
            seen.failed(str(error.get("code") or "error"), _said(str(error.get("message")), seen.request.prompt))
            return
        if usage := event.get("usage"):
            seen.input_tokens, seen.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            if text := delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
                seen.piece(at, len(text))
            seen.finish_reason = choice.get("finish_reason") or seen.finish_reason
    if not seen.finish_reason:
        seen.failed("cut", "The stream ended in the middle of the answer.")


async def _events(content: aiohttp.StreamReader, seen: Observation) -> AsyncIterator[tuple[float, bytes]]:
    """The data of each event, with the time at which its last byte came."""
    rest, size = b"", 0
    while piece := await content.readany():
        at = time.perf_counter()
        size += len(piece)
        if size > MAX_BYTES:
            seen.failed("bad_reply", "The reply has more than 64 MB.")
            return
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at, line[5:].strip()


def _said(text: str, prompt: str) -> str:
    """What a service says of an error, without keys; nothing where it repeats the prompt."""
    try:
        error = json.loads(text).get("error")
        text = error.get("message", "") if isinstance(error, dict) else str(error or "")
    except (ValueError, AttributeError):
        pass
    line = redact(" ".join(text.split()))[:MAX_SAID_CHARS]
    return "" if quotes(line, [prompt]) else line
