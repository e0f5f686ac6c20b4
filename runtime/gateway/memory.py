"""Outcomes kept in memory, and the calls under way: a lane for each set of options.

Bounded by bytes: two generations, of which the older is dropped whole when the younger is full; what is used again
moves to the younger. Not thread-safe; the gateway holds its lock around every call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from runtime.gateway.call import Call, PlainOutcome, output_of
from runtime.spec import CallOptions, Message, Prompt

OVERHEAD_BYTES = 350  # of one entry, beside the characters of its texts


class Lane:
    """Calls with one set of options: finished ones (in two generations) and open ones, by prompt."""

    __slots__ = ("_memory", "old", "open", "young")

    def __init__(self, memory: OutcomeMemory) -> None:
        self._memory = memory
        self.young: dict[Prompt, PlainOutcome] = {}
        self.old: dict[Prompt, PlainOutcome] = {}
        self.open: dict[Prompt, Call] = {}

    def find(self, prompts: Sequence[Prompt]) -> list[PlainOutcome | None]:
        """The outcomes that are remembered, None for the others; what is used again is remembered longer."""
        found: list[PlainOutcome | None] = list(map(self.young.get, prompts))
        if self.old and None in found:
            older = list(map(self.old.get, prompts))
            if any(older):
                again = {prompt: outcome for prompt, outcome in zip(prompts, older, strict=True) if outcome}
                for prompt in again:
                    del self.old[prompt]
                self.remember(list(again), list(again.values()))
                found = [young or old for young, old in zip(found, older, strict=True)]
        return found

    def remember(self, prompts: Sequence[Prompt], outcomes: Sequence[PlainOutcome]) -> None:
        """Keep these outcomes."""
        self.young.update(zip(prompts, outcomes, strict=True))
        self._memory.count(prompts, outcomes)


class OutcomeMemory:
    """The lanes of one model.

    Args:
        max_bytes: bound on texts and vectors kept, with an estimate of what holds them.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes // 2  # of one generation
        self._lanes: dict[CallOptions, Lane] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return sum(len(lane.young) + len(lane.old) for lane in self._lanes.values())

    def lane(self, options: CallOptions) -> Lane:
        """The lane of these options."""
        lane = self._lanes.get(options)
        if lane is None:
            lane = self._lanes[options] = Lane(self)
        return lane

    def forget(self) -> None:
        """Drop every outcome; what open calls are answered is kept nowhere, and nobody may join them."""
        for lane in self._lanes.values():
            for call in lane.open.values():
                call.home = call.key = None
        self._lanes = {}
        self._bytes = 0

    def count(self, prompts: Sequence[Prompt], outcomes: Sequence[PlainOutcome]) -> None:
        """Entries came into the younger generation; it becomes the older one when it is full."""
        self._bytes += len(prompts) * OVERHEAD_BYTES + _bytes(prompts) + _bytes(list(map(output_of, outcomes)))
        if self._bytes > self._max_bytes:
            self._bytes = 0
            for options, lane in list(self._lanes.items()):
                lane.old, lane.young = lane.young, {}
                if not (lane.old or lane.open):
                    del self._lanes[options]


def _part_bytes(part: Any) -> int:
    """Memory of a turn of a conversation, or of a part of an answer."""
    if isinstance(part, Message):
        return sys.getsizeof(part.content) + sum(map(sys.getsizeof, part.media))
    return sys.getsizeof(part)


def _bytes(values: Sequence[Any]) -> int:
    """Memory of texts, conversations or vectors, taking all to be of the first one's kind."""
    first = values[0] if values else None
    if isinstance(first, str):
        return sys.getsizeof("".join(filter(None, values)))  # a third of the time of asking each
    if isinstance(first, tuple):
        return sum(_part_bytes(part) for value in values for part in value)
    return len(values) * int(getattr(first, "nbytes", 0) or sys.getsizeof(first))
