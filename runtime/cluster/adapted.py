"""A pool that asks the workers of another model with a LoRA adapter: a function of its own over the same memory.

Alone because it deploys nothing: it lives as long as its function, and its base as long as somebody keeps it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from runtime.cluster.pool import Pool
from runtime.engines.probes import probe
from runtime.errors import DeployError, UserError
from runtime.spec import Answers, Batch, CallOptions, Delta, EngineInfo, ModelSpec, PoolSpec


class AdaptedPool:
    """The workers of `base`, which every batch tells to use the adapter. Thread-safe.

    Args:
        name: the function's.
        base: a pool that belongs to this one alone.
        adapter: folder of the adapter, as the workers see it.
        content: fingerprint of the adapter; '' = answers are not stored.
        defaults: of every call, over those of the base.

    Attributes:
        base, adapter: as given.

    Raises:
        UserError: adapter_unsupported, the engine of the base takes none.
    """

    def __init__(self, name: str, base: Pool, adapter: str, content: str, defaults: CallOptions) -> None:
        if not base.info.adapters:
            raise UserError(
                f'The workers of "{base.name}" take no adapters: their engine is {base.info.engine}.',
                code="adapter_unsupported",
                hint=f'Deploy "{base.name}" anew: !llm setup "infer_backend=vllm"; AND `backend.enable_lora`="true".',
            )
        self.name = name
        self.base = base
        self.adapter = adapter
        self._content = content
        self._defaults = defaults

    @property
    def generation(self) -> int:
        """The base's: when it is deployed anew, what is known of its answers is no longer true."""
        return self.base.generation

    @property
    def spec(self) -> ModelSpec:
        """The base's, with the name, the defaults and the fingerprint of this function."""
        spec = self.base.spec
        deciding = f"{spec.fingerprint} with {self._content}" if spec.fingerprint and self._content else ""
        return replace(
            spec,
            name=self.name,
            defaults=self._defaults.over(spec.defaults),
            fingerprint=hashlib.sha256(deciding.encode()).hexdigest() if deciding else "",
        )

    @property
    def pool(self) -> PoolSpec:
        """How the base is placed."""
        return self.base.pool

    @property
    def info(self) -> EngineInfo:
        """What the base's engine says of itself, and that there is an adapter."""
        info = self.base.info
        note = f'on the workers of "{self.base.name}" with the adapter {self.adapter}'
        return replace(info, notes=(note, *info.notes))

    @property
    def workers(self) -> int:
        """Workers of the base."""
        return self.base.workers

    def run(self, worker: int, batch: Batch) -> Iterator[Answers | Delta]:
        """As `Pool.run`, with the adapter."""
        return self.base.run(worker, replace(batch, adapter=self.adapter))

    def count_tokens(self, worker: int, batch: Batch) -> Sequence[int] | None:
        """As `Pool.count_tokens`, with the adapter."""
        return self.base.count_tokens(worker, replace(batch, adapter=self.adapter))

    def probe(self) -> None:
        """Let every worker answer one row, so that an adapter that cannot be put on is found at once.

        Raises:
            SqlextError: as `run`.
            DeployError: the row failed.
        """
        options, prompt = probe(self.info.task)
        batch = Batch(0, options.over(self.spec.defaults), [prompt])
        for worker in range(self.workers):
            for piece in self.run(worker, batch):
                for error in piece.errors.values() if isinstance(piece, Answers) else ():
                    if error.code != "truncated":
                        raise DeployError(error.message, code=error.code, hint=error.hint)

    def cancel(self, worker: int, batch_id: int) -> None:
        """As `Pool.cancel`."""
        self.base.cancel(worker, batch_id)

    def close(self) -> None:
        """Drop the handles; the base's workers go on."""
        self.base.close()
