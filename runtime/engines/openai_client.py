"""The way to a provider: the options of a deployment, and the client of the `openai` package they make.

Alone because what leaves the machine, and where it goes, is decided here and nowhere else: one address, no redirects,
no retries, a bound on what comes back, and a key that only its own address gets.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx2
from openai import AsyncOpenAI, AsyncStream, DefaultAioHttpClient, Omit

from runtime.address import service_address
from runtime.errors import UserError, did_you_mean
from runtime.secrets import Secret, resolve
from runtime.spec import ModelSpec, Task

OPENAI_URL = "https://api.openai.com/v1"
OPTIONS = ("api_key", "base_url", "model", "task", "timeout", "concurrency", "max_tokens_name")
TIMEOUT_S = 120.0
CONCURRENCY = 64
CONNECT_TIMEOUT_S = 10.0
MAX_REPLY_BYTES = 64 * 1024 * 1024

Headers: TypeAlias = Mapping[str, str | Omit]


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a deployment, read. `timeout_s` is of one request, `concurrency` bounds those in flight."""

    base_url: str
    model: str
    task: Task
    key: Secret | None
    timeout_s: float
    concurrency: int
    max_tokens_name: str

    @property
    def where(self) -> str:
        """The model and its address, for people."""
        return f"{self.model} at {self.base_url}"


def read_settings(spec: ModelSpec) -> Settings:
    """The options of a deployment.

    Raises:
        UserError: option_unknown, option_missing, option_value, secret_missing, secret_bad.
    """
    said: dict[str, Any] = dict(spec.options)
    for name in said:
        if name not in OPTIONS:
            near = did_you_mean(name, OPTIONS)
            raise UserError(
                f'saas/openai has no option "{name}".',
                code="option_unknown",
                hint=(f'Did you mean "saas.{near}"? ' if near else "") + f"It has: {', '.join(OPTIONS)}.",
            )
    model = str(said.get("model") or "").strip()
    if not model:
        raise UserError(
            "The statement does not say which model of the provider to ask.",
            code="option_missing",
            hint='Add AND `saas.model`="…", by the name the provider gives it.',
        )
    base_url = service_address(str(said.get("base_url") or OPENAI_URL), "saas.base_url")
    usual = "max_completion_tokens" if base_url == OPENAI_URL else "max_tokens"
    task = said.get("task") or (Task.EMBED if "embed" in model.lower() else Task.GENERATE)
    return Settings(
        base_url=base_url,
        model=model,
        task=Task.EMBED if task == Task.EMBED else Task.GENERATE,
        key=resolve(said["api_key"]) if said.get("api_key") else None,
        timeout_s=float(said.get("timeout") or TIMEOUT_S),
        concurrency=int(said.get("concurrency") or CONCURRENCY),
        max_tokens_name=str(said.get("max_tokens_name") or usual),
    )


class ReplyTooLarge(Exception):
    """A reply has more than MAX_REPLY_BYTES."""


class BoundedClient(DefaultAioHttpClient):
    """The package's HTTP client, reading no more than MAX_REPLY_BYTES of a reply.

    On aiohttp, which takes a third of the processor time for a request that the package's usual transport takes.
    """

    async def send(self, request: httpx2.Request, **how: Any) -> httpx2.Response:
        """Send a request and read its reply whole; one that was asked for as a stream is left to be read, unless it
        is a refusal.

        Raises:
            ReplyTooLarge: it has more bytes.
        """
        response = await super().send(request, **{**how, "stream": True})
        if how.get("stream") and response.is_success:
            return response
        pieces, size = [], 0
        try:
            async for piece in response.aiter_bytes():
                pieces.append(piece)
                size += len(piece)
                if size > MAX_REPLY_BYTES:
                    raise ReplyTooLarge
        finally:
            await response.aclose()
        unpacked = {"content-encoding", "content-length", "transfer-encoding"}
        headers = [(name, value) for name, value in response.headers.multi_items() if name not in unpacked]
        return httpx2.Response(response.status_code, headers=headers, content=b"".join(pieces), request=request)


class Client:
    """The package's client for one provider.

    A key or an organization that the environment has for OpenAI does not go to other addresses.
    """

    def __init__(self, settings: Settings) -> None:
        key = settings.key.reveal() if settings.key else ""
        self._headers: Headers = {"Authorization": f"Bearer {key}" if key else Omit()}
        self._client = AsyncOpenAI(
            api_key=key or "none",  # else it would take one from the environment
            base_url=settings.base_url,
            max_retries=0,
            timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S),
            http_client=BoundedClient(
                follow_redirects=False, limits=httpx2.Limits(max_connections=settings.concurrency)
            ),
        )
        if settings.base_url != OPENAI_URL:
            self._client.organization = self._client.project = None

    async def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The body of the reply to one request, whatever it is.

        Raises:
            APIStatusError: the status is not 2xx.
            APIConnectionError, aiohttp.ClientError: there was no reply.
            ReplyTooLarge: there was too much of one.
        """
        response = await self._client.post(
            path, cast_to=httpx2.Response, body=body, options={"headers": self._headers}
        )
        return response.content

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """The reply to a request that asks for a stream: the data of each of its server-sent events.

        A reply that is no stream comes whole, as if it were one event. Raises as `post`.
        """
        asked: Any = await self._client.post(
            path,
            cast_to=httpx2.Response,
            body=body,
            options={"headers": self._headers},
            stream=True,
            stream_cls=AsyncStream[object],
        )
        response: httpx2.Response = asked  # what `cast_to` says counts
        try:
            async for data in _events(response):
                yield data
        finally:
            await response.aclose()

    async def close(self) -> None:
        """End the connections."""
        await self._client.close()


async def _events(response: httpx2.Response) -> AsyncIterator[bytes]:
    is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
    size, rest = 0, b""
    async for piece in response.aiter_bytes():
        size += len(piece)
        if size > MAX_REPLY_BYTES:
            raise ReplyTooLarge
        rest += piece
        if is_stream:
            *lines, rest = rest.split(b"\n")  # OpenAI's events are lines that begin with «data:»
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()
    if not is_stream or rest.startswith(b"data:"):
        yield rest.removeprefix(b"data:").strip()
