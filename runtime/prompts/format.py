"""prompt_format: a conversation written out by one text per role, the same in training and in serving.

Alone because it is a small language with rules of its own, those of Anyscale's LLMForge and of ray-llm:

- `system`, `user` and `assistant` hold ``{instruction}``, where the content of a turn stands; it is stripped of
  surrounding whitespace first.
- With `system_in_user` the user text holds ``{system}`` too. The system message stands in the first user turn, the
  others get nothing there.
- One system message at most, moved to the front. Without one `default_system_message` counts; an empty one is left
  out.
- `bos` begins the text, once. `trailing_assistant` ends a prompt that is to be answered.
- Nothing else is special: other braces stay as they are, in the format and in what is said.

In training an answer is what the model must write itself: the assistant's turn behind `trailing_assistant`, with its
end mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple, NoReturn

from runtime.errors import RowError, UserError, did_you_mean
from runtime.spec import Message

INSTRUCTION, SYSTEM = "{instruction}", "{system}"
ROLES = ("system", "user", "assistant")
MAX_CHARS = 100_000
"""Of one text of a format."""

_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")
_WORDS = {"true": True, "false": False}


class Piece(NamedTuple):
    """A part of a written conversation, and whether the model is to write it itself."""

    text: str
    is_answer: bool = False


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The texts of a prompt_format.

    Raises:
        UserError: prompt_format, with the key that breaks a rule.
    """

    system: str
    user: str
    assistant: str
    trailing_assistant: str = ""
    bos: str = ""
    system_in_user: bool = False
    default_system_message: str = ""

    def __post_init__(self) -> None:
        _check_types(self)
        for role in ROLES:
            _check_places(self, role)
        if self.assistant.count(INSTRUCTION) > 1:
            _refuse("assistant", f"holds {INSTRUCTION} twice", "Keep one: the answer stands there.")

    @classmethod
    def parse(cls, text: str) -> PromptFormat:
        """A prompt_format from a JSON object.

        Raises:
            UserError: prompt_format, with the key that breaks a rule.
        """
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise UserError(
                "prompt_format is no JSON object.",
                code="prompt_format",
                hint='Give {"system": "{instruction}\\n", "user": "{instruction}\\n", "assistant": "{instruction}"}.',
            )
        known = [field.name for field in fields(cls)]
        for key in said:
            if key not in known:
                near = did_you_mean(key, known)
                _refuse(key, "is no key of it", f'Did you mean "{near}"?' if near else f"Keys: {', '.join(known)}.")
        for field in fields(cls):
            if field.default is MISSING and field.name not in said:
                _refuse(field.name, "is missing", f'Add "{field.name}": "{INSTRUCTION}".')
        # What YAML leaves empty is null in JSON.
        return cls(**{key: _read(key, value) for key, value in said.items() if value is not None or key in ROLES})

    def to_json(self) -> str:
        """The format as `parse` reads it."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)

    @property
    def verbatim_user(self) -> bool:
        """Whether a user turn adds nothing of its own, so that an empty one is one that is not there."""
        return self.user in (INSTRUCTION, SYSTEM + INSTRUCTION)

    @property
    def after_answer(self) -> str:
        """What ends an assistant's turn."""
        return self.assistant.partition(INSTRUCTION)[2]

    def require_trainable(self) -> None:
        """Refuse a format whose prompts do not end where the assistant's turns begin: it would train other prompts
        than those that are asked.

        Raises:
            UserError: prompt_format.
        """
        if not self._before_answer.startswith(self.trailing_assistant):
            _refuse(
                "trailing_assistant",
                "is not what assistant begins with",
                f"In training, give it the beginning of assistant, at most up to {INSTRUCTION}.",
            )

    def write(self, messages: Sequence[Message], *, to_answer: bool) -> tuple[Piece, ...]:
        """A conversation in pieces.

        Args:
            to_answer: end with `trailing_assistant`, as a prompt does.

        Raises:
            RowError: prompt_bad for an unknown role, a second system message, or a system message that no user turn
                can take up.
        """
        system, turns = self._apart(messages)
        pieces = list(self._turns(system, turns))
        if to_answer:
            pieces.append(Piece(self.trailing_assistant))
        first = next((piece.text for piece in pieces if piece.text), "")
        if self.bos and not first.startswith(self.bos):
            pieces.insert(0, Piece(self.bos))
        return tuple(piece for piece in pieces if piece.text)

    def content(self, answer: str) -> str:
        """What was said in a text that the model wrote: without what the format puts around it."""
        rest = self._before_answer.removeprefix(self.trailing_assistant).strip()
        return answer.strip().removeprefix(rest).removesuffix(self.after_answer.strip()).strip()

    def settled(self, answer: str) -> str:
        """What `content` will begin with, however a text that the model is still writing goes on."""
        rest = self._before_answer.removeprefix(self.trailing_assistant).strip()
        text = answer.lstrip()
        if len(text) < len(rest) and rest.startswith(text):
            return ""
        text, after = text.removeprefix(rest).strip(), self.after_answer.strip()
        held = next((size for size in range(len(after), 0, -1) if text.endswith(after[:size])), 0)
        return text[: len(text) - held].rstrip()

    @property
    def _before_answer(self) -> str:
        return self.assistant.partition(INSTRUCTION)[0]

    def _apart(self, messages: Sequence[Message]) -> tuple[str, list[Message]]:
        """The system message, or '', and the other turns."""
        for message in messages:
            if message.role not in ROLES:
                raise RowError(
                    "A message has a role that prompt_format does not know.",
                    code="prompt_bad",
                    hint=f"Roles: {', '.join(ROLES)}.",
                )
        said = [message.content for message in messages if message.role == "system"]
        if len(said) > 1:
            raise RowError(
                "The conversation has more than one system message.", code="prompt_bad", hint="Join them into one."
            )
        system = said[0] if said else self.default_system_message
        turns = [message for message in messages if message.role != "system"]
        if system.strip() and self.system_in_user and all(turn.role != "user" for turn in turns):
            raise RowError(
                "The system message stands in the first user turn, and there is none.",
                code="prompt_bad",
                hint="Add a user message, or set system_in_user to false.",
            )
        return system.strip(), turns

    def _turns(self, system: str, turns: Sequence[Message]) -> Iterator[Piece]:
        system_text = _fill(self.system, instruction=system) if system else ""
        if system_text and not self.system_in_user:
            yield Piece(system_text)
        for turn in turns:
            content = turn.content.strip()
            if turn.role == "user":
                yield Piece(_fill(self.user, instruction=content, system=system_text))
                system_text = ""
            else:
                yield from self._answer(_fill(self.assistant, instruction=content))

    def _answer(self, text: str) -> Iterator[Piece]:
        given = self.trailing_assistant if self._before_answer.startswith(self.trailing_assistant) else ""
        yield Piece(given)
        yield Piece(text[len(given) :], is_answer=True)


def _fill(text: str, **contents: str) -> str:
    """`text` with its places filled in one pass: what is filled in is not looked at."""
    return _PLACE.sub(lambda place: contents[place[1]], text)


def _check_types(said: PromptFormat) -> None:
    for field in fields(said):
        value = getattr(said, field.name)
        if field.name == "system_in_user":
            continue
        if not isinstance(value, str):
            _refuse(field.name, "is no text", "Give a string.")
        if len(value) > MAX_CHARS:
            _refuse(field.name, "is too long", f"At most {MAX_CHARS:,} characters.")


def _check_places(said: PromptFormat, role: str) -> None:
    text = getattr(said, role)
    places = set(_PLACE.findall(text))
    if "instruction" not in places:
        _refuse(role, f"lacks {INSTRUCTION}", f"Write {INSTRUCTION} where the content of a message stands.")
    takes_system = role == "user" and said.system_in_user
    if takes_system and "system" not in places:
        _refuse(role, f"lacks {SYSTEM}", f"With system_in_user, write {SYSTEM} where the system message stands.")
    if role == "user" and "system" in places and not takes_system:
        _refuse(role, f"holds {SYSTEM} without system_in_user", 'Set "system_in_user": true, or leave it out.')
    known = {"instruction", "system"} if takes_system else {"instruction"}
    if unknown := sorted(places - known):
        near = did_you_mean(unknown[0], known) or "instruction"
        hint = f"Did you mean {{{near}}}?"
        _refuse(role, f"holds {{{unknown[0]}}}, which stands for nothing", hint)


def _read(key: str, value: Any) -> Any:
    if key != "system_in_user" or isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else None
    if word not in _WORDS:
        _refuse(key, "is neither true nor false", 'Write "system_in_user": true.')
    return _WORDS[word]


def _refuse(key: str, why: str, hint: str) -> NoReturn:
    raise UserError(f'The key "{key}" of prompt_format {why}.', code="prompt_format", hint=hint)
