"""What is said in a recording: Whisper, by transformers.

Alone because sound comes in. Recordings of up to 30 seconds, which the model hears at once, run side by side. A
longer one runs alone and moves through its 30 seconds by the times that the model itself writes, as OpenAI's own
program does (Radford et al. 2022, section 3.8).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, StoppingCriteriaList

from runtime.checkpoints.inspect import inspect
from runtime.engines.loading import (
    device_memory,
    engine_options,
    free_memory,
    load_model,
    loading,
    place,
    whole_number,
)
from runtime.engines.microbatch import failed
from runtime.engines.parameters import bad_value, read_parameters, truth
from runtime.engines.recordings import read_recording
from runtime.engines.stopping import Left, Stopped
from runtime.errors import ErrorInfo, RowError
from runtime.spec import Answers, Batch, CallOptions, EngineInfo, ModelSpec, Prompt, Task

OPTIONS = ("dtype", "max_num_seqs")
CPU_ROWS = 4
GPU_ROWS = 16
MAX_BATCH_BYTES = 64 << 20

_PARAMETERS: dict[str, Any] = {"language": str, "task": str, "timestamps": truth}
_WANTED = {truth: "true or false"}
_TASKS = ("transcribe", "translate")


class TranscriptionEngine:
    """A Whisper model and its processor.

    Args:
        model: in evaluation mode.
        processor: makes features of sound, and text of token ids.
        info: what was loaded.
        rows: recordings of up to 30 seconds that run at once.
    """

    def __init__(self, model: Any, processor: Any, info: EngineInfo, rows: int) -> None:
        self.info = info
        self._model = model
        self._processor = processor
        self._rows = rows

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        """The text of each recording. Tokens are counted of what was written; nothing is read but sound.

        Raises:
            OutOfMemory: the recordings that run at once do not fit.
            Fatal: a parameter is unknown, or nothing the model knows.
        """
        begun = time.perf_counter()
        asked = self._asked(batch.options)
        with device_memory(), torch.inference_mode():
            for rows in self._groups(batch):
                sounds, errors = self._read(batch, rows)
                if errors:
                    yield failed(errors, (time.perf_counter() - begun) * 1000.0)
                for places in self._together(sounds):
                    if stop.is_set():
                        return
                    try:
                        ids = self._write([sounds[place] for place in places], asked, stop)
                    except Left:
                        return
                    yield self._answers(places, ids, asked, (time.perf_counter() - begun) * 1000.0)

    def count_tokens(self, batch: Batch) -> list[int]:
        """A recording is no tokens."""
        return [0] * len(batch.prompts)

    def close(self) -> None:
        """Give back the memory."""
        self._model = None
        free_memory()

    def _groups(self, batch: Batch) -> Iterator[range]:
        count = len(batch.prompts)
        return (range(start, min(start + self._rows, count)) for start in range(0, count, self._rows))

    def _read(self, batch: Batch, rows: range) -> tuple[dict[int, Any], dict[int, ErrorInfo]]:
        """The samples of each recording, by row, and the errors of the others."""
        sounds: dict[int, Any] = {}
        errors: dict[int, ErrorInfo] = {}
        for row in rows:
            try:
                sounds[row] = read_recording(
                    _recording(batch.prompts[row]), self._processor.feature_extractor.sampling_rate
                )
            except RowError as error:
                errors[row] = error.info
        return sounds, errors

    def _together(self, sounds: dict[int, Any]) -> list[list[int]]:
        """The rows that run at once: the short ones together, each long one alone."""
        heard = self._processor.feature_extractor.n_samples
        short = [row for row, sound in sounds.items() if len(sound) <= heard]
        return [*([short] if short else []), *([row] for row, sound in sounds.items() if len(sound) > heard)]

    def _asked(self, options: CallOptions) -> dict[str, Any]:
        """Arguments of the model's `generate`."""
        said = read_parameters(options.extra, _PARAMETERS, _WANTED)
        many = bool(getattr(self._model.generation_config, "is_multilingual", False))
        asked: dict[str, Any] = {"return_timestamps": said.get("timestamps", False)}
        if (task := said.get("task")) not in (None, *_TASKS):
            raise bad_value("task", " or ".join(_TASKS))
        if not many and (wrong := "language" if "language" in said else "task" if task == "translate" else ""):
            raise bad_value(wrong, "left out: this model knows one language only")
        if "language" in said:
            asked["language"] = self._language(said["language"])
        if task and many:
            asked["task"] = task
        if options.max_tokens is not None:
            asked["max_new_tokens"] = options.max_tokens
        return asked

    def _language(self, said: str) -> str:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        known = {token.strip("<|>"): token for token in self._model.generation_config.lang_to_id}
        word = said.strip().lower()
        code = word if word in known else TO_LANGUAGE_CODE.get(word, "")
        if code not in known:
            raise bad_value("language", "a language that this model knows, such as en or german")
        return code

    def _write(self, sounds: list[Any], asked: dict[str, Any], stop: threading.Event) -> list[list[int]]:
        """Token ids of what is said in each."""
        extractor = self._processor.feature_extractor
        long = len(sounds[0]) > extractor.n_samples
        more = {"truncation": False, "padding": "longest"} if long else {}
        features = extractor(
            sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt", return_attention_mask=True, **more
        )
        ids = self._model.generate(
            features["input_features"].to(self._model.device, self._model.dtype),
            attention_mask=features["attention_mask"].to(self._model.device),
            stopping_criteria=StoppingCriteriaList([Stopped(stop)]),
            do_sample=False,
            num_beams=1,
            **(asked | {"return_timestamps": True} if long else asked),  # by which a long one goes on
        )
        return ids.tolist()

    def _answers(self, places: list[int], ids: list[list[int]], asked: dict[str, Any], latency_ms: float) -> Answers:
        tokenizer = self._processor.tokenizer
        texts = tokenizer.batch_decode(
            ids, skip_special_tokens=True, decode_with_timestamps=asked["return_timestamps"]
        )
        special = {*tokenizer.all_special_ids}
        counts = [sum(token not in special for token in row) for row in ids]
        most = asked.get("max_new_tokens") or 0
        return Answers(
            rows=places,
            outputs=[text.strip() for text in texts],
            finish_reasons=["length" if most and len(row) >= most else "stop" for row in ids],
            prompt_tokens=[0] * len(places),
            completion_tokens=counts,
            latency_ms=latency_ms,
        )


def _recording(prompt: Prompt) -> bytes:
    if isinstance(prompt, str) or len(prompt) != 1 or len(prompt[0].media) != 1:
        raise RowError("The model reads one recording, and nothing else.", code="prompt_bad")
    return prompt[0].media[0]


def load(spec: ModelSpec) -> TranscriptionEngine:
    """Load the Whisper checkpoint in `spec.path`.

    Options: dtype; max_num_seqs (recordings of up to 30 seconds that run at once).

    Raises:
        UserError: the folder or an option is wrong.
        DeployError: the model did not load.
    """
    options = engine_options(spec, OPTIONS)
    checkpoint = inspect(spec.path, Task.TRANSCRIBE)
    placement = place(checkpoint, options.get("dtype"))
    with loading(checkpoint):
        processor = AutoProcessor.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
        model = load_model(AutoModelForSpeechSeq2Seq, checkpoint, placement)
    rows = whole_number(options, "max_num_seqs") or (CPU_ROWS if placement.device.type == "cpu" else GPU_ROWS)
    info = EngineInfo(
        engine="transcription",
        task=Task.TRANSCRIBE,
        device=str(model.device),
        dtype=placement.dtype_name,
        max_batch_rows=2 * rows,
        max_batch_chars=MAX_BATCH_BYTES,
        architectures=checkpoint.architectures,
        notes=placement.notes,
    )
    return TranscriptionEngine(model, processor, info, rows)
