"""Dispatch: open calls go to workers in batches, and every call comes back with an outcome.

Feeder threads carry batches to the pool and answers back. A batch that is lost is halved and sent again, so that a
poison row ends alone with its error; a row whose failure may pass waits its turn and is tried again.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from runtime.errors import ErrorInfo, Fatal, OutOfMemory, Retryable, RowError, SqlextError
from runtime.gateway.budget import most_tokens
from runtime.gateway.call import Call, PlainOutcome, wanted
from runtime.gateway.interpreter import busy
from runtime.gateway.pace import Pace, RetryPolicy
from runtime.gateway.queue import CallQueue
from runtime.gateway.slots import Slots
from runtime.schema import unfit
from runtime.spec import Answers, Batch, CallOptions, Delta, EngineInfo, ModelSpec, PoolSpec

MAX_LOSSES_ALONE = 2  # a row whose batch of one was lost this often is the cause, not an accident
MAX_GIVEN_UP_IN_A_ROW = 20  # rows that were given up, one after the other, before the statement stops
CLOSE_TIMEOUT_S = 2.0  # for feeders to end; one that waits for a batch nobody wants is left behind
LINGER_S = 0.05  # that an incomplete batch waits for rows that are being asked ahead
BUDGET_POLL_S = 0.05  # another model may settle what this one waits for


class WorkerPool(Protocol):
    """What the gateway needs of a pool of workers."""

    @property
    def name(self) -> str:
        """The function's name."""
        ...

    @property
    def generation(self) -> int:
        """Changes when the model is deployed anew."""
        ...

    @property
    def spec(self) -> ModelSpec:
        """What was asked for."""
        ...

    @property
    def pool(self) -> PoolSpec:
        """How it is placed."""
        ...

    @property
    def info(self) -> EngineInfo:
        """What was loaded."""
        ...

    @property
    def workers(self) -> int:
        """How many there are."""
        ...

    def run(self, worker: int, batch: Batch) -> Iterator[Answers | Delta]:
        """Answer a batch on a worker, with the texts of `batch.stream` as they are written; blocks between pieces.

        Raises:
            Retryable: the batch was lost (worker died or hung, out of memory); it may be sent again.
            SqlextError: anything else that ends the batch.
        """
        ...

    def count_tokens(self, worker: int, batch: Batch) -> Sequence[int] | None:
        """Tokens of each prompt as the model reads it; None when the engine cannot know. Raises as `run`."""
        ...

    def cancel(self, worker: int, batch_id: int) -> None:
        """Nobody wants the batch any more. Returns at once."""
        ...

    def close(self) -> None:
        """Drop the handles; the workers stay deployed."""
        ...


class Dispatcher:
    """Queue, slots, retries and feeder threads in front of one pool.

    Args:
        pool: the workers.
        lock: the gateway's.
        policy: attempts and waiting times.
        settle: called without the lock when calls have their outcomes; must end in `Call.settle` of each.
    """

    def __init__(
        self,
        pool: WorkerPool,
        lock: threading.RLock,
        policy: RetryPolicy,
        settle: Callable[[Sequence[Call], Sequence[PlainOutcome]], None],
    ) -> None:
        info = pool.info
        balance = pool.pool.load_balance
        self._pool = pool
        self._lock = lock
        self._work = threading.Condition(lock)  # there may be something to send
        self._settle = settle
        self._pace = Pace(policy, time.monotonic)
        self._queue = CallQueue(info.max_batch_rows, info.max_batch_chars, pool.workers, balance == "prefix")
        self._slots = Slots(pool.workers, pool.pool.worker_concurrency, balance)
        self._max_rows = info.max_batch_rows  # shrinks when a batch runs out of memory
        self._later: list[tuple[float, int, Call]] = []  # a heap of calls to be tried again, by time
        self._numbers = itertools.count(1)
        self._in_flight: dict[int, tuple[int, Sequence[Call]]] = {}
        self._rows_in_flight = 0
        self._given_up_in_a_row = 0
        self._linger_until = 0.0
        self._short_of_budget = False
        self._closing = False
        self._feeders: list[threading.Thread] = []

    def put(self, options: CallOptions, calls: Sequence[Call], *, ahead: bool = False) -> None:
        """Take new calls, all with the same options; `ahead`: more of the kind come soon. Under the lock."""
        if ahead:
            self._linger_until = time.monotonic() + LINGER_S
        self._queue.put(options, list(calls))
        self._start_feeders()
        self._work.notify()

    def stop_lingering(self) -> None:
        """No more calls come ahead of their time. Under the lock."""
        self._linger_until = 0.0
        self._work.notify()

    def drop_unwanted(self) -> None:
        """Some calls have lost those who waited: cancel batches that nobody wants any more. Under the lock."""
        for batch_id, (worker, calls) in self._in_flight.items():
            if not wanted(calls):
                self._pool.cancel(worker, batch_id)
        self._work.notify()  # a feeder may have found nothing but these

    def close(self) -> None:
        """Stop the feeders, when nobody waits any more, and drop the pool's handles."""
        with self._lock:
            self._closing = True
            self._work.notify_all()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._feeders:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._pool.close()

    # -- what is sent next ----------------------------------------------------------------------------------

    def _start_feeders(self) -> None:
        if self._feeders:
            return
        self._feeders = [
            threading.Thread(target=self._feed, name=f"sqlext-feeder-{self._pool.name}-{number}", daemon=True)
            for number in range(self._slots.total)
        ]
        for thread in self._feeders:
            thread.start()

    def _feed(self) -> None:
        while True:
            with self._lock:
                now = time.monotonic()  # before it is asked what may be sent: what is due after that is waited for
                while (work := self._take()) is None:
                    if self._closing:
                        return
                    self._work.wait(self._until_next_event(now))
                    now = time.monotonic()
            worker, batch, calls = work
            try:
                with busy:
                    self._carry(worker, batch, calls)
            finally:
                with self._lock:
                    del self._in_flight[batch.id]
                    self._rows_in_flight -= len(calls)
                    self._slots.release(worker)

    def _take(self) -> tuple[int, Batch, list[Call]] | None:
        self._bring_back()
        again = self._queue.again
        worker = self._slots.choose(empty=again) if len(self._queue) else None
        room = self._pace.room(self._rows_in_flight)
        if worker is None or room == 0:
            return None
        self._queue.max_rows = self._max_rows if room is None else min(self._max_rows, room)
        lingers = time.monotonic() < self._linger_until
        full_only = lingers or not self._slots.idle(worker)
        self._short_of_budget = False
        calls: list[Call] = []
        while not calls and not self._short_of_budget:
            found = self._queue.take(full_only, worker)
            if not found:
                return None
            calls = self._affordable(found)
        if not calls:
            return None
        # A batch that was lost may have killed its worker: no other batch is put beside it.
        self._slots.occupy(worker, alone=again)
        heard = frozenset(row for row, call in enumerate(calls) if call.text is not None)
        for row in heard:
            calls[row].text = ""  # an attempt begins anew
        batch = Batch(next(self._numbers), calls[0].options, [call.prompt for call in calls], heard)
        self._in_flight[batch.id] = (worker, calls)
        self._rows_in_flight += len(calls)
        self._note_sent(calls)
        if len(self._queue):
            self._work.notify()  # each feeder wakes the next, so that none wakes in vain
        return worker, batch, calls

    def _bring_back(self) -> None:
        """Calls that waited to be tried again, and whose time has come."""
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            call = heapq.heappop(self._later)[2]
            if call.wanted:
                self._queue.put(call.options, [call])

    def _until_next_event(self, now: float) -> float | None:
        """Seconds from `now` after which something may be sent though nothing else happens; None: never."""
        if not (len(self._queue) or self._later):
            return None
        times = [self._pace.resume_at, self._linger_until]
        if self._later:
            times.append(self._later[0][0])
        if self._short_of_budget:
            times.append(now + BUDGET_POLL_S)
        return min((at - now for at in times if at > now), default=None)

    def _affordable(self, calls: list[Call]) -> list[Call]:
        """The calls that their statements' budgets allow now; the others wait for what is under way to be settled."""
        if not any(call.statement.budgets for call in calls):
            return calls
        taken = [call for call in calls if self._reserve(call)]
        waiting = [call for call in calls if call.reserved is None and call.wanted]
        if waiting:
            self._short_of_budget = True
            self._queue.put(waiting[0].options, waiting)
        return taken

    def _reserve(self, call: Call) -> bool:
        """Whether someone who waits for the call can pay for it now; who never can is stopped."""
        while call.reserved is None:
            payer = next((ticket.statement for ticket in call.tickets if ticket.waits), None)
            if payer is None:  # a statement may be cancelled at any moment
                return False
            call.statement = payer
            budgets = payer.budgets
            try:
                tokens = most_tokens(call.prompt, call.options, self._pool.info) if budgets.counts_tokens else 0
                if not budgets.reserve(tokens):
                    return False
                call.reserved = tokens
            except SqlextError as error:
                self._stop_statement(call, error)
        return call.reserved is not None

    def _stop_statement(self, call: Call, error: SqlextError) -> None:
        """The statement cannot pay for the call; others who wait for it may."""
        statement = call.statement
        for ticket in call.tickets:
            if ticket.statement is statement:
                ticket.fail(error)
        statement.fail(error)
        if not call.wanted:
            call.shut()
        self.drop_unwanted()

    def _unreserve(self, calls: Iterable[Call]) -> None:
        """Calls that are not under way any more, and were not answered: only what is under way is set aside."""
        for call in calls:
            if call.reserved is not None:
                call.statement.budgets.settle(call.reserved, 0, sent=False)
                call.reserved = None

    def _note_sent(self, calls: Sequence[Call]) -> None:
        now = time.monotonic()
        for call in calls:
            call.sent = now
            call.since = call.since or now
        for statement in {id(call.statement): call.statement for call in calls}.values():
            statement.worked(self._pool.name, began=now)

    # -- what comes back ------------------------------------------------------------------------------------

    def _carry(self, worker: int, batch: Batch, calls: list[Call]) -> None:
        pending = dict(enumerate(calls))
        try:
            for piece in self._pool.run(worker, batch):
                if isinstance(piece, Delta):
                    self._tell(pending, piece)
                else:
                    self._deliver(pending, piece)
            lost: SqlextError = Retryable("The engine ended a batch without an answer for every row.")
        except Exception as error:
            lost = _fault(error)
        missing = [call for call in pending.values() if call.outcome is None and call.wanted]
        with self._lock:
            self._unreserve(call for call in pending.values() if not call.wanted)
            if missing:
                self._lose(missing, lost, len(calls))

    def _tell(self, pending: dict[int, Call], delta: Delta) -> None:
        """A row's text goes on: whoever listens hears it."""
        if (call := pending.get(delta.row)) and _unsound(delta.text) is None:
            with self._lock:
                call.tell(delta.text)

    def _deliver(self, pending: dict[int, Call], answers: Answers) -> None:
        """Each row of the batch counts once, whatever an engine sends; a row it does not have is nobody's answer."""
        calls, outcomes = [], []
        errors, latency_ms = answers.errors, answers.latency_ms
        columns = (
            answers.rows,
            answers.outputs,
            answers.finish_reasons,
            answers.prompt_tokens,
            answers.completion_tokens,
        )
        if len(set(map(len, columns))) != 1:  # told before the first row is taken
            raise Fatal("The engine answered with columns of different lengths.", code="engine_failed")
        for row, output, finish_reason, prompt_tokens, completion_tokens in zip(*columns, strict=True):
            call = pending.pop(row, None)
            if call is None:
                continue
            error = errors.get(row) if errors else None
            error = error or _unsound(output) or _unfit(call, output, finish_reason)
            if error is not None and row in answers.retry_after_s:
                with self._lock:
                    self._fail_for_now(call, error, answers.retry_after_s[row])
                continue
            shown = None if error else output
            calls.append(call)
            outcomes.append(
                (shown, finish_reason, prompt_tokens, completion_tokens, latency_ms, error, call.statement.id)
            )
        if not calls:
            return
        with self._lock:
            self._pace.answered(len(calls))
            self._given_up_in_a_row = 0
        self._finish(calls, outcomes)

    def _finish(self, calls: Sequence[Call], outcomes: Sequence[PlainOutcome]) -> None:
        failure = None
        try:
            self._settle(calls, outcomes)
        except Exception as error:  # the answers could not be kept
            failure = _fault(error)
        for call, outcome in zip(calls, outcomes, strict=True):  # not before: who waits for a budget may end now
            if call.reserved is not None:
                call.statement.budgets.settle(call.reserved, outcome[2] + outcome[3])
                call.reserved = None
        if failure:
            with self._lock:
                self._give_up(calls, failure)

    def _fail_for_now(self, call: Call, error: ErrorInfo, retry_after_s: float) -> None:
        """An attempt failed in a way that may pass: try the call again later, or give it up. Under the lock."""
        policy = self._pace.policy
        now = time.monotonic()
        too_long = retry_after_s > policy.longest_retry_after_s
        stops = ""
        if not (retry_after_s or error.code == "rate_limited"):
            if self._pace.failed(call.since, self._rows_in_flight):
                stops = f"{policy.failures_in_a_row} times in a row, and after a pause again"
        elif not too_long:
            if self._pace.slow_down(retry_after_s, self._rows_in_flight):
                stops = f"{policy.failures_in_a_row} times in a row, with longer and longer waits between"
            if self._pace.answered_since(call.since):  # others were served: not the row's failure, but too many rows
                call.attempts -= 1
            call.since = now
        call.attempts += 1
        delay = policy.delay(max(1, call.attempts), retry_after_s)
        call.seconds += now - call.sent + delay - retry_after_s
        tried = replace(error, attempts=call.attempts)
        if stops:
            self._stop(call, tried, stops)
        elif call.attempts >= policy.attempts or call.seconds > policy.row_deadline_s or too_long:
            self._fail_row(call, tried)
        else:
            self._unreserve([call])
            heapq.heappush(self._later, (now + delay, next(self._numbers), call))
            self._work.notify()  # this feeder's batch may go on for long

    def _lose(self, calls: list[Call], error: SqlextError, rows: int) -> None:
        """A batch of `rows` ended without these calls: send them again in halves, or give up. Under the lock."""
        if not isinstance(error, (Retryable, RowError)):
            self._give_up(calls, error)
            return
        alone = rows == 1
        if isinstance(error, OutOfMemory):  # a row that is too large by itself says nothing of the others
            self._max_rows = self._pool.info.max_batch_rows if alone else min(self._max_rows, rows // 2)
        calls[0].losses += alone
        if alone and (isinstance(error, (OutOfMemory, RowError)) or calls[0].losses >= MAX_LOSSES_ALONE):
            self._fail_row(calls[0], replace(error.info, attempts=calls[0].losses))
        else:
            self._unreserve(calls)
            self._queue.put_back(calls)

    def _fail_row(self, call: Call, error: ErrorInfo) -> None:
        # Bad rows are left over at the end of a table: only those sent since the last answer speak against the model.
        self._given_up_in_a_row += not self._pace.answered_since(call.since)
        if self._given_up_in_a_row >= MAX_GIVEN_UP_IN_A_ROW:
            self._stop(call, error, f"on {self._given_up_in_a_row} rows in a row")
            return
        self._finish([call], [(None, "", 0, 0, 0.0, error, call.statement.id)])

    def _stop(self, call: Call, error: ErrorInfo, how: str) -> None:
        self._given_up_in_a_row = 0  # the next statement has its own patience
        stop = Fatal(
            f'The model "{self._pool.name}" failed {how}; the last error: {error.message}',
            code=error.code,
            hint="Rows that were finished are kept. See `!llm status`, mend the cause and run the statement again: "
            "it asks only for the rest.",
        )
        self._give_up([call], stop)

    def _give_up(self, calls: Sequence[Call], error: SqlextError) -> None:
        """Fail every statement that waits for one of these calls; nobody may join them any more. Under the lock."""
        for call in calls:
            for ticket in call.tickets:
                ticket.fail(error)
                ticket.statement.fail(error)
            call.shut()
        self._unreserve(calls)
        self.drop_unwanted()


def _unsound(output: object) -> ErrorInfo | None:
    """What is wrong with an answer that could not be shown or stored; None: nothing."""
    if output is None:
        return ErrorInfo("no_answer", "The engine gave no answer to the row, and no cause.")
    if isinstance(output, str) and not output.isascii():
        try:
            output.encode()
        except UnicodeEncodeError:
            return ErrorInfo("bad_answer", "The answer holds characters that are no valid Unicode text.")
    return None


def _unfit(call: Call, output: str, finish_reason: str) -> ErrorInfo | None:
    """What is wrong with an answer that was to have a schema: no engine is trusted with it."""
    return unfit(call.options.schema, output, finish_reason) if call.options.schema else None


def _fault(error: Exception) -> SqlextError:
    """The error as one of ours: a fault of this program must reach the user, not strand the waiting rows."""
    return error if isinstance(error, SqlextError) else Fatal(f"The gateway failed: {type(error).__name__}: {error}")
