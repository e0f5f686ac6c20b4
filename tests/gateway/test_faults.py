"""A simulation of everything that can go wrong, by seed: each row ends with its value or its own error, once.

What happens to a row is decided by the seed, the row, and how often it was sent, never by the threads' timing: the
expected end of every row is known before. The gateway, its threads and the store's file are real.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from scripted import ScriptedPool

from runtime.errors import Cancelled, ErrorInfo, Fatal, OutOfMemory, Retryable, RowError, SqlextError, WorkerLost
from runtime.gateway import Asked, Budget, Budgets, Gateway, Limits, ResultStore, RetryPolicy, Statement
from runtime.spec import Answers, Batch, CallOptions, ModelSpec

SEEDS = 1000
SEEDS_IN_A_TEST = 100
ROWS = 2000
ASKING_THREADS = 4
BATCH = 64
POLICY = RetryPolicy(first_delay_s=5e-5, longest_delay_s=2e-4, pause_s=1e-3)
OPTIONS = CallOptions(max_tokens=2)
WATCHDOG_S = 30.0

# How many rows of a seed meet a fault, where the seed has it. Fewer rows are refused for good (17), and fewer waves
# of 429 come (16), than stop a statement (20): a stop would be right, and is tested elsewhere.
PASSING = {"timeout": 12, "5xx": 8, "connection": 8, "429": 4, "dies": 5, "fails": 3, "left out": 8}
ODD = {"twice": 8, "unknown": 4}
LASTING = {
    "rejected": ("rejected", 5),
    "hung": ("timeout", 4),
    "quota": ("rate_limited", 2),
    "poison": ("worker_lost", 2),
    "broken": ("engine_failed", 2),
    "never": ("retryable", 1),
    "huge": ("out_of_memory", 1),
}
IN_BATCHES = ("small memory", "driver dies", "small budget")
SELDOM = {"429": 0.2, "small memory": 0.15, "driver dies": 0.15, "small budget": 0.1}  # they take the most time
ALL_FAULTS = (*PASSING, *ODD, *LASTING, *IN_BATCHES)
ROW_ERRORS = {
    "timeout": ErrorInfo("timeout", "No answer."),
    "hung": ErrorInfo("timeout", "No answer."),
    "5xx": ErrorInfo("provider_failed", "Status 503."),
    "connection": ErrorInfo("unreachable", "Nobody there."),
    "429": ErrorInfo("rate_limited", "Too many."),
    "quota": ErrorInfo("rate_limited", "Come back tomorrow."),
    "rejected": ErrorInfo("rejected", "Status 400."),
}
BATCH_ERRORS: dict[str, SqlextError] = {
    "dies": WorkerLost("the worker died"),
    "poison": WorkerLost("the worker died"),
    "fails": Retryable("try again"),
    "broken": RowError("no", code="engine_failed"),
    "huge": OutOfMemory("too large"),
}


class Fate:
    """What one seed has in store."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        texts = [f"{seed}.{number}".ljust(chance.randrange(8, 24), "x") for number in range(ROWS - 50)]
        self.seed = seed
        self.prompts = [*texts, *chance.sample(texts, 50)]
        chance.shuffle(self.prompts)
        self.faults = {fault for fault in ALL_FAULTS if chance.random() < SELDOM.get(fault, 0.4)}
        self.workers = chance.choice([1, 2, 3])
        self.memory_rows = chance.choice([9, 17, 33, 63]) if "small memory" in self.faults else BATCH
        self.deaths = [chance.randrange(2, 25) for _ in range(chance.choice([1, 2]))]
        if "driver dies" not in self.faults:
            self.deaths = []
        self.limits = chance.choice([Limits(max_rows=900), Limits(max_tokens_total=3500)])
        if "small budget" not in self.faults:
            self.limits = Limits(max_rows=ROWS, max_tokens_total=ROWS * 50)
        self.of: dict[str, str] = {}  # the fault of a prompt
        self.times: dict[str, int] = {}  # that a passing fault happens
        unhurt = iter(chance.sample(texts, 200))
        counts = PASSING | ODD | {fault: count for fault, (_, count) in LASTING.items()}
        for fault in ALL_FAULTS:  # a set's order is not the same in every run
            for _ in range(counts.get(fault, 0) if fault in self.faults else 0):
                prompt = next(unhurt)
                self.of[prompt] = fault
                self.times[prompt] = 1 if fault in ("dies", "fails", "left out") else chance.randint(1, 4)
        self.asks_to_wait = chance.choice([0.0, 1e-4])

    def end(self, prompt: str) -> tuple[str | None, str | None]:
        """The output and the error's code that the prompt must have in the end."""
        fault = self.of.get(prompt, "")
        return (None, LASTING[fault][0]) if fault in LASTING else (prompt.upper(), None)

    def most_calls(self) -> int:
        """Rows that may be sent in all, repeats counted.

        Each row once; each passing fault of a row, again; each lasting one, for its attempts or its bisection, which
        sends a batch's rows again in halves, quarters, …; a batch that is too large for the memory likewise, in each
        of the feeders at once; a driver's death or a budget's end, at most what was under way, and the lasting ones.
        """
        halved = 2 * BATCH
        under_way = 2 * self.workers * BATCH
        passing = sum(
            BATCH if fault in ("dies", "fails") else self.times[prompt]
            for prompt, fault in self.of.items()
            if fault in PASSING
        )
        lasting = sum(
            halved + 1 if fault in BATCH_ERRORS else POLICY.attempts for fault in self.of.values() if fault in LASTING
        )
        learns = 1 + ("huge" in self.faults) if "small memory" in self.faults else 0
        runs = 1 + len(self.deaths) + (4 if "small budget" in self.faults else 0)
        return ROWS + passing + runs * (lasting + learns * 2 * self.workers * halved) + (runs - 1) * under_way


class FaultyPool(ScriptedPool):
    """Answers as the seed's fate says; counts every fault that it brought about."""

    def __init__(self, fate: Fate) -> None:
        super().__init__(workers=fate.workers, max_batch_rows=BATCH)
        self.name = "sim"
        self.spec = ModelSpec("sim", "scripted", fingerprint=f"seed {fate.seed}")
        self.fate = fate
        self.injected: Counter[str] = Counter()
        self.calls = 0
        self.paid = 0
        self.carried = 0
        self.driver: Statement | None = None
        self._deaths = list(fate.deaths)
        self._sent: Counter[str] = Counter()

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        driver = self.driver
        faults = self._happens(batch)
        rows = [row for row in range(len(batch.prompts)) if faults.get(row) not in ("left out", "never")]
        for row, fault in faults.items():
            if fault in BATCH_ERRORS:
                if row % 2:  # some rows were answered before
                    yield self._answers(batch, faults, [other for other in rows if other < row])
                raise BATCH_ERRORS[fault]
        if len(batch.prompts) > self.fate.memory_rows:
            self.injected["small memory"] += 1
            raise OutOfMemory("too large")
        if driver is not self.driver or (driver and driver.cancelled and self.fate.deaths):
            raise WorkerLost("nobody is there to take the answers")
        half = len(rows) // 2 if self.fate.seed % 3 == 0 else 0
        yield self._answers(batch, faults, rows[half:])
        if half:
            yield self._answers(batch, faults, rows[:half])

    def _happens(self, batch: Batch) -> dict[int, str]:
        """The faults of this batch's rows, by row."""
        fate, faults = self.fate, {}
        with self._lock:
            self.calls += len(batch.prompts)
            self.carried += 1
            for row, prompt in enumerate(batch.prompts):
                if fault := fate.of.get(prompt):
                    self._sent[prompt] += 1
                    if fault not in PASSING or self._sent[prompt] <= fate.times[prompt]:
                        faults[row] = fault
                        self.injected[fault] += 1
            if self._deaths and self.carried >= self._deaths[0] and self.driver:
                self.carried = 0
                self._deaths.pop(0)
                self.injected["driver dies"] += 1
                self.driver.cancel()
        return faults

    def _answers(self, batch: Batch, faults: dict[int, str], rows: list[int]) -> Answers:
        numbers = list(rows)
        outputs = [batch.prompts[row].upper() for row in numbers]
        errors = {row: ROW_ERRORS[faults[row]] for row in numbers if faults.get(row) in ROW_ERRORS}
        waits = {row: 0.0 for row in errors if faults[row] != "rejected"}
        for row in waits:
            if faults[row] in ("429", "5xx"):
                waits[row] = self.fate.asks_to_wait
            if faults[row] == "quota":
                waits[row] = 3600.0
        for row, fault in faults.items():
            if fault == "twice" and row in numbers:
                numbers.append(row)
                outputs.append("THE SECOND ANSWER")
            if fault == "unknown":
                numbers += [len(batch.prompts) + row, -1 - row]
                outputs += ["NOBODY'S ANSWER"] * 2
        count = len(numbers)
        with self._lock:
            self.paid += len(set(rows)) - len(waits)
        return Answers(numbers, outputs, ["stop"] * count, [1] * count, [2] * count, 1.0, errors, waits)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ResultStore]:
    store = ResultStore(tmp_path_factory.mktemp("faults") / "results.db")
    yield store
    store.close()


def ask(gateway: Gateway, prompts: list[str], statement: Statement, threads: ThreadPoolExecutor) -> Asked | None:
    """The outcomes; None when the driver died or the budget ended the statement. Threads ask, as DuckDB's do."""
    size = ROWS // ASKING_THREADS
    chunks = [prompts[start : start + size] for start in range(0, ROWS, size)]
    told = [threads.submit(gateway.ask, OPTIONS, chunk, statement) for chunk in chunks]
    ended = [future.exception(timeout=WATCHDOG_S) for future in told]
    for error in ended:
        if error is not None and not isinstance(error, Cancelled) and getattr(error, "code", "") != "budget":
            raise error
    return None if any(ended) else [outcome for future in told for outcome in future.result()]


def simulate(seed: int, store: ResultStore, threads: ThreadPoolExecutor) -> Counter[str]:
    """Run a seed to its end and check every promise; the faults that happened."""
    fate = Fate(seed)
    pool = FaultyPool(fate)
    kept = store if fate.deaths or "small budget" in fate.faults else None
    asked: Asked | None = None
    for number in range(1, 12):
        budget = Budget(fate.limits)
        statement = pool.driver = Statement(number, budgets=Budgets([budget]))
        gateway = Gateway(pool, kept, policy=POLICY)
        paid = pool.paid
        asked = ask(gateway, fate.prompts, statement, threads)
        gateway.close()
        assert (budget._reserved, budget._under_way) == (0, 0)
        assert budget.rows <= (fate.limits.max_rows or ROWS)
        assert budget.tokens == 3 * (pool.paid - paid) or pool.injected["driver dies"]
        assert budget.tokens <= (fate.limits.max_tokens_total or 3 * ROWS)
        if asked is not None:
            break
        pool.injected["small budget"] += isinstance(statement.failure, Fatal)
    assert asked is not None
    assert len(asked) == ROWS
    ends = [(outcome[0], outcome[5] and outcome[5].code) for outcome in asked if outcome]
    assert ends == [fate.end(prompt) for prompt in fate.prompts]
    assert all((outcome[0] is None) != (outcome[5] is None) for outcome in asked if outcome)
    assert all(
        outcome[5].attempts == POLICY.attempts for outcome in asked if outcome[5] and outcome[5].code == "timeout"
    )
    assert statement.usage["sim"].rows == ROWS
    assert statement.usage["sim"].errors == sum(1 for prompt in fate.prompts if fate.end(prompt)[1])
    assert pool.calls <= fate.most_calls()
    return pool.injected


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_IN_A_TEST))
def test_every_row_has_its_value_or_its_error_whatever_happens(first: int, store: ResultStore):
    """2,000 rows for each seed: 429 with and without Retry-After, 5xx, timeouts, lost connections, out of memory, dead
    workers, poison, answers left out, twice or for nobody, used-up quotas and budgets, and dying drivers."""
    injected: Counter[str] = Counter()
    with ThreadPoolExecutor(ASKING_THREADS) as threads:
        for seed in range(first, first + SEEDS_IN_A_TEST):
            try:
                injected += simulate(seed, store, threads)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
    assert set(injected) == set(ALL_FAULTS)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("sqlext-feeder-sim")]
