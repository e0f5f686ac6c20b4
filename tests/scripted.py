"""A pool without processes: a scripted model behind the protocol of a real pool."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from runtime.spec import Answers, Batch, CallOptions, EngineInfo, ModelSpec, PoolSpec, Task


class ScriptedPool:
    """Answers a prompt with its upper case; `script` may raise for a batch or wait.

    `batches` lists (worker, prompts) of every batch in the order they began.
    """

    def __init__(
        self,
        script: Callable[[Batch], None] = lambda _: None,
        *,
        workers: int = 1,
        max_batch_rows: int = 64,
        load_balance: str = "lru",
        defaults: CallOptions | None = None,
    ) -> None:
        self.name = "chat"
        self.generation = 1
        self.spec = ModelSpec("chat", "scripted", defaults=defaults or CallOptions())
        self.pool = PoolSpec(num_workers=workers, load_balance=load_balance)
        self.info = EngineInfo("scripted", Task.GENERATE, max_batch_rows=max_batch_rows)
        self.workers = workers
        self.batches: list[tuple[int, list[str]]] = []
        self.cancelled: list[int] = []
        self.closed = False
        self._script = script
        self._lock = threading.Lock()

    @property
    def prompts(self) -> list[str]:
        """Every prompt that was sent, as often as it was sent."""
        return [prompt for _, prompts in self.batches for prompt in prompts]

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        with self._lock:
            self.batches.append((worker, list(batch.prompts)))
        self._script(batch)
        count = len(batch.prompts)
        outputs = [prompt.upper() for prompt in batch.prompts]
        yield Answers(range(count), outputs, ["stop"] * count, [1] * count, [2] * count, 1.0)

    def count_tokens(self, worker: int, batch: Batch) -> list[int]:
        return [len(prompt) for prompt in batch.prompts]

    def cancel(self, worker: int, batch_id: int) -> None:
        self.cancelled.append(batch_id)

    def close(self) -> None:
        self.closed = True
