"""From a rendered text to token ids, with exact borders between what a model was given and what it wrote.

Alone because training and serving must send the same ids. A text is tokenised as one, and the tokenizer's offsets
say to which side of a border a token belongs. Where it would join both sides of a border (a prompt that ends in a
blank with its answer, for example), they are tokenised apart: serving sends the prompt before there is an answer to
join it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from runtime.errors import RowError, UserError
from runtime.prompts.chat import Rendered, has_template, render_examples
from runtime.prompts.style import Style
from runtime.spec import Message

REMEMBERED = 1024
_PROBE = "zebra"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text, and the ranges of them that are answers: (start, end)."""

    ids: list[int]
    answers: tuple[tuple[int, int], ...] = ()


class Encoder:
    """Tokenises rendered texts with a fast tokenizer of transformers. Not for several threads at once.

    Raises:
        UserError: tokenizer_slow.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "The tokenizer of the model knows no offsets, so its answers cannot be found among its tokens.",
                code="tokenizer_slow",
                hint="Use a checkpoint with a tokenizer.json.",
            )
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._written = _without_additions(self._backend)
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._special = frozenset(id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special)
        # A token that the tokenizer cuts out first: what follows it is not taken for the beginning of a text.
        marks = (tokenizer.eos_token, tokenizer.bos_token)
        self._anchor: str = next(
            (mark for mark in marks if mark and tokenizer.convert_tokens_to_ids(mark) in self._added), ""
        )
        self._ids = lru_cache(REMEMBERED)(self._ids_of)

    def encode(self, texts: Sequence[Rendered]) -> list[Encoded]:
        """The ids of each text; a whole batch is tokenised in parallel."""
        self._backend.no_truncation()
        self._backend.no_padding()
        found: list[Encoded | None] = [None] * len(texts)
        for special in (False, True):
            places = [place for place, text in enumerate(texts) if text.add_special_tokens is special]
            if places:
                backend = self._backend if special else self._written
                joint = backend.encode_batch([texts[place].text for place in places], add_special_tokens=special)
                for place, encoding in zip(places, joint, strict=True):
                    found[place] = self._encoded(texts[place], encoding)
        return [each for each in found if each is not None]

    def end_token(self, style: Style) -> int | None:
        """The special token with which a turn of the assistant ends; None when there is none, or no style."""
        ending = self._ending(style)
        return next((id_ for id_ in self._ids(ending) if id_ in self._special), None) if ending else None

    def is_ended(self, ids: Sequence[int], end_token: int | None) -> bool:
        """Whether an answer of these ids tells that it is over."""
        ends = {end_token, self._tokenizer.eos_token_id} - {None}
        return bool(ids) and (ids[-1] in self._special or not ends.isdisjoint(ids))

    def _ending(self, style: Style) -> str:
        if style.prompt_format:
            return style.prompt_format.after_answer
        if not has_template(self._tokenizer, style):
            return ""
        try:
            turns = (Message("user", "a"), Message("assistant", _PROBE))
            return render_examples(self._tokenizer, turns, style)[0].text.rpartition(_PROBE)[2]
        except RowError:
            return ""

    def _encoded(self, text: Rendered, joint: Any) -> Encoded:
        ids = joint.ids
        cuts = [start for start, _ in text.answers if not self._is_clean(text.text, joint, ids, start)]
        cuts += [end for _, end in text.answers if end < len(text.text) and _reaches_over(joint, end)]
        if cuts:
            return self._encoded_apart(text, cuts)
        return Encoded(ids, tuple(_tokens(joint, len(text.text), *answer) for answer in text.answers))

    def _is_clean(self, text: str, joint: Any, ids: list[int], start: int) -> bool:
        """Whether the ids before `start` are those of the text before it alone."""
        first = _token_at(joint, len(text), start)
        if first == 0 or ids[first - 1] in self._added:
            return not _reaches_over(joint, start)
        since = first
        while since and ids[since - 1] not in self._added:
            since -= 1
        since = max(0, since - 1)  # with that token itself: it decides how what follows is taken
        begin = joint.token_to_chars(since)[0] if since else 0
        return bool(self._ids(text[begin:start]) == tuple(ids[since:first]))

    def _encoded_apart(self, text: Rendered, cuts: list[int]) -> Encoded:
        ids: list[int] = []
        answers: list[tuple[int, int]] = []
        for begin, end in pairwise((0, *sorted(cuts), len(text.text))):
            lead = self._anchor if begin else ""
            part = self._written.encode(lead + text.text[begin:end], add_special_tokens=False)
            skipped = 1 if lead else 0
            for answer in text.answers:
                if begin <= answer[0] < end:
                    at = (place - begin + len(lead) for place in answer)
                    first, last = _tokens(part, len(lead) + end - begin, *at)
                    answers.append((len(ids) + first - skipped, len(ids) + last - skipped))
            ids += part.ids[skipped:]
        return Encoded(ids, tuple(answers))

    def _ids_of(self, text: str) -> tuple[int, ...]:
        return tuple(self._written.encode(text, add_special_tokens=False).ids)


def _without_additions(backend: Any) -> Any:
    """For texts that hold their special tokens: what adds them may also cut blanks off the offsets."""
    mine = deepcopy(backend)
    mine.post_processor = None
    mine.no_truncation()
    mine.no_padding()
    return mine


def _tokens(encoding: Any, length: int, start: int, end: int) -> tuple[int, int]:
    """The range of tokens that begin in this range of the characters of a text of this length."""
    return _token_at(encoding, length, start), _token_at(encoding, length, end)


def _token_at(encoding: Any, length: int, start: int) -> int:
    """The first token that begins at this character or later."""
    for char in range(start, length):  # the first one mostly says it; some characters are in no token
        token: int | None = encoding.char_to_token(char)
        if token is not None and encoding.token_to_chars(token)[0] >= start:
            return token
    return len(encoding)


def _reaches_over(encoding: Any, start: int) -> bool:
    """Whether one token holds characters on both sides."""
    token = encoding.char_to_token(start)
    return token is not None and encoding.token_to_chars(token)[0] < start
