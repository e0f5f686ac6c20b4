"""How open calls become batches, and which worker takes them."""

from __future__ import annotations

import pytest

from runtime.errors import UserError
from runtime.gateway.call import Call, Ticket
from runtime.gateway.queue import CallQueue
from runtime.gateway.slots import Slots
from runtime.gateway.statement import Statement
from runtime.spec import CallOptions

GREEDY = CallOptions()


def calls(*prompts: str, options: CallOptions = GREEDY) -> list[Call]:
    made = [Call(prompt, options, 1, True, None) for prompt in prompts]
    for call in made:
        call.tickets.append(Ticket(Statement()))
    return made


def taken(queue: CallQueue, full_only: bool = False) -> list[str]:
    return [call.prompt for call in queue.take(full_only)]


def test_a_batch_holds_prompts_of_similar_length():
    """Long prompts go first and together, so that little is padded."""
    queue = CallQueue(max_rows=2, max_chars=1000, workers=1)
    queue.put(GREEDY, calls("a", "ccc", "bb", "dddd"))
    assert [taken(queue), taken(queue)] == [["dddd", "ccc"], ["bb", "a"]]


def test_a_short_queue_is_spread_over_the_workers():
    """Four workers share ten rows instead of one taking them all."""
    queue = CallQueue(max_rows=64, max_chars=1000, workers=4)
    queue.put(GREEDY, calls(*"abcdefghij"))
    assert [len(taken(queue)) for _ in range(4)] == [3, 2, 2, 1]


def test_a_busy_worker_gets_full_batches_only():
    """A partial batch waits for a worker that can start on it."""
    queue = CallQueue(max_rows=4, max_chars=1000, workers=1)
    queue.put(GREEDY, calls(*"abcdef"))
    assert len(taken(queue, full_only=True)) == 4
    assert taken(queue, full_only=True) == []
    assert len(taken(queue)) == 2


def test_small_sheaves_share_a_batch_when_their_options_are_equal():
    """The few rows that a filter leaves in each chunk do not go out one by one."""
    queue = CallQueue(max_rows=10, max_chars=1000, workers=1)
    other = CallOptions(max_tokens=3)
    queue.put(GREEDY, calls("a"))
    queue.put(other, calls("x", options=other))
    queue.put(CallOptions(), calls("b"))
    assert taken(queue) == ["a", "b"]
    assert taken(queue) == ["x"]
    assert len(queue) == 0


def test_characters_bound_a_batch():
    """Texts beyond the bound go into the next batch; a single longer one goes alone."""
    queue = CallQueue(max_rows=10, max_chars=10, workers=1)
    queue.put(GREEDY, calls("x" * 30, "y" * 6, "z" * 5, "w"))
    assert [len(p) for p in taken(queue)] == [30]
    assert [len(p) for p in taken(queue)] == [6]
    assert [len(p) for p in taken(queue)] == [5, 1]


def test_what_nobody_waits_for_is_not_sent():
    """A cancelled statement's calls leave the queue without a batch."""
    queue = CallQueue(max_rows=2, max_chars=1000, workers=1)
    dropped, kept = calls("aa", "bb", "cc"), calls("d")
    queue.put(GREEDY, dropped)
    queue.put(GREEDY, kept)
    for call in dropped:
        call.tickets.clear()
    assert taken(queue) == ["d"]
    assert taken(queue) == []


def test_lru_prefers_the_idle_worker_that_waited_longest():
    """Work goes to the least loaded worker."""
    slots = Slots(workers=3, running=1, policy="lru")
    first = [slots.choose()]
    slots.occupy(0)
    first.append(slots.choose())
    slots.occupy(1)
    slots.release(0)
    assert first == [0, 1]
    assert slots.choose() == 2
    slots.occupy(2)
    assert slots.choose() == 0


def test_round_robin_goes_around():
    """Each worker in turn, skipping those that are full."""
    slots = Slots(workers=3, running=1, policy="round_robin")
    order = []
    for _ in range(6):
        worker = slots.choose()
        order.append(worker)
        slots.occupy(worker)
    assert order == [0, 1, 2, 0, 1, 2]
    assert slots.choose() is None
    slots.release(1)
    assert slots.choose() == 1


def test_an_idle_worker_goes_first():
    """No policy lets a batch wait behind another one while a worker has nothing to do."""
    slots = Slots(workers=2, running=1, policy="round_robin")
    slots.occupy(0)
    slots.occupy(1)
    slots.release(1)
    assert slots.choose() == 1


def test_a_worker_with_a_lost_batch_gets_no_other():
    """What may kill its worker is alone there."""
    slots = Slots(workers=1, running=1, policy="lru")
    assert slots.choose(empty=True) == 0
    slots.occupy(0, alone=True)
    assert slots.choose() is None
    slots.release(0)
    slots.occupy(0)
    assert slots.choose() == 0
    assert slots.choose(empty=True) is None


def test_a_lost_batch_comes_back_in_halves_before_all_others():
    """Bisecting goes deep first, so that a batch that fails whole is found out early."""
    queue = CallQueue(max_rows=4, max_chars=1000, workers=1)
    queue.put(GREEDY, calls("x"))
    queue.put_back(calls("a", "b", "c"))
    assert queue.again
    assert [taken(queue), taken(queue), taken(queue)] == [["a", "b"], ["c"], ["x"]]


def test_an_unknown_policy_names_the_nearest():
    """A misspelt load_balance is an error with a hint."""
    with pytest.raises(UserError, match="round_robin"):
        Slots(1, 1, "roundrobin")
