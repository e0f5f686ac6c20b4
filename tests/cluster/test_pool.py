"""Pools: pieces as they finish, and workers that die, hang, fail, are cancelled or taken away."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from runtime import cluster
from runtime.errors import Fatal, OutOfMemory, RowError, WorkerLost
from tests.cluster.conftest import batch, outputs, pids


def test_200_batches_with_two_in_flight(deploy):
    """Two feeders on each of two workers get 200 different batches back, each right and in order."""
    pool = deploy("echo", workers=2)

    def carry(number: int) -> bool:
        prompts = [f"{number}:{row}" for row in range(64)]
        return outputs(pool, number % 2, batch(*prompts)) == prompts

    with ThreadPoolExecutor(4) as feeders:
        assert all(feeders.map(carry, range(200)))


def test_pieces_arrive_before_the_batch_ends(deploy):
    """The first rows of a slow batch are there long before its last; quick ones travel together."""
    pool = deploy(options={"piece_s": 0.05})
    times = [time.monotonic() for _ in pool.run(0, batch(*"abcdefghij"))]
    assert times[-1] - times[0] > 0.3


def test_a_batch_larger_than_the_inline_limit_arrives_whole(deploy):
    """Two megabytes go and come."""
    prompts = [f"{row} " + "x" * 10_000 for row in range(200)]
    assert outputs(deploy("echo"), 0, batch(*prompts)) == prompts


def test_a_rows_error_stays_with_its_row(deploy):
    """Its neighbours are answered."""
    answers = list(deploy().run(0, batch("a", "row error", "c")))
    errors = {row: error.code for a in answers for row, error in a.errors.items()}
    assert errors == {1: "bad_row"}
    assert [text for a in answers for text in a.outputs] == ["A", None, "C"]


@pytest.mark.parametrize(
    ("order", "kind", "code", "text"),
    [
        ("raise unpicklable", RowError, "engine_failed", "status 500: server said no"),
        ("raise fatal", Fatal, "closed", "The provider is closed."),
        ("raise memory", OutOfMemory, "out_of_memory", "ran out of memory"),
        ("raise exit", RowError, "engine_failed", "SystemExit"),
        ("raise quoting", RowError, "engine_failed", "ValueError in fake_engines.py"),
    ],
)
def test_an_engines_exception_arrives_as_ours(deploy, order, kind, code, text):
    """Whatever it was, after the rows that were finished; never with the prompt in it; the worker goes on."""
    pool = deploy()
    done: list[object] = []
    with pytest.raises(kind) as raised:
        done.extend(text for answers in pool.run(0, batch("a", order, "c")) for text in answers.outputs)
    assert done == ["A"]
    assert (type(raised.value), raised.value.code) == (kind, code)
    assert text in raised.value.message
    assert order not in str(raised.value)
    assert outputs(pool, 0, batch("b")) == ["B"]


def test_an_answer_that_cannot_be_sent_fails_its_batch(deploy):
    """The worker is not blamed and goes on."""
    pool = deploy()
    with pytest.raises(RowError, match="could not be sent: TypeError"):
        outputs(pool, 0, batch("unsendable"))
    assert outputs(pool, 0, batch("b")) == ["B"]


def test_out_of_memory_above_a_ceiling(deploy):
    """Three rows do not fit, two do."""
    pool = deploy(options={"oom_above": 2})
    with pytest.raises(OutOfMemory):
        outputs(pool, 0, batch("a", "b", "c"))
    assert outputs(pool, 0, batch("a", "b")) == ["A", "B"]


def test_a_row_that_kills_its_worker_costs_no_more_than_its_batches(deploy, name):
    """Each is lost within seconds and the process replaced; finding the row is the caller's work."""
    pool = deploy()
    seen = set(pids(name))
    for _ in range(4):  # more often than a worker that cannot live may die
        began = time.monotonic()
        with pytest.raises(WorkerLost) as raised:
            outputs(pool, 0, batch("a", "die"))
        assert time.monotonic() - began < 15
        assert raised.value.code == "worker_lost"
    assert outputs(pool, 0, batch("b")) == ["B"]
    assert not seen & set(pids(name))


def test_a_worker_killed_while_idle_comes_back(deploy, name):
    """Meanwhile it is listed, exists and can be attached to; a pool loses at most one batch."""
    pool = deploy()
    process = psutil.Process(pids(name)[0])
    process.kill()
    process.wait()
    assert [d.name for d in cluster.deployments() if d.name == name] == [name]
    assert cluster.exists(name)
    assert outputs(cluster.attach(name), 0, batch("a")) == ["A"]
    try:
        answer = outputs(pool, 0, batch("a"))
    except WorkerLost:
        answer = outputs(pool, 0, batch("a"))
    assert answer == ["A"]


def test_a_worker_that_cannot_live_is_given_up(deploy, tmp_path):
    """Three deaths in a row before a first row is answered stop the statement with the cause."""
    pool = deploy("load_once", path=str(tmp_path))
    with pytest.raises(WorkerLost):
        outputs(pool, 0, batch("die"))
    with pytest.raises(Fatal) as raised:
        outputs(pool, 0, batch("b"))
    assert raised.value.code == "worker_dies"


def test_a_hung_batch_costs_only_its_worker(deploy, name, monkeypatch):
    """Past its time the process is killed, even one that no longer listens; the replacement answers."""
    monkeypatch.setattr("runtime.cluster.seat.ANSWER_TIMEOUT_S", 1.0)
    pool = deploy(workers=2, batch_timeout_s=0.5)
    before = pids(name)
    began = time.monotonic()
    with pytest.raises(WorkerLost) as raised:
        outputs(pool, 0, batch("hang"))
    assert time.monotonic() - began < 10
    assert raised.value.code == "worker_hung"
    assert outputs(pool, 1, batch("b")) == ["B"]
    assert outputs(pool, 0, batch("b")) == ["B"]
    after = pids(name)
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_waiting_behind_others_is_not_hanging(deploy, name):
    """A batch that waits longer than the limit in its worker's queue is answered in the end."""
    pool = deploy(batch_timeout_s=0.5)
    before = pids(name)
    with ThreadPoolExecutor(4) as feeders:
        assert list(feeders.map(lambda _: outputs(pool, 0, batch("wait 0.3")), range(4))) == [["WAIT 0.3"]] * 4
    assert pids(name) == before


def test_cancel_frees_the_worker(deploy):
    """A batch that would run for a minute ends at once, and so does one that waits behind it."""
    pool = deploy()
    running, waiting = batch("a", "wait 60"), batch("wait 60")
    began = time.monotonic()
    with ThreadPoolExecutor(2) as feeders:
        first = iter(pool.run(0, running))
        assert next(first).outputs == ["A"]
        later = feeders.submit(list, pool.run(0, waiting))
        pool.cancel(0, waiting.id)
        pool.cancel(0, running.id)
        list(first)
        assert [piece.outputs for piece in later.result()] in ([], [["WAIT 60"]])  # it may just have begun
    assert outputs(pool, 0, batch("b")) == ["B"]
    assert time.monotonic() - began < 10


def test_closing_the_iterator_cancels(deploy):
    """A caller that stops reading frees the worker too."""
    pool = deploy()
    pieces = pool.run(0, batch("a", "wait 60"))
    next(pieces)
    pieces.close()
    began = time.monotonic()
    assert outputs(pool, 0, batch("b")) == ["B"]
    assert time.monotonic() - began < 10


def test_a_worker_runs_as_many_batches_as_it_may(deploy, name):
    """worker_concurrency 2: two run at once, and it describes itself meanwhile."""
    pool = deploy(worker_concurrency=2)
    meet = threading.Barrier(3)

    def slow() -> None:
        pieces = pool.run(0, batch("a", "wait 60"))
        next(pieces)
        meet.wait(timeout=20)
        meet.wait(timeout=20)
        pieces.close()

    threads = [threading.Thread(target=slow) for _ in range(2)]
    for thread in threads:
        thread.start()
    meet.wait(timeout=20)
    (info,) = [d for d in cluster.deployments() if d.name == name]
    assert info.workers[0].busy == 2
    meet.wait(timeout=20)
    for thread in threads:
        thread.join()


def test_a_removed_model_is_fatal(deploy, name):
    """The batch in flight is lost, the next one says that the model was removed."""
    pool = deploy()
    pieces = pool.run(0, batch("a", "wait 60"))
    next(pieces)
    cluster.remove(name)
    with pytest.raises(WorkerLost):
        list(pieces)
    with pytest.raises(Fatal) as raised:
        outputs(pool, 0, batch("b"))
    assert raised.value.code == "model_removed"


def test_a_model_deployed_anew_is_found(deploy, name):
    """A pool whose workers were replaced by another process's deployment goes on with those."""
    old = deploy(workers=2)
    new = deploy(workers=1)
    cluster.remove(name, generation=old.generation)
    with pytest.raises(WorkerLost):
        outputs(old, 1, batch("a"))
    assert outputs(old, 1, batch("a")) == ["A"]
    assert new.workers == 1


def test_ctrl_c_reaches_no_worker(deploy, name):
    """The terminal's SIGINT goes to the driver's process group; workers have their own and block it anyhow."""
    pool = deploy()
    (pid,) = pids(name)
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    assert outputs(pool, 0, batch("a")) == ["A"]
    assert pids(name) == [pid]


def test_tokens_are_counted_beside_a_batch(deploy, name):
    """Counting does not wait for the batch that keeps the worker busy, and disturbs no one."""
    pool = deploy("echo")
    assert pool.count_tokens(0, batch("a", "four", "")) == [1, 4, 0]
    assert pool.info.overhead_tokens == 2  # the probe's "ok"
    busy = deploy("load_counting")
    pieces = busy.run(0, batch("a", "wait 60"))
    next(pieces)
    assert busy.count_tokens(0, batch("a", "four")) == [1, 4]
    pieces.close()


def test_an_engine_that_cannot_count_says_none(deploy):
    """An engine without the method is no error."""
    assert deploy().count_tokens(0, batch("a")) is None


def test_counting_survives_a_dead_worker_and_another_deployment(deploy, name):
    """A dead worker's question goes to its replacement; that of an old generation to the new one."""
    pool = deploy("load_counting")
    os.kill(pids(name)[0], signal.SIGKILL)
    assert pool.count_tokens(0, batch("four")) == [4]
    deploy("load_counting")
    cluster.remove(name, generation=pool.generation)
    assert pool.count_tokens(0, batch("four")) == [4]


def test_a_failure_to_count_is_an_error_of_ours(deploy):
    """What the engine raises while it counts arrives as it does from a batch."""
    with pytest.raises(Fatal) as raised:
        deploy("load_counting").count_tokens(0, batch("raise fatal"))
    assert raised.value.code == "closed"
