"""An engine without a model: the answer is the prompt. It measures the way of a call and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from runtime.spec import Answers, Batch, EngineInfo, ModelSpec, Task


class EchoEngine:
    """Answers every prompt with itself; one character counts as one token."""

    def __init__(self, spec: ModelSpec) -> None:
        self.info = EngineInfo(engine="echo", task=Task.GENERATE, max_batch_rows=2048)

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        texts = _texts(batch)
        lengths = list(map(len, texts))
        count = len(texts)
        yield Answers(range(count), texts, ["stop"] * count, lengths, lengths, 0.0)

    def count_tokens(self, batch: Batch) -> list[int]:
        return list(map(len, _texts(batch)))

    def close(self) -> None:
        pass


def _texts(batch: Batch) -> list[str]:
    return [prompt if isinstance(prompt, str) else prompt[-1].content for prompt in batch.prompts]


def load(spec: ModelSpec) -> EchoEngine:
    """An echo engine; `spec.path` is not read."""
    return EchoEngine(spec)
