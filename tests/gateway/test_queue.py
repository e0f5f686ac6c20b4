"""How open calls become batches, and which worker takes them."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import UserError
from runtime.gateway.call import Call, Ticket
from runtime.gateway.queue import CallQueue
from runtime.gateway.slots import Slots
from runtime.gateway.statement import Statement
from runtime.spec import CallOptions, Message

GREEDY = CallOptions()
OTHER = CallOptions(max_tokens=3)


def calls(*prompts: str, options: CallOptions = GREEDY) -> list[Call]:
    made = [Call(prompt, options, Statement()) for prompt in prompts]
    for call in made:
        call.tickets.append(Ticket(call.statement))
    return made


def taken(queue: CallQueue, full_only: bool = False, worker: int = 0) -> list[str]:
    return [call.prompt for call in queue.take(full_only, worker)]


def worked_off(queue: CallQueue, workers: int) -> list[list[str]]:
    """What each worker gets when all are equally fast, in this order."""
    work: list[list[str]] = [[] for _ in range(workers)]
    while len(queue):
        for worker in range(workers):
            work[worker] += taken(queue, worker=worker)
    return work


def table(groups: int, rows: int, seed: int = 1) -> list[str]:
    """Prompts of `groups` documents with `rows` questions each, in random order."""
    prompts = [
        f"All begin alike. Document {group}: {'text ' * 20}\nQuestion {row}"
        for group in range(groups)
        for row in range(rows)
    ]
    random.Random(seed).shuffle(prompts)
    return prompts


def group_of(prompt: str) -> str:
    return prompt.partition("\n")[0]


def splits(work: list[list[str]]) -> int:
    """How many workers too many had to read a group's beginning."""
    readers = defaultdict(set)
    for worker, prompts in enumerate(work):
        for prompt in prompts:
            readers[group_of(prompt)].add(worker)
    return sum(len(found) - 1 for found in readers.values())


def test_a_batch_holds_prompts_of_similar_length():
    """Long prompts go first and together, so that little is padded."""
    queue = CallQueue(max_rows=2, max_chars=1000, workers=1)
    queue.put(GREEDY, calls("a", "ccc", "bb", "dddd"))
    assert [taken(queue), taken(queue)] == [["dddd", "ccc"], ["bb", "a"]]


def test_a_short_queue_is_spread_over_the_workers():
    """Four workers share ten rows instead of one taking them all."""
    queue = CallQueue(max_rows=64, max_chars=1000, workers=4)
    queue.put(GREEDY, calls(*"abcdefghij"))
    assert [len(taken(queue)) for _ in range(5)] == [3, 2, 2, 2, 1]


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
    queue.put(GREEDY, calls("a"))
    queue.put(OTHER, calls("x", options=OTHER))
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


def test_equal_beginnings_meet_on_one_worker():
    """Of 50 groups in random order at most one for each worker is read by two, and every worker has its share."""
    queue = CallQueue(max_rows=16, max_chars=10**6, workers=4, by_prefix=True)
    prompts = table(groups=50, rows=40)
    queue.put(GREEDY, calls(*prompts))
    work = worked_off(queue, workers=4)
    assert sorted(chain(*work)) == sorted(prompts)
    assert min(map(len, work)) >= len(prompts) // 4 - 3 * 16
    assert splits(work) <= 4


def test_a_worker_goes_on_with_the_neighbours_of_its_last_rows():
    """Nearly always a row begins like the one before it on the same worker."""
    queue = CallQueue(max_rows=16, max_chars=10**6, workers=4, by_prefix=True)
    queue.put(GREEDY, calls(*table(groups=50, rows=40)))
    work = worked_off(queue, workers=4)
    fresh = sum(group_of(a) != group_of(b) for prompts in work for a, b in pairwise(prompts))
    assert fresh <= 50 + 2 * 4


def test_a_beginning_that_comes_again_goes_to_the_worker_that_knows_it():
    """Chunks that come while there is work join their groups; few groups are ever read by a second worker."""
    prompts = table(groups=40, rows=60)
    found = {}
    for by_prefix in (False, True):
        queue = CallQueue(max_rows=16, max_chars=10**6, workers=4, by_prefix=by_prefix)
        work: list[list[str]] = [[] for _ in range(4)]
        for start in range(0, len(prompts), 600):
            queue.put(GREEDY, calls(*prompts[start : start + 600]))
            for worker in [0, 1, 2, 3] * 5:
                work[worker] += taken(queue, worker=worker)
        work = [done + rest for done, rest in zip(work, worked_off(queue, workers=4), strict=True)]
        assert sorted(chain(*work)) == sorted(prompts)
        found[by_prefix] = splits(work)
    assert found[True] < found[False] / 5


def test_chunks_that_have_gone_are_remembered_by_their_workers():
    """When the same groups come again to an empty queue, every worker gets most of its own."""
    queue = CallQueue(max_rows=16, max_chars=10**6, workers=4, by_prefix=True)
    work: list[list[str]] = [[] for _ in range(4)]
    for seed in range(3):
        queue.put(GREEDY, calls(*table(groups=40, rows=32, seed=seed)))
        work = [done + more for done, more in zip(work, worked_off(queue, workers=4), strict=True)]
    assert splits(work) <= 3 * 4


def test_a_slow_worker_gives_half_of_its_stretch_away():
    """Rows do not wait for the worker that knows them while another one has nothing to do."""
    queue = CallQueue(max_rows=4, max_chars=10**6, workers=2, by_prefix=True)
    queue.put(GREEDY, calls(*table(groups=4, rows=8)))
    first = taken(queue, worker=0)
    others = []
    while len(queue):
        others += taken(queue, worker=1)
    assert (len(first), len(others)) == (4, 28)
    assert group_of(others[-1]) == group_of(first[0])  # what the slow one stands in goes last


def test_equal_texts_are_shared_too():
    """A prompt that is sampled many times keeps every worker busy."""
    queue = CallQueue(max_rows=4, max_chars=10**6, workers=4, by_prefix=True)
    queue.put(GREEDY, calls(*["the same"] * 64))
    work = worked_off(queue, workers=4)
    assert sum(map(len, work)) == 64
    assert max(map(len, work)) - min(map(len, work)) <= 4


def test_a_stream_of_new_neighbours_does_not_hold_back_the_oldest_call():
    """What comes in front of a call again and again does not keep it waiting for ever."""
    queue = CallQueue(max_rows=4, max_chars=10**6, workers=1, by_prefix=True)
    queue.put(GREEDY, calls("m", "z"))
    came = []
    for number in range(200):
        queue.put(GREEDY, calls(*(f"n{number:04d}.{row}" for row in range(8))))
        came += taken(queue)
    assert {"m", "z"} <= set(came)


def test_conversations_are_ordered_by_their_words():
    """Messages with the same system message and the same first turns meet as texts do."""
    queue = CallQueue(max_rows=2, max_chars=10**6, workers=1, by_prefix=True)
    told = [(Message("system", system), Message("user", user)) for user in "ab" for system in "xy"]
    queue.put(GREEDY, calls(*told))
    assert [[turn.content for turn in prompt] for prompt in taken(queue)] == [["x", "a"], ["x", "b"]]


def test_batches_of_neighbours_keep_to_one_set_of_options_and_both_bounds():
    """Rows and characters bound a batch; sets of options are served in turn, so that none waits for another."""
    queue = CallQueue(max_rows=3, max_chars=10, workers=1, by_prefix=True)
    queue.put(GREEDY, calls("a" * 6, "b" * 6, "c" * 30, "d", "e", "f", "g"))
    queue.put(OTHER, calls("x", options=OTHER))
    batches = []
    while len(queue):
        batches.append("".join(prompt[0] for prompt in taken(queue)))
    assert batches == ["a", "x", "b", "c", "def", "g"]


def test_a_busy_worker_takes_ahead_only_when_there_is_plenty():
    """As long as every worker can have a full batch; then it is full even where its own stretch ends."""
    queue = CallQueue(max_rows=4, max_chars=10**6, workers=2, by_prefix=True)
    queue.put(GREEDY, calls(*"abcdefgh"))
    assert len(taken(queue, full_only=True)) == 4
    assert taken(queue, full_only=True) == []
    assert len(taken(queue, worker=1)) == 2


def test_neighbours_that_nobody_waits_for_are_not_sent():
    """A cancelled statement's calls leave the order without a batch."""
    queue = CallQueue(max_rows=2, max_chars=1000, workers=2, by_prefix=True)
    dropped, kept = calls(*"abcdefgh"), calls("dd")
    queue.put(GREEDY, dropped)
    queue.put(GREEDY, kept)
    for call in dropped:
        call.tickets.clear()
    assert taken(queue, worker=1) == ["dd"]
    assert taken(queue, worker=0) == []
    assert len(queue) == 0


def test_a_lost_batch_comes_first_among_neighbours_too():
    """Lost rows go out alone and halved, whoever asks."""
    queue = CallQueue(max_rows=4, max_chars=1000, workers=2, by_prefix=True)
    queue.put(GREEDY, calls("x"))
    queue.put_back(calls("a", "b", "c"))
    assert len(queue) == 4
    assert [taken(queue, worker=1), taken(queue, worker=0), taken(queue, worker=1)] == [["a", "b"], ["c"], ["x"]]


PUT = st.tuples(st.just("put"), st.lists(st.text("ab", max_size=5), max_size=12), st.sampled_from([GREEDY, OTHER]))
TAKE = st.tuples(st.just("take"), st.integers(0, 3), st.booleans())


@given(st.lists(PUT | TAKE, max_size=40), st.booleans(), st.integers(1, 5), st.integers(1, 12))
def test_everything_comes_out_exactly_once(steps, by_prefix: bool, max_rows: int, max_chars: int):
    """However puts and takes follow each other, no call is lost, doubled, or in a batch that is too large or mixed."""
    queue = CallQueue(max_rows, max_chars, 4, by_prefix)
    put: list[Call] = []
    batches: list[list[Call]] = []
    for step in steps:
        if step[0] == "put":
            new = calls(*step[1], options=step[2])
            put += new
            queue.put(step[2], list(new))
        else:
            batches.append(queue.take(step[2], step[1]))
        assert len(queue) == len(put) - sum(map(len, batches))
    while batch := queue.take(False, len(batches) % 4):
        batches.append(batch)
    assert sorted(map(id, chain(*batches))) == sorted(map(id, put))
    for batch in filter(None, batches):
        assert len(batch) <= max_rows
        assert sum(call.size for call in batch) <= max_chars or len(batch) == 1
        assert len({call.options for call in batch}) == 1


@given(st.lists(st.text("ab", max_size=6), min_size=1, max_size=60), st.integers(1, 4), st.data())
def test_an_idle_worker_is_never_sent_away_while_a_call_waits(prompts, workers: int, data):
    """Whoever asks without a reservation gets rows, wherever the others stand."""
    queue = CallQueue(3, 10**6, workers, by_prefix=True)
    queue.put(GREEDY, calls(*prompts))
    while len(queue):
        assert queue.take(False, data.draw(st.integers(0, workers - 1)))
