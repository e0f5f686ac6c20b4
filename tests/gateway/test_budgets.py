"""What a budget promises: nothing is overspent, nothing that was paid is lost, and nothing stays set aside."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from scripted import ScriptedPool

from runtime.errors import Cancelled, ErrorInfo, Fatal, SqlextError, UserError, WorkerLost
from runtime.gateway import Budget, Budgets, Gateway, Limits, ResultStore, RetryPolicy, Statement
from runtime.gateway.budget import most_tokens
from runtime.spec import Answers, Batch, CallOptions, EngineInfo, Message, ModelSpec, PoolSpec, Task

SHORT = CallOptions(max_tokens=20)
POLICY = RetryPolicy(first_delay_s=1e-4, longest_delay_s=4e-4, pause_s=1e-3, failures_in_a_row=10**9)
BOUND = 60  # of one call of `rows`: at most 40 bytes and 20 tokens


class MeteredPool(ScriptedPool):
    """Counts what it was asked for; every answer costs its prompt and a random part of what it may have.

    `faults` is the share of rows that fail once, and half of that the share of batches that are lost once.
    """

    def __init__(self, seed: int = 0, *, faults: float = 0.0, concurrency: int = 1, name: str = "chat", **how: int):
        super().__init__(**how)
        self.name = name
        self.spec = ModelSpec(name, "scripted", fingerprint=f"{name}-weights")
        self.pool = PoolSpec(num_workers=self.workers, worker_concurrency=concurrency)
        self.rows = 0
        self.tokens = 0
        self.faults = faults
        self._random = random.Random(seed)
        self._failed: set[str] = set()
        self._lost: set[str] = set()

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        self._script(batch)
        count = len(batch.prompts)
        errors: dict[int, ErrorInfo] = {}
        with self._lock:
            self.batches.append((worker, list(batch.prompts)))
            if batch.prompts[0] not in self._lost and self._random.random() < self.faults / 2:
                self._lost.add(batch.prompts[0])
                raise WorkerLost("the worker died")
            for row, prompt in enumerate(batch.prompts):
                if prompt not in self._failed and self._random.random() < self.faults:
                    self._failed.add(prompt)
                    errors[row] = ErrorInfo("timeout", "No answer.")
            read = [0 if row in errors else len(prompt) for row, prompt in enumerate(batch.prompts)]
            said = [0 if row in errors else self._random.randint(0, 20) for row in range(count)]
            self.rows += count - len(errors)
            self.tokens += sum(read) + sum(said)
        outputs = [None if row in errors else prompt.upper() for row, prompt in enumerate(batch.prompts)]
        yield Answers(range(count), outputs, ["stop"] * count, read, said, 1.0, errors, dict.fromkeys(errors, 0.0))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ResultStore]:
    store = ResultStore(tmp_path / "results.db")
    yield store
    store.close()


def rows(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [f"{seed}-{number}-".ljust(chance.randint(12, 40), "x") for number in range(count)]


def statement(number: int, *budgets: Budget) -> Statement:
    return Statement(number, budgets=Budgets(budgets))


def ask(gateway: Gateway, prompts: list[str], asking: Statement) -> list[str | None]:
    """The outputs; several threads ask, as DuckDB's do."""
    chunks = [prompts[start : start + 100] for start in range(0, len(prompts), 100)]
    with ThreadPoolExecutor(4) as threads:
        told = list(threads.map(lambda chunk: attempt(gateway, chunk, asking), chunks))
    if failed := [said for said in told if isinstance(said, SqlextError)]:
        raise asking.failure or failed[0]
    return [output for said in told if isinstance(said, list) for output in said]


def attempt(gateway: Gateway, prompts: list[str], asking: Statement) -> list[str | None] | SqlextError:
    try:
        return [outcome and outcome[0] for outcome in gateway.ask(SHORT, prompts, asking)]
    except SqlextError as error:
        return error


def settled(*budgets: Budget) -> bool:
    """Nothing is set aside any more; batches that nobody wants may take a moment to come back."""
    deadline = time.monotonic() + 10
    while any(budget._reserved or budget._under_way for budget in budgets):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


# -- overspend --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(50))
def test_nothing_is_overspent(seed: int, store: ResultStore):
    """Eight batches at once, faults in every third seed: tokens and rows stay below, and end close to, the bound."""
    chance = random.Random(seed)
    pool = MeteredPool(
        seed,
        workers=chance.choice([1, 2, 4, 8]),
        concurrency=chance.choice([1, 2, 8]),
        max_batch_rows=chance.choice([1, 4, 32]),
        faults=0.1 if seed % 3 == 0 else 0.0,
    )
    gateway = Gateway(pool, store, policy=POLICY)
    by_rows = seed % 2 == 0
    limits = Limits(max_rows=150) if by_rows else Limits(max_tokens_total=5000)
    of_session = seed % 4 >= 2
    budget, other = Budget(limits), Budget(Limits(max_rows=10_000, max_tokens_total=10**6))
    asking = statement(1, *((other, budget) if of_session else (budget, other)))
    with pytest.raises(Fatal) as caught:
        ask(gateway, rows(400, seed), asking)
    assert caught.value.code == "budget"
    assert settled(budget, other)
    assert budget.tokens == pool.tokens == other.tokens
    assert budget.rows == pool.rows == other.rows
    if by_rows:
        assert pool.rows == 150
    else:
        assert 5000 - BOUND < pool.tokens <= 5000
    assert sum(line.results for line in store.summary()) == pool.rows
    gateway.close()


@pytest.mark.parametrize("seed", range(10))
def test_statements_of_two_models_share_a_session_s_budget(seed: int):
    """Two gateways and four statements spend from one purse at once, and not a token more than is in it."""
    purse = Budget(Limits(max_tokens_total=8000, max_rows=300, prefix="session."))
    pools = [MeteredPool(seed + number, name=f"model{number}", workers=2, max_batch_rows=8) for number in range(2)]
    gateways = [Gateway(pool, policy=POLICY) for pool in pools]
    own = [Budget(Limits(max_tokens_total=20_000)) for _ in range(4)]
    asking = [statement(number + 1, budget, purse) for number, budget in enumerate(own)]
    with ThreadPoolExecutor(8) as threads:
        told = [
            threads.submit(attempt, gateway, rows(200, 10 * seed + number), asked)
            for number, asked in enumerate(asking)
            for gateway in gateways
        ]
        said = [future.result(timeout=30) for future in told]
    assert all(error.code in ("budget", "cancelled") for error in said if isinstance(error, SqlextError))
    assert all(asked.failure and "session.max" in str(asked.failure) for asked in asking)
    assert settled(purse, *own)
    assert purse.tokens == sum(pool.tokens for pool in pools) == sum(budget.tokens for budget in own)
    assert purse.rows == sum(pool.rows for pool in pools)
    assert purse.tokens <= 8000
    assert purse.rows <= 300
    assert purse.rows == 300 or purse.tokens > 8000 - BOUND
    for gateway in gateways:
        gateway.close()


@pytest.mark.parametrize("seed", range(10))
def test_a_budget_that_is_just_large_enough_changes_nothing(seed: int):
    """With as many rows as there are calls, and the tokens that they cost at most, every row is answered."""
    prompts = rows(300, seed)
    most = sum(most_tokens(prompt, SHORT, MeteredPool().info) for prompt in prompts)
    budget = Budget(Limits(max_rows=300, max_tokens_total=most))
    pool = MeteredPool(seed, workers=4, max_batch_rows=16, faults=0.1)
    gateway = Gateway(pool, policy=POLICY)
    assert ask(gateway, prompts + prompts, statement(1, budget)) == [prompt.upper() for prompt in prompts + prompts]
    assert settled(budget)
    assert (budget.rows, budget.tokens) == (300, pool.tokens)
    gateway.close()


def test_calls_wait_for_what_is_set_aside_and_not_spent():
    """Bounds are larger than prices: a statement ends only when what is under way has left no room either."""
    prompts = rows(200)
    pool = MeteredPool(workers=8, max_batch_rows=1)
    pool._random.randint = lambda low, high: 0  # type: ignore[method-assign]  # answers cost nothing
    needed = sum(map(len, prompts))
    budget = Budget(Limits(max_tokens_total=needed + 20))
    gateway = Gateway(pool, policy=POLICY)
    assert None not in ask(gateway, prompts, statement(1, budget))
    assert budget.tokens == needed
    gateway.close()


# -- how it ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [Limits(max_rows=90), Limits(max_tokens_total=4000)])
def test_what_was_paid_is_kept_and_free_the_next_time(limits: Limits, store: ResultStore):
    """Statement after statement with the same small budget finishes a table, and no row is paid twice."""
    prompts = rows(400)
    pool = MeteredPool(workers=4, max_batch_rows=16, faults=0.05)
    answered: list[str | None] = []
    paid = [0]
    for number in range(1, 50):
        gateway = Gateway(pool, store, policy=POLICY)
        with suppress(Fatal):
            answered = ask(gateway, prompts, statement(number, Budget(limits)))
        gateway.close()
        if answered:
            break
        paid.append(pool.rows)
        assert paid[-1] > paid[-2]
    assert answered == [prompt.upper() for prompt in prompts]
    assert pool.rows == 400
    assert len(paid) <= 15


def test_a_batch_under_way_is_not_thrown_away_when_the_rows_are_used_up(store: ResultStore):
    """The row too many waits until the last paid ones are in the store; only then the statement ends."""
    full, release = threading.Event(), threading.Event()

    def script(batch: Batch) -> None:
        full.set()
        assert release.wait(10)

    pool = MeteredPool(script=script, max_batch_rows=25)  # type: ignore[arg-type]
    gateway = Gateway(pool, store)
    asking = statement(1, Budget(Limits(max_rows=40)))
    with ThreadPoolExecutor(1) as threads:
        told = threads.submit(attempt, gateway, rows(60), asking)
        assert full.wait(10)
        release.set()
        error = told.result(timeout=10)
    assert isinstance(error, Fatal)
    assert pool.cancelled == []
    assert sum(line.results for line in store.summary()) == 40
    gateway.close()


def test_one_statement_s_budget_does_not_end_another_that_waits_for_the_same_rows():
    """Two statements ask the same: when the one that came first cannot pay any more, the other goes on."""
    begun, release = threading.Event(), threading.Event()

    def script(batch: Batch) -> None:
        begun.set()
        assert release.wait(10)

    pool = MeteredPool(script=script, max_batch_rows=10)  # type: ignore[arg-type]
    gateway = Gateway(pool)
    poor, rich = statement(1, Budget(Limits(max_rows=25))), statement(2, Budget(Limits(max_rows=1000)))
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(attempt, gateway, rows(200), poor)
        assert begun.wait(10)
        second = threads.submit(attempt, gateway, rows(200), rich)
        while gateway._asking < 2:
            time.sleep(0.001)
        release.set()
        ended, answered = first.result(timeout=20), second.result(timeout=20)
    assert isinstance(ended, Fatal)
    assert answered == [prompt.upper() for prompt in rows(200)]
    assert pool.rows == 200
    gateway.close()


def test_a_budget_of_nothing_sends_nothing():
    """max_rows=0 is a way to see what is stored, and costs nothing."""
    pool = MeteredPool()
    gateway = Gateway(pool)
    with pytest.raises(Fatal, match=r"max_rows=0") as caught:
        gateway.ask(SHORT, ["a"], statement(1, Budget(Limits(max_rows=0))))
    assert caught.value.code == "budget"
    assert pool.batches == []
    gateway.close()


def test_a_large_limit_is_named_as_it_was_written():
    """The message says 1234567, not 1.23457e+06."""
    with pytest.raises(Fatal, match="max_tokens_total=1234567 does not"):
        Budget(Limits(max_tokens_total=1234567)).reserve(2_000_000)


def test_answers_without_a_bound_are_refused_before_anything_is_sent():
    """A token budget needs max_tokens; the error says so."""
    pool = MeteredPool()
    gateway = Gateway(pool)
    with pytest.raises(UserError) as caught:
        gateway.ask(CallOptions(), ["a"], statement(1, Budget(Limits(max_tokens_total=100))))
    assert caught.value.code == "budget_needs_max_tokens"
    assert "max_tokens" in (caught.value.hint or "")
    assert pool.batches == []
    gateway.close()


# -- what is set aside ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_cancelled_statement_leaves_nothing_set_aside(seed: int):
    """Cancelled in the middle of faults and retries: the session's budget holds what was spent, no more."""
    purse = Budget(Limits(max_tokens_total=10**6, max_rows=10**6, prefix="session."))
    reached = threading.Event()
    pool = MeteredPool(
        seed,
        faults=0.3,
        workers=2,
        max_batch_rows=8,
        script=lambda _: reached.set() if len(pool.batches) > 20 + seed else None,  # type: ignore[arg-type]
    )
    gateway = Gateway(pool, policy=POLICY)
    asking = statement(1, purse)
    with ThreadPoolExecutor(1) as threads:
        told = threads.submit(attempt, gateway, rows(2000, seed), asking)
        assert reached.wait(10)
        asking.cancel()
        assert isinstance(told.result(timeout=10), Cancelled)
    assert settled(purse)
    gateway.close()
    assert (purse.rows, purse.tokens) == (pool.rows, pool.tokens)


def test_a_model_that_stops_leaves_nothing_set_aside():
    """A total outage, and a batch that cannot be mended, give everything back."""
    for error in (WorkerLost("the worker died"), Fatal("the model was removed")):

        def script(batch: Batch, error: SqlextError = error) -> None:
            raise error

        budget = Budget(Limits(max_rows=1000, max_tokens_total=10**6))
        gateway = Gateway(MeteredPool(script=script, workers=4), policy=POLICY)  # type: ignore[arg-type]
        with pytest.raises(Fatal):
            gateway.ask(SHORT, rows(500), statement(1, budget))
        assert settled(budget)
        assert budget.tokens == 0
        gateway.close()


def test_rows_that_failed_for_good_count_as_rows():
    """A call that was given up after its attempts is one row, and no tokens."""
    gateway = Gateway(Failing(), policy=POLICY)
    budget = Budget(Limits(max_rows=100, max_tokens_total=10_000))
    gateway.ask(SHORT, ["a", "b"], statement(1, budget))
    assert (budget.rows, budget.tokens) == (2, 0)
    assert settled(budget)
    gateway.close()


class Failing(ScriptedPool):
    """Every row fails, and may be tried again."""

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        count = len(batch.prompts)
        errors = {row: ErrorInfo("timeout", "No answer.") for row in range(count)}
        zeros = [0] * count
        yield Answers(
            range(count), [None] * count, [""] * count, zeros, zeros, 1.0, errors, dict.fromkeys(errors, 0.0)
        )


# -- what a call can cost ---------------------------------------------------------------------------------------


def test_the_most_that_a_call_can_cost():
    """Bytes of every turn and the system text, what the template adds for each, and the answer's bound."""
    info = EngineInfo("scripted", Task.GENERATE, overhead_tokens=10)
    assert most_tokens("abc", CallOptions(max_tokens=5), info) == 3 + 10 + 5
    assert most_tokens("äé", CallOptions(max_tokens=5), info) == 4 + 10 + 5
    talk = (Message("user", "ab"), Message("assistant", "c"))
    assert most_tokens(talk, CallOptions(max_tokens=5), info) == 3 + 10 + 16 + 5
    assert most_tokens("abc", CallOptions(max_tokens=5, system="de"), info) == 5 + 10 + 16 + 5
    bounded = EngineInfo("scripted", Task.GENERATE, max_answer_tokens=7)
    assert most_tokens("abc", CallOptions(), bounded) == 10
    assert most_tokens("abc" * 100, CallOptions(), EngineInfo("e", Task.EMBED, max_model_len=64)) == 64
    assert most_tokens("\ud800", CallOptions(max_tokens=1), bounded) == 4


def test_budgets_of_a_statement_are_reserved_in_all_or_in_none():
    """The session's refusal gives back what the statement's own budget had set aside."""
    own, purse = Budget(Limits(max_rows=5)), Budget(Limits(max_rows=1, prefix="session."))
    both = Budgets([own, purse])
    assert both.reserve(0)
    assert not both.reserve(0)  # the first may come back
    assert (own.rows, purse.rows) == (1, 1)
    both.settle(0, 3)
    with pytest.raises(Fatal, match=r"session\.max_rows=1 "):
        both.reserve(0)
    assert (own.rows, own.tokens, own._under_way) == (1, 3, 0)
    assert settled(own, purse)
