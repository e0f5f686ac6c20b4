"""A listener: someone who hears one answer while it is written.

Alone because of what a text that comes in parts must get over: a row whose worker was lost is asked anew, and what is
told must still end as the answer. A listener remembers what it has told. An attempt that writes the same again is
waited for in silence; one that writes something else begins the text anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from runtime.errors import UserError
from runtime.spec import CallOptions, Prompt

if TYPE_CHECKING:
    from runtime.gateway.call import PlainOutcome


class Listener:
    """Hears the answer to the one question that a statement asks; give it to the statement as its `listener`.

    Args:
        hear: called with the next part of the text, and whether the text begins anew with it. Called from any thread
            and under the gateway's lock: it must return at once.
    """

    def __init__(self, hear: Callable[[str, bool], None]) -> None:
        self._hear = hear
        self._told = ""
        self._asked: set[tuple[CallOptions, Prompt]] = set()

    def begin(self, asked: Iterable[tuple[CallOptions, Prompt]]) -> None:
        """These questions are asked; DuckDB may ask the same one twice, as it plans and as it runs.

        Raises:
            UserError: stream_rows, they are more than one.
        """
        self._asked.update(asked)
        if len(self._asked) > 1:
            raise UserError(
                "Only one answer can be followed while it is written, and this query asks for several.",
                code="stream_rows",
                hint="Ask for one row, for example with LIMIT 1; or run the query as usual.",
            )

    def follow(self, text: str) -> None:
        """An attempt has written `text` so far."""
        if not self._told.startswith(text):
            self._tell(text)

    def finish(self, outcomes: Sequence[PlainOutcome | None]) -> None:
        """The answers are known: what was told, joined, is now the answer."""
        for outcome in outcomes:
            if outcome and isinstance(outcome[0], str) and outcome[0] != self._told:
                self._tell(outcome[0])

    def _tell(self, text: str) -> None:
        anew = not text.startswith(self._told)
        more = text if anew else text[len(self._told) :]
        self._told = text
        self._hear(more, anew)
