"""The gateway of one model: every row asked of it, from every thread and query, passes here.

Equal questions share one call; open calls wait in one queue; feeder threads carry batches to workers and answers
back. A batch that is lost is halved and sent again, so that a poison row ends alone with its error.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from runtime.errors import Cancelled, Fatal, OutOfMemory, Retryable, RowError, SqlextError
from runtime.gateway.call import Asked, Call, Outcome, Ticket
from runtime.gateway.memory import OutcomeMemory
from runtime.gateway.queue import CallQueue
from runtime.gateway.slots import Slots
from runtime.gateway.statement import Statement
from runtime.spec import Answers, Batch, CallOptions, EngineInfo, ModelSpec, PoolSpec, Prompt

MAX_LOSSES_ALONE = 2  # a row whose batch of one was lost this often is the cause, not an accident
MAX_FAILURES_IN_A_ROW = 20  # rows the engine failed on, one after the other, before the statement stops
CLOSE_TIMEOUT_S = 2.0  # for feeders to end; one that waits for a batch nobody wants is left behind
MEMORY_BYTES = 256 * 1024 * 1024


class WorkerPool(Protocol):
    """What the gateway needs of a pool of workers."""

    name: str
    generation: int
    spec: ModelSpec
    pool: PoolSpec
    info: EngineInfo
    workers: int

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        """Answer a batch on a worker; blocks between pieces.

        Raises:
            Retryable: the batch was lost (worker died or hung, out of memory); it may be sent again.
            SqlextError: anything else that ends the batch.
        """
        ...

    def cancel(self, worker: int, batch_id: int) -> None:
        """Nobody wants the batch any more. Returns at once."""
        ...

    def close(self) -> None:
        """Drop the handles; the workers stay deployed."""
        ...


class GatewayClosed(Exception):
    """This gateway takes no more questions: its model was redeployed or removed."""


class _Entered:
    """What became of one group of a question: known outcomes and open calls, in the order of its prompts."""

    __slots__ = ("calls", "fresh", "options", "reused")

    def __init__(self, options: CallOptions) -> None:
        self.options = options
        self.calls: list[Call | Outcome] = []
        self.reused: list[bool] = []
        self.fresh: list[Call] = []


class Gateway:
    """Single flight, queue and feeders in front of one pool. Thread-safe.

    Args:
        pool: the workers.
        memory_bytes: bound on the finished calls that are remembered.
    """

    def __init__(self, pool: WorkerPool, memory_bytes: int = MEMORY_BYTES) -> None:
        info = pool.info
        self.pool = pool
        self.name = pool.name
        self._defaults = pool.spec.defaults
        self._changed = threading.Condition()
        self._queue = CallQueue(info.max_batch_rows, info.max_batch_chars, pool.workers)
        self._slots = Slots(pool.workers, pool.pool.worker_concurrency, pool.pool.load_balance)
        self._memory = OutcomeMemory(memory_bytes)
        self._open: dict[CallOptions, dict[Prompt, Call]] = {}  # deterministic calls that others may join
        self._batch_ids = itertools.count(1)
        self._in_flight: dict[int, tuple[int, Sequence[Call]]] = {}
        self._feeders: list[threading.Thread] = []
        self._asking = 0
        self._failures_in_a_row = 0
        self._closing = False
        self._generation = pool.generation

    @property
    def info(self) -> EngineInfo:
        """What the deployed engine says of itself."""
        return self.pool.info

    def ask(self, options: CallOptions, prompts: Sequence[Prompt], statement: Statement) -> Asked:
        """`ask_all` for prompts that share their options."""
        return self.ask_all([(options, prompts)], statement)[0]

    def ask_all(self, groups: Sequence[tuple[CallOptions, Sequence[Prompt]]], statement: Statement) -> list[Asked]:
        """Answer every prompt of every group, in order. Blocks until all are answered.

        Args:
            groups: call options and the prompts that are asked with them.

        Raises:
            Cancelled: the statement was cancelled.
            SqlextError: the whole statement cannot go on (a row's own failure is in its outcome instead).
            GatewayClosed: the model was redeployed or removed before the question was taken.
        """
        started = time.monotonic()
        ticket = Ticket(statement)
        with self._changed:
            if self._closing:
                raise GatewayClosed
            self._asking += 1
            entered = [self._enter(o.over(self._defaults), prompts, statement, ticket) for o, prompts in groups]
            if not ticket.open_calls:
                ticket.done.set()
        stop_listening = statement.on_cancel(ticket.done.set)
        try:
            ticket.done.wait()
        finally:
            stop_listening()
            with self._changed:
                self._leave(entered, ticket)
        if ticket.failure:
            raise ticket.failure
        if ticket.open_calls:
            raise Cancelled("The statement was cancelled.")
        seconds = time.monotonic() - started
        answers = [Asked([found.outcome for found in group.calls], group.reused) for group in entered]  # type: ignore[misc]
        for asked, group in zip(answers, entered, strict=True):
            self._account(asked, group.fresh, statement, seconds)
            seconds = 0.0
        return answers

    def close(self) -> None:
        """Take no more questions, wait for those under way, stop the feeders and drop the pool's handles."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._asking == 0)
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._feeders:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.pool.close()

    # -- asking -------------------------------------------------------------------------------------------

    def _enter(
        self, options: CallOptions, prompts: Sequence[Prompt], statement: Statement, ticket: Ticket
    ) -> _Entered:
        shared = options.deterministic
        lane = self._open.setdefault(options, {}) if shared else None
        remembered = self._memory.view(options, statement)
        entered = _Entered(options)
        keep = statement.cache == "on"
        for prompt in prompts:
            call = lane.get(prompt) if lane else None
            if call is None and shared and (known := remembered.find(prompt)):
                entered.calls.append(known)
                entered.reused.append(True)
                continue
            entered.reused.append(call is not None)
            if call is None:
                call = Call(prompt, options, statement.id, keep, lane)
                entered.fresh.append(call)
                if lane is not None:
                    lane[prompt] = call
            if not call.tickets or call.tickets[-1] is not ticket:
                call.tickets.append(ticket)
                ticket.open_calls += 1
            entered.calls.append(call)
        if entered.fresh:
            self._queue.put(options, list(entered.fresh))
            self._start_feeders()
            self._changed.notify_all()
        return entered

    def _leave(self, entered: Sequence[_Entered], ticket: Ticket) -> None:
        self._asking -= 1
        if ticket.open_calls:  # cancelled or failed: take back what nobody else waits for
            for call in (call for group in entered for call in group.calls if isinstance(call, Call)):
                if ticket in call.tickets:
                    call.tickets.remove(ticket)
                    if not call.wanted:
                        call.shut()
            for batch_id, (worker, batch_calls) in self._in_flight.items():
                if not any(call.wanted for call in batch_calls):
                    self.pool.cancel(worker, batch_id)
        for group in entered:
            if not self._open.get(group.options, True):
                del self._open[group.options]
        self._changed.notify_all()

    def _account(self, asked: Asked, fresh: Sequence[Call], statement: Statement, seconds: float) -> None:
        made = [call.outcome for call in fresh if call.outcome]
        statement.add(
            self.name,
            rows=len(asked.outcomes),
            calls=len(fresh),
            reused=sum(asked.reused),
            errors=sum(1 for outcome in asked.outcomes if outcome.error),
            prompt_tokens=sum(outcome.prompt_tokens for outcome in made),
            completion_tokens=sum(outcome.completion_tokens for outcome in made),
            seconds=seconds,
        )

    # -- feeding ------------------------------------------------------------------------------------------

    def _start_feeders(self) -> None:
        if self._feeders:
            return
        self._feeders = [
            threading.Thread(target=self._feed, name=f"sqlext-feeder-{self.name}-{number}", daemon=True)
            for number in range(self._slots.total)
        ]
        for thread in self._feeders:
            thread.start()

    def _feed(self) -> None:
        while True:
            with self._changed:
                while (work := self._take()) is None:
                    if self._closing and self._asking == 0:
                        return
                    self._changed.wait()
            worker, batch, calls = work
            try:
                self._carry(worker, batch, calls)
            finally:
                with self._changed:
                    del self._in_flight[batch.id]
                    self._slots.release(worker)
                    self._changed.notify_all()

    def _take(self) -> tuple[int, Batch, list[Call]] | None:
        again = self._queue.again
        worker = self._slots.choose(empty=again) if len(self._queue) else None
        if worker is None:
            return None
        calls = self._queue.take(full_only=not self._slots.idle(worker))
        if not calls:
            return None
        # A batch that was lost may have killed its worker: no other batch is put beside it.
        self._slots.occupy(worker, alone=again)
        batch = Batch(next(self._batch_ids), calls[0].options, [call.prompt for call in calls])
        self._in_flight[batch.id] = (worker, calls)
        return worker, batch, calls

    def _carry(self, worker: int, batch: Batch, calls: list[Call]) -> None:
        try:
            for answers in self.pool.run(worker, batch):
                self._deliver(calls, answers)
            self._notice_other_model()
            lost: SqlextError = Retryable("The engine ended a batch without an answer for every row.")
        except SqlextError as error:
            lost = error
        except Exception as error:  # a fault of ours must reach the user, not strand the waiting rows
            lost = Fatal(f"The gateway failed: {type(error).__name__}: {error}")
        missing = [call for call in calls if call.outcome is None and call.wanted]
        if missing:
            self._lose(missing, lost)

    def _notice_other_model(self) -> None:
        """Another process may have deployed the model anew: what is remembered is no longer its word."""
        if self.pool.generation != self._generation:
            with self._changed:
                self._generation = self.pool.generation
                self._defaults = self.pool.spec.defaults
                self._memory.clear()

    def _deliver(self, calls: Sequence[Call], answers: Answers) -> None:
        columns = zip(
            answers.rows,
            answers.outputs,
            answers.finish_reasons,
            answers.prompt_tokens,
            answers.completion_tokens,
            strict=True,
        )
        errors, latency_ms = answers.errors, answers.latency_ms
        with self._changed:
            for row, output, finish_reason, prompt_tokens, completion_tokens in columns:
                error = errors.get(row) if errors else None
                shown = None if error else output
                calls[row].settle(Outcome(shown, error, finish_reason, prompt_tokens, completion_tokens, latency_ms))
            self._remember([calls[row] for row in answers.rows])
            self._failures_in_a_row = 0

    def _remember(self, calls: Sequence[Call]) -> None:
        if calls and calls[0].options.deterministic:
            self._memory.remember(calls[0].options, calls)

    def _lose(self, calls: list[Call], error: SqlextError) -> None:
        """A batch ended without these calls: halve it and send it again, or give up."""
        with self._changed:
            if not isinstance(error, (Retryable, RowError)):
                self._give_up(calls, error)
                return
            if isinstance(error, OutOfMemory):
                self._queue.max_rows = max(1, min(self._queue.max_rows, len(calls) // 2))
            if len(calls) > 1:
                self._queue.put_back(calls)
            else:
                calls[0].losses += 1
                if isinstance(error, (OutOfMemory, RowError)) or calls[0].losses >= MAX_LOSSES_ALONE:
                    self._fail_row(calls[0], error)
                else:
                    self._queue.put_back(calls)
            self._changed.notify_all()

    def _give_up(self, calls: Sequence[Call], error: SqlextError) -> None:
        """Fail every `ask` that waits for one of these calls; nobody may join the calls any more."""
        for call in calls:
            for ticket in call.tickets:
                ticket.fail(error)
            call.shut()

    def _fail_row(self, call: Call, error: SqlextError) -> None:
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            stop = Fatal(
                f'The model "{self.name}" failed on {self._failures_in_a_row} rows in a row; the last error: '
                f"{error.message}",
                code=error.code,
                hint="Rows that were finished are kept. See `!llm status`, mend the cause and run it again.",
            )
            self._failures_in_a_row = 0  # the next statement has its own patience
            self._give_up([call], stop)
            return
        call.settle(Outcome(None, error.info))
        self._remember([call])
