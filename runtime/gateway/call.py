"""A call: one distinct question to a model, the rows that wait for it, and its outcome.

Millions of these are made in a query, so they are plain slotted objects and tuples.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from runtime.errors import ErrorInfo, SqlextError
from runtime.gateway.statement import Statement
from runtime.spec import CallOptions, Prompt


class Outcome(NamedTuple):
    """What became of a call: an output or an error, never both."""

    output: Any
    error: ErrorInfo | None = None
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_ms: float = 0.0

    @property
    def outcome(self) -> Outcome:
        """Itself: what is known already stands beside calls that are settled later."""
        return self


class Asked(NamedTuple):
    """The answer to one `Gateway.ask`: a column of outcomes in the order of the prompts.

    `reused[i]` is True when row i needed no model call of its own: an equal question had been asked before it.
    """

    outcomes: list[Outcome]
    reused: list[bool]


class Ticket:
    """One waiting `ask`: counts down its open calls and wakes the thread at the last one."""

    __slots__ = ("done", "failure", "open_calls", "statement")

    def __init__(self, statement: Statement) -> None:
        self.statement = statement
        self.open_calls = 0
        self.done = threading.Event()
        self.failure: SqlextError | None = None

    def count_down(self) -> None:
        """One call has its outcome. Called under the gateway's lock."""
        self.open_calls -= 1
        self.statement.answered += 1
        if self.open_calls == 0:
            self.done.set()

    def fail(self, error: SqlextError) -> None:
        """The whole statement cannot go on."""
        self.failure = self.failure or error  # the first is the cause
        self.done.set()


class Call:
    """One question, asked once for all rows that ask it.

    Args:
        lane: the open calls that others may join, by prompt; None when nobody may.
    """

    __slots__ = ("keep", "lane", "losses", "options", "outcome", "prompt", "size", "statement_id", "tickets")

    def __init__(
        self, prompt: Prompt, options: CallOptions, statement_id: int, keep: bool, lane: dict[Prompt, Call] | None
    ) -> None:
        self.prompt = prompt
        self.options = options
        self.size = len(prompt) if isinstance(prompt, str) else sum(len(m.content) for m in prompt)
        self.statement_id = statement_id
        self.keep = keep  # may answer later statements too
        self.lane = lane
        self.outcome: Outcome | None = None
        self.tickets: list[Ticket] = []
        self.losses = 0  # times it was alone in a batch that came back without an answer

    @property
    def wanted(self) -> bool:
        """Whether any row still waits for it."""
        return any(ticket.failure is None for ticket in self.tickets)

    def settle(self, outcome: Outcome) -> None:
        """Give the outcome to every waiting row. Called under the gateway's lock."""
        self.outcome = outcome
        for ticket in self.tickets:
            ticket.count_down()
        self.shut()

    def shut(self) -> None:
        """Nobody waits for it, and nobody may join it any more. Called under the gateway's lock."""
        self.tickets = []
        if self.lane is not None and self.lane.get(self.prompt) is self:
            del self.lane[self.prompt]
