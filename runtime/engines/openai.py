"""Models behind an OpenAI-compatible address: chat and embeddings, through the `openai` package.

Alone because here the work is done elsewhere and all is waiting: one thread with an event loop holds the requests of
all batches, bounded together, so that a batch's end is no pause. Nothing is tried again here: a row that may succeed
later comes back with the seconds to wait, and the gateway holds the one retry loop of the program.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import aiohttp
import httpx2
from openai import APIConnectionError, APIStatusError

from runtime.engines.microbatch import texts_of
from runtime.engines.openai_client import MAX_REPLY_BYTES, Client, ReplyTooLarge, Settings, read_settings
from runtime.engines.openai_replies import (
    BAD_REPLY,
    BODY_ERRORS,
    Reply,
    StreamedReply,
    chat_reply,
    refusal,
    vector_replies,
)
from runtime.errors import DeployError, ErrorInfo, Fatal, RowError, SqlextError
from runtime.prompts.chat import conversation
from runtime.secrets import quotes
from runtime.spec import Answers, Batch, CallOptions, Delta, EngineInfo, ModelSpec, Prompt, Task

EMBED_ROWS = 256  # texts of one request
EMBED_CHARS = 200_000  # OpenAI takes 300,000 tokens in one request
CHAT_CHARS = 1_000_000  # each row is a request of its own
POLL_S = 0.05
RESERVED = ("model", "messages", "input", "stream", "n", "encoding_format")
"""Fields of a request that decide the form of its reply."""

T = TypeVar("T")
Put: TypeAlias = Callable[[dict[int, Reply] | Delta], None]
"""Takes finished rows of a batch, by index, and parts of texts."""
Box: TypeAlias = "queue.SimpleQueue[dict[int, Reply] | Delta | None]"


class OpenAIEngine:
    """One model of one provider. `run` may be called by several threads at once.

    Args:
        settings: which, and how to ask it.
    """

    def __init__(self, settings: Settings, info: EngineInfo) -> None:
        self.info = info
        self._settings = settings
        self._flight = asyncio.Semaphore(settings.concurrency)
        self._client = Client(settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-requests", daemon=True)
        self._thread.start()

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers | Delta]:
        """Ask for every row, all at once as far as the engine's bound allows; a row comes as soon as it is there.

        Raises:
            Fatal: key, quota, model or address are wrong, or a parameter is; rows that were finished came before.
            RowError: the provider rejects a request for several texts and does not say which of them is wrong.
        """
        begun = time.perf_counter()
        parameters = _parameters(batch.options, self._settings)
        ask = self._embed if self.info.task is Task.EMBED else self._chat
        box: Box = queue.SimpleQueue()
        job = asyncio.run_coroutine_threadsafe(ask(batch, parameters, box.put), self._loop)
        job.add_done_callback(lambda _: box.put(None))
        try:
            for deltas, replies in _gathered(box, stop):
                yield from deltas
                if replies:
                    yield _answers(replies, (time.perf_counter() - begun) * 1000.0)
            if job.done() and not job.cancelled() and (error := job.exception()):
                raise _first(error)
        finally:
            job.cancel()

    def close(self) -> None:
        """End the requests in flight and the connections."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def measured(self, options: CallOptions) -> OpenAIEngine:
        """This engine with the length of its vectors found, by asking for one with these options.

        Raises:
            DeployError: there was no vector.
            Fatal: as `run`.
        """
        for answers in self.run(Batch(0, options, ["ok"]), threading.Event()):
            if isinstance(answers, Delta):
                continue
            for error in answers.errors.values():
                raise DeployError(error.message, code=error.code, hint=error.hint)
            self.info = replace(self.info, dimension=len(answers.outputs[0]))
        return self

    # -- on the loop's thread ---------------------------------------------------------------------------------------

    async def _chat(self, batch: Batch, parameters: dict[str, Any], put: Put) -> None:
        async with asyncio.TaskGroup() as rows:
            for row, prompt in enumerate(batch.prompts):
                streams = row in batch.stream
                rows.create_task(self._chat_row(row, prompt, batch.options.system, parameters, put, streams=streams))

    async def _chat_row(
        self, row: int, prompt: Prompt, system: str | None, parameters: dict[str, Any], put: Put, *, streams: bool
    ) -> None:
        try:
            turns = conversation(prompt, system)
        except RowError as error:
            put({row: Reply(error=error.info)})
            return
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        body = {**parameters, "messages": messages}

        async def follow() -> Reply:
            return await self._follow(body, lambda more: put(Delta(row, more)))

        async def wait() -> Reply:
            return chat_reply(await self._client.post("/chat/completions", body))

        put({row: await self._ask(follow if streams else wait, [prompt], system)})

    async def _follow(self, body: dict[str, Any], tell: Callable[[str], None]) -> Reply:
        """Ask for a row as a stream of events, and tell its text as it comes."""
        reply = StreamedReply()
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with aclosing(self._client.events("/chat/completions", asked)) as events:
            async for event in events:
                try:
                    more = reply.add(event)
                except BODY_ERRORS:
                    return Reply(error=BAD_REPLY)
                if more:
                    tell(more)
        return reply.reply()

    async def _embed(self, batch: Batch, parameters: dict[str, Any], put: Put) -> None:
        texts, errors = texts_of(batch)
        put({row: Reply(error=error) for row, error in errors.items()})
        if not texts:
            return
        body = {**parameters, "input": list(texts.values())}
        found = await self._ask(lambda: self._client.post("/embeddings", body), batch.prompts, None)
        if isinstance(found, Reply):
            if found.error and found.retry_after_s is None and len(texts) > 1:  # halved, the one to blame is found
                raise RowError(found.error.message, code=found.error.code, hint=found.error.hint)
            replies = [found] * len(texts)
        else:
            replies = vector_replies(found, len(texts), self.info.dimension)
        put(dict(zip(texts, replies, strict=True)))

    async def _ask(
        self, request: Callable[[], Awaitable[T]], prompts: Sequence[Prompt], system: str | None
    ) -> T | Reply:
        """What one request comes to, or what became of its rows without a reply."""
        settings = self._settings
        async with self._flight:
            try:
                async with asyncio.timeout(settings.timeout_s):
                    return await request()
            except APIStatusError as error:
                return refusal(error, settings.where, lambda text: quotes(text, prompts, system))
            except TimeoutError:
                said = ErrorInfo("timeout", f"No answer after {settings.timeout_s:g} s ({settings.where}).")
                return Reply(error=said, retry_after_s=0.0)
            except (APIConnectionError, aiohttp.ClientError, httpx2.TransportError) as error:
                return Reply(error=_unreachable(error, settings), retry_after_s=0.0)
            except ReplyTooLarge:
                size = f"{MAX_REPLY_BYTES // 2**20} MB"
                return Reply(error=ErrorInfo("bad_reply", f"The reply has more than {size} ({settings.where})."))

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()


def load(spec: ModelSpec) -> OpenAIEngine:
    """An engine for the model that the options name; `spec.path` is not read.

    Options: model; base_url (OpenAI's, when not said); api_key (env:NAME, file:PATH or the key; none for a service
    that needs none); task (generate or embed; by the model's name, when not said); timeout (seconds of one request);
    concurrency (requests in flight); max_tokens_name (how the provider calls max_tokens).

    Raises:
        UserError: an option is missing or wrong, or the key is not where it should be.
        DeployError, Fatal: an embedding model gave no vector.
    """
    settings = read_settings(spec)
    embeds = settings.task is Task.EMBED
    info = EngineInfo(
        engine="openai",
        task=settings.task,
        device="remote",
        max_batch_rows=EMBED_ROWS if embeds else max(1, settings.concurrency // 4),
        max_batch_chars=EMBED_CHARS if embeds else CHAT_CHARS,
        max_answer_tokens=None if embeds else spec.defaults.max_tokens,
        streams=not embeds,
        notes=(settings.where,),
    )
    engine = OpenAIEngine(settings, info)
    try:
        return engine.measured(spec.defaults) if embeds else engine
    except BaseException:
        engine.close()
        raise


def _parameters(options: CallOptions, settings: Settings) -> dict[str, Any]:
    """The fields of a request that all rows of a batch share.

    Raises:
        Fatal: option_unknown.
    """
    extra = {name: list(value) if isinstance(value, tuple) else value for name, value in options.extra}
    if wrong := next((name for name in RESERVED if name in extra), None):
        raise Fatal(
            f'"{wrong}" cannot be set for a model of a provider.', code="option_unknown", hint="Leave it out."
        )
    if settings.task is Task.EMBED:
        return {**extra, "model": settings.model, "encoding_format": "base64"}
    said = {
        settings.max_tokens_name: options.max_tokens,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "stop": list(options.stop) or None,
        "seed": options.seed,
    }
    known = {name: value for name, value in said.items() if value is not None}
    # Not said means greedy here, and 1 to providers.
    return {**extra, **known, "model": settings.model, "temperature": options.temperature or 0}


def _gathered(box: Box, stop: threading.Event) -> Iterator[tuple[list[Delta], dict[int, Reply]]]:
    """Parts of texts and finished rows, those that are there at the same time together, until None comes or `stop`
    is set."""
    ended = False
    while not ended and not stop.is_set():
        try:
            found = [box.get(timeout=POLL_S)]
            while not box.empty():
                found.append(box.get_nowait())
        except queue.Empty:
            continue
        ended = None in found
        deltas = [item for item in found if isinstance(item, Delta)]
        rows = {row: reply for item in found if isinstance(item, dict) for row, reply in item.items()}
        if deltas or rows:
            yield deltas, rows


def _answers(replies: dict[int, Reply], latency_ms: float) -> Answers:
    return Answers(
        rows=list(replies),
        outputs=[reply.output for reply in replies.values()],
        finish_reasons=[reply.finish_reason for reply in replies.values()],
        prompt_tokens=[reply.prompt_tokens for reply in replies.values()],
        completion_tokens=[reply.completion_tokens for reply in replies.values()],
        latency_ms=latency_ms,
        errors={row: reply.error for row, reply in replies.items() if reply.error},
        retry_after_s={row: reply.retry_after_s for row, reply in replies.items() if reply.retry_after_s is not None},
    )


def _first(error: BaseException) -> BaseException:
    """The error that ended a batch, out of the group it may come in; ours before others."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    inner = [_first(each) for each in error.exceptions]
    return next((each for each in inner if isinstance(each, SqlextError)), inner[0])


def _unreachable(error: Exception, settings: Settings) -> ErrorInfo:
    cause: BaseException = error
    while cause.__cause__:
        cause = cause.__cause__
    return ErrorInfo(
        "unreachable",
        f"There is no connection to the provider ({settings.where}): {type(cause).__name__}.",
        "Check saas.base_url, and that the service runs and can be reached from where the workers run.",
    )
