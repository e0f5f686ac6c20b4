"""A call: one distinct question to a model, who waits for it, and its outcome.

Millions of these are made in a query, so calls are plain slotted objects and outcomes plain tuples, which Python's
garbage collector soon stops looking at: as objects, half of the time of a fast query went into collecting them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from runtime.errors import ErrorInfo, SqlextError
from runtime.gateway.statement import Statement
from runtime.spec import CallOptions, Message, Prompt

if TYPE_CHECKING:
    from runtime.gateway.memory import Lane


class Outcome(NamedTuple):
    """What became of a call: an output or an error, never both. `statement` is the id of the one that paid for it."""

    output: Any
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_ms: float = 0.0
    error: ErrorInfo | None = None
    statement: int = 0


PlainOutcome: TypeAlias = tuple[Any, str, int, int, float, ErrorInfo | None, int]
"""The fields of an `Outcome` as a plain tuple."""

output_of = itemgetter(0)
error_of = itemgetter(5)

Asked: TypeAlias = list[PlainOutcome | None]
"""One outcome for each prompt, in their order; None where the answer is not known (never in the real run)."""


class Ticket:
    """Someone who waits for calls: an `ask` that blocks, or a statement that had them asked ahead.

    Counts down the open calls and wakes the thread at the last one.
    """

    __slots__ = ("done", "failure", "open_calls", "over", "passes", "statement", "strict")

    def __init__(self, statement: Statement, passes: int = 0, strict: bool = False) -> None:
        self.statement = statement
        self.strict = strict  # a row's failure ends the statement
        self.passes = passes  # for calls asked ahead: in which pass; 0 for a waiting `ask`
        self.open_calls = 0
        self.done = threading.Event()
        self.failure: SqlextError | None = None
        self.over = False

    @property
    def waits(self) -> bool:
        """Whether it still wants answers."""
        return self.failure is None and not self.over and not self.statement.cancelled

    def count_down(self) -> None:
        """One call has its outcome. Called under the gateway's lock."""
        self.open_calls -= 1
        if self.open_calls == 0:
            self.done.set()

    def fail(self, error: SqlextError) -> None:
        """The whole statement cannot go on."""
        self.failure = self.failure or error  # the first is the cause
        self.done.set()


class Call:
    """One question, asked once for all rows that ask it.

    Attributes:
        home: the lane where it can be joined and its outcome is remembered; None when nobody may join it.
        key: name of its answer in the result store; None when it is not stored.
        reserved: tokens set aside for it in its statement's budgets while it is under way; None otherwise.
        text: what its present attempt has written so far; None when nobody listens.
    """

    __slots__ = (
        "attempts",
        "home",
        "key",
        "losses",
        "options",
        "outcome",
        "prompt",
        "reserved",
        "seconds",
        "sent",
        "since",
        "size",
        "statement",
        "text",
        "tickets",
    )

    def __init__(
        self,
        prompt: Prompt,
        options: CallOptions,
        statement: Statement,
        home: Lane | None = None,
        key: bytes | None = None,
    ) -> None:
        self.prompt = prompt
        self.options = options
        self.size = len(prompt) if isinstance(prompt, str) else sum(map(_size, prompt))
        self.statement = statement
        self.home = home
        self.key = key
        self.outcome: PlainOutcome | None = None
        self.tickets: list[Ticket] = []
        self.attempts = 0  # that ended with a failure which may pass
        self.losses = 0  # times it was alone in a batch that came back without an answer
        self.seconds = 0.0  # that its attempts and the delays between them took, of the row's deadline
        self.sent = 0.0  # monotonic time when it was last sent
        self.since = 0.0  # monotonic time: an answer to another row after it shows that the model is well
        self.reserved: int | None = None
        self.text: str | None = None

    def join(self, ticket: Ticket) -> None:
        """`ticket` waits for it too. Called under the gateway's lock."""
        self.tickets.append(ticket)
        if listener := ticket.statement.listener:
            self.text = self.text or ""
            listener.follow(self.text)

    def tell(self, more: str) -> None:
        """Its text goes on with `more`. Called under the gateway's lock."""
        self.text = (self.text or "") + more
        for ticket in self.tickets:
            if listener := ticket.statement.listener:
                listener.follow(self.text)

    @property
    def wanted(self) -> bool:
        """Whether anyone still waits for it."""
        return any(ticket.waits for ticket in self.tickets)

    def settle(self, outcome: PlainOutcome) -> None:
        """Give the outcome to everyone who waits. Called under the gateway's lock."""
        self.outcome = outcome
        for ticket in self.tickets:
            ticket.count_down()
        self.shut()

    def shut(self) -> None:
        """Nobody waits for it, and nobody may join it any more. Called under the gateway's lock."""
        self.tickets = []
        if self.home is not None and self.home.open.get(self.prompt) is self:
            del self.home.open[self.prompt]


def _size(message: Message) -> int:
    return len(message.content) + sum(map(len, message.media))


def wanted(calls: Sequence[Call]) -> bool:
    """Whether anyone waits for any of them."""
    return any(call.wanted for call in calls)
