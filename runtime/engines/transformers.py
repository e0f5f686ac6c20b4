"""Text generation with any causal language model of transformers, on CPU or GPU.

Alone because it is the engine most models run on. The loop that makes it fast is in `decoding.py`, the meaning of
the options in `sampling.py`; here a batch becomes rows and rows become answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerBase

from runtime.checkpoints.adapter import open_adapter
from runtime.checkpoints.inspect import inspect
from runtime.engines.decoding import Limits, Row, decode
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
from runtime.engines.sampling import Sampling, sampling
from runtime.errors import ErrorInfo, Fatal, RowError, UserError
from runtime.prompts.chat import AS_IT_IS, DEFAULT_MAX_TOKENS, Rendered, fit_answer, has_template, render
from runtime.prompts.encoding import Encoder
from runtime.prompts.style import Style, find_style
from runtime.spec import Answers, Batch, EngineInfo, ModelSpec, Task, Value

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
        tokenizer: with or without a chat template.
        info: what was loaded.
        limits: how much runs at once.
        style: how conversations are written for it.
        encoder: of a fast tokenizer; None for any other.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        info: EngineInfo,
        limits: Limits,
        style: Style = AS_IT_IS,
        encoder: Encoder | None = None,
    ) -> None:
        self.info = info
        self._model = model
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._limits = limits
        self._style = style
        self._tokenizing = threading.Lock()  # a fast tokenizer must not be called by two threads at once

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        """Answer the prompts; a row comes as soon as its last token is there.

        Raises:
            OutOfMemory: the rows that run at once do not fit.
            Fatal: a generation parameter is unknown or out of its range.
        """
        begun = time.perf_counter()
        settings = sampling(batch.options, self._tokenizer, self._model.generation_config)
        rows, errors = self._rows(batch, settings)
        if errors:
            yield failed(errors, _ms_since(begun))

        def ended(row: Row) -> str:
            if row.new[-1] in settings.ends or (settings.stop and self._stopped(row, settings.stop)):
                return "stop"
            return "length" if len(row.new) >= row.limit else ""

        with device_memory():
            for finished in decode(self._model, rows, settings, self._limits, ended=ended, stop=stop):
                yield self._answers(finished, settings, _ms_since(begun))

    def count_tokens(self, batch: Batch) -> list[int]:
        """Tokens of each prompt with all that the chat template adds; 0 for one that cannot be asked."""
        read, _ = self._read(batch)
        return [len(read[index][0]) if index in read else 0 for index in range(len(batch.prompts))]

    def close(self) -> None:
        """Give back the memory."""
        self._model = None
        free_memory()

    def _rows(self, batch: Batch, settings: Sampling) -> tuple[list[Row], dict[int, ErrorInfo]]:
        """The rows that can be answered, and the errors of the others."""
        read, errors = self._read(batch)
        return [Row(index, ids, limit, settings.draws(ids)) for index, (ids, limit) in read.items()], errors

    def _read(self, batch: Batch) -> tuple[dict[int, tuple[list[int], int]], dict[int, ErrorInfo]]:
        """Token ids and limit of new tokens of each row that can be asked, tokenised at once; the others' errors."""
        rendered: dict[int, Rendered] = {}
        errors: dict[int, ErrorInfo] = {}
        for index, prompt in enumerate(batch.prompts):
            try:
                rendered[index] = render(self._tokenizer, prompt, batch.options.system, self._style)
            except RowError as error:
                errors[index] = error.info
        read: dict[int, tuple[list[int], int]] = {}
        for index, ids in zip(rendered, self._token_ids(list(rendered.values())), strict=True):
            try:
                read[index] = ids, fit_answer(len(ids), batch.options.max_tokens, self.info.max_model_len)
            except RowError as error:
                errors[index] = error.info
        return read, errors

    def _token_ids(self, rendered: list[Rendered]) -> list[list[int]]:
        """Token ids of each text. An empty one becomes the token that starts a text, as a model needs one to read."""
        if not rendered:
            return []
        with self._tokenizing:
            if self._encoder:
                ids = [each.ids for each in self._encoder.encode(rendered)]
            else:
                ids = self._tokenizer(
                    [each.text for each in rendered],
                    add_special_tokens=rendered[0].add_special_tokens,
                    return_attention_mask=False,
                    verbose=False,
                )["input_ids"]
        return [each or [self._first_token()] for each in ids]

    def _first_token(self) -> int:
        tokenizer = self._tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return first if first is not None else 0

    def _stopped(self, row: Row, stop: tuple[str, ...]) -> bool:
        """Whether the newest token completed a stop text."""
        reach = max(len(text.encode()) for text in stop) + 4  # tokens a stop text can span, and some before it
        tail = self._decode([row.new[-reach:]])[0]
        return any(text in tail for text in stop)

    def _decode(self, ids: list[list[int]]) -> list[str]:
        with self._tokenizing:
            return self._tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _content(self, text: str) -> str:
        """What was said in a text that the model wrote."""
        return self._style.prompt_format.content(text) if self._style.prompt_format else text

    def _answers(self, rows: list[Row], settings: Sampling, latency_ms: float) -> Answers:
        ids = [row.new[:-1] if row.new[-1] in settings.ends else row.new for row in rows]
        return Answers(
            rows=[row.index for row in rows],
            outputs=[self._content(_cut(text, settings.stop)) for text in self._decode(ids)],
            finish_reasons=[row.reason for row in rows],
            prompt_tokens=[len(row.prompt) for row in rows],
            completion_tokens=[len(row.new) for row in rows],
            latency_ms=latency_ms,
        )


def load(spec: ModelSpec) -> TransformersEngine:
    """Load the checkpoint in `spec.path`: safetensors only, no code of its own, nothing from a hub.

    Options: dtype; quantization (4, 8, true, false; GPU only); max_model_len (tokens of prompt and answer);
    max_num_seqs and max_num_batched_tokens (rows and padded tokens that run at once); prompt_format or chat_template,
    instead of the checkpoint's own; adapter, the folder of a LoRA adapter.

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
    encoder = Encoder(tokenizer) if tokenizer.is_fast else None
    if encoder and (end := encoder.end_token(style)) is not None:
        _end_with(end, model.generation_config, tokenizer)
    try:
        sampling(spec.defaults, tokenizer, model.generation_config)
    except Fatal as error:  # a wrong default fails the deployment, not its rows
        raise UserError(error.message, code=error.code, hint=error.hint) from None
    own_len, asked_len = checkpoint.max_model_len, whole_number(options, "max_model_len")
    info = EngineInfo(
        engine="transformers",
        task=Task.GENERATE,
        device=str(model.device),
        dtype=f"int{bits}" if bits else placement.dtype_name,
        max_model_len=min((each for each in (own_len, asked_len) if each), default=None),
        max_batch_rows=BATCHES_AHEAD * limits.rows,
        max_batch_chars=BATCHES_AHEAD * limits.rows * CHARS_PER_ROW,
        max_answer_tokens=spec.defaults.max_tokens or DEFAULT_MAX_TOKENS,
        architectures=checkpoint.architectures,
        chat_template=bool(style.prompt_format) or has_template(tokenizer, style),
        notes=(*placement.notes, *([f"with the adapter {adapter.path}"] if adapter else ())),
    )
    return TransformersEngine(model, tokenizer, info, limits, style, encoder)


def _end_with(end: int, generation: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let an answer end where a turn of the assistant does; a base model's own end token may be another one."""
    said = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    ends = said if isinstance(said, list) else [] if said is None else [said]
    generation.eos_token_id = ends if end in ends else [*ends, end]


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


def _cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first stop text."""
    ends = [at for each in stop if (at := text.find(each)) >= 0]
    return text[: min(ends)] if ends else text


def _ms_since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1000.0
