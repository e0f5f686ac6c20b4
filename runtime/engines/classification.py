"""Classification of texts with any sequence classification model of transformers.

Alone because its answer is a pair: the likeliest label and its score. Scores are what the model was trained for:
softmax over the labels; a sigmoid each where several may hold or there is only one; the number itself for regression.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, TypeAlias

from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from runtime.checkpoints.inspect import inspect
from runtime.engines.loading import (
    engine_options,
    free_memory,
    load_model,
    load_tokenizer,
    loading,
    place,
    whole_number,
)
from runtime.engines.reading import OPTIONS, answers_to_texts, batch_bounds, piece_of, tokens_of_texts
from runtime.spec import Answers, Batch, EngineInfo, ModelSpec, Task

_Read: TypeAlias = tuple[dict[str, list[list[int]]], set[int]]  # features by name and text; the texts that were cut


class ClassificationEngine:
    """A classifier and its tokenizer.

    Args:
        model: of transformers, in evaluation mode, with `id2label`.
        info: what was loaded; `max_model_len` tokens of a text are read.
        piece: most rows and padded tokens of one forward.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, info: EngineInfo, piece: tuple[int, int]
    ) -> None:
        self.info = info
        self._model = model
        self._tokenizer = tokenizer
        self._piece = piece
        self._tokenizing = threading.Lock()  # a fast tokenizer must not be called by two threads at once

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        """(label, score) for each text, a piece at a time. A text cut to the model's length ends 'length'.

        Raises:
            OutOfMemory: a piece does not fit.
        """
        return answers_to_texts(batch, stop, self._piece, self._read, self._answer)

    def count_tokens(self, batch: Batch) -> list[int]:
        """Tokens that the model reads of each text."""
        return tokens_of_texts(batch, self._read)

    def close(self) -> None:
        """Give back the memory."""
        self._model = None
        free_memory()

    def _read(self, texts: list[str]) -> tuple[_Read, list[int]]:
        """What the model reads of each text, unpadded, and which texts were cut."""
        limit = self.info.max_model_len
        with self._tokenizing:
            whole = dict(self._tokenizer(texts, verbose=False))
            cut = [row for row, ids in enumerate(whole["input_ids"]) if limit and len(ids) > limit]
            if cut:
                short = self._tokenizer([texts[row] for row in cut], truncation=True, max_length=limit)
                for name, values in short.items():
                    for row, value in zip(cut, values, strict=True):
                        whole[name][row] = value
        return (whole, set(cut)), [len(ids) for ids in whole["input_ids"]]

    def _answer(self, read: _Read, rows: list[int]) -> tuple[list[tuple[str, float]], list[str]]:
        features, cut = read
        return self._forward(features, rows), ["length" if row in cut else "stop" for row in rows]

    def _forward(self, features: dict[str, list[list[int]]], rows: list[int]) -> list[tuple[str, float]]:
        with self._tokenizing:
            piece = self._tokenizer.pad(
                {name: [values[row] for row in rows] for name, values in features.items()}, return_tensors="pt"
            )
        logits = self._model(**piece.to(self._model.device)).logits.float()
        config = self._model.config
        if config.problem_type == "regression":
            scores = logits
        elif config.problem_type == "multi_label_classification" or logits.shape[-1] == 1:
            scores = logits.sigmoid()
        else:
            scores = logits.softmax(dim=-1)
        best, places = scores.max(dim=-1)
        return [
            (str(config.id2label[place]), score) for place, score in zip(places.tolist(), best.tolist(), strict=True)
        ]


def load(spec: ModelSpec) -> ClassificationEngine:
    """Load the checkpoint in `spec.path` for classification.

    Options: dtype; max_model_len (tokens read of a text).

    Raises:
        UserError: the folder or an option is wrong.
        DeployError: the model did not load.
    """
    options = engine_options(spec, OPTIONS)
    checkpoint = inspect(spec.path, Task.CLASSIFY)
    placement = place(checkpoint, options.get("dtype"))
    with loading(checkpoint):
        tokenizer = load_tokenizer(checkpoint)
        model = load_model(AutoModelForSequenceClassification, checkpoint, placement)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id  # decoders find the last word of a row by it
    piece = piece_of(placement)
    rows, chars = batch_bounds(piece)
    lengths = (checkpoint.max_model_len, tokenizer.model_max_length, whole_number(options, "max_model_len"))
    info = EngineInfo(
        engine="classification",
        task=Task.CLASSIFY,
        device=str(model.device),
        dtype=placement.dtype_name,
        max_model_len=min((each for each in lengths if each), default=None),
        max_batch_rows=rows,
        max_batch_chars=chars,
        architectures=checkpoint.architectures,
        notes=placement.notes,
    )
    return ClassificationEngine(model, tokenizer, info, piece)
