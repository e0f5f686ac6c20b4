"""A model of sentence-transformers read a piece at a time: what embedding and reranking have in common.

Alone because both ask the library's modules otherwise than its `encode` and `predict` do: a batch is tokenised once
and cut into pieces by token length, where those sort by characters and pad pieces of a fixed number of rows.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Read(NamedTuple):
    """What a model reads of a batch: texts or pairs of them, their features padded to the longest, tokens of each."""

    inputs: list[Any]
    features: dict[str, Any]
    lengths: list[int]


class Sentences:
    """Tokenising with a model of sentence-transformers. Thread-safe.

    Args:
        model: in evaluation mode; a SentenceTransformer or a CrossEncoder.
        max_model_len: tokens that it reads of a text or pair; None: no limit.
    """

    def __init__(self, model: Any, max_model_len: int | None) -> None:
        self._model = model
        self._max_model_len = max_model_len
        self._prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
        self._tokenizing = threading.Lock()  # a fast tokenizer must not be called by two threads at once

    def read(self, inputs: list[Any]) -> tuple[Read, list[int]]:
        """The features of the inputs, and the tokens of each."""
        features = self._features(inputs)
        lengths = features["attention_mask"].sum(dim=-1).tolist()
        return Read(inputs, features, lengths), lengths

    def piece(self, read: Read, rows: list[int]) -> dict[str, Any]:
        """The features of these rows, longest first, cut to the longest of them, on the model's device."""
        longest = read.lengths[rows[0]]
        left = bool(read.features["attention_mask"][rows, 0].min() == 0)  # padded on the left
        return {
            name: (value[rows, -longest:] if left else value[rows, :longest]).to(self._model.device)
            if isinstance(value, torch.Tensor) and value.dim() == 2
            else value
            for name, value in read.features.items()
        }

    def finish_reasons(self, read: Read, rows: Sequence[int]) -> list[str]:
        """'length' where the model did not read the whole text. Only one as long as the limit can be such."""
        limit = self._max_model_len
        full = [place for place, row in enumerate(rows) if limit and read.lengths[row] >= limit]
        reasons = ["stop"] * len(rows)
        if full:
            inputs = [read.inputs[rows[place]] for place in full]
            whole = self._features(inputs, processing_kwargs={"text": {"truncation": False}})
            for place, length in zip(full, whole["attention_mask"].sum(dim=-1).tolist(), strict=True):
                if length > read.lengths[rows[place]]:
                    reasons[place] = "length"
        return reasons

    def _features(self, inputs: list[Any], **how: Any) -> dict[str, Any]:
        with self._tokenizing:
            features: dict[str, Any] = self._model.preprocess(inputs, prompt=self._prompt, **how)
            return features
