"""How often a failed row is tried, when, and when the whole statement stops instead."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import ScriptedPool

from runtime.errors import ErrorInfo, Fatal, OutOfMemory, WorkerLost
from runtime.gateway import Gateway, Outcome, RetryPolicy, Statement
from runtime.spec import Answers, Batch, CallOptions

GREEDY = CallOptions()
SOON = 1e-4
QUICK = RetryPolicy(first_delay_s=SOON, longest_delay_s=4 * SOON, pause_s=10 * SOON)

# code, and the seconds that the provider asks to wait: 0 when it does not say, None when another try is of no use
STATUSES: dict[str, tuple[str, float | None]] = {
    "400": ("rejected", None),
    "404": ("rejected", None),
    "413": ("prompt_too_long", None),
    "422": ("rejected", None),
    "408": ("provider_failed", 0.0),
    "409": ("provider_failed", 0.0),
    "429": ("rate_limited", 0.0),
    "429, Retry-After": ("rate_limited", SOON),
    "500": ("provider_failed", 0.0),
    "502": ("provider_failed", 0.0),
    "503, Retry-After": ("provider_failed", SOON),
    "connection": ("unreachable", 0.0),
}

Failure = tuple[str, float | None] | None


class FailingPool(ScriptedPool):
    """Rows fail as `fails(prompt, attempt)` says, attempts counted from 1; `sent` holds the times of each prompt."""

    def __init__(self, fails: Callable[[str, int], Failure], **how: Any) -> None:
        super().__init__(**how)
        self.sent: dict[str, list[float]] = {}
        self.calls = 0  # rows that were sent, as often as they were
        self._fails = fails

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        now = time.monotonic()
        errors, waits = {}, {}
        for row, prompt in enumerate(batch.prompts):
            with self._lock:
                self.calls += 1
                times = self.sent.setdefault(prompt, [])
                times.append(now)
                failure = self._fails(prompt, len(times))
            if failure:
                errors[row] = ErrorInfo(failure[0], "The provider did not answer.")
                if failure[1] is not None:
                    waits[row] = failure[1]
        for answers in super().run(worker, batch):
            yield Answers(
                answers.rows,
                [None if row in errors else output for row, output in enumerate(answers.outputs)],
                answers.finish_reasons,
                answers.prompt_tokens,
                answers.completion_tokens,
                answers.latency_ms,
                errors,
                waits,
            )


def ask(gateway: Gateway, prompts: list[str], statement: Statement | None = None) -> list[Outcome]:
    return [Outcome._make(outcome) for outcome in gateway.ask(GREEDY, prompts, statement or Statement(1))]


def rows(count: int) -> list[str]:
    return [f"row {number}" for number in range(count)]


# -- attempts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempts", [1, 3, 5])
@pytest.mark.parametrize("status", STATUSES)
def test_a_row_is_tried_as_often_as_the_policy_says(status: str, attempts: int):
    """Hits on the server are exactly `attempts` where another try may help, one where it cannot."""
    pool = FailingPool(lambda prompt, attempt: STATUSES[status])
    gateway = Gateway(pool, policy=RetryPolicy(attempts, first_delay_s=SOON, longest_delay_s=2 * SOON))
    asked = ask(gateway, rows(3))
    expected = attempts if STATUSES[status][1] is not None else 1
    assert {prompt: len(times) for prompt, times in pool.sent.items()} == dict.fromkeys(rows(3), expected)
    assert [(o.output, o.error.code, o.error.attempts) for o in asked] == [(None, STATUSES[status][0], expected)] * 3
    gateway.close()


@pytest.mark.parametrize("failures", [1, 2, 4])
def test_a_row_that_succeeds_at_last_has_no_error(failures: int):
    """The last attempt counts like the first."""
    pool = FailingPool(lambda prompt, attempt: ("provider_failed", 0.0) if attempt <= failures else None)
    gateway = Gateway(pool, policy=QUICK)
    assert [o.output for o in ask(gateway, rows(5))] == [prompt.upper() for prompt in rows(5)]
    assert pool.calls == 5 * (failures + 1)
    gateway.close()


def test_good_rows_are_not_sent_again_for_their_neighbours():
    """Of a batch with one bad row only that row is tried again."""
    pool = FailingPool(lambda prompt, attempt: ("provider_failed", 0.0) if prompt == "row 7" else None)
    gateway = Gateway(pool, policy=QUICK)
    asked = ask(gateway, rows(64))
    assert Counter(pool.prompts) == Counter(rows(64)) + Counter({"row 7": QUICK.attempts - 1})
    assert [o.error is not None for o in asked] == [prompt == "row 7" for prompt in rows(64)]
    gateway.close()


def test_fifty_hung_rows_are_fifty_timeouts():
    """Rows that never answer fail after their attempts, also when nothing else is left; the others are answered."""
    hung = set(rows(5000)[::100])
    assert len(hung) == 50
    pool = FailingPool(lambda prompt, attempt: ("timeout", 0.0) if prompt in hung else None, workers=2)
    gateway = Gateway(pool, policy=QUICK)
    asked = dict(zip(rows(5000), ask(gateway, rows(5000)), strict=True))
    failed = {prompt: (o.error.code, o.error.attempts) for prompt, o in asked.items() if o.error}
    assert failed == dict.fromkeys(hung, ("timeout", QUICK.attempts))
    assert all(o.output == prompt.upper() for prompt, o in asked.items() if prompt not in hung)
    assert pool.calls == 5000 - 50 + 50 * QUICK.attempts
    gateway.close()


# -- times ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["rate_limited", "provider_failed"])
def test_no_row_is_tried_before_its_time(code: str):
    """Retry-After holds for the row that got it, to the microsecond."""
    waits = {prompt: 0.001 * number for number, prompt in enumerate(rows(40), 1)}
    pool = FailingPool(lambda prompt, attempt: (code, waits[prompt]) if attempt <= 2 else None, max_batch_rows=8)
    gateway = Gateway(pool, policy=replace(QUICK, failures_in_a_row=1000))
    assert [o.error for o in ask(gateway, rows(40))] == [None] * 40
    for prompt, (first, second, third) in pool.sent.items():
        assert second >= first + waits[prompt]
        assert third >= second + waits[prompt]
    gateway.close()


def test_while_the_provider_asks_to_wait_no_other_row_is_sent():
    """One refusal with a Retry-After holds everything back that has not been sent."""
    pool = FailingPool(lambda prompt, attempt: ("rate_limited", 0.05) if pool.calls == 1 else None, max_batch_rows=1)
    gateway = Gateway(pool, policy=QUICK)
    with ThreadPoolExecutor(1) as threads:
        refused = threads.submit(ask, gateway, ["refused"], Statement(2))
        while not gateway._dispatcher._later:
            pass
        assert [o.error for o in ask(gateway, rows(20))] == [None] * 20
        assert refused.result(timeout=10)[0].error is None
    first, *others = sorted(at for times in pool.sent.values() for at in times)
    assert len(others) == 21
    assert min(others) >= first + 0.05
    gateway.close()


def test_a_provider_that_asks_for_too_long_fails_the_row_at_once():
    """An hour is not waited for, by the row or by its neighbours."""
    pool = FailingPool(lambda prompt, attempt: ("rate_limited", 3600.0) if prompt == "row 3" else None)
    gateway = Gateway(pool)
    asked = ask(gateway, rows(100))
    assert [prompt for prompt, o in zip(rows(100), asked, strict=True) if o.error] == ["row 3"]
    assert pool.calls == 100
    gateway.close()


def test_a_provider_that_asks_everyone_for_too_long_stops_the_statement():
    """A day's quota that is used up ends a table of 10,000 rows after some dozen calls."""
    pool = FailingPool(lambda prompt, attempt: ("rate_limited", 3600.0))
    gateway = Gateway(pool)
    with pytest.raises(Fatal) as caught:
        ask(gateway, rows(10_000))
    assert caught.value.code == "rate_limited"
    assert pool.calls <= 2 * 64
    gateway.close()


def test_a_row_is_not_tried_after_its_deadline():
    """What its attempts and the delays between them took counts; the row keeps the last error."""
    policy = RetryPolicy(attempts=1000, first_delay_s=0.002, longest_delay_s=0.002, row_deadline_s=0.02)
    pool = FailingPool(lambda prompt, attempt: ("timeout", 0.0))
    gateway = Gateway(pool, policy=policy)
    (asked,) = ask(gateway, ["slow"])
    assert asked.error.code == "timeout"
    assert asked.error.attempts == pool.calls
    assert 2 <= pool.calls <= 10  # each attempt takes the delay at least
    gateway.close()


def test_the_wait_that_a_provider_asks_for_is_not_the_row_s():
    """Retry-After moves the deadline; otherwise a provider could fail rows by asking for patience."""
    policy = RetryPolicy(first_delay_s=SOON, longest_delay_s=SOON, row_deadline_s=0.05)
    pool = FailingPool(lambda prompt, attempt: ("rate_limited", 0.04) if attempt < 4 else None)
    gateway = Gateway(pool, policy=policy)
    assert ask(gateway, ["a"])[0].output == "A"
    assert pool.calls == 4
    gateway.close()


def test_time_in_the_queue_is_not_the_row_s():
    """Behind a long table a row has as many attempts as before a short one."""
    policy = RetryPolicy(first_delay_s=SOON, longest_delay_s=SOON, row_deadline_s=1.0)

    class SlowPool(FailingPool):
        def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
            time.sleep(0.05)
            return super().run(worker, batch)

    pool = SlowPool(lambda prompt, attempt: ("timeout", 0.0) if prompt == "row 0" and attempt < 3 else None)
    gateway = Gateway(pool, policy=policy)
    assert [o.error for o in ask(gateway, rows(2000))] == [None] * 2000
    gateway.close()


# -- the breaker ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["unreachable", "timeout", "provider_failed"])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_total_outage_stops_the_statement(code: str, workers: int):
    """100,000 rows and nobody there: what was in flight, twenty failures, a pause, three trials, one error."""
    pool = FailingPool(lambda prompt, attempt: (code, 0.0), workers=workers)
    gateway = Gateway(pool, policy=QUICK)
    statement = Statement(1)
    with pytest.raises(Fatal) as caught:
        ask(gateway, rows(100_000), statement)
    in_flight = workers * 2 * pool.info.max_batch_rows
    assert pool.calls <= QUICK.failures_in_a_row + QUICK.trials + in_flight
    assert caught.value.code == code
    assert "run the statement again" in (caught.value.hint or "")
    assert "row 1" not in str(caught.value)
    assert statement.failed == 0
    assert statement.failure is caught.value
    gateway.close()


def test_an_outage_that_passes_during_the_pause_costs_nobody_anything():
    """All rows of a batch fail at once; afterwards they are tried again, and no row has an error."""
    pool = FailingPool(lambda prompt, attempt: ("unreachable", 0.0) if pool.calls <= 64 else None)
    gateway = Gateway(pool, policy=QUICK)
    assert [o.output for o in ask(gateway, rows(3000))] == [prompt.upper() for prompt in rows(3000)]
    assert pool.calls == 3000 + 64
    gateway.close()


def test_while_the_breaker_is_open_single_rows_try():
    """After the failures in a row no batch is larger than one row until one is answered."""
    pool = FailingPool(lambda prompt, attempt: ("unreachable", 0.0) if pool.calls <= 60 else None)
    gateway = Gateway(pool, policy=RetryPolicy(50, SOON, SOON, pause_s=0.001, trials=1000))
    ask(gateway, rows(20))
    sizes = [len(batch) for _, batch in pool.batches]
    assert sizes[0] == 20
    assert set(sizes[1:42]) == {1}
    gateway.close()


def test_the_next_statement_has_the_patience_of_the_first():
    """After a stop the provider is tried again as if nothing had been."""
    down = [True]
    pool = FailingPool(lambda prompt, attempt: ("unreachable", 0.0) if down[0] else None)
    gateway = Gateway(pool, policy=QUICK)
    for number in (1, 2):
        before = pool.calls
        with pytest.raises(Fatal):
            ask(gateway, rows(1000), Statement(number))
        assert pool.calls - before >= QUICK.failures_in_a_row
    down[0] = False
    assert [o.error for o in ask(gateway, rows(1000), Statement(3))] == [None] * 1000
    gateway.close()


def test_rows_that_fail_for_good_do_not_stop_a_table_of_good_ones():
    """Nineteen bad rows together, hundreds in all: each has its error, nothing else happens."""
    bad = {prompt for number, prompt in enumerate(rows(4000)) if number % 40 < 19}
    pool = FailingPool(lambda prompt, attempt: ("provider_failed", 0.0) if prompt in bad else None)
    gateway = Gateway(pool, policy=RetryPolicy(3, SOON, SOON, pause_s=0.001))
    asked = ask(gateway, rows(4000))
    assert {prompt for prompt, o in zip(rows(4000), asked, strict=True) if o.error} == bad
    gateway.close()


def test_a_model_that_breaks_for_good_stops_the_statement_in_its_middle():
    """After 1,000 good rows everything is refused: few errors, one Fatal."""
    pool = FailingPool(lambda prompt, attempt: ("rate_limited", 0.0) if pool.calls > 1000 else None)
    gateway = Gateway(pool, policy=QUICK)
    statement = Statement(1)
    with pytest.raises(Fatal, match=f"{QUICK.failures_in_a_row} times in a row") as caught:
        ask(gateway, rows(100_000), statement)
    assert caught.value.code == "rate_limited"
    assert pool.calls <= 1000 + 2 * 64 + 2 * 64 + QUICK.failures_in_a_row  # in flight, half, quarter, …, single rows
    assert statement.failed == 0
    gateway.close()


# -- rate limits ------------------------------------------------------------------------------------------------


class CrowdedPool(ScriptedPool):
    """A provider that bears `bears` rows at once and refuses the rest; `most` were in flight lately."""

    def __init__(self, bears: int, **how: int) -> None:
        super().__init__(**how)
        self.bears = bears
        self.busy = 0
        self.refused = 0

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        count = len(batch.prompts)
        with self._lock:
            taken = min(count, self.bears - self.busy)
            self.busy += taken
            self.refused += count - taken
            self.batches.append((worker, list(batch.prompts)))
        if refused := range(taken, count):
            error = ErrorInfo("rate_limited", "The provider is asked too often.")
            zeros = [0] * len(refused)
            yield Answers(
                refused,
                [None] * len(refused),
                [""] * len(refused),
                zeros,
                zeros,
                0.0,
                dict.fromkeys(refused, error),
                dict.fromkeys(refused, 0.0),
            )
        time.sleep(0.0005)
        with self._lock:
            self.busy -= taken
        outputs = [prompt.upper() for prompt in batch.prompts[:taken]]
        yield Answers(range(taken), outputs, ["stop"] * taken, [1] * taken, [1] * taken, 0.0)


@pytest.mark.parametrize("bears", [2, 4, 40])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_table_under_a_permanent_rate_limit_has_no_failed_row(bears: int, workers: int):
    """The rows in flight find the provider's limit; to be refused while others are served is no failure."""
    pool = CrowdedPool(bears, workers=workers)
    gateway = Gateway(pool, policy=RetryPolicy(first_delay_s=0.002, longest_delay_s=0.01))
    asked = ask(gateway, rows(2000))
    assert [o.output for o in asked] == [prompt.upper() for prompt in rows(2000)]
    assert pool.refused > 0
    gateway.close()


def test_what_is_in_flight_grows_again_when_the_limit_has_gone():
    """A wave of refusals narrows the batches; answers widen them again."""
    pool = CrowdedPool(2)
    gateway = Gateway(pool, policy=QUICK)
    ask(gateway, rows(500))
    narrow = len(pool.batches)
    assert max(len(batch) for _, batch in pool.batches[-50:]) <= 8
    pool.bears = 10_000
    ask(gateway, [f"more {number}" for number in range(20_000)])
    sizes = [len(batch) for _, batch in pool.batches[narrow:]]
    assert max(sizes) == 64
    assert sum(sizes[-50:]) > sum(sizes[:50])
    gateway.close()


# -- batches that are lost --------------------------------------------------------------------------------------


class Streaming(ScriptedPool):
    """Answers all rows but the last one of a batch at once, then the script decides about the last."""

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        with self._lock:
            self.batches.append((worker, list(batch.prompts)))
        most = len(batch.prompts) - 1
        outputs = [prompt.upper() for prompt in batch.prompts]
        yield Answers(range(most), outputs[:most], ["stop"] * most, [1] * most, [1] * most, 0.0)
        self._script(batch)
        yield Answers([most], outputs[most:], ["stop"], [1], [1], 0.0)


@pytest.mark.parametrize("error", [OutOfMemory("too large"), WorkerLost("the worker died")])
def test_the_last_row_of_a_batch_is_tried_alone_before_it_is_blamed(error: Exception):
    """A batch that ends after all its rows but one is an accident of the batch, not of that row."""

    def script(batch: Batch) -> None:
        if len(batch.prompts) > 1:
            raise error

    pool = Streaming(script, max_batch_rows=8)
    gateway = Gateway(pool)
    assert [o.output for o in ask(gateway, rows(100))] == [prompt.upper() for prompt in rows(100)]
    gateway.close()


def test_out_of_memory_halves_what_was_in_the_batch():
    """The ceiling is half of the batch that did not fit, however many of its rows were answered before."""

    def script(batch: Batch) -> None:
        if len(batch.prompts) > 32:
            raise OutOfMemory("too large")

    pool = Streaming(script)
    gateway = Gateway(pool)
    ask(gateway, rows(2000))
    assert Counter(len(batch) for _, batch in pool.batches).most_common(1)[0][0] == 32
    gateway.close()


def test_one_row_that_is_too_large_does_not_narrow_the_batches_of_the_others():
    """Halving ends at that row; the others go on in whole batches."""

    def script(batch: Batch) -> None:
        if "row 5" in batch.prompts:
            raise OutOfMemory("too large")

    pool = ScriptedPool(script)
    gateway = Gateway(pool)
    asked = ask(gateway, rows(6400))
    assert [prompt for prompt, o in zip(rows(6400), asked, strict=True) if o.error] == ["row 5"]
    ask(gateway, [f"more {number}" for number in range(640)])
    assert len(pool.batches[-1][1]) == 64
    gateway.close()


# -- engines that answer nonsense -------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["outputs", "finish_reasons", "prompt_tokens", "completion_tokens", "rows"])
def test_columns_of_unequal_length_are_told_and_strand_nobody(extra: str):
    """A faulty engine's answer ends the statement with an error; it does not leave it waiting."""

    class Faulty(ScriptedPool):
        def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
            for answers in super().run(worker, batch):
                columns = {
                    name: [*getattr(answers, name)]
                    for name in ("rows", "outputs", "finish_reasons", "prompt_tokens", "completion_tokens")
                }
                columns[extra].append(columns[extra][0])
                yield Answers(**columns, latency_ms=0.0)

    gateway = Gateway(Faulty())
    with pytest.raises(Fatal, match="different lengths"):
        ask(gateway, rows(3))
    gateway.close()


def test_a_store_that_breaks_ends_the_statement():
    """An answer that cannot be kept is not given out, and nobody waits for it for ever."""

    class Broken:
        def find(self, keys: list[bytes]) -> dict[bytes, object]:
            return {}

        def put(self, *what: object) -> None:
            raise OSError("the disk is gone")

    pool = ScriptedPool()
    pool.spec = type(pool.spec)("chat", "scripted", fingerprint="f")
    gateway = Gateway(pool, Broken())  # type: ignore[arg-type]
    with pytest.raises(Fatal, match="OSError"):
        ask(gateway, rows(3))
    gateway.close()


def test_a_row_that_falls_due_while_its_feeder_lies_down_is_not_slept_over(monkeypatch: pytest.MonkeyPatch):
    """On a clock that moves whenever it is read, rows fall due between any two looks; the other feeder is busy."""
    reads = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + next(reads) * SOON / 2)
    monkeypatch.setattr("runtime.gateway.dispatch.time", clock)
    begun, release = threading.Event(), threading.Event()

    def script(batch: Batch) -> None:
        if "slow" in batch.prompts:
            begun.set()
            assert release.wait(60)

    pool = FailingPool(
        lambda prompt, attempt: ("timeout", 0.0) if prompt != "slow" and attempt < 5 else None,
        script=script,
        max_batch_rows=1,
    )
    gateway = Gateway(pool, policy=QUICK)
    try:
        with ThreadPoolExecutor(2) as threads:
            threads.submit(ask, gateway, ["slow"], Statement(2))
            assert begun.wait(10)
            rows_one_by_one = threads.submit(lambda: [ask(gateway, [prompt]) for prompt in rows(100)])
            try:
                rows_one_by_one.result(timeout=20)
            finally:
                release.set()
    finally:
        gateway.close()
