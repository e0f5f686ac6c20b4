"""Telling: the text of rows that someone follows, given out while it is written.

Alone because every engine that streams must hold the same things back: half a character, the beginning of what may
become a stop text, and what a prompt_format takes off an answer. So what was told never has to be taken back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

from runtime.prompts.format import PromptFormat
from runtime.spec import Delta

PAUSE_S = 0.02  # between two parts of a row: a text is decoded whole each time, so that it is that of the answer
BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or none yet


class Telling:
    """The rows of one batch that are followed, and what was told of each.

    Args:
        rows: the batch's `stream`.
        stop: texts that end an answer and are cut off.
        prompt_format: of the model; what it writes around an answer is not told.
    """

    def __init__(
        self, rows: Iterable[int], stop: Collection[str] = (), prompt_format: PromptFormat | None = None
    ) -> None:
        self._told = dict.fromkeys(rows, "")
        self._due = dict.fromkeys(self._told, 0.0)
        self._stop = stop
        self._format = prompt_format

    def more(self, row: int, text: Callable[[], str]) -> Delta | None:
        """The next part of a row's text; None when nobody follows the row or nothing can be told yet.

        Args:
            text: all that the model has written so far; called only when there is something to tell.
        """
        now = time.monotonic()
        if row not in self._told or now < self._due[row]:
            return None
        self._due[row] = now + PAUSE_S
        told, settled = self._told[row], self._settled(text())
        if len(settled) <= len(told) or not settled.startswith(told):
            return None
        self._told[row] = settled
        return Delta(row, settled[len(told) :])

    def _settled(self, text: str) -> str:
        """What `text` begins with and no more tokens can change."""
        text = without_beginning(text.rstrip(BROKEN), self._stop)
        return self._format.settled(text) if self._format else text


def without_beginning(text: str, ends: Iterable[str]) -> str:
    """`text` up to the first of `ends` in it, or to where its own end may be the beginning of one."""
    cut = len(text)
    for end in ends:
        whole = text.find(end)
        starts = [whole] if whole >= 0 else range(max(0, len(text) - len(end) + 1), len(text))
        cut = min([cut, *(at for at in starts if end.startswith(text[at : at + len(end)]))])
    return text[:cut]
