"""What crosses the borders of the rooms: frozen dataclasses and columns, never loose dictionaries.

Two directions: a `ModelSpec` and a `PoolSpec` go down when a model is deployed; `Batch` goes down and `Answers`,
with `Delta`s between them, come up when rows are asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, TypeAlias

from runtime.errors import ErrorInfo

Scalar: TypeAlias = str | int | float | bool
Value: TypeAlias = Scalar | tuple[Scalar, ...]


class Task(StrEnum):
    """What a model function answers: its SQL type follows from it."""

    GENERATE = "generate"  # VARCHAR
    EMBED = "embed"  # FLOAT[n]
    CLASSIFY = "classify"  # STRUCT(label VARCHAR, score DOUBLE)
    RANK = "rank"  # DOUBLE, of a pair of texts
    DRAW = "draw"  # BLOB, a PNG image of a text
    TRANSCRIBE = "transcribe"  # VARCHAR, of a recording
    SPEAK = "speak"  # BLOB, a WAV recording of a text


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; role is 'system', 'user', 'assistant' or 'tool'.

    `media` are the contents of files that belong to it: images in front of its text, or a recording. Training learns
    nothing from an answer whose `weight` is 0.
    """

    role: str
    content: str
    media: tuple[bytes, ...] = ()
    weight: int = 1


Prompt: TypeAlias = str | tuple[Message, ...]
"""A text (one user turn) or a whole conversation; for RANK two turns, a 'query' and a 'text'."""


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What, beside the prompt, decides an answer. Hashable; None means «not said».

    Deploy-time defaults and the call's own options are merged with `over`.
    """

    system: str | None = None
    temperature: float | None = None  # None or 0: greedy
    max_tokens: int | None = None  # new tokens, not counting the prompt
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    schema: str | None = None  # JSON schema, as `runtime.schema` describes; the answer is a JSON text that fits it
    extra: tuple[tuple[str, Value], ...] = ()  # engine's own generation parameters, sorted by name

    @property
    def deterministic(self) -> bool:
        """True when equal prompts give equal answers, so that one call serves them all."""
        return not self.temperature or self.seed is not None

    @property
    def plain(self) -> CallOptions:
        """These options as all that mean the same are written: a temperature of 0 is not said."""
        return replace(self, temperature=None) if self.temperature == 0 else self

    def over(self, defaults: CallOptions) -> CallOptions:
        """These options, with what they do not say taken from `defaults`."""
        said = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name != "extra" and getattr(self, f.name) not in (None, ())
        }
        extra = tuple(sorted({**dict(defaults.extra), **dict(self.extra)}.items()))
        return replace(defaults, **said, extra=extra)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as the user asked for it.

    Attributes:
        name: the SQL function's name.
        engine: name of an entry point in the group ``sqlext.engines``.
        path: folder of the checkpoint; '' for engines that need none.
        task: forced task, or None to find it from the checkpoint.
        options: the engine's own options (``backend.…`` without its prefix, ``dtype``, ``quantization``), sorted.
        defaults: generation defaults of every call.
        fingerprint: the content of what answers (weights, tokenizer, adapter; or provider, address and model), so
            that stored answers are found again for equal content only; '' = answers are not stored.
        notes: why this engine, in front of what the engine says of itself.
    """

    name: str
    engine: str
    path: str = ""
    task: Task | None = None
    options: tuple[tuple[str, Value], ...] = ()
    defaults: CallOptions = field(default_factory=CallOptions)
    fingerprint: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Where and how wide a model runs.

    Attributes:
        num_workers: Ray actors, each with one copy of the model.
        worker_concurrency: batches one worker runs at the same time.
        gpus_per_worker: GPUs reserved by each worker, fractions allowed; None = one when the cluster has any.
        cpus_per_worker: CPUs reserved by each worker; rounded down, but at least 1, its number of torch threads.
        resources: Ray custom resources of each worker, for placing it on certain nodes.
        load_balance: 'lru', 'round_robin' or 'prefix'.
        load_timeout_s: seconds a worker may take to load its model.
        batch_timeout_s: seconds one batch may take before its worker counts as hung and is replaced.
        idle_timeout_s: seconds without a batch after which a worker gives its memory back until it is asked again;
            None = never.
    """

    num_workers: int = 1
    worker_concurrency: int = 1
    gpus_per_worker: float | None = None
    cpus_per_worker: float = 0.5  # a model that waits needs none: more of them fit than there are cores
    resources: tuple[tuple[str, float], ...] = ()
    load_balance: str = "lru"
    load_timeout_s: float = 600.0
    batch_timeout_s: float = 600.0
    idle_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a loaded engine says of itself.

    Attributes:
        dimension: length of an embedding vector; None for other tasks.
        max_model_len: tokens of prompt and answer together (embedding: tokens read of a text); None = unbounded.
        max_batch_rows: most rows worth sending in one batch.
        max_batch_chars: most characters of prompts, and bytes of their media, worth sending in one batch.
        max_answer_tokens: tokens an answer may have when the call does not say max_tokens; None = nobody knows.
        overhead_tokens: tokens of a one-word prompt: what the chat template adds.
        streams: it tells texts as they are written, where a batch asks for it.
        images: it reads images beside the text.
        schemas: it writes answers that fit `CallOptions.schema`.
        adapters: it answers each batch with the LoRA adapter that the batch names.
        notes: what was chosen (device, dtype, batch) and why, for `!llm status`.
    """

    engine: str
    task: Task
    device: str = "cpu"
    dtype: str = ""
    dimension: int | None = None
    max_model_len: int | None = None
    max_batch_rows: int = 256
    max_batch_chars: int = 100_000
    max_answer_tokens: int | None = None
    overhead_tokens: int = 0
    architectures: tuple[str, ...] = ()
    chat_template: bool = False
    images: bool = False
    schemas: bool = False
    adapters: bool = False
    streams: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows for one engine call: all share their options. A row is known by its index in `prompts`.

    `stream`: rows whose text someone wants as it is written. `adapter`: folder of a LoRA adapter to answer with, for
    an engine whose info says `adapters`; '' = none beside what was deployed.
    """

    id: int
    options: CallOptions
    prompts: Sequence[Prompt]
    stream: frozenset[int] = frozenset()
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """The next part of a row's text, while it is written.

    The parts of a row, joined, are what its output begins with: whole characters, and nothing that belongs to a stop
    text or may still change. The row's `Answers` come after them and hold the whole output.
    """

    row: int
    text: str


@dataclass(frozen=True, slots=True)
class Answers:
    """Finished rows of a batch, in columns. Each row of the batch comes exactly once, in any order and pieces.

    Attributes:
        rows: indices into the batch's `prompts`.
        outputs: one per row: text; a float32 vector (or one (n, dimension) array for all); (label, score); a
            number; a tuple of images, or a recording, as bytes. None where the row failed.
        finish_reasons: 'stop', 'length', … per row; '' where the row failed.
        prompt_tokens, completion_tokens: counted by the engine, per row.
        latency_ms: from the batch's start in the engine to the row's end.
        errors: by batch index, only for rows that failed.
        retry_after_s: by batch index, only for failed rows whose next attempt may succeed: the seconds that the
            provider asks to wait first, 0 when it does not say.
    """

    rows: Sequence[int]
    outputs: Sequence[Any]
    finish_reasons: Sequence[str]
    prompt_tokens: Sequence[int]
    completion_tokens: Sequence[int]
    latency_ms: float
    errors: dict[int, ErrorInfo] = field(default_factory=dict)
    retry_after_s: dict[int, float] = field(default_factory=dict)
