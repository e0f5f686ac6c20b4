"""Byzer's requests: what `llm_param(map(…))` makes, a model function takes, and the helpers around it.

A request travels through SQL as STRUCT(llm_request VARCHAR), so that no text of the user's can be mistaken for one.
A function called with a request answers in Byzer's form: a JSON list of {predict, input, metadata}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from runtime.errors import RowError, UserError
from runtime.gateway import Outcome
from runtime.spec import Message, Prompt

_OPTION_NAMES = {"max_length": "max_tokens", "stopping_sequences": "stop"}
_ROLE_KEYS = {"system": "system_msg", "user_role": "user_role", "assistant_role": "assistant_role"}
_IMAGES = ("image", "init_image", "generation.init_image", "gen.init_image")
_IGNORED = ("embedding", "tokenizer", "apply_chat_template", "meta", "embed_rerank")


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the question, its roles, the turns before it, and what else the map said."""

    instruction: str
    system: str = ""
    user_role: str = ""
    assistant_role: str = ""
    history: tuple[tuple[str, str], ...] = ()  # (question, answer), oldest first
    options: tuple[tuple[str, Any], ...] = ()
    image: Any = None  # base64

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read what `llm_param` wrote.

        Raises:
            RowError: bad_request: there is no instruction, or the history is no list of pairs.
        """
        said = json.loads(text)
        instruction = said.pop("instruction", said.pop("query", None)) if isinstance(said, dict) else None
        if instruction is None:
            raise RowError(
                'The map given to llm_param has no "instruction".',
                code="bad_request",
                hint="""Write llm_param(MAP {'instruction': '…'}).""",
            )
        roles = {
            field: str(said.pop(key, "") or "")
            for field, key in (
                ("system", "system_msg"),
                ("user_role", "user_role"),
                ("assistant_role", "assistant_role"),
            )
        }
        history = _history(said.pop("history", None))
        images = [said.pop(key, None) for key in _IMAGES]
        options = {
            _OPTION_NAMES.get(key, key).removeprefix("generation.").removeprefix("gen."): value
            for key, value in said.items()
            if key not in _IGNORED and value is not None
        }
        return cls(
            str(instruction),
            history=history,
            options=tuple(options.items()),
            image=next((image for image in images if image), None),
            **roles,
        )

    def prompt(self, chat_template: bool) -> Prompt:
        """Messages for a model with a chat template; otherwise one text with the roles written out."""
        if chat_template:
            turns = [Message("system", self.system)] if self.system else []
            for question, answer in self.history:
                turns += [Message("user", question), Message("assistant", answer)]
            return (*turns, Message("user", self.instruction))
        user = f"{self.user_role}:" if self.user_role else ""
        assistant = f"{self.assistant_role}:" if self.assistant_role else ""
        lines = [self.system] if self.system else []
        for question, answer in self.history:
            lines += [f"{user}{question}", f"{assistant}{answer}"]
        lines.append(f"{user}{self.instruction}")
        if assistant:
            lines.append(assistant)
        return "\n".join(lines)


def _history(said: Any) -> tuple[tuple[str, str], ...]:
    try:
        pairs = json.loads(said or "[]") if isinstance(said, str) else said or []
        return tuple((str(question), str(answer)) for question, answer in pairs)
    except (TypeError, ValueError):
        raise RowError("The history of the request is no list of [question, answer].", code="bad_request") from None


def response(outcome: Outcome, request: Request) -> str:
    """Byzer's response to one request, as JSON."""
    return json.dumps(
        [
            {
                "predict": outcome.output,
                "input": {"instruction": request.instruction, "history": request.history},
                "metadata": {
                    "finish_reason": outcome.finish_reason,
                    "input_tokens_count": outcome.prompt_tokens,
                    "generated_tokens_count": outcome.completion_tokens,
                    "time_cost": outcome.latency_ms,
                },
            }
        ],
        ensure_ascii=False,
    )


def _parsed(text: str) -> dict[str, Any] | None:
    """The first entry of a response, or None when `text` is not one."""
    if not text.startswith('[{"predict"'):
        return None
    try:
        parsed: dict[str, Any] = json.loads(text)[0]
    except (ValueError, IndexError):
        return None
    return parsed


def llm_result(text: str) -> str | None:
    """The answer in a response; a text that is no response is the answer itself."""
    parsed = _parsed(text)
    return text if parsed is None else parsed["predict"]


def llm_response_full(text: str) -> str | None:
    """Question and answer of a response, one after the other."""
    parsed = _parsed(text)
    return text if parsed is None else f"{parsed['input']['instruction']}{parsed['predict']}"


def llm_prompt(template: str, arguments: list[str | None]) -> str:
    """`template` with {0}, {1}, … or {} replaced by the arguments; other braces stay."""
    positions = iter(range(len(arguments)))

    def fill(match: re.Match[str]) -> str:
        number = int(match[1]) if match[1] else next(positions, len(arguments))
        return arguments[number] or "" if number < len(arguments) else match[0]

    return re.sub(r"\{(\d*)\}", fill, template)


def llm_stack(previous: str, request: str) -> str:
    """`request` with the exchange in `previous` (a response) put before it."""
    parsed = _parsed(previous)
    if parsed is None:
        raise UserError(
            "llm_stack needs the response of a model function that was called with llm_param.",
            code="not_a_response",
            hint="Write llm_stack(chat(llm_param(…)), llm_param(…)).",
        )
    said = json.loads(request)
    before = [*parsed["input"]["history"], [parsed["input"]["instruction"], parsed["predict"]]]
    return json.dumps({**said, "history": before}, ensure_ascii=False)


def llm_split(text: str, separators: list[str | None], limit: int) -> list[dict[str, Any]]:
    """`text` in pieces of at most `limit` characters, cut behind the last separator that fits; nothing is lost."""
    if limit < 1:
        raise UserError("The limit of llm_split must be at least 1.", code="option_value")
    pieces: list[dict[str, Any]] = []
    start = 0
    while start < len(text):
        end = min(start + limit, len(text))
        if end < len(text):
            cuts = [text.rfind(sep, start, end) + len(sep) for sep in separators if sep and sep in text[start:end]]
            end = max(cuts, default=end)
        pieces.append({"content": text[start:end], "content_id": len(pieces)})
        start = end
    return pieces


def by_row(function: Callable[..., Any], result: pa.DataType) -> Callable[..., pa.Array]:
    """An Arrow function that applies `function` to each row; a NULL argument gives NULL."""

    def column(*columns: pa.ChunkedArray) -> pa.Array:
        rows = zip(*(c.to_pylist() for c in columns), strict=True)
        return pa.array([None if None in row else function(*row) for row in rows], result)

    return column
