"""Conversations about images: any image-text-to-text model of transformers.

Alone because its prompts are not token ids alone: a processor makes them of texts and images together, for some rows
at once. Rows of a batch that have as many images share a forward; each has the answer that it would have alone.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteriaList

from runtime.checkpoints.inspect import inspect
from runtime.engines.chance import chance
from runtime.engines.loading import (
    device_memory,
    engine_options,
    free_memory,
    load_model,
    loading,
    place,
    whole_number,
)
from runtime.engines.microbatch import failed, microbatches
from runtime.engines.pictures import read_image
from runtime.engines.sampling import Sampling, sampling
from runtime.engines.stopping import Left, Stopped
from runtime.engines.wording import cut
from runtime.errors import ErrorInfo, Fatal, RowError, UserError
from runtime.prompts.chat import DEFAULT_MAX_TOKENS, conversation, fit_answer
from runtime.spec import Answers, Batch, CallOptions, EngineInfo, Message, ModelSpec, Prompt, Task

OPTIONS = ("dtype", "max_model_len", "max_num_seqs", "chat_template")
CPU_ROWS = 8
GPU_ROWS = 32
MAX_BATCH_BYTES = 64 << 20
CHARS_PER_IMAGE = 2_000  # to sort rows by: an image is some hundred tokens


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """A prompt as the processor takes it: `index` in the batch, the written conversation, its images."""

    index: int
    text: str
    images: list[Any]

    @property
    def size(self) -> int:
        return len(self.text) + CHARS_PER_IMAGE * len(self.images)


class VisionEngine:
    """A model that reads texts and images, and its processor.

    Args:
        model: in evaluation mode.
        processor: pads on the left.
        info: what was loaded.
        rows: that run at once.
        template: instead of the checkpoint's chat template; '' = the checkpoint's.
    """

    def __init__(self, model: Any, processor: Any, info: EngineInfo, rows: int, template: str = "") -> None:
        self.info = info
        self._model = model
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._rows = rows
        self._template = template or processor.chat_template or ""
        self._processing = threading.Lock()  # a fast tokenizer must not be called by two threads at once

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        """Answer the prompts, a group of rows at a time.

        Raises:
            OutOfMemory: the rows that run at once do not fit.
            Fatal: a generation parameter is unknown or out of its range.
        """
        begun = time.perf_counter()
        settings = sampling(batch.options, self._tokenizer, self._model.generation_config)
        rows, errors = self._read(batch)
        if errors:
            yield failed(errors, _ms_since(begun))
        with device_memory(), torch.inference_mode():
            for group in self._groups(rows, alone=settings.config.do_sample and settings.seed is not None):
                if stop.is_set():
                    return
                kept, inputs, limits, errors = self._fit(group, batch.options)
                if errors:
                    yield failed(errors, _ms_since(begun))
                if not kept:
                    continue
                try:
                    new = self._generate(inputs, settings, max(limits), kept, batch.prompts, stop)
                except Left:
                    return
                yield self._answers(kept, inputs, limits, new, settings, _ms_since(begun))

    def count_tokens(self, batch: Batch) -> list[int]:
        """Tokens of each prompt, those of its images too; 0 for one that cannot be asked."""
        rows, _ = self._read(batch)
        counted: dict[int, int] = {}
        for group in self._groups(rows):
            kept, inputs, _, _ = self._fit(group, batch.options)
            lengths = inputs["attention_mask"].sum(dim=-1).tolist() if kept else []
            counted.update(zip((row.index for row in kept), lengths, strict=True))
        return [counted.get(index, 0) for index in range(len(batch.prompts))]

    def close(self) -> None:
        """Give back the memory."""
        self._model = None
        free_memory()

    # -- what the model reads ---------------------------------------------------------------------------------------

    def _read(self, batch: Batch) -> tuple[list[_Row], dict[int, ErrorInfo]]:
        """The rows that can be asked, and the errors of the others."""
        rows: list[_Row] = []
        errors: dict[int, ErrorInfo] = {}
        for index, prompt in enumerate(batch.prompts):
            try:
                turns = conversation(prompt, batch.options.system)
                images = [read_image(image) for turn in turns for image in turn.media]
                rows.append(_Row(index, self._written(turns), images))
            except RowError as error:
                errors[index] = error.info
        return rows, errors

    def _written(self, turns: Sequence[Message]) -> str:
        """The conversation as text, with a mark for each image."""
        if not self._template:
            mark = str(getattr(self._processor, "image_token", "<image>"))
            return "\n".join(mark * len(turn.media) + turn.content for turn in turns)
        messages = [
            {
                "role": turn.role,
                "content": [*({"type": "image"} for _ in turn.media), {"type": "text", "text": turn.content}],
            }
            for turn in turns
        ]
        try:
            text: str = self._processor.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise RowError(
                f"The chat template refuses this conversation: {type(error).__name__}.",
                code="template_failed",
                hint="Check the roles of the messages and their order.",
            ) from None
        return text

    def _groups(self, rows: list[_Row], *, alone: bool = False) -> Iterator[list[_Row]]:
        """Rows that run at once: of like length, and with as many images, as processors want it."""
        for count in sorted({len(row.images) for row in rows}):
            same = [row for row in rows if len(row.images) == count]
            most = 1 if alone else self._rows
            for places in microbatches([row.size for row in same], most, max(1, most * max(r.size for r in same))):
                yield [same[place] for place in places]

    def _fit(
        self, group: list[_Row], options: CallOptions
    ) -> tuple[list[_Row], Any, list[int], dict[int, ErrorInfo]]:
        """The rows that fit the model, what it reads of them, their most new tokens; the errors of the others."""
        errors: dict[int, ErrorInfo] = {}
        while group:
            inputs = self._process(group)
            limits: list[int] = []
            kept: list[_Row] = []
            for row, length in zip(group, inputs["attention_mask"].sum(dim=-1).tolist(), strict=True):
                try:
                    limits.append(fit_answer(length, options.max_tokens, self.info.max_model_len))
                    kept.append(row)
                except RowError as error:
                    errors[row.index] = error.info
            if len(kept) == len(group):
                return kept, inputs, limits, errors
            group = kept  # without those that are too long: they would be padding for the others
        return [], None, [], errors

    def _process(self, group: list[_Row]) -> Any:
        texts = [row.text for row in group]
        images = {"images": [row.images for row in group]} if group[0].images else {}
        bos = self._tokenizer.bos_token
        written = bool(self._template and bos and texts[0].startswith(bos))  # then the tokenizer adds no second one
        with self._processing:
            return self._processor(
                text=texts,
                padding=True,
                return_tensors="pt",
                **images,
                **({"add_special_tokens": False} if written else {}),
            )

    # -- what it answers --------------------------------------------------------------------------------------------

    def _generate(
        self,
        inputs: Any,
        settings: Sampling,
        max_tokens: int,
        rows: Sequence[_Row],
        prompts: Sequence[Prompt],
        stop: threading.Event,
    ) -> list[list[int]]:
        """New token ids of each row, what fills them up included."""
        config = settings.config
        config.max_new_tokens = max_tokens
        config.stop_strings = list(settings.stop) or None
        seed = None if settings.seed is None else _seed(settings.seed, prompts[rows[0].index])
        try:
            with chance(seed, self._model.device) if config.do_sample else nullcontext():
                ids = self._model.generate(
                    **inputs.to(self._model.device, self._model.dtype),
                    generation_config=config,
                    tokenizer=self._tokenizer,
                    stopping_criteria=StoppingCriteriaList([Stopped(stop)]),
                )
        except (ValueError, TypeError) as error:
            reason = type(error).__name__  # its text may quote the row
            raise Fatal(f"transformers refuses the call: {reason}.", code="option_value") from None
        new: list[list[int]] = ids[:, inputs["input_ids"].shape[1] :].tolist()
        return new

    def _answers(
        self,
        rows: Sequence[_Row],
        inputs: Any,
        limits: Sequence[int],
        new: Sequence[list[int]],
        settings: Sampling,
        latency_ms: float,
    ) -> Answers:
        made = [_until(ids[:limit], settings.ends) for ids, limit in zip(new, limits, strict=True)]
        said = [ids[:-1] if ids and ids[-1] in settings.ends else ids for ids in made]
        with self._processing:
            texts = self._tokenizer.batch_decode(said, skip_special_tokens=True)
        ended = [
            ids[-1:] != text_ids[-1:] or any(stop in text for stop in settings.stop)
            for ids, text_ids, text in zip(made, said, texts, strict=True)
        ]
        return Answers(
            rows=[row.index for row in rows],
            outputs=[cut(text, settings.stop) for text in texts],
            finish_reasons=["stop" if end else "length" for end in ended],
            prompt_tokens=inputs["attention_mask"].sum(dim=-1).tolist(),
            completion_tokens=[len(ids) for ids in made],
            latency_ms=latency_ms,
        )


def _until(ids: list[int], ends: frozenset[int]) -> list[int]:
    """The ids up to the first that ends an answer, that one included."""
    return next((ids[: place + 1] for place, id_ in enumerate(ids) if id_ in ends), ids)


def _seed(seed: int, prompt: Prompt) -> int:
    """Of the call's seed and the prompt alone; 63 bits."""
    made = hashlib.blake2b(f"{seed}:".encode(), digest_size=8)
    for turn in conversation(prompt):
        for part in (turn.role.encode(), turn.content.encode(), *turn.media):
            made.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(made.digest(), "big") >> 1


def _ms_since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1000.0


def load(spec: ModelSpec) -> VisionEngine:
    """Load the checkpoint in `spec.path`: safetensors only, no code of its own, nothing from a hub.

    Options: dtype; max_model_len (tokens of prompt, images and answer); max_num_seqs (rows that run at once);
    chat_template, instead of the checkpoint's own.

    Raises:
        UserError: the folder or an option is wrong.
        DeployError: the model did not load.
    """
    options = engine_options(spec, OPTIONS)
    checkpoint = inspect(spec.path, Task.GENERATE)
    if not checkpoint.images:
        raise UserError(
            f'"{checkpoint.path}" reads no images.',
            code="checkpoint_task",
            hint='Leave infer_backend out: a text model runs on the engine "transformers".',
        )
    placement = place(checkpoint, options.get("dtype"))
    with loading(checkpoint):
        processor = AutoProcessor.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
        processor.tokenizer.padding_side = "left"
        model = load_model(AutoModelForImageTextToText, checkpoint, placement)
    try:
        sampling(spec.defaults, processor.tokenizer, model.generation_config)
    except Fatal as error:  # a wrong default fails the deployment, not its rows
        raise UserError(error.message, code=error.code, hint=error.hint) from None
    rows = whole_number(options, "max_num_seqs") or (CPU_ROWS if placement.device.type == "cpu" else GPU_ROWS)
    lengths = (checkpoint.max_model_len, whole_number(options, "max_model_len"))
    info = EngineInfo(
        engine="vision",
        task=Task.GENERATE,
        device=str(model.device),
        dtype=placement.dtype_name,
        max_model_len=min((each for each in lengths if each), default=None),
        max_batch_rows=2 * rows,
        max_batch_chars=MAX_BATCH_BYTES,
        max_answer_tokens=spec.defaults.max_tokens or DEFAULT_MAX_TOKENS,
        architectures=checkpoint.architectures,
        chat_template=bool(options.get("chat_template") or processor.chat_template),
        images=True,
        notes=placement.notes,
    )
    return VisionEngine(model, processor, info, rows, str(options.get("chat_template", "")))
