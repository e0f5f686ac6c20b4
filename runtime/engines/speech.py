"""Texts spoken: VITS (also of Meta's MMS) and Bark, by transformers.

Alone because sound comes out. Rows are spoken one after the other: both models draw noise for a whole batch at once,
so that in company a row would not sound as it does alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForTextToWaveform, AutoProcessor

from runtime.checkpoints.inspect import inspect
from runtime.engines.chance import chance
from runtime.engines.loading import (
    device_memory,
    engine_options,
    free_memory,
    load_model,
    load_tokenizer,
    loading,
    place,
)
from runtime.engines.microbatch import failed, texts_of
from runtime.engines.parameters import bad_value, read_parameters
from runtime.engines.recordings import wav
from runtime.errors import ErrorInfo, RowError
from runtime.spec import Answers, Batch, EngineInfo, ModelSpec, Task

OPTIONS = ("dtype",)
MAX_TOKENS = 5_000  # of a text: minutes of speech
BARK_TOKENS = 256  # that Bark reads; it was trained on no more
BATCH_ROWS = 16


def _speaker(value: Any) -> int:
    number = int(str(value))
    if number < 0:
        raise ValueError
    return number


def _rate(value: Any) -> float:
    rate = float(value)
    if not 0.1 <= rate <= 10:
        raise ValueError
    return rate


_PARAMETERS = {"speaker": _speaker, "speaking_rate": _rate}
_WANTED = {_speaker: "the number of a speaker, from 0", _rate: "a number from 0.1 to 10; 1 is as trained"}


class SpeechEngine:
    """A model that speaks, and its tokenizer.

    Args:
        model: in evaluation mode, a VitsModel or a BarkModel.
        tokenizer: VITS's tokenizer or Bark's processor.
        info: what was loaded; `max_model_len` tokens of a text are spoken.
        rate: samples of a second.
    """

    def __init__(self, model: Any, tokenizer: Any, info: EngineInfo, rate: int) -> None:
        self.info = info
        self._model = model
        self._tokenizer = tokenizer
        self._rate = rate

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        """A WAV recording of each text. With a seed equal texts sound alike.

        Raises:
            OutOfMemory: a text does not fit.
            Fatal: a parameter is unknown, or nothing the model knows.
        """
        begun = time.perf_counter()
        said = read_parameters(batch.options.extra, _PARAMETERS, _WANTED)
        self._check(said)
        texts, errors = texts_of(batch)
        if errors:
            yield failed(errors, (time.perf_counter() - begun) * 1000.0)
        for row, text in texts.items():
            if stop.is_set():
                return
            yield self._answer(row, text, said, batch.options.seed, begun)

    def count_tokens(self, batch: Batch) -> list[int]:
        """Tokens of each text."""
        texts, _ = texts_of(batch)
        return [self._count(texts[row]) if row in texts else 0 for row in range(len(batch.prompts))]

    def close(self) -> None:
        """Give back the memory."""
        self._model = None
        free_memory()

    def _check(self, said: dict[str, Any]) -> None:
        """Refuse what this model cannot be told."""
        speakers = getattr(self._model.config, "num_speakers", 1)
        if said.get("speaker", 0) >= speakers:
            raise bad_value("speaker", f"below {speakers}, the number of speakers of this model")
        if "speaking_rate" in said and self._bark:
            raise bad_value("speaking_rate", "left out: this model speaks as fast as it likes")

    @property
    def _bark(self) -> bool:
        return bool(self._model.config.model_type == "bark")

    def _inputs(self, text: str) -> Any:
        if self._bark:
            return self._tokenizer([text], max_length=BARK_TOKENS)
        return self._tokenizer([text], return_tensors="pt")

    def _count(self, text: str) -> int:
        return int(self._inputs(text)["attention_mask"].sum())

    def _answer(self, row: int, text: str, said: dict[str, Any], seed: int | None, begun: float) -> Answers:
        inputs = self._inputs(text)
        tokens = int(inputs["attention_mask"].sum())
        if error := self._refusal(text, tokens):
            return failed({row: error}, (time.perf_counter() - begun) * 1000.0)
        with device_memory(), torch.inference_mode(), chance(seed, self._model.device):
            samples = self._speak(inputs.to(self._model.device), said)
        full = self._bark and tokens == BARK_TOKENS
        return Answers(
            rows=[row],
            outputs=[wav(samples, self._rate)],
            finish_reasons=["length" if full else "stop"],
            prompt_tokens=[tokens],
            completion_tokens=[0],
            latency_ms=(time.perf_counter() - begun) * 1000.0,
        )

    def _refusal(self, text: str, tokens: int) -> ErrorInfo | None:
        limit = self.info.max_model_len or MAX_TOKENS
        if tokens > limit and not self._bark:
            return RowError(
                f"The text has {tokens} tokens; at most {limit} are spoken.",
                code="prompt_too_long",
                hint="Split it, for example with llm_split.",
            ).info
        if not text.strip() or not tokens:
            return RowError("There is nothing to say in the text.", code="prompt_bad").info
        return None

    def _speak(self, inputs: Any, said: dict[str, Any]) -> Any:
        """Float32 samples."""
        if self._bark:
            audio = self._model.generate(**inputs)
        else:
            speaker = {"speaker_id": said["speaker"]} if "speaker" in said else {}
            usual = self._model.speaking_rate
            self._model.speaking_rate = said.get("speaking_rate", usual)
            try:
                audio = self._model(**inputs, **speaker).waveform
            finally:
                self._model.speaking_rate = usual
        return audio.float().cpu().numpy().reshape(-1)


def load(spec: ModelSpec) -> SpeechEngine:
    """Load the checkpoint in `spec.path` for speaking.

    Option: dtype.

    Raises:
        UserError: the folder or an option is wrong.
        DeployError: the model did not load.
    """
    options = engine_options(spec, OPTIONS)
    checkpoint = inspect(spec.path, Task.SPEAK)
    placement = place(checkpoint, options.get("dtype"))
    bark = checkpoint.model_type == "bark"
    with loading(checkpoint):
        model = load_model(AutoModelForTextToWaveform, checkpoint, placement)
        if bark:
            tokenizer = AutoProcessor.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
        else:
            tokenizer = load_tokenizer(checkpoint)
    rate = model.generation_config.sample_rate if bark else model.config.sampling_rate
    info = EngineInfo(
        engine="speech",
        task=Task.SPEAK,
        device=str(model.device),
        dtype=placement.dtype_name,
        max_model_len=BARK_TOKENS if bark else MAX_TOKENS,
        max_batch_rows=BATCH_ROWS,
        architectures=checkpoint.architectures,
        notes=(*placement.notes, f"{rate} samples a second"),
    )
    return SpeechEngine(model, tokenizer, info, int(rate))
