"""From a prompt to the text a model reads, and whether its answer still fits.

Alone because every text engine needs the same rules:

- A checkpoint with a chat template gets the conversation through it, with the generation prompt added; a plain text
  is one user turn. The template is rendered by transformers in jinja2's immutable sandbox and writes the special
  tokens itself, so the tokenizer adds none.
- A checkpoint without one gets the plain contents, the system message first, joined by newlines and without roles;
  the tokenizer adds its special tokens.
- The system message of the call stands first; a conversation that brings its own keeps its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.errors import RowError
from runtime.spec import Message, Prompt

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as text for the tokenizer, and whether that adds the special tokens."""

    text: str
    add_special_tokens: bool


def render(tokenizer: Any, prompt: Prompt, system: str | None) -> Rendered:
    """What the model reads for one row.

    Args:
        tokenizer: of transformers, with or without a chat template.
        system: the call's system message.

    Raises:
        RowError: prompt_bad when it is neither text nor a conversation or holds what no text file could hold,
            template_failed when the checkpoint's template refuses it.
    """
    messages = conversation(prompt, system)
    if not tokenizer.chat_template:
        return Rendered("\n".join(message.content for message in messages), add_special_tokens=True)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it may raise anything
        raise _template_failed(tokenizer, error) from None
    return Rendered(text, add_special_tokens=False)


def conversation(prompt: Prompt, system: str | None = None) -> tuple[Message, ...]:
    """The turns of a prompt, the system message first.

    Raises:
        RowError: prompt_bad.
    """
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if not isinstance(turns, tuple) or not turns:
        raise RowError("The prompt is neither a text nor a conversation.", code="prompt_bad")
    if system is not None and all(turn.role != "system" for turn in turns):
        turns = (Message("system", system), *turns)
    try:
        for turn in turns:
            turn.content.encode("utf-8")
    except (UnicodeEncodeError, AttributeError):
        raise RowError(
            "The prompt holds characters that are no valid Unicode text.",
            code="prompt_bad",
            hint="Clean the column where it is read, for example with another encoding.",
        ) from None
    return turns


def plain_text(prompt: Prompt) -> str:
    """A prompt for a model that reads one text: the contents of its turns, joined by newlines.

    Raises:
        RowError: prompt_bad.
    """
    return "\n".join(turn.content for turn in conversation(prompt))


def fit_answer(prompt_tokens: int, max_tokens: int | None, max_model_len: int | None) -> int:
    """How many new tokens a row may have: what was said, or the default, cut to what the model has room for.

    Args:
        prompt_tokens: tokens of the prompt.
        max_tokens: new tokens as the user said, None when not said.
        max_model_len: tokens of prompt and answer together; None: no limit.

    Raises:
        RowError: prompt_too_long, with both numbers.
    """
    if max_model_len is None:
        return max_tokens or DEFAULT_MAX_TOKENS
    room = max_model_len - prompt_tokens
    if room < 1 or (max_tokens is not None and max_tokens > room):
        asked = f" and max_tokens={max_tokens}" if max_tokens is not None and room >= 1 else ""
        raise RowError(
            f"The prompt has {prompt_tokens} tokens{asked}; the model reads and writes at most {max_model_len}.",
            code="prompt_too_long",
            hint="Shorten the prompt, or split the text." if room < 1 else f"Set max_tokens to {room} or less.",
        )
    return max_tokens or min(DEFAULT_MAX_TOKENS, room)


def _template_failed(tokenizer: Any, error: Exception) -> RowError:
    # A template's own message is shown only where it stands in the template: it may quote the row otherwise.
    said = str(error)
    known = bool(said) and said in str(tokenizer.chat_template)
    return RowError(
        f"The chat template of the checkpoint refuses this conversation: {said if known else type(error).__name__}.",
        code="template_failed",
        hint="Check the roles of the messages and their order.",
    )
