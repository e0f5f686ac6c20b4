"""From a prompt to the text a model reads, and whether its answer still fits.

Alone because every text engine, training and render need the same rules:

- With a prompt_format or a chat template, of the statement or of the checkpoint, the conversation goes through it;
  a plain text is one user turn. Both write the special tokens themselves, so the tokenizer adds none. Templates are
  rendered by transformers in jinja2's immutable sandbox.
- A checkpoint without either gets the plain contents, the system message first, joined by newlines and without
  roles; the tokenizer adds its special tokens.
- The system message of the call stands first; a conversation that brings its own keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.errors import RowError
from runtime.prompts.format import Piece
from runtime.prompts.style import Style
from runtime.spec import Message, Prompt

DEFAULT_MAX_TOKENS = 256
MAX_ADDED_CHARS = 1 << 20
"""What a template may add to a conversation; one that adds more is a mistake or an attack."""

AS_IT_IS = Style()


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text for the tokenizer.

    Attributes:
        add_special_tokens: the tokenizer adds its own.
        answers: where in the text the model wrote, or is to write: (start, end) in characters.
    """

    text: str
    add_special_tokens: bool
    answers: tuple[tuple[int, int], ...] = ()


def render(
    tokenizer: Any, prompt: Prompt, system: str | None, style: Style = AS_IT_IS, *, to_answer: bool = True
) -> Rendered:
    """What the model reads for one row.

    Args:
        tokenizer: of transformers, with or without a chat template.
        system: the call's system message.
        to_answer: end with what asks for an answer.

    Raises:
        RowError: prompt_bad when it is neither text nor a conversation or holds what no text file could hold,
            template_failed when the template refuses it, template_too_large when it writes without end.
    """
    messages = conversation(prompt, system)
    if style.prompt_format:
        return _joined(style.prompt_format.write(messages, to_answer=to_answer))
    if not has_template(tokenizer, style):
        return Rendered("\n".join(message.content for message in messages), add_special_tokens=True)
    return Rendered(_template_text(tokenizer, style, messages, to_answer=to_answer), add_special_tokens=False)


def render_examples(tokenizer: Any, messages: Sequence[Message], style: Style) -> list[Rendered]:
    """A whole conversation to learn from, with where its answers stand; mostly one text.

    A template that writes earlier answers otherwise than the last one (some leave out what a model thought) gives one
    text for each answer, as each is asked for in serving.

    Args:
        messages: the last one is the assistant's, with a weight.
        style: with a prompt_format, or for a tokenizer with a template.

    Raises:
        RowError: prompt_bad, template_failed, template_too_large; template_unstable when a prompt is not what its
            answered conversation begins with.
    """
    if style.prompt_format:
        return [_weighed(_joined(style.prompt_format.write(messages, to_answer=False)), messages)]
    whole = _template_text(tokenizer, style, messages, to_answer=False)
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    if (answers := _answers_within(tokenizer, style, messages, places, whole)) is not None:
        return [_weighed(Rendered(whole, False, answers), messages)]
    learnt = [place for place in places if messages[place].weight]
    return [_last_answer(tokenizer, style, messages[: place + 1]) for place in learnt]


def _weighed(text: Rendered, messages: Sequence[Message]) -> Rendered:
    """The text of a whole conversation, without the answers that are not to be learnt."""
    weights = [message.weight for message in messages if message.role == "assistant"]
    learnt = tuple(answer for answer, weight in zip(text.answers, weights, strict=True) if weight)
    return replace(text, answers=learnt)


def has_template(tokenizer: Any, style: Style = AS_IT_IS) -> bool:
    """Whether conversations go through a chat template."""
    return bool(not style.prompt_format and (style.chat_template or tokenizer.chat_template))


def _joined(pieces: Sequence[Piece]) -> Rendered:
    answers: list[tuple[int, int]] = []
    at = 0
    for piece in pieces:
        if piece.is_answer:
            answers.append((at, at + len(piece.text)))
        at += len(piece.text)
    return Rendered("".join(piece.text for piece in pieces), False, tuple(answers))


def _answers_within(
    tokenizer: Any, style: Style, messages: Sequence[Message], places: Sequence[int], whole: str
) -> tuple[tuple[int, int], ...] | None:
    """Where the answers stand in `whole`; None when the conversation's beginnings are not beginnings of its text."""
    found = []
    for place in places:
        before = _template_text(tokenizer, style, messages[:place], to_answer=True)
        last = place == len(messages) - 1
        after = whole if last else _template_text(tokenizer, style, messages[: place + 1], to_answer=False)
        if not (whole.startswith(after) and after.startswith(before)):
            return None
        found.append((len(before), len(after)))
    return tuple(found)


def _last_answer(tokenizer: Any, style: Style, messages: Sequence[Message]) -> Rendered:
    before = _template_text(tokenizer, style, messages[:-1], to_answer=True)
    whole = _template_text(tokenizer, style, messages, to_answer=False)
    if not whole.startswith(before):
        raise RowError(
            "The chat template writes an answered conversation otherwise than the prompt that it answers.",
            code="template_unstable",
            hint="Train with a prompt_format, or with a chat_template whose answers begin where its prompts end.",
        )
    return Rendered(whole, False, ((len(before), len(whole)),))


def _template_text(tokenizer: Any, style: Style, messages: Sequence[Message], *, to_answer: bool) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(
            turns, chat_template=style.chat_template or None, tokenize=False, add_generation_prompt=to_answer
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise _template_failed(style.chat_template or str(tokenizer.chat_template), error) from None
    if len(text) > MAX_ADDED_CHARS + 2 * sum(len(message.content) for message in messages):
        raise RowError(
            f"The chat template adds more than {MAX_ADDED_CHARS:,} characters to the conversation.",
            code="template_too_large",
            hint="Look into the template for a loop that writes too much.",
        )
    return text


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


def _template_failed(template: str, error: Exception) -> RowError:
    # A template's own message is shown only where it stands in the template: it may quote the row otherwise.
    said = str(error)
    known = bool(said) and said in template
    return RowError(
        f"The chat template refuses this conversation: {said if known else type(error).__name__}.",
        code="template_failed",
        hint="Check the roles of the messages and their order.",
    )
