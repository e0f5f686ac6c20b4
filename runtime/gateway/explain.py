"""What a statement would ask of a model: rows, distinct calls, and their exact tokens. No model is called."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from runtime.gateway.dispatch import WorkerPool
from runtime.gateway.question import Question
from runtime.gateway.statement import Explained, Statement
from runtime.spec import Batch, CallOptions, Prompt


def explain(
    question: Question,
    statement: Statement,
    pool: WorkerPool,
    key_of: Callable[[Prompt], bytes],
    lock: threading.RLock,
) -> None:
    """Count a question, whose known outcomes are filled in, into `statement.explained`."""
    with lock:
        explained = statement.explained.setdefault(pool.name, Explained())
        explained.rows += len(question.prompts)
        new = _not_seen(question, explained, key_of)
    tokens = _count_tokens(pool, question.options, new)
    limit = question.options.max_tokens or pool.info.max_answer_tokens
    with lock:
        explained.add(len(new), tokens, limit)


def _not_seen(question: Question, explained: Explained, key_of: Callable[[Prompt], bytes]) -> Sequence[Prompt]:
    """The prompts that would be calls, of those that no chunk before had."""
    if not question.options.deterministic:
        explained.sampled += len(question.prompts)
        return question.prompts
    new = []
    for prompt, outcome in dict(zip(question.prompts, question.outcomes, strict=True)).items():
        key = key_of(prompt)
        if key not in explained.seen:
            explained.seen.add(key)
            if outcome is None:
                new.append(prompt)
            else:
                explained.stored += 1
    return new


def _count_tokens(pool: WorkerPool, options: CallOptions, prompts: Sequence[Prompt]) -> int | None:
    total = 0
    for start in range(0, len(prompts), pool.info.max_batch_rows):
        counted = pool.count_tokens(0, Batch(0, options, prompts[start : start + pool.info.max_batch_rows]))
        if counted is None:
            return None
        total += sum(counted)
    return total
