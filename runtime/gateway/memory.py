"""Outcomes kept in memory, so that equal questions cost nothing while they are remembered.

Bounded by bytes: two generations, of which the older is dropped whole when the younger is full; what is used again
moves to the younger. Outcomes are kept as plain tuples of plain values, which Python's garbage collector soon stops
looking at: as objects, half of the time of a fast query went into collecting them.
Not thread-safe; the gateway holds its lock around every call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeAlias

from runtime.gateway.call import Call, Outcome
from runtime.gateway.statement import Statement
from runtime.spec import CallOptions, Prompt

OVERHEAD_BYTES = 250  # of one entry, beside its texts
_FIELDS = len(Outcome._fields)

Lane: TypeAlias = dict[Prompt, tuple[Any, ...]]
"""By prompt: the fields of its outcome, the statement that asked, whether later statements may use it."""


class OutcomeMemory:
    """Outcomes by the call's options and prompt.

    Args:
        max_bytes: bound on texts and vectors kept, with an estimate of what holds them.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes // 2  # of one generation
        self._young: dict[CallOptions, Lane] = {}
        self._old: dict[CallOptions, Lane] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return sum(len(lane) for lanes in (self._young, self._old) for lane in lanes.values())

    def view(self, options: CallOptions, statement: Statement) -> OutcomeView:
        """What is remembered of calls with these options, for `statement`; valid while the lock is held."""
        self._make_room()
        return OutcomeView(self, self._young.setdefault(options, {}), self._old.get(options, {}), statement)

    def clear(self) -> None:
        """Forget everything."""
        self._young, self._old, self._bytes = {}, {}, 0

    def remember(self, options: CallOptions, calls: Iterable[Call]) -> None:
        """Keep the outcomes of settled calls; a failure answers only its own statement."""
        self._make_room()
        lane = self._young.setdefault(options, {})
        for call in calls:
            outcome = call.outcome
            if outcome is not None:
                keep = call.keep and outcome.error is None
                lane[call.prompt] = (*outcome, call.statement_id, keep)
                self.count(call.prompt, outcome.output)

    def count(self, prompt: Prompt, output: Any) -> None:
        """An entry came into the younger generation."""
        self._bytes += OVERHEAD_BYTES + _bytes(prompt) + _bytes(output)

    def _make_room(self) -> None:
        if self._bytes > self._max_bytes:
            self._old, self._young, self._bytes = self._young, {}, 0


class OutcomeView:
    """The remembered outcomes of one set of options, as one statement may use them."""

    __slots__ = ("_memory", "_old", "_reads", "_statement_id", "_young")

    def __init__(self, memory: OutcomeMemory, young: Lane, old: Lane, statement: Statement) -> None:
        self._memory = memory
        self._young = young
        self._old = old
        self._statement_id = statement.id
        self._reads = statement.cache != "off"

    def find(self, prompt: Prompt) -> Outcome | None:
        """The outcome for `prompt`, or None when none is remembered that the statement may use."""
        entry = self._young.get(prompt)
        if entry is None:
            entry = self._old.pop(prompt, None)
            if entry is None:
                return None
            self._young[prompt] = entry
            self._memory.count(prompt, entry[0])
        *fields, statement_id, keep = entry
        if statement_id == self._statement_id or (keep and self._reads):
            return Outcome(*fields)
        return None


def _bytes(value: Any) -> int:
    if isinstance(value, str):
        return sys.getsizeof(value)
    size: int = getattr(value, "nbytes", 0) or sys.getsizeof(value)
    return size
