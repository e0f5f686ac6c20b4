"""Calls that are asked ahead of a statement's real run: noted at once, made once, and dropped when in vain."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from scripted import ScriptedPool

from runtime.errors import Cancelled, ErrorInfo, Fatal, RowError, SqlextError
from runtime.gateway import (
    Asked,
    Budget,
    Budgets,
    Gateway,
    GatewayClosed,
    Group,
    Limits,
    Mode,
    ResultStore,
    RetryPolicy,
    Statement,
)
from runtime.gateway.ahead import KNOWN_CHUNKS
from runtime.spec import Answers, Batch, CallOptions, ModelSpec

GREEDY = CallOptions()
SAMPLED = CallOptions(temperature=1.0)
CHUNKS = 50  # of a long table; 500 make a million rows


class Gate:
    """A script that holds every batch until it is opened; `begun` is set by the first."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self._open = threading.Event()

    def __call__(self, batch: Batch) -> None:
        self.begun.set()
        assert self._open.wait(20)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ResultStore]:
    store = ResultStore(tmp_path / "results.db")
    yield store
    store.close()


def stored_pool(script: Callable[[Batch], None] = lambda _: None, **how: int) -> ScriptedPool:
    pool = ScriptedPool(script, **how)
    pool.spec = ModelSpec("chat", "scripted", fingerprint="weights")
    return pool


def begin(statement: Statement) -> Statement:
    """One more run of its query in mode AHEAD."""
    statement.mode = Mode.AHEAD
    statement.passes += 1
    return statement


def outputs(asked: Asked) -> list[str | None]:
    return [outcome and outcome[0] for outcome in asked]


def ask(gateway: Gateway, prompts: list[str], statement: Statement) -> list[str | None]:
    return outputs(gateway.ask(GREEDY, prompts, statement))


def real(gateway: Gateway, prompts: list[str], statement: Statement) -> list[str | None]:
    gateway.pass_over()
    statement.mode = Mode.REAL
    return ask(gateway, prompts, statement)


def upper(prompts: list[str]) -> list[str]:
    return [prompt.upper() for prompt in prompts]


def rows(count: int, name: str = "row") -> list[str]:
    return [f"{name} {number}" for number in range(count)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


# -- what a run gets --------------------------------------------------------------------------------------------


def test_what_is_not_known_is_answered_by_null_at_once(gate: Gate):
    """The first run in mode AHEAD waits for nothing, and the workers have begun."""
    gateway = Gateway(ScriptedPool(gate))
    statement = begin(Statement(1))
    assert ask(gateway, rows(100), statement) == [None] * 100
    assert gate.begun.wait(10)
    assert gateway.asked_ahead(statement) == (100, 100)
    gate.open()
    assert real(gateway, rows(100), statement) == upper(rows(100))
    assert gateway.asked_ahead(statement) == (100, 0)
    gateway.close()


def test_what_is_known_is_answered_at_once(gate: Gate):
    """From memory or from the store, in the same chunk as what is not known."""
    pool = ScriptedPool(lambda batch: gate(batch) if "new" in batch.prompts else None)
    gateway = Gateway(pool)
    ask(gateway, ["old"], Statement(1))
    statement = begin(Statement(2))
    assert ask(gateway, ["new", "old", "new"], statement) == [None, "OLD", None]
    gate.open()
    assert real(gateway, ["new", "old", "new"], statement) == ["NEW", "OLD", "NEW"]
    assert sorted(pool.prompts) == ["new", "old"]
    gateway.close()


def test_what_is_stored_is_answered_at_once(store: ResultStore):
    """Another session's answers count as known."""
    gateway = Gateway(stored_pool(), store)
    ask(gateway, rows(50), Statement(1))
    gateway.close()
    pool = stored_pool()
    gateway = Gateway(pool, store)
    assert ask(gateway, rows(50), begin(Statement(1))) == upper(rows(50))
    assert pool.batches == []
    gateway.close()


def test_the_next_run_waits_for_what_the_first_has_asked(gate: Gate, threads: ThreadPoolExecutor):
    """It needs the answers to ask for what depends on them."""
    gateway = Gateway(ScriptedPool(gate))
    statement = begin(Statement(1))
    ask(gateway, ["a", "b"], statement)
    begin(statement)
    second = threads.submit(ask, gateway, ["a", "b", "c"], statement)
    assert gate.begun.wait(10)
    assert not second.done()
    gate.open()
    assert second.result(timeout=10) == ["A", "B", None]  # the new one is only noted
    assert real(gateway, ["a", "b", "c"], statement) == ["A", "B", "C"]
    gateway.close()


def test_a_chain_of_calls_opens_one_link_in_each_run():
    """chat(chat(chat(x))): every run finds the next argument, and each call is made once."""
    pool = ScriptedPool()
    gateway = Gateway(pool)
    statement = Statement(1)
    values: list[str | None] = []
    for _ in range(3):
        begin(statement)
        values = list(rows(20))
        for _ in range(3):
            known = [value for value in values if value is not None]
            answers = iter([answer and f"{answer}!" for answer in ask(gateway, known, statement)])
            values = [value and next(answers) for value in values]
        gateway.pass_over()
    statement.mode = Mode.REAL
    values = rows(20)
    for _ in range(3):
        values = [f"{answer}!" for answer in real(gateway, values, statement)]
    assert values == [f"{prompt.upper()}!!!" for prompt in rows(20)]
    assert max(Counter(pool.prompts).values()) == 1
    assert len(pool.prompts) == 60
    assert gateway.asked_ahead(statement) == (60, 0)
    gateway.close()


def test_sampled_calls_are_not_asked_ahead():
    """They are made for each row of the real run, and for nothing else."""
    pool = ScriptedPool()
    gateway = Gateway(pool)
    statement = begin(Statement(1))
    assert gateway.ask_all([Group(SAMPLED, ["a", "a"]), Group(GREEDY, ["b"])], statement) == [[None, None], [None]]
    statement.mode = Mode.REAL
    gateway.pass_over()
    assert outputs(gateway.ask(SAMPLED, ["a", "a"], statement)) == ["A", "A"]
    assert sorted(pool.prompts) == ["a", "a", "b"]
    gateway.close()


def test_rows_of_a_run_ahead_are_not_counted_twice():
    """Usage is that of the real run; the calls are counted where they were made."""
    gateway = Gateway(ScriptedPool())
    statement = begin(Statement(1))
    ask(gateway, rows(10) * 2, statement)
    real(gateway, rows(10) * 2, statement)
    used = statement.usage["chat"]
    assert (used.rows, used.calls, used.reused, used.errors) == (20, 10, 10, 0)
    gateway.close()


def test_a_row_that_fails_ahead_has_its_error_in_the_real_run():
    """It is not tried again for the same statement."""

    def script(batch: Batch) -> None:
        if "bad" in batch.prompts:
            raise RowError("no", code="bad_row")

    pool = ScriptedPool(script)
    gateway = Gateway(pool)
    statement = begin(Statement(1))
    ask(gateway, ["good", "bad"], statement)
    gateway.pass_over()
    wait_until(lambda: gateway.asked_ahead(statement) == (2, 0))
    sent = len(pool.prompts)
    statement.mode = Mode.REAL
    asked = gateway.ask(GREEDY, ["good", "bad"], statement)
    assert [outcome and outcome[5] and outcome[5].code for outcome in asked] == [None, "bad_row"]
    assert len(pool.prompts) == sent
    gateway.close()


def test_a_model_that_fails_ahead_ends_the_real_run():
    """The cause is kept until somebody asks."""

    def script(batch: Batch) -> None:
        raise Fatal("the model was removed")

    gateway = Gateway(ScriptedPool(script))
    statement = begin(Statement(1))
    ask(gateway, ["a"], statement)
    gateway.pass_over()
    wait_until(lambda: statement.cancelled)
    with pytest.raises(Fatal, match="removed"):
        real(gateway, ["a"], statement)
    gateway.close()


# -- once -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 4])
def test_runs_ahead_real_runs_and_other_statements_share_every_call(workers: int, threads: ThreadPoolExecutor):
    """Three statements at once, one of them asked ahead in two runs: each distinct prompt is sent once."""
    pool = ScriptedPool(workers=workers, max_batch_rows=16)
    gateway = Gateway(pool)
    chunks = [rows(2000)[start : start + 100] for start in range(0, 2000, 100)]
    statement = Statement(1)

    def whole(number: int) -> list[str | None]:
        other = Statement(number)
        return [output for chunk in chunks for output in ask(gateway, chunk, other)]

    def in_runs() -> list[str | None]:
        for _ in range(2):
            begin(statement)
            for chunk in chunks:
                ask(gateway, chunk, statement)
            gateway.pass_over()
        return [output for chunk in chunks for output in real(gateway, chunk, statement)]

    others: list[Future[list[str | None]]] = [threads.submit(whole, number) for number in (2, 3)]
    ahead = threads.submit(in_runs)
    for told in [ahead, *others]:
        assert told.result(timeout=30) == upper(rows(2000))
    assert len(pool.prompts) == len(set(pool.prompts)) == 2000
    assert gateway.asked_ahead(statement)[1] == 0
    gateway.close()


def test_a_run_ahead_from_many_threads_asks_once(threads: ThreadPoolExecutor):
    """DuckDB's threads look at chunks that overlap."""
    pool = ScriptedPool(workers=2)
    gateway = Gateway(pool)
    statement = begin(Statement(1))
    list(threads.map(lambda _: ask(gateway, rows(1000), statement), range(8)))
    assert gateway.asked_ahead(statement)[0] == 1000
    assert real(gateway, rows(1000), statement) == upper(rows(1000))
    assert len(pool.prompts) == 1000
    gateway.close()


# -- in vain ----------------------------------------------------------------------------------------------------


def test_cancel_drops_what_is_queued_and_cancels_what_is_under_way(gate: Gate):
    """Of 1,000 calls asked ahead no more than the two batches that had begun are sent."""
    pool = ScriptedPool(gate, max_batch_rows=10)
    gateway = Gateway(pool)
    statement = begin(Statement(1))
    ask(gateway, rows(1000), statement)
    wait_until(lambda: len(pool.batches) == 2)
    statement.cancel()
    with pytest.raises(Cancelled):
        ask(gateway, rows(10), statement)
    gateway.forget(statement)
    assert sorted(set(pool.cancelled)) == [1, 2]
    gate.open()
    assert ask(gateway, ["next"], Statement(2)) == ["NEXT"]
    assert len(pool.prompts) == 21
    gateway.close()


def test_a_second_run_that_waits_wakes_at_cancel(gate: Gate, threads: ThreadPoolExecutor):
    """Ctrl-C ends a run in mode AHEAD as it ends the real one."""
    gateway = Gateway(ScriptedPool(gate))
    statement = begin(Statement(1))
    ask(gateway, ["a"], statement)
    begin(statement)
    waiting = threads.submit(ask, gateway, ["a"], statement)
    assert gate.begun.wait(10)
    statement.cancel()
    with pytest.raises(Cancelled):
        waiting.result(timeout=10)
    gate.open()
    gateway.close()


def test_what_the_real_run_does_not_need_is_dropped_at_its_end(gate: Gate):
    """A query with LIMIT asks ahead for rows that it never reads."""
    pool = ScriptedPool(lambda batch: gate(batch) if "first row" not in batch.prompts else None, max_batch_rows=10)
    gateway = Gateway(pool)
    statement = begin(Statement(1))
    ask(gateway, ["first row", *rows(1000)], statement)
    assert real(gateway, ["first row"], statement) == ["FIRST ROW"]
    wait_until(lambda: len(pool.batches) == 3)
    gateway.forget(statement)
    assert sorted(set(pool.cancelled)) == [2, 3]
    gate.open()
    assert ask(gateway, ["next"], Statement(2)) == ["NEXT"]
    assert len(pool.batches) == 4
    assert gateway.asked_ahead(statement) == (0, 0)
    gateway.close()


def test_what_another_statement_waits_for_is_not_dropped(gate: Gate, threads: ThreadPoolExecutor):
    """forget() and cancel() take back one statement's wish, not the other's."""
    pool = ScriptedPool(gate)
    gateway = Gateway(pool)
    first, second = begin(Statement(1)), Statement(2)
    ask(gateway, rows(10), first)
    gateway.pass_over()
    waiting = threads.submit(ask, gateway, rows(10), second)
    assert gate.begun.wait(10)
    wait_until(lambda: gateway._asking == 1)
    first.cancel()
    gateway.forget(first)
    gate.open()
    assert waiting.result(timeout=10) == upper(rows(10))
    gateway.close()


# -- bounds -----------------------------------------------------------------------------------------------------


def small(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("runtime.gateway.gateway.MAX_AHEAD", most)


def test_a_run_that_is_far_ahead_waits_for_the_workers(
    gate: Gate, threads: ThreadPoolExecutor, store: ResultStore, monkeypatch: pytest.MonkeyPatch
):
    """It goes on when calls are answered, and never has more than a chunk above the bound open."""
    small(monkeypatch, 100)
    gateway = Gateway(stored_pool(gate, max_batch_rows=10), store)
    statement = begin(Statement(1))
    most = [0]

    def run() -> None:
        for chunk in range(50):
            ask(gateway, rows(50, f"chunk {chunk}"), statement)
            most[0] = max(most[0], gateway.asked_ahead(statement)[1])

    running = threads.submit(run)
    wait_until(lambda: gateway.asked_ahead(statement) == (100, 100))
    assert not running.done()
    gate.open()
    running.result(timeout=20)
    assert gateway.asked_ahead(statement)[0] == 2500
    assert most[0] < 150
    gateway.close()


@pytest.mark.parametrize("how", ["cancel", "fail", "close", "forget"])
def test_a_run_that_waits_for_room_wakes_when_the_statement_ends(
    how: str, gate: Gate, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
):
    """Cancelled, failed, or its model replaced: nobody is left waiting for room that will never come."""
    small(monkeypatch, 10)
    gateway = Gateway(ScriptedPool(gate, max_batch_rows=5))
    statement = begin(Statement(1))
    ask(gateway, rows(100), statement)
    waiting = threads.submit(ask, gateway, ["more"], statement)
    wait_until(lambda: gateway._asking == 1)
    match how:
        case "cancel":
            statement.cancel()
        case "fail":
            statement.fail(Fatal("no more"))
        case "close":
            threads.submit(gateway.close)
        case "forget":
            gateway.forget(statement)
    try:
        assert waiting.result(timeout=10) == [None]
    except SqlextError as error:
        assert how in ("cancel", "fail"), error  # noqa: PT017 - either end will do
    gate.open()
    gateway.close()


def test_a_model_that_is_replaced_while_a_query_is_asked_ahead_is_closed(gate: Gate, threads: ThreadPoolExecutor):
    """close() drops what was asked ahead and does not wait for it; later questions go to the next model."""
    pool = ScriptedPool(gate, max_batch_rows=10)
    gateway = Gateway(pool)
    statement = begin(Statement(1))
    ask(gateway, rows(1000), statement)
    wait_until(lambda: len(pool.batches) == 2)
    closing = threads.submit(gateway.close)
    wait_until(lambda: gateway._closing)
    with pytest.raises(GatewayClosed):
        ask(gateway, rows(10), statement)
    gate.open()
    closing.result(timeout=10)
    assert len(pool.batches) == 2
    assert not statement.cancelled


def test_without_a_store_no_more_is_asked_ahead_than_is_kept(monkeypatch: pytest.MonkeyPatch):
    """cache=off: the first calls only, in all; the real run asks for the rest, and for nothing twice."""
    small(monkeypatch, 300)
    pool = ScriptedPool(workers=2)
    gateway = Gateway(pool)
    statement = begin(Statement(1, cache="off"))
    chunks = [rows(1000)[start : start + 100] for start in range(0, 1000, 100)]
    for _ in range(2):
        for chunk in chunks:
            ask(gateway, chunk, statement)
        gateway.pass_over()
        assert gateway.asked_ahead(statement)[0] == 300
        begin(statement)
    assert [output for chunk in chunks for output in real(gateway, chunk, statement)] == upper(rows(1000))
    assert len(pool.prompts) == len(set(pool.prompts)) == 1000
    gateway.close()


def test_two_statements_without_a_cache_share_nothing(threads: ThreadPoolExecutor):
    """cache=off answers anew for each statement, asked ahead or not."""
    pool = ScriptedPool()
    gateway = Gateway(pool)

    def whole(number: int) -> list[str | None]:
        statement = begin(Statement(number, cache="off"))
        ask(gateway, rows(200), statement)
        return real(gateway, rows(200), statement)

    for told in [threads.submit(whole, number) for number in (1, 2)]:
        assert told.result(timeout=10) == upper(rows(200))
    assert set(Counter(pool.prompts).values()) == {2}
    gateway.close()


def test_where_everything_is_known_most_chunks_are_passed_over():
    """After some chunks without a new call only one in as many is looked at; a new prompt there is found."""
    pool = ScriptedPool()
    gateway = Gateway(pool)
    ask(gateway, rows(10), Statement(1))
    statement = begin(Statement(2))
    looked = [ask(gateway, rows(10), statement) != [None] * 10 for _ in range(10 * KNOWN_CHUNKS)]
    assert all(looked[:KNOWN_CHUNKS])
    assert sum(looked[KNOWN_CHUNKS:]) == 9
    for number in range(KNOWN_CHUNKS):
        ask(gateway, [f"new {number}"], statement)
    assert gateway.asked_ahead(statement)[0] == 1
    ask(gateway, ["newer"], statement)  # what was found makes it look again
    assert gateway.asked_ahead(statement)[0] == 2
    wanted = [f"new {number}" for number in range(KNOWN_CHUNKS)]
    assert real(gateway, [*wanted, "newer"], statement) == upper([*wanted, "newer"])
    assert len(pool.prompts) == len(set(pool.prompts)) == 10 + KNOWN_CHUNKS + 1
    gateway.close()


# -- batches ----------------------------------------------------------------------------------------------------


def test_incomplete_batches_linger_while_rows_come_ahead(monkeypatch: pytest.MonkeyPatch):
    """Rows that come one by one leave in full batches, and the last ones when the run is over."""
    monkeypatch.setattr("runtime.gateway.dispatch.LINGER_S", 60.0)
    pool = ScriptedPool(workers=2, max_batch_rows=32)
    gateway = Gateway(pool)
    statement = begin(Statement(1))
    for prompt in rows(100):
        ask(gateway, [prompt], statement)
    wait_until(lambda: gateway.asked_ahead(statement)[1] == 4)
    assert [len(batch) for _, batch in pool.batches] == [32, 32, 32]
    gateway.pass_over()
    wait_until(lambda: gateway.asked_ahead(statement)[1] == 0)
    assert sum(len(batch) for _, batch in pool.batches[3:]) == 4
    gateway.close()


def test_a_run_that_falls_silent_does_not_hold_its_rows():
    """Without pass_over an incomplete batch leaves by itself when no more rows come."""
    gateway = Gateway(ScriptedPool(max_batch_rows=32))
    statement = begin(Statement(1))
    ask(gateway, ["a"], statement)
    wait_until(lambda: gateway.asked_ahead(statement) == (1, 0))
    gateway.close()


# -- together with what else can happen --------------------------------------------------------------------------


def test_a_budget_that_is_reached_ahead_ends_the_statement(store: ResultStore):
    """What the run ahead has paid for is stored; the real run tells."""
    pool = stored_pool(max_batch_rows=10)
    gateway = Gateway(pool, store)
    statement = begin(Statement(1, budgets=Budgets([Budget(Limits(max_rows=50))])))
    ask(gateway, rows(200), statement)
    gateway.pass_over()
    wait_until(lambda: statement.cancelled)
    with pytest.raises(Fatal, match="max_rows=50"):
        real(gateway, rows(200), statement)
    gateway.forget(statement)
    assert len(pool.prompts) == 50
    assert sum(line.results for line in store.summary()) == 50
    gateway.close()


def test_rows_asked_ahead_are_tried_again_as_others():
    """Retries go on while the query runs ahead, and the real run gets the answer."""
    gateway = Gateway(Unsteady(), policy=RetryPolicy(first_delay_s=1e-4, longest_delay_s=2e-4))
    statement = begin(Statement(1))
    ask(gateway, rows(100), statement)
    assert real(gateway, rows(100), statement) == upper(rows(100))
    assert Counter(gateway.pool.prompts) == Counter(
        {prompt: 1 + (index % 9 == 0) for index, prompt in enumerate(rows(100))}
    )
    gateway.close()


class Unsteady(ScriptedPool):
    """Each ninth row has no answer at its first attempt."""

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        late = [
            row
            for row, prompt in enumerate(batch.prompts)
            if int(prompt.split()[1]) % 9 == 0 and prompt not in self.prompts
        ]
        error = ErrorInfo("timeout", "No answer.")
        for answers in super().run(worker, batch):
            yield replace(answers, errors=dict.fromkeys(late, error), retry_after_s=dict.fromkeys(late, 0.0))


def test_a_long_table_does_not_stay_in_memory(store: ResultStore):
    """Asked ahead and for real, with a store: what is remembered stays under its bound, and nothing is open."""
    pool = stored_pool(workers=2, max_batch_rows=1024)
    gateway = Gateway(pool, store, memory_bytes=4_000_000)
    statement = begin(Statement(1))
    chunks = [f"chunk {number}" for number in range(CHUNKS)]
    for chunk in chunks:
        ask(gateway, rows(2000, chunk), statement)
    gateway.pass_over()
    statement.mode = Mode.REAL
    for chunk in chunks:
        assert ask(gateway, rows(2000, chunk), statement) == upper(rows(2000, chunk))
        assert len(gateway._known) < 15_000
    assert statement.usage["chat"].rows == statement.usage["chat"].calls == 2000 * CHUNKS
    assert gateway.asked_ahead(statement) == (2000 * CHUNKS, 0)
    gateway.close()


@pytest.mark.parametrize(("strict", "on_error"), [(True, "fail"), (True, "record"), (False, "fail")])
def test_a_row_that_fails_ends_a_strict_statement_before_the_rest_is_paid_for(strict: bool, on_error: str):
    """With on_error «fail» nothing more is asked ahead after the first failure; other forms and modes go on."""

    def script(batch: Batch) -> None:
        if "row 0" in batch.prompts:
            raise RowError("It cannot be answered.", code="bad_row")

    pool = ScriptedPool(script, max_batch_rows=8)
    gateway = Gateway(pool)
    statement = Statement(1, on_error=on_error)
    statement.mode, statement.passes = Mode.AHEAD, 1
    gateway.ask_all([Group(GREEDY, ["row 0"], strict=strict)], statement)
    gateway.pass_over()
    while gateway.asked_ahead(statement)[1]:
        time.sleep(0.001)
    more = [Group(GREEDY, [f"row {i}" for i in range(1, 100)], strict=strict)]
    if strict and on_error == "fail":
        with pytest.raises(Fatal, match="A row failed") as caught:
            gateway.ask_all(more, statement)
        assert caught.value.code == "bad_row"
        assert pool.prompts == ["row 0"]
    else:
        gateway.ask_all(more, statement)
        statement.mode = Mode.REAL
        assert None not in gateway.ask_all(more, statement)[0]
    gateway.close()
