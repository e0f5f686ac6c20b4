"""What one statement has had asked ahead of its real run.

Its query is run before, for its model calls alone, perhaps more than once: a call whose argument is another's answer
is only known when the first is there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.gateway.call import Ticket
from runtime.gateway.statement import Statement

MAX_AHEAD = 32_768  # open calls of one statement that are asked ahead; where nothing is stored, calls in all
KNOWN_CHUNKS = 8  # in a row without a new call, after which a run looks at one chunk of as many


@dataclass(slots=True)
class Ahead:
    """What one statement has had asked ahead of its real run."""

    tickets: list[Ticket] = field(default_factory=list)  # one for each pass, two where some are strict
    opened: int = 0
    chunks: int = 0
    known_chunks: int = 0  # in a row

    def ticket(self, statement: Statement, strict: bool) -> Ticket:
        """Who waits for what is asked ahead in the present pass."""
        for ticket in self.tickets:
            if (ticket.passes, ticket.strict) == (statement.passes, strict):
                return ticket
        self.tickets.append(Ticket(statement, statement.passes, strict))
        return self.tickets[-1]

    @property
    def open_calls(self) -> int:
        return sum(ticket.open_calls for ticket in self.tickets)

    def skips(self) -> bool:
        """Whether to pass over this chunk: nothing lately was new, and looking is what takes the time."""
        self.chunks += 1
        return self.known_chunks >= KNOWN_CHUNKS and self.chunks % KNOWN_CHUNKS != 0

    def looked(self, new: bool) -> None:
        """A chunk was looked at; `new`: there was something to ask or to wait for."""
        self.known_chunks = 0 if new else self.known_chunks + 1
