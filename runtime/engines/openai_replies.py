"""What a provider's reply means: an answer, an error of a row that may be tried again or not, or the end of it all.

Alone because it is reading, without a connection: a reply comes from a stranger and may be anything. Nothing of it is
believed that was not checked, and its words are shown only without keys and if they repeat no prompt.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from openai import APIStatusError

from runtime.errors import ErrorInfo, Fatal
from runtime.secrets import redact

MAX_SAID = 200  # characters of a provider's own message that are passed on
BODY_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What reading a reply of an unexpected form may raise."""

BAD_REPLY = ErrorInfo(
    "bad_reply",
    "The provider's reply is no answer in OpenAI's form.",
    "See whether saas.base_url is the address of an OpenAI-compatible service.",
)


BROKEN_OFF = ErrorInfo("provider_failed", "The provider's answer broke off before its end.")


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one row.

    Attributes:
        output: a text, or a float32 vector; None where the row failed.
        retry_after_s: set when the next attempt may succeed: seconds to wait first, as far as the provider says.
    """

    output: Any = None
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: ErrorInfo | None = None
    retry_after_s: float | None = None


def chat_reply(body: bytes) -> Reply:
    """The answer in the reply to a chat request."""
    try:
        found = json.loads(body)
    except BODY_ERRORS:
        return Reply(error=BAD_REPLY)
    return _chat_reply(found)


def _chat_reply(found: Any) -> Reply:
    try:
        choice = found["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason") or "stop"
        text = message.get("content")
        used = found.get("usage") or {}
        if not isinstance(text, str | None) or not isinstance(reason, str):
            return Reply(error=BAD_REPLY)
        (text or "").encode()  # half a surrogate pair could not be stored
        tokens = _count(used.get("prompt_tokens")), _count(used.get("completion_tokens"))
        error = _no_answer(text, reason, message.get("refusal"))
    except BODY_ERRORS:
        return Reply(error=BAD_REPLY)
    return Reply(None, "", *tokens, error) if error else Reply(text, reason, *tokens)


class StreamedReply:
    """The reply to a chat request as it comes in events."""

    def __init__(self) -> None:
        self._text: str | None = None
        self._refusal = ""
        self._reason = ""
        self._usage: Any = None
        self._whole: Reply | None = None

    def add(self, event: bytes) -> str:
        """Read the next event; returns what it adds to the text.

        Raises:
            ValueError, TypeError, LookupError, AttributeError, RecursionError: it is no event in OpenAI's form.
        """
        if event == b"[DONE]":
            return ""
        found = json.loads(event)
        self._usage = found.get("usage") or self._usage
        for choice in found.get("choices") or ():
            if "delta" not in choice:  # a service that knows no streams has sent its answer
                self._whole = _chat_reply(found)
                return ""
            self._reason = choice.get("finish_reason") or self._reason
            self._refusal += choice["delta"].get("refusal") or ""
            more = choice["delta"].get("content")
            if more is not None:
                more.encode()  # half a surrogate pair could not be told
                self._text = (self._text or "") + more
                return str(more)
        if found.get("error"):
            raise ValueError("an error instead of an event")
        return ""

    def reply(self) -> Reply:
        """What the row has come to, when there are no more events."""
        if self._whole:
            return self._whole
        if not self._reason:
            return Reply(error=BROKEN_OFF, retry_after_s=0.0)
        message = {"content": self._text, "refusal": self._refusal}
        choice = {"message": message, "finish_reason": self._reason}
        return _chat_reply({"choices": [choice], "usage": self._usage})


def _no_answer(text: str | None, reason: str, refusal: Any) -> ErrorInfo | None:
    """Why the message is no answer, if it is none. An empty text that ends by itself is one."""
    if reason == "content_filter":
        return ErrorInfo("content_filter", "The provider's content filter held the answer back.")
    if refusal and not text:
        return ErrorInfo("refused", "The model refuses to answer this prompt.")
    if reason == "length" and not text:
        return ErrorInfo(
            "truncated",
            "The answer reached max_tokens before its first word.",
            "Raise max_tokens: the model thinks before it answers.",
        )
    return BAD_REPLY if text is None else None


def vector_replies(body: bytes, count: int, dimension: int | None) -> list[Reply]:
    """The vectors in the reply to an embedding request, each found by its index.

    Args:
        count: texts that were asked.
        dimension: length that a vector must have; None: as the first one has.
    """
    try:
        found = json.loads(body)
        used = _count((found.get("usage") or {}).get("prompt_tokens"))
        items: list[Any] = [None] * count
        seen = [0] * count
        for item in found["data"]:
            index = item["index"]
            if isinstance(index, int) and 0 <= index < count:
                items[index] = item.get("embedding")
                seen[index] += 1
    except BODY_ERRORS:
        return [Reply(error=BAD_REPLY)] * count
    vectors = [_vector(item) if times == 1 else None for item, times in zip(items, seen, strict=True)]
    length = dimension or next((len(vector) for vector in vectors if vector is not None), None)
    return [
        Reply(vector, "stop", used * (row + 1) // count - used * row // count)  # only the sum is known
        if vector is not None and len(vector) == length
        else Reply(error=_no_vector(length))
        for row, vector in enumerate(vectors)
    ]


def _vector(said: Any) -> npt.NDArray[np.float32] | None:
    """A list of numbers, or base64 of float32; None for anything else and for what is not finite."""
    try:
        if isinstance(said, str):
            vector = np.frombuffer(base64.b64decode(said, validate=True), "<f4")
        else:
            vector = np.asarray(said, np.float32)
    except (*BODY_ERRORS, OverflowError):
        return None
    return vector if vector.ndim == 1 and vector.size and np.isfinite(vector).all() else None


def _no_vector(length: int | None) -> ErrorInfo:
    return ErrorInfo(
        "bad_reply",
        f"The provider sent no single vector of {length} finite numbers for this row."
        if length
        else "The provider sent no vector for this row.",
    )


def refusal(error: APIStatusError, what: str, quotes: Callable[[str], bool]) -> Reply:
    """What an HTTP status other than 2xx means for the row.

    Args:
        what: the model and where it is, for messages.
        quotes: whether a text repeats what was sent.

    Raises:
        Fatal: no row will be answered: key, money, model or address are wrong.
    """
    status, code = error.status_code, error.code or ""
    said = _said(error, quotes)
    if fatal := _FATAL.get(402 if "insufficient_quota" in (code, error.type) else status):
        raise Fatal(f"{fatal[1]} ({what}; status {status}){said}", code=fatal[0], hint=fatal[2])
    if status < 400:
        raise Fatal(
            f"The provider sends the caller elsewhere ({what}; status {status}).",
            code="redirected",
            hint="Set saas.base_url to the final address; a key is not sent to an address that nobody named.",
        )
    if status in (408, 409, 429) or status >= 500:
        kind = ("rate_limited", "is asked too often") if status == 429 else ("provider_failed", "did not answer")
        return Reply(
            error=ErrorInfo(kind[0], f"The provider {kind[1]} ({what}; status {status}){said}"),
            retry_after_s=retry_after_s(error.response.headers),
        )
    if "context_length" in code or "maximum context length" in error.message:
        return Reply(error=ErrorInfo("prompt_too_long", f"The prompt is too long for the model ({what}){said}"))
    hint = None
    if error.param == "temperature":
        hint = "A model that takes no temperature of 0 is asked with another, for example temperature := 1."
    message = f"The provider rejects the request ({what}; status {status}){said}"
    return Reply(error=ErrorInfo("rejected", message, hint))


_FATAL = {
    401: ("key_refused", "The provider refuses the key", "Check the key that saas.api_key refers to."),
    402: ("quota", "The quota of the key is used up", "See the account of the key, then run the statement again."),
    403: ("key_refused", "The key may not do this", "Check the rights of the key that saas.api_key refers to."),
    404: (
        "model_missing",
        "The provider has no such model, or the address is wrong",
        "Check saas.model, and that saas.base_url ends where /chat/completions would follow, often with /v1.",
    ),
}
"""Statuses after which no row will be answered: code, message, hint."""


def retry_after_s(headers: Mapping[str, str]) -> float:
    """The seconds a provider asks to wait: `retry-after-ms`, or `Retry-After` as seconds or a date; else 0."""
    try:
        return _seconds(float(headers["retry-after-ms"]) / 1000)
    except (KeyError, ValueError):
        said = headers.get("retry-after", "")
    try:
        return _seconds(float(said))
    except ValueError:
        pass
    try:
        return _seconds(parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, OverflowError, OSError):
        return 0.0


def _seconds(number: float) -> float:
    return max(0.0, number) if math.isfinite(number) else 0.0


def _said(error: APIStatusError, quotes: Callable[[str], bool]) -> str:
    """The provider's own words as the end of a sentence."""
    found = error.body.get("message") if isinstance(error.body, dict) else None
    if not isinstance(found, str) or not found.strip():
        return "."
    text = " ".join(found[: 10 * MAX_SAID].split())
    return "." if quotes(text) else f": {redact(text)[:MAX_SAID]}"


def _count(said: Any) -> int:
    """A number of tokens; 0 for what is none."""
    return said if isinstance(said, int) and not isinstance(said, bool) and 0 <= said < 2**31 else 0
