"""How much of the prompts a worker's prefix cache knows already: rows spread as they come, and by `prefix`.

A simulation without a model: each worker remembers the blocks of text that it read last, as vLLM and others do, and
takes its next batch when it has read what was new in the one before. Also: what the queue itself costs.
"""

from __future__ import annotations

import argparse
import heapq
import random
import time
from collections import OrderedDict
from collections.abc import Sequence

from texts import mixed

from runtime.gateway.call import Call, Ticket
from runtime.gateway.queue import CallQueue
from runtime.gateway.statement import Statement
from runtime.spec import CallOptions

GREEDY = CallOptions()
BLOCK = 16  # characters
CHUNK = 2048  # rows that DuckDB hands over at once


class PrefixCache:
    """The beginnings that one worker knows: the last `blocks` ones used, each standing for all text up to its end."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._known: OrderedDict[int, None] = OrderedDict()

    def read(self, prompt: str) -> int:
        """Characters of the prompt that were known; all of it is known afterwards."""
        ends = range(BLOCK, len(prompt) + 1, BLOCK)
        beginnings = [hash(prompt[:end]) for end in ends]
        hit = next((index for index, one in enumerate(beginnings) if one not in self._known), len(beginnings))
        for one in reversed(beginnings):  # the end of a text goes first when there is no room
            self._known[one] = None
            self._known.move_to_end(one)
        while len(self._known) > self._blocks:
            self._known.popitem(last=False)
        return hit * BLOCK


def make_calls(prompts: Sequence[str]) -> list[Call]:
    statement = Statement()
    calls = [Call(prompt, GREEDY, statement) for prompt in prompts]
    for call in calls:
        call.tickets.append(Ticket(statement))
    return calls


def hit_ratio(
    prompts: Sequence[str], by_prefix: bool, workers: int, rows: int, cache_chars: int, chunk: int
) -> float:
    """Share of all characters that a worker knew already; a new chunk comes when less than one is waiting."""
    queue = CallQueue(rows, 10**9, workers, by_prefix)
    chunks = iter([prompts[start : start + chunk] for start in range(0, len(prompts), chunk)])
    caches = [PrefixCache(cache_chars // BLOCK) for _ in range(workers)]
    free = [(0, worker) for worker in range(workers)]
    known = 0
    while free:
        now, worker = heapq.heappop(free)
        while len(queue) < chunk and (more := next(chunks, None)):
            queue.put(GREEDY, make_calls(more))
        batch = queue.take(False, worker)
        if batch:
            hits = sum(caches[worker].read(str(call.prompt)) for call in batch)
            known += hits
            heapq.heappush(free, (now + sum(call.size for call in batch) - hits + 1, worker))
    return known / sum(map(len, prompts))


def microseconds(prompts: Sequence[str], by_prefix: bool, chunks: int) -> float:
    """Cost of a call's way through the queue when this many chunks come before the first batch is taken."""
    queue = CallQueue(64, 10**9, 4, by_prefix)
    rows = chunks * CHUNK
    calls = make_calls([prompts[row % len(prompts)] for row in range(rows)])
    started = time.perf_counter()
    for start in range(0, rows, CHUNK):
        queue.put(GREEDY, calls[start : start + CHUNK])
    worker = 0
    while queue.take(False, worker := (worker + 1) % 4):
        pass
    return (time.perf_counter() - started) / rows * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--workers", type=int, default=4)
    said = parser.parse_args()
    documents = [f"Document {n}: " + " ".join(mixed(12, seed=n)) for n in range(said.documents)]
    questions = [f"\nQuestion: {text}" for text in mixed(said.questions, longest=80, seed=0)]
    prompts = [document + question for document in documents for question in questions]
    random.Random(1).shuffle(prompts)
    most = sum(map(len, prompts)) - sum(map(len, documents)) - sum(map(len, questions)) * said.documents
    print(
        f"{said.documents} documents x {said.questions} questions, {said.workers} workers; "
        f"at best {most / sum(map(len, prompts)):.1%} of the text is read before"
    )
    mean = sum(map(len, documents)) // len(documents)
    for chunk in (CHUNK, 256):
        for kept in (2, 10):
            lru, prefix = (
                hit_ratio(prompts, by_prefix, said.workers, 32, kept * mean, chunk) for by_prefix in (False, True)
            )
            print(f"chunks of {chunk:>4} rows, cache of {kept:>2} documents:  lru {lru:.1%}   prefix {prefix:.1%}")
    for kind, texts in (("long", prompts), ("short", [text[-40:] for text in prompts])):
        for by_prefix, name in ((False, "lru"), (True, "prefix")):
            costs = [min(microseconds(texts, by_prefix, chunks) for _ in range(3)) for chunks in (1, 50)]
            print(
                f"queue of {name:<6} {kind:>5} prompts  {costs[0]:.2f} us a call with {CHUNK:,} waiting, "
                f"{costs[1]:.2f} with {50 * CHUNK:,}"
            )


if __name__ == "__main__":
    main()
