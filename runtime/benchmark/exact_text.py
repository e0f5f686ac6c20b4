"""Texts of an exact number of tokens.

Alone because it is a small search: tokenizers join what stands side by side, so that a text cut at its n-th token and
read again may have more or fewer of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics

from runtime.errors import UserError

ATTEMPTS = 50
NUDGES = 40  # small changes to one text, before another one is taken
FILLERS = (" a", " the", " x", ".", " 1", "e", "\n", " I")


class ExactText:
    """Real text (the manual of Python) in pieces of exactly so many tokens.

    Args:
        encode: the token ids of a text, without special tokens.
        decode: the text of token ids.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]) -> None:
        self._encode = encode
        self._decode = decode
        self._words = " ".join(topics[name] for name in sorted(topics)).split()

    def of(self, tokens: int, chance: random.Random) -> str:
        """A text that has `tokens` tokens.

        Raises:
            UserError: no_exact_text, the tokenizer makes none of this length.
        """
        for _ in range(ATTEMPTS):
            begin = chance.randrange(len(self._words))
            # A word has a token at least; a text that begins anywhere goes on at the front of the manual.
            words = [self._words[(begin + place) % len(self._words)] for place in range(tokens)]
            text = self._decode(self._encode(" ".join(words))[:tokens]).strip()
            if (found := self._nudged(text, tokens, chance)) is not None:
                return found
        raise UserError(
            f"No text of exactly {tokens} tokens was found for this tokenizer.",
            code="no_exact_text",
            hint='Give prompts of your own: mode="custom" and inputTable.',
        )

    def _nudged(self, text: str, tokens: int, chance: random.Random) -> str | None:
        for _ in range(NUDGES):
            count = len(self._encode(text))
            if count == tokens and text:
                return text
            if count > tokens:
                text = text[: -max(1, (count - tokens) // 2)].rstrip()
            else:
                text += chance.choice(FILLERS) * max(1, (tokens - count) // 2)
        return None
