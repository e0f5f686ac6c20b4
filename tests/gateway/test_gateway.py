"""What a query may rely on when it asks a model through the gateway."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
from scripted import ScriptedPool

from runtime.errors import Cancelled, Fatal, OutOfMemory, RowError, WorkerLost
from runtime.gateway import Gateway, GatewayClosed, Group, Outcome, Statement
from runtime.spec import Batch, CallOptions, ModelSpec

GREEDY = CallOptions()


def ask(gateway: Gateway, prompts: list[str], statement: Statement | None = None) -> list[Outcome]:
    return [Outcome._make(outcome) for outcome in gateway.ask(GREEDY, prompts, statement or Statement(1))]


def outputs(gateway: Gateway, prompts: list[str], statement: Statement | None = None) -> list[str | None]:
    return [outcome.output for outcome in ask(gateway, prompts, statement)]


def test_answers_come_in_the_order_of_the_questions():
    """Count and order out are count and order in, however the batches were cut and sorted."""
    gateway = Gateway(ScriptedPool(workers=3, max_batch_rows=7))
    prompts = [f"{'x' * (i * 37 % 50)}{i}" for i in range(500)]
    assert outputs(gateway, prompts) == [prompt.upper() for prompt in prompts]
    gateway.close()


def test_equal_questions_are_asked_once_from_many_threads():
    """D distinct inputs of a deterministic call make D generations, over threads and chunks."""
    pool = ScriptedPool(workers=2)
    gateway = Gateway(pool)
    prompts = [f"q{i % 50}" for i in range(1000)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: outputs(gateway, prompts), range(8)))
    assert sorted(pool.prompts) == sorted(set(prompts))
    assert all(answer == [p.upper() for p in prompts] for answer in answers)
    gateway.close()


def test_sampled_questions_are_never_merged():
    """A sampled call runs for every row."""
    pool = ScriptedPool()
    gateway = Gateway(pool)
    gateway.ask(CallOptions(temperature=1.0), ["same"] * 10, Statement(1))
    gateway.ask(CallOptions(temperature=1.0), ["same"] * 10, Statement(1))
    assert pool.prompts == ["same"] * 20
    gateway.ask(CallOptions(temperature=1.0, seed=7), ["same"] * 10, Statement(1))
    assert len(pool.prompts) == 21
    gateway.close()


def test_options_keep_questions_apart():
    """A batch holds one set of options, and another option is another question."""
    pool = ScriptedPool(defaults=CallOptions(max_tokens=5))
    gateway = Gateway(pool)
    gateway.ask(CallOptions(), ["a"], Statement(1))
    gateway.ask(CallOptions(max_tokens=5), ["a"], Statement(1))  # what the default says already
    gateway.ask(CallOptions(max_tokens=6), ["a"], Statement(1))
    gateway.ask(CallOptions(max_tokens=6, temperature=0.0), ["a"], Statement(1))  # greedy is what is meant anyway
    assert pool.prompts == ["a", "a"]
    gateway.close()


def test_usage_tells_calls_from_reused_rows():
    """Rows, calls and reused rows add up; tokens are those of the calls."""
    statement = Statement(1)
    gateway = Gateway(ScriptedPool())
    asked = ask(gateway, ["a", "b", "a", "a"], statement)
    used = statement.usage["chat"]
    assert (used.rows, used.calls, used.reused, used.errors) == (4, 2, 2, 0)
    assert (used.prompt_tokens, used.completion_tokens) == (2, 4)
    assert [outcome.statement for outcome in asked] == [1, 1, 1, 1]
    assert [outcome.statement for outcome in ask(gateway, ["a"], Statement(2))] == [1]
    gateway.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_poison_rows_end_alone(workers: int):
    """37 rows that kill their batch, among 10,000 in batches of 64: exactly 37 errors, few extra calls."""
    poison = {f"row {i}" for i in range(0, 10_000, 271)}
    assert len(poison) == 37

    def script(batch: Batch) -> None:
        if poison.intersection(batch.prompts):
            raise WorkerLost("the worker died")

    pool = ScriptedPool(script, workers=workers)
    gateway = Gateway(pool)
    prompts = [f"row {i}" for i in range(10_000)]
    asked = ask(gateway, prompts, Statement(1))
    failed = {prompt for prompt, outcome in zip(prompts, asked, strict=True) if outcome.error}
    assert failed == poison
    assert all((o.output is None) == (o.error is not None) for o in asked)
    clean = math.ceil(10_000 / 64)
    assert len(pool.batches) <= clean + 37 * 2 * (math.log2(64) + 2)
    gateway.close()


@pytest.mark.parametrize("fits", [1, 2, 17, 63])
def test_out_of_memory_halves_and_is_remembered(fits: int):
    """Batches above what fits are halved; the size that failed is not tried again."""

    def script(batch: Batch) -> None:
        if len(batch.prompts) > fits:
            raise OutOfMemory("too large")

    pool = ScriptedPool(script)
    gateway = Gateway(pool)
    prompts = [f"row {i}" for i in range(2000)]
    assert outputs(gateway, prompts) == [p.upper() for p in prompts]
    too_large = [len(batch) for _, batch in pool.batches if len(batch) > fits]
    assert len(too_large) <= 4 * math.log2(64)
    gateway.close()


def test_out_of_memory_on_one_row_is_its_error():
    """A single row that does not fit gets the error; its neighbours their answers."""

    def script(batch: Batch) -> None:
        if "big" in batch.prompts:
            raise OutOfMemory("too large")

    gateway = Gateway(ScriptedPool(script))
    asked = ask(gateway, ["a", "big", "b"], Statement(1))
    assert [o.output for o in asked] == ["A", None, "B"]
    assert asked[1].error.code == "out_of_memory"
    gateway.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_poison_row_takes_no_neighbour_with_it(workers: int):
    """What dies with a worker is only what was alone on it: the others are answered."""

    class Dying(ScriptedPool):
        """A worker that gets the poison dies with every batch that is on it at the time."""

        def run(self, worker, batch):
            killed = threading.Event()
            on_worker = self.running.setdefault(worker, [])
            on_worker.append(killed)
            try:
                if "poison" in batch.prompts:
                    time.sleep(0.02)  # time for another batch to come beside it
                    for other in list(on_worker):
                        other.set()
                if killed.wait(0.03):
                    raise WorkerLost("the worker died")
                yield from super().run(worker, batch)
            finally:
                on_worker.remove(killed)

        running: ClassVar[dict[int, list[threading.Event]]] = {}

    gateway = Gateway(Dying(workers=workers))
    asked = ask(gateway, ["poison", "b", "c", "d", "e"], Statement(1))
    assert [o.output for o in asked] == [None, "B", "C", "D", "E"]
    gateway.close()


def test_a_failing_thread_wakes_the_others_of_its_statement():
    """When one chunk of a statement cannot go on, its other chunks do not wait for their batches."""
    release = threading.Event()

    def script(batch: Batch) -> None:
        if "slow" in batch.prompts:
            assert release.wait(10)
        if "fatal" in batch.prompts:
            raise Fatal("no more")

    pool = ScriptedPool(script, workers=2)
    gateway = Gateway(pool)
    statement = Statement(1)
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(outputs, gateway, ["slow"], statement)
        while not pool.batches:
            pass
        with pytest.raises(Fatal) as caught:
            outputs(gateway, ["fatal"], statement)
        statement.fail(caught.value)
        with pytest.raises(Fatal):
            slow.result(timeout=1)
        release.set()
    assert statement.failure is caught.value
    gateway.close()


def test_options_that_vary_by_row_are_asked_side_by_side():
    """Groups of one question are in flight together, not one after the other."""
    together = threading.Barrier(2, timeout=10)
    gateway = Gateway(ScriptedPool(lambda _: together.wait(), workers=2))
    groups = [Group(CallOptions(seed=seed), ["q"]) for seed in (1, 2)]
    assert [asked[0][0] for asked in gateway.ask_all(groups, Statement(1))] == ["Q", "Q"]
    gateway.close()


def test_a_model_that_another_process_deployed_anew_is_noticed():
    """What is remembered of the old model is forgotten, and the new defaults hold."""
    pool = ScriptedPool()
    gateway = Gateway(pool)
    outputs(gateway, ["a"])
    pool.generation, pool.spec = 2, ModelSpec("chat", "scripted", defaults=CallOptions(max_tokens=9))
    outputs(gateway, ["b"], Statement(2))
    outputs(gateway, ["a"], Statement(3))
    assert pool.prompts == ["a", "b", "a"]
    gateway.close()


def test_close_does_not_wait_for_a_batch_that_nobody_wants():
    """A batch that ignores its cancelling keeps no session from ending."""
    begun, release = threading.Event(), threading.Event()

    def script(batch: Batch) -> None:
        begun.set()
        release.wait(20)

    gateway = Gateway(ScriptedPool(script))
    statement = Statement(1)
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(outputs, gateway, ["deaf"], statement)
        assert begun.wait(10)
        statement.cancel()
        with pytest.raises(Cancelled):
            asking.result(timeout=1)
    started = time.monotonic()
    gateway.close()
    assert time.monotonic() - started < 10
    release.set()


def test_a_lost_batch_is_answered_by_another_worker():
    """The answer is complete and right although a worker died with a batch."""
    lost: list[int] = []

    def script(batch: Batch) -> None:
        if not lost:
            lost.append(batch.id)
            raise WorkerLost("the worker died")

    gateway = Gateway(ScriptedPool(script, workers=2))
    prompts = [f"row {i}" for i in range(300)]
    assert outputs(gateway, prompts) == [p.upper() for p in prompts]
    gateway.close()


def test_a_fatal_error_stops_the_statement_and_leaves_the_gateway_usable():
    """What no retry can mend is raised to the statement; the same question may be asked again later."""
    broken = [True]

    def script(batch: Batch) -> None:
        if broken[0]:
            raise Fatal("the model was removed")

    gateway = Gateway(ScriptedPool(script))
    with pytest.raises(Fatal, match="removed"):
        outputs(gateway, ["a", "b"])
    broken[0] = False
    assert outputs(gateway, ["a", "b"]) == ["A", "B"]
    gateway.close()


def test_an_engine_that_fails_on_every_row_stops_the_statement():
    """A job of 100,000 rows on a broken engine ends after a few dozen calls, not with 100,000 errors."""

    def script(batch: Batch) -> None:
        raise RowError("broken", code="engine_failed")

    pool = ScriptedPool(script)
    gateway = Gateway(pool)
    with pytest.raises(Fatal, match="20 rows in a row") as caught:
        outputs(gateway, [f"row {i}" for i in range(100_000)])
    assert caught.value.code == "engine_failed"
    assert len(pool.batches) < 200
    gateway.close()


def test_a_failed_row_is_asked_again_by_the_next_statement_only():
    """Within a statement a failure counts for all equal rows; it is never kept as an answer."""
    attempts: list[str] = []

    def script(batch: Batch) -> None:
        if "bad" in batch.prompts:
            attempts.append("bad")
            raise RowError("no", code="bad_row")

    gateway = Gateway(ScriptedPool(script))
    statement = Statement(1)
    for _ in range(3):
        assert ask(gateway, ["bad"], statement)[0].error.code == "bad_row"
    assert len(attempts) == 1
    gateway.ask(GREEDY, ["bad"], Statement(2))
    assert len(attempts) == 2
    gateway.close()


def test_cancel_wakes_the_statement_and_frees_the_worker():
    """A cancelled statement returns at once, its batch is cancelled, and other statements go on."""
    begun, release = threading.Event(), threading.Event()

    def script(batch: Batch) -> None:
        if "slow" in batch.prompts:
            begun.set()
            assert release.wait(10)

    pool = ScriptedPool(script)
    gateway = Gateway(pool)
    statement = Statement(1)
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(outputs, gateway, ["slow"], statement)
        assert begun.wait(10)
        statement.cancel()
        with pytest.raises(Cancelled):
            asking.result(timeout=1)
        assert pool.cancelled == [1]
        release.set()
        assert outputs(gateway, ["next"]) == ["NEXT"]
    gateway.close()


def test_cancel_leaves_questions_that_others_wait_for():
    """A call shared by two statements survives the cancelling of one of them."""
    begun, release = threading.Event(), threading.Event()

    def script(batch: Batch) -> None:
        begun.set()
        assert release.wait(10)

    pool = ScriptedPool(script)
    gateway = Gateway(pool)
    first, second = Statement(1), Statement(2)
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(outputs, gateway, ["shared"], first)
        assert begun.wait(10)
        two = threads.submit(outputs, gateway, ["shared", "shared"], second)
        while not second.usage and gateway._asking < 2:
            pass
        first.cancel()
        with pytest.raises(Cancelled):
            one.result(timeout=1)
        release.set()
        assert two.result(timeout=5) == ["SHARED", "SHARED"]
    assert pool.prompts == ["shared"]
    gateway.close()


def test_memory_is_bounded():
    """What was asked longest ago leaves memory when the outcomes take more than their share."""
    pool = ScriptedPool(max_batch_rows=1000)
    gateway = Gateway(pool, memory_bytes=1_000_000)
    for start in range(0, 20_000, 2000):
        outputs(gateway, [f"row {i}" for i in range(start, start + 2000)])
    assert len(gateway._known) <= 2000  # a generation is a whole number of batches
    outputs(gateway, ["row 19999"])
    assert len(pool.prompts) == 20_000
    gateway.close()


def test_memory_is_bounded_when_everything_is_used_again():
    """What is used again stays, but not beyond the bound."""
    pool = ScriptedPool(max_batch_rows=1000)
    gateway = Gateway(pool, memory_bytes=500_000)
    for end in range(500, 10_000, 500):
        for start in range(0, end, 500):
            outputs(gateway, [f"row {i}" for i in range(start, start + 500)])
        assert len(gateway._known) <= 3000
    gateway.close()


def test_cache_off_asks_again_and_read_does_not_keep():
    """cache=off neither uses nor keeps results of other statements; cache=read only uses them."""
    pool = ScriptedPool()
    gateway = Gateway(pool)
    outputs(gateway, ["a"], Statement(1, cache="read"))
    outputs(gateway, ["a"], Statement(2))
    assert len(pool.prompts) == 2
    outputs(gateway, ["a"], Statement(3, cache="read"))
    assert len(pool.prompts) == 2
    outputs(gateway, ["a"], Statement(4, cache="off"))
    outputs(gateway, ["a"], Statement(4, cache="off"))
    assert len(pool.prompts) in (3, 4)
    gateway.close()


def test_close_waits_for_questions_under_way():
    """A gateway that is replaced answers what it has taken and refuses the rest."""
    begun, release = threading.Event(), threading.Event()

    def script(batch: Batch) -> None:
        begun.set()
        assert release.wait(10)

    pool = ScriptedPool(script)
    gateway = Gateway(pool)
    with ThreadPoolExecutor(2) as threads:
        asking = threads.submit(outputs, gateway, ["a"])
        assert begun.wait(10)
        closing = threads.submit(gateway.close)
        while not gateway._closing:
            pass
        with pytest.raises(GatewayClosed):
            outputs(gateway, ["b"])
        release.set()
        assert asking.result(timeout=5) == ["A"]
        closing.result(timeout=5)
    assert pool.closed


def test_an_engine_that_forgets_rows_is_found_out():
    """An answer that never comes is an error of that row, not a hang and not a NULL without a cause."""

    class Forgetful(ScriptedPool):
        def run(self, worker, batch):
            for answers in super().run(worker, batch):
                keep = [i for i, prompt in enumerate(batch.prompts) if prompt != "lost"]
                yield type(answers)(
                    keep,
                    [answers.outputs[i] for i in keep],
                    ["stop"] * len(keep),
                    [1] * len(keep),
                    [1] * len(keep),
                    0,
                )

    gateway = Gateway(Forgetful())
    asked = ask(gateway, ["a", "lost", "b"], Statement(1))
    assert [o.output for o in asked] == ["A", None, "B"]
    assert asked[1].error is not None
    gateway.close()


@pytest.mark.parametrize(("output", "code"), [(None, "no_answer"), ("half \ud800", "bad_answer")])
def test_what_is_no_answer_is_an_error_of_its_row(output: str | None, code: str):
    """Nothing, and text that is none, are never given out, stored or taken for a value."""

    class Odd(ScriptedPool):
        def run(self, worker, batch):
            for answers in super().run(worker, batch):
                answers.outputs[:] = [output if text == "ODD" else text for text in answers.outputs]
                yield answers

    gateway = Gateway(Odd())
    asked = ask(gateway, ["a", "odd", "b"])
    assert [(o.output, o.error.code if o.error else None) for o in asked] == [("A", None), (None, code), ("B", None)]
    gateway.close()
