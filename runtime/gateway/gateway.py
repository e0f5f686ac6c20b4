"""The gateway of one model: every row asked of it, from every thread and query, passes here.

Equal questions share one call, and what was answered before is not asked again: an outcome is looked for in memory,
among the calls under way, and in the result store, in this order. What is left goes to the dispatcher.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter

from runtime.errors import Cancelled, Fatal, SqlextError
from runtime.gateway.ahead import MAX_AHEAD, Ahead
from runtime.gateway.call import Asked, Call, PlainOutcome, Ticket, error_of
from runtime.gateway.dispatch import Dispatcher, WorkerPool
from runtime.gateway.explain import explain
from runtime.gateway.interpreter import busy
from runtime.gateway.known import Known, still_missing
from runtime.gateway.memory import Lane
from runtime.gateway.pace import RetryPolicy
from runtime.gateway.question import Group, Question
from runtime.gateway.statement import Mode, Statement, row_failure
from runtime.gateway.store import ResultStore
from runtime.spec import CallOptions, EngineInfo, Prompt

MEMORY_BYTES = 256 * 1024 * 1024
CANCEL_POLL_S = 0.05


class GatewayClosed(Exception):
    """This gateway takes no more questions: its model was redeployed or removed."""


class Gateway:
    """Single flight, memory and store in front of one pool. Thread-safe.

    Args:
        pool: the workers.
        store: where answers are kept for later; None or a model without a fingerprint: only in memory.
        memory_bytes: bound on the finished calls that are remembered.
        policy: attempts and waiting times of rows that fail.
    """

    def __init__(
        self,
        pool: WorkerPool,
        store: ResultStore | None = None,
        memory_bytes: int = MEMORY_BYTES,
        policy: RetryPolicy | None = None,
    ) -> None:
        self.pool = pool
        self.name = pool.name
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # fewer are asking, or fewer calls are open
        self._known = Known(pool, store, memory_bytes, self._lock)
        self._dispatcher = Dispatcher(pool, self._lock, policy or RetryPolicy(), self._settle)
        self._ahead: dict[int, Ahead] = {}  # by statement
        self._asking = 0
        self._closing = False

    @property
    def info(self) -> EngineInfo:
        """What the deployed engine says of itself."""
        return self.pool.info

    def ask(self, options: CallOptions, prompts: Sequence[Prompt], statement: Statement) -> Asked:
        """`ask_all` for prompts that share their options."""
        return self.ask_all([Group(options, prompts)], statement)[0]

    def ask_all(self, groups: Sequence[Group], statement: Statement) -> list[Asked]:
        """The outcomes of every prompt of every group, in their order.

        In the statement's mode REAL it blocks until all are known. In mode AHEAD new calls are only noted for the
        workers, and those noted in an earlier pass are waited for; in mode EXPLAIN calls are counted.

        Raises:
            Cancelled: the statement was cancelled.
            Fatal: schema_unsupported, the engine cannot answer with a schema.
            SqlextError: the whole statement cannot go on (a row's own failure is in its outcome instead).
            GatewayClosed: the model was redeployed or removed before the question was taken.
        """
        with self._asked(statement):
            defaults = self.pool.spec.defaults
            questions = [
                Question(
                    group.options.over(defaults).plain, group.prompts, group.cache or statement.cache, group.strict
                )
                for group in groups
            ]
            if not self.info.schemas and any(question.options.schema for question in questions):
                raise Fatal(
                    f'The engine "{self.info.engine}" of the model "{self.name}" cannot answer with a schema.',
                    code="schema_unsupported",
                    hint='Ask without it, or deploy a checkpoint with infer_backend="transformers".',
                )
            if statement.mode is Mode.AHEAD:
                self._ask_ahead(questions, statement)
            else:
                for question in questions:
                    self._known.look_up(question, statement)
                if statement.mode is Mode.REAL:
                    self._ask_now(questions, statement)
                else:
                    for question in questions:
                        key_of = self._known.key_of(question.options)
                        explain(question, statement, self.pool, key_of, self._lock)
            return [question.outcomes for question in questions]

    def pass_over(self) -> None:
        """A run in mode AHEAD has ended: incomplete batches need wait no longer."""
        with self._lock:
            self._dispatcher.stop_lingering()

    def forget(self, statement: Statement) -> None:
        """The statement has ended: drop what only it needed, and calls that were asked ahead for it in vain."""
        with self._lock:
            self._known.forget(statement)
            if ahead := self._ahead.pop(statement.id, None):
                self._end_ahead(ahead)

    def forget_answers(self) -> None:
        """Drop the answers in memory; the store and what is under way are left as they are."""
        with self._lock:
            self._known.forget_answers()

    def asked_ahead(self, statement: Statement) -> tuple[int, int]:
        """Calls that were asked ahead for the statement, and how many of them are still open."""
        ahead = self._ahead.get(statement.id)
        return (ahead.opened, ahead.open_calls) if ahead else (0, 0)

    def close(self) -> None:
        """Take no more questions, wait for those under way, and drop the pool's handles."""
        with self._lock:
            self._closing = True
            for ahead in self._ahead.values():
                self._end_ahead(ahead)
            self._changed.wait_for(lambda: self._asking == 0)
        self._dispatcher.close()

    def _end_ahead(self, ahead: Ahead) -> None:
        for ticket in ahead.tickets:
            ticket.over = True
        self._dispatcher.drop_unwanted()

    @contextmanager
    def _asked(self, statement: Statement) -> Iterator[None]:
        if statement.cancelled:
            raise statement.failure or Cancelled("The statement was cancelled.")
        with self._lock:
            if self._closing:
                raise GatewayClosed
            self._asking += 1
            self._known.notice_other_model()
        try:
            with busy:
                yield
        finally:
            with self._lock:
                self._asking -= 1
                self._changed.notify_all()

    # -- asking ---------------------------------------------------------------------------------------------

    def _ask_now(self, questions: Sequence[Question], statement: Statement) -> None:
        """Wait until every outcome is known."""
        if statement.listener:
            statement.listener.begin((each.options, prompt) for each in questions for prompt in each.prompts)
        ticket = Ticket(statement)
        if any(None in question.outcomes for question in questions):
            with self._lock:
                waited = [self._enter(question, statement, ticket) for question in questions]
            self._wait(ticket, waited)
            for question, calls in zip(questions, waited, strict=True):
                if question.options.deterministic:
                    question.fill({call.prompt: call.outcome for call in calls if call.outcome})
                else:
                    question.outcomes = [call.outcome for call in calls]
        if statement.listener:
            for question in questions:
                statement.listener.finish(question.outcomes)
        rows = sum(len(question.outcomes) for question in questions)
        errors = sum(1 for question in questions for outcome in question.outcomes if outcome and error_of(outcome))
        statement.add(self.name, rows=rows, errors=errors)

    def _ask_ahead(self, questions: Sequence[Question], statement: Statement) -> None:
        """Note new calls for the workers; wait for those that were noted in an earlier run."""
        with self._lock:
            ahead = self._ahead.setdefault(statement.id, Ahead())
            skips, begins = ahead.skips(), ahead.chunks == 1
        if skips:
            for question in questions:
                question.outcomes = [None] * len(question.prompts)
            return
        self._await_room(ahead, statement)
        if begins:  # idle workers get their first batch while the rest is looked up
            new = False
            for question in questions:
                parts = question.parts(self.info.max_batch_rows)
                for part in parts:
                    new |= self._note_ahead([part], statement, ahead)
                question.outcomes = [outcome for part in parts for outcome in part.outcomes]
        else:
            new = self._note_ahead(questions, statement, ahead)
        with self._lock:
            ahead.looked(new)

    def _note_ahead(self, questions: Sequence[Question], statement: Statement, ahead: Ahead) -> bool:
        """As `_ask_ahead`; whether there was anything to ask or to wait for."""
        for question in questions:
            self._known.look_up(question, statement)
        ticket = Ticket(statement)
        with self._lock:
            # Where another run follows, what is under way must be met again.
            new = any(None in question.outcomes if statement.nested else question.unknown for question in questions)
            waited = [self._enter_ahead(question, statement, ahead, ticket) for question in questions]
        self._wait(ticket, waited)
        for question, calls in zip(questions, waited, strict=True):
            question.fill({call.prompt: call.outcome for call in calls if call.outcome})
        return new

    def _await_room(self, ahead: Ahead, statement: Statement) -> None:
        """Back-pressure: a query that is far ahead of the workers waits for them."""

        def may_go_on() -> bool:
            return ahead.open_calls < MAX_AHEAD or not all(ticket.waits for ticket in ahead.tickets)

        # Not woken by `cancel`: one gateway cancels under its lock, and waking this one would take another's.
        with self._lock:
            while not self._changed.wait_for(may_go_on, CANCEL_POLL_S):
                pass
        for ticket in ahead.tickets:
            if ticket.failure:
                raise ticket.failure

    def _wait(self, ticket: Ticket, waited: Sequence[Sequence[Call]]) -> None:
        """Block until the ticket's calls have their outcomes.

        Raises:
            Cancelled, SqlextError: the statement ends before.
        """
        if not ticket.open_calls:
            return
        stop_listening = ticket.statement.on_cancel(ticket.done.set)
        try:
            ticket.done.wait()
        finally:
            stop_listening()
            with self._lock:
                if ticket.open_calls:
                    self._take_back(ticket, waited)
        if ticket.failure:
            raise ticket.failure
        if ticket.open_calls:
            raise ticket.statement.failure or Cancelled("The statement was cancelled.")

    def _take_back(self, ticket: Ticket, waited: Sequence[Sequence[Call]]) -> None:
        """Cancelled or failed: what nobody else waits for is not asked any more. Under the lock."""
        for call in (call for calls in waited for call in calls):
            if ticket in call.tickets:
                call.tickets.remove(ticket)
                if not call.wanted:
                    call.shut()
        self._dispatcher.drop_unwanted()

    def _enter(self, question: Question, statement: Statement, ticket: Ticket) -> list[Call]:
        """Join or open the calls that are missing; `ticket` waits for them. Under the lock."""
        if not question.options.deterministic:
            return self._open(question, question.prompts, None, statement, ticket)
        lanes = self._known.lanes(question, statement)
        joined, fresh = [], []
        for prompt in still_missing(question, lanes, question.missing()):
            call = _open_call(lanes, prompt)
            if call is None:
                fresh.append(prompt)
            else:
                joined.append(call)
                call.join(ticket)
        ticket.open_calls += len(joined)
        return joined + self._open(question, fresh, lanes[0], statement, ticket)

    def _enter_ahead(self, question: Question, statement: Statement, ahead: Ahead, ticket: Ticket) -> list[Call]:
        """Open the calls that are missing, for later; `ticket` waits for those of earlier runs. Under the lock."""
        if not question.options.deterministic:
            return []
        lanes = self._known.lanes(question, statement)
        mine = ahead.ticket(statement, question.strict and statement.on_error == "fail")
        joined, fresh = [], []
        # In the first run nothing was asked before, and what is under way need not be looked at.
        missing = question.unknown if mine.passes == 1 else question.missing()
        for prompt in still_missing(question, lanes, missing):
            call = _open_call(lanes, prompt)
            if call is None:
                fresh.append(prompt)
            elif any(earlier in ahead.tickets and earlier.passes < mine.passes for earlier in call.tickets):
                joined.append(call)
                call.tickets.append(ticket)
        ticket.open_calls += len(joined)
        if not self._known.stores(question):
            fresh = fresh[: max(0, MAX_AHEAD - ahead.opened)]
        ahead.opened += len(fresh)
        self._open(question, fresh, lanes[0], statement, mine)
        return joined

    def _open(
        self,
        question: Question,
        prompts: Sequence[Prompt],
        home: Lane | None,
        statement: Statement,
        ticket: Ticket,
    ) -> list[Call]:
        options, keys = question.options, question.keys
        text = "" if statement.listener else None
        key_of = self._known.key_of(options) if home and self._known.stores(question) else None
        calls = []
        for prompt in prompts:
            key = (keys.get(prompt) or key_of(prompt)) if key_of else None
            call = Call(prompt, options, statement, home, key)
            call.tickets.append(ticket)
            call.text = text
            if home is not None:
                home.open[prompt] = call
            calls.append(call)
        ticket.open_calls += len(calls)
        if calls:
            self._dispatcher.put(options, calls, ahead=bool(ticket.passes))
        return calls

    def _settle(self, calls: Sequence[Call], outcomes: Sequence[PlainOutcome]) -> None:
        """Store the answers, then give them to everyone who waits: what was seen can never be lost."""
        self._known.keep(calls, outcomes)
        with self._lock:
            self._known.remember(calls, outcomes)
            self._account(calls, outcomes)
            for call, outcome in zip(calls, outcomes, strict=True):
                if error := error_of(outcome):
                    self._end_strict(call, row_failure(self.name, error))
                call.settle(outcome)
            self._changed.notify_all()

    def _end_strict(self, call: Call, failure: SqlextError) -> None:
        """What was asked ahead fails its statement now, as it would later: nothing more is paid for."""
        for ticket in call.tickets:
            if ticket.strict:
                ticket.fail(failure)
                ticket.statement.fail(failure)

    def _account(self, calls: Sequence[Call], outcomes: Sequence[PlainOutcome]) -> None:
        used: dict[int, tuple[Statement, list[PlainOutcome]]] = {}
        for call, outcome in zip(calls, outcomes, strict=True):
            used.setdefault(id(call.statement), (call.statement, []))[1].append(outcome)
        said = calls[0].options.max_tokens is not None  # calls that are settled together share their options
        for statement, made in used.values():
            cut = sum(1 for outcome in made if outcome[1] == "length")
            statement.add(
                self.name,
                calls=len(made),
                prompt_tokens=sum(map(itemgetter(2), made)),
                completion_tokens=sum(map(itemgetter(3), made)),
                cut=cut,
                cut_unasked=0 if said else cut,
            )
            statement.worked(self.name, ended=time.monotonic())


def _open_call(lanes: Sequence[Lane], prompt: Prompt) -> Call | None:
    """The call under way that asks this, unless everyone has given it up."""
    for lane in lanes:
        call = lane.open.get(prompt)
        if call is not None and call.wanted:
            return call
    return None
