"""An engine that takes a known time and does no work: 5 ms for a batch and 0.1 ms for each of its rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from runtime.spec import Answers, Batch, EngineInfo, ModelSpec, Task

BATCH_S = 0.005
ROW_S = 0.0001
MAX_ROWS = 256


class TimedEngine:
    """Answers every prompt with itself, when its time has come."""

    def __init__(self, spec: ModelSpec) -> None:
        self.info = EngineInfo(engine="timed", task=Task.GENERATE, max_batch_rows=MAX_ROWS)

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        count = len(batch.prompts)
        time.sleep(BATCH_S + count * ROW_S)
        yield Answers(range(count), list(batch.prompts), ["stop"] * count, [1] * count, [1] * count, 0.0)

    def close(self) -> None:
        pass


def load(spec: ModelSpec) -> TimedEngine:
    """The engine; `spec.path` is not read."""
    return TimedEngine(spec)


def ideal_s(rows: int, workers: int) -> float:
    """Seconds that `workers` need for `rows` when they are never without a full batch."""
    batches = -(-rows // MAX_ROWS)
    return (batches * BATCH_S + rows * ROW_S) / workers
