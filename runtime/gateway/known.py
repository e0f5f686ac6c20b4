"""What is known of a model's answers: in memory, private to a statement, and in the result store.

The store outlives everything and is shared by processes; memory saves the way to it, and is all there is for answers
that are not stored. A failure, and an answer that a statement does not share, are known to that statement only.
Methods that say so are called under the gateway's lock; the others take it only for moments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from runtime.gateway.answer_codec import MAX_STORED_BYTES, decoder, encode
from runtime.gateway.call import Call, PlainOutcome, error_of
from runtime.gateway.dispatch import WorkerPool
from runtime.gateway.keys import CallKeys
from runtime.gateway.memory import Lane, OutcomeMemory
from runtime.gateway.question import Question
from runtime.gateway.statement import Statement
from runtime.gateway.store import ResultStore
from runtime.spec import CallOptions, Prompt

_STORED = (None, -1)  # no error; and -1 stands for the statement that paid, where another session did
MAX_KEYS = 1024  # sets of options whose keys are prepared; more only where options vary by row


class Known:
    """The outcomes of one model that need no call.

    Args:
        pool: the model.
        store: where answers are kept for later; None, or a model without a fingerprint: only in memory.
        memory_bytes: bound on what is remembered, of all statements and of each that keeps its own.
        lock: the gateway's.
    """

    def __init__(self, pool: WorkerPool, store: ResultStore | None, memory_bytes: int, lock: threading.RLock) -> None:
        self._pool = pool
        self._store = store
        self._memory_bytes = memory_bytes
        self._lock = lock
        self._memory = OutcomeMemory(memory_bytes)
        self._private: dict[int, OutcomeMemory] = {}  # by statement
        self._keys: dict[CallOptions, CallKeys] = {}
        self._generation = pool.generation

    def __len__(self) -> int:
        return len(self._memory)

    def look_up(self, question: Question, statement: Statement) -> None:
        """Fill in what memory and store know."""
        if not question.options.deterministic:
            question.outcomes = [None] * len(question.prompts)
            return
        with self._lock:
            lanes = self.lanes(question, statement)
            question.outcomes = lanes[0].find(question.prompts)
            if None not in question.outcomes:
                return
            unknown = still_missing(question, lanes[1:], question.missing())
            for lane in lanes:
                if lane.open:
                    unknown = [prompt for prompt in unknown if prompt not in lane.open]
        stored = self._stored(question, unknown) if unknown and self.stores(question, "read") else {}
        question.unknown = [prompt for prompt in unknown if prompt not in stored] if stored else unknown

    def lanes(self, question: Question, statement: Statement) -> list[Lane]:
        """Where the statement may find outcomes and open calls; it adds its own to the first. Under the lock."""
        lanes = []
        if question.cache != "off":
            lanes.append(self._memory.lane(question.options))
        if question.cache != "on" or statement.id in self._private:
            lanes.append(self._private_lane(statement, question.options))
        return lanes if question.cache == "on" else lanes[::-1]

    def stores(self, question: Question, *modes: str) -> bool:
        """Whether answers to the question are kept in the store; with 'read': or used from there."""
        return question.cache in ("on", *modes) and self._store is not None and bool(self._pool.spec.fingerprint)

    def key_of(self, options: CallOptions) -> Callable[[Prompt], bytes]:
        """Gives the key of the answer to a prompt with these options."""
        keys = self._keys.get(options)
        if keys is None:
            if len(self._keys) >= MAX_KEYS:
                self._keys.clear()
            keys = self._keys[options] = CallKeys(self._pool.spec.fingerprint, options)
        return keys.of

    def keep(self, calls: Sequence[Call], outcomes: Sequence[PlainOutcome]) -> None:
        """Put answers into the store, but those that are too large; they are there when this returns.

        Raises:
            Fatal: the store cannot be written.
        """
        self.notice_other_model()
        task = self._pool.info.task
        rows = [
            (call.key, encoded, *outcome[1:5])
            for call, outcome in zip(calls, outcomes, strict=True)
            if call.key and error_of(outcome) is None and len(encoded := encode(outcome[0], task)) <= MAX_STORED_BYTES
        ]
        if rows and self._store:
            self._store.put(self._pool.name, self._pool.spec.fingerprint, rows)

    def remember(self, calls: Sequence[Call], outcomes: Sequence[PlainOutcome]) -> None:
        """Keep outcomes in memory: answers for all, failures for those that wait for them. Under the lock."""
        lanes: dict[int, tuple[Lane, list[Prompt], list[PlainOutcome]]] = {}
        for call, outcome in zip(calls, outcomes, strict=True):
            if call.home is None:
                continue
            for lane in (call.home,) if error_of(outcome) is None else self._waiting_lanes(call):
                _, prompts, known = lanes.setdefault(id(lane), (lane, [], []))
                prompts.append(call.prompt)
                known.append(outcome)
        for lane, prompts, known in lanes.values():
            lane.remember(prompts, known)

    def _waiting_lanes(self, call: Call) -> list[Lane]:
        waiting = {ticket.statement.id: ticket.statement for ticket in call.tickets if ticket.waits}
        return [self._private_lane(statement, call.options) for number, statement in waiting.items() if number]

    def forget(self, statement: Statement) -> None:
        """Drop what only this statement knew. Under the lock."""
        self._private.pop(statement.id, None)

    def forget_answers(self) -> None:
        """Drop the answers that all share. Under the lock."""
        self._memory.forget()

    def notice_other_model(self) -> None:
        """Another process may have deployed the model anew: what is remembered is no longer its word, and what is
        under way may be answered by either."""
        if self._pool.generation == self._generation:
            return
        with self._lock:
            self._generation = self._pool.generation
            for memory in (self._memory, *self._private.values()):
                memory.forget()
            self._keys.clear()

    def _stored(self, question: Question, prompts: Sequence[Prompt]) -> dict[Prompt, PlainOutcome]:
        """What the store knows of these prompts; it is filled in and remembered."""
        if self._store is None:
            return {}
        key_of = self.key_of(question.options)
        question.keys = {prompt: key_of(prompt) for prompt in prompts}
        stored = self._store.find(list(question.keys.values()))
        if not stored:
            return {}
        decode = decoder(self._pool.info.task)
        known: dict[Prompt, PlainOutcome] = {
            prompt: (decode(found[0]), *found[1:], *_STORED) if decode else found + _STORED
            for prompt, found in zip(prompts, map(stored.get, question.keys.values()), strict=True)
            if found is not None
        }
        with self._lock:
            self._memory.lane(question.options).remember(list(known), list(known.values()))
        question.fill(known)
        return known

    def _private_lane(self, statement: Statement, options: CallOptions) -> Lane:
        memory = self._private.get(statement.id)
        if memory is None:
            memory = self._private[statement.id] = OutcomeMemory(self._memory_bytes)
        return memory.lane(options)


def still_missing(question: Question, lanes: Sequence[Lane], missing: list[Prompt]) -> list[Prompt]:
    """Those of `missing` of which these lanes know nothing; what they know is filled in. Under the gateway's lock."""
    for lane in lanes:
        found = lane.find(missing)
        question.fill({p: o for p, o in zip(missing, found, strict=True) if o is not None})
        missing = [p for p, o in zip(missing, found, strict=True) if o is None]
    return missing
