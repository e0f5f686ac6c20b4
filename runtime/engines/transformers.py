"""Text generation with any causal language model of transformers, on CPU or GPU.

Alone because it is the engine most models run on. The loop that makes it fast is in `decoding.py`, the meaning of
the options in `sampling.py`; here a batch becomes rows and rows become answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from runtime.checkpoints.adapter import open_adapter
from runtime.checkpoints.inspect import inspect
from runtime.engines.decoding import Limits, Row, decode
from runtime.engines.grammar import Grammars
from runtime.engines.loading import (
    Placement,
    device_memory,
    engine_options,
    free_memory,
    load_model,
    load_tokenizer,
    loading,
    place,
    whole_number,
)
from runtime.engines.microbatch import failed
from runtime.engines.sampling import Sampling, end_with, sampling
from runtime.engines.telling import Telling
from runtime.engines.wording import Wording
from runtime.errors import ErrorInfo, Fatal, UserError
from runtime.prompts.chat import DEFAULT_MAX_TOKENS
from runtime.prompts.style import find_style
from runtime.spec import Answers, Batch, CallOptions, Delta, EngineInfo, ModelSpec, Task, Value

OPTIONS = (
    *("dtype", "quantization", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
    *("prompt_format", "chat_template", "adapter"),
)
CPU_LIMITS = Limits(rows=32, tokens=32_768)
GPU_LIMITS = Limits(rows=128, tokens=262_144)
BATCHES_AHEAD = 4  # a batch holds this many times the rows that run at once, so that the set stays full
CHARS_PER_ROW = 2_000


class TransformersEngine:
    """A causal language model and its tokenizer.

    Args:
        model: of transformers, in evaluation mode.
        info: what was loaded.
        limits: how much runs at once.
        wording: how prompts become its token ids, and ids answers.
    """

    def __init__(
        self,
        model: Any,
        info: EngineInfo,
        limits: Limits,
        wording: Wording,
    ) -> None:
        self.info = info
        self._model = model
        self._limits = limits
        self._wording = wording
        self._tokenizer = wording.tokenizer
        self._grammars = Grammars(
            wording.tokenizer,
            model.config.get_text_config().vocab_size,
            sampling(CallOptions(), wording.tokenizer, model.generation_config).ends,
        )

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers | Delta]:
        """Answer the prompts; a row comes as soon as its last token is there, one that is followed also before.

        Raises:
            OutOfMemory: the rows that run at once do not fit.
            Fatal: a generation parameter is unknown or out of its range; the schema cannot guide the model.
        """
        begun = time.perf_counter()
        settings = sampling(batch.options, self._tokenizer, self._model.generation_config)
        rows, errors = self._rows(batch, settings)
        if errors:
            yield failed(errors, _ms_since(begun))

        def ended(row: Row) -> str:
            if row.guide and row.guide.done:
                return "stop"
            if row.new[-1] in settings.ends or (settings.stop and self._wording.stopped(row.new, settings.stop)):
                return "stop"
            return "length" if len(row.new) >= row.limit else ""

        telling = Telling(batch.stream, settings.stop, self._wording.style.prompt_format)
        followed = [row for row in rows if row.index in batch.stream]
        decoding = decode(
            self._model, rows, settings, self._limits, ended=ended, stop=stop, each_token=bool(followed)
        )
        with device_memory():
            for finished in decoding:
                if followed:
                    yield from self._deltas(followed, telling)
                if finished:
                    yield self._answers(finished, settings, _ms_since(begun))

    def count_tokens(self, batch: Batch) -> list[int]:
        """Tokens of each prompt with all that the chat template adds; 0 for one that cannot be asked."""
        return self._wording.count_tokens(batch)

    def close(self) -> None:
        """Give back the memory."""
        self._model = None
        free_memory()

    def _rows(self, batch: Batch, settings: Sampling) -> tuple[list[Row], dict[int, ErrorInfo]]:
        """The rows that can be answered, and the errors of the others."""
        read, errors = self._wording.read(batch)
        schema = batch.options.schema
        guides = self._grammars.guides(schema, len(read)) if schema else [None] * len(read)
        rows = [
            Row(index, ids, limit, settings.draws(ids), guide)
            for (index, (ids, limit)), guide in zip(read.items(), guides, strict=True)
        ]
        return rows, errors

    def _deltas(self, rows: list[Row], telling: Telling) -> Iterator[Delta]:
        for row in rows:
            if row.new and not row.reason:
                delta = telling.more(row.index, partial(self._text, row))
                if delta:
                    yield delta

    def _text(self, row: Row) -> str:
        """All that was written of a row so far."""
        return self._wording.decode([row.new])[0]

    def _answers(self, rows: list[Row], settings: Sampling, latency_ms: float) -> Answers:
        return Answers(
            rows=[row.index for row in rows],
            outputs=self._wording.answers([row.new for row in rows], settings.ends, settings.stop),
            finish_reasons=[row.reason for row in rows],
            prompt_tokens=[len(row.prompt) for row in rows],
            completion_tokens=[len(row.new) for row in rows],
            latency_ms=latency_ms,
        )


def load(spec: ModelSpec, prepare: Callable[[Any], Any] | None = None) -> TransformersEngine:
    """Load the checkpoint in `spec.path`: safetensors only, no code of its own, nothing from a hub.

    Options: dtype; quantization (4, 8, true, false; GPU only); max_model_len (tokens of prompt and answer);
    max_num_seqs and max_num_batched_tokens (rows and padded tokens that run at once); prompt_format or chat_template,
    instead of the checkpoint's own; adapter, the folder of a LoRA adapter.

    Args:
        prepare: makes of the loaded model the one that is asked.

    Raises:
        UserError: the folder or an option is wrong.
        DeployError: the model did not load.
    """
    options = engine_options(spec, OPTIONS)
    checkpoint = inspect(spec.path, Task.GENERATE)
    placement = place(checkpoint, options.get("dtype"))
    bits = _bits(options.get("quantization"), placement)
    limits = _limits(options, placement)
    adapter = open_adapter(str(options["adapter"])) if options.get("adapter") else None
    style = find_style(
        adapter.path if adapter and adapter.has_style else checkpoint.path,
        str(options.get("prompt_format", "")),
        str(options.get("chat_template", "")),
    )
    speaker = replace(checkpoint, path=str(adapter.path)) if adapter and adapter.has_tokenizer else checkpoint
    with loading(checkpoint):
        tokenizer = load_tokenizer(speaker, padding_side="left")
        model = load_model(AutoModelForCausalLM, checkpoint, placement, _quantized(bits, placement.dtype))
        if adapter:
            from runtime.engines.adapters import put_on  # with it comes peft, which other models do not need

            put_on(model, Path(checkpoint.path), adapter, quantized=bool(bits))
        model = prepare(model) if prepare else model
    own_len, asked_len = checkpoint.max_model_len, whole_number(options, "max_model_len")
    wording = Wording(tokenizer, style, min((each for each in (own_len, asked_len) if each), default=None))
    if (end := wording.end_token) is not None:
        end_with(end, model.generation_config, tokenizer)
    try:
        sampling(spec.defaults, tokenizer, model.generation_config)
    except Fatal as error:  # a wrong default fails the deployment, not its rows
        raise UserError(error.message, code=error.code, hint=error.hint) from None
    info = EngineInfo(
        engine=spec.engine,
        task=Task.GENERATE,
        device=str(model.device),
        dtype=f"int{bits}" if bits else placement.dtype_name,
        max_model_len=wording.max_model_len,
        max_batch_rows=BATCHES_AHEAD * limits.rows,
        max_batch_chars=BATCHES_AHEAD * limits.rows * CHARS_PER_ROW,
        max_answer_tokens=spec.defaults.max_tokens or DEFAULT_MAX_TOKENS,
        architectures=checkpoint.architectures,
        chat_template=wording.has_template,
        streams=True,
        schemas=True,
        notes=(*placement.notes, *([f"with the adapter {adapter.path}"] if adapter else ())),
    )
    return TransformersEngine(model, info, limits, wording)


def _limits(options: dict[str, Value], placement: Placement) -> Limits:
    usual = CPU_LIMITS if placement.device.type == "cpu" else GPU_LIMITS
    return Limits(
        rows=whole_number(options, "max_num_seqs") or usual.rows,
        tokens=whole_number(options, "max_num_batched_tokens") or usual.tokens,
    )


def _bits(wanted: Value | None, placement: Placement) -> int:
    """0 (as it is), 4 or 8.

    Raises:
        UserError: option_value, quantization_needs_gpu, quantization_missing.
    """
    known = {"none": 0, "false": 0, "true": 4, "4": 4, "8": 8}
    word = str(wanted).lower()
    if word not in known:
        raise UserError(
            f'quantization="{wanted}" is not known.', code="option_value", hint="Known: 4, 8, true (is 4), false."
        )
    bits = known[word]
    if bits and placement.device.type == "cpu":
        raise UserError(
            f'quantization="{wanted}" needs a GPU, and this worker has none.',
            code="quantization_needs_gpu",
            hint='Leave it out, or take dtype="bfloat16"; on a cluster with GPUs: !llm setup "num_gpus=1".',
        )
    if bits and not find_spec("bitsandbytes"):
        raise UserError(
            f'quantization="{wanted}" needs the package bitsandbytes on the workers.',
            code="quantization_missing",
            hint="Run: pip install bitsandbytes, where the workers run.",
        )
    return bits


def _quantized(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if bits == 4:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0) if bits == 8 else None


def _ms_since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1000.0
