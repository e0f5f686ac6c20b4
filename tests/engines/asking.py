"""Asking an engine and getting one reply for each row."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.engines import Engine
from runtime.errors import ErrorInfo
from runtime.spec import Batch, CallOptions, Prompt


@dataclass(frozen=True)
class Reply:
    """The answer to one row."""

    output: Any
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    error: ErrorInfo | None


def ask(engine: Engine, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
    """The replies of an engine in the order of the prompts; every row must come exactly once."""
    replies: dict[int, Reply] = {}
    for piece in engine.run(Batch(7, CallOptions(**options), prompts), threading.Event()):
        assert piece.latency_ms >= 0
        for place, row in enumerate(piece.rows):
            assert row not in replies
            replies[row] = Reply(
                piece.outputs[place],
                piece.finish_reasons[place],
                piece.prompt_tokens[place],
                piece.completion_tokens[place],
                piece.errors.get(row),
            )
    assert sorted(replies) == list(range(len(prompts)))
    return [replies[row] for row in range(len(prompts))]
