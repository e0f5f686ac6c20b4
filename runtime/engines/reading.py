"""Engines that read texts and write none: what embedding, classification and reranking have in common.

A batch is tokenised once and cut into pieces of like length; each piece is one forward, and its rows are answered at
once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from runtime.engines.loading import Placement, device_memory
from runtime.engines.microbatch import failed, microbatches, texts_of
from runtime.errors import ErrorInfo
from runtime.spec import Answers, Batch

OPTIONS = ("dtype", "max_model_len")
CPU_PIECE = (64, 768)  # rows, padded tokens of one forward; measured: padding costs more than small pieces do
GPU_PIECE = (256, 65_536)
PIECES = 8  # a batch holds about this many, so that there is something to sort
CHARS_PER_PIECE_TOKEN = 8

Features = TypeVar("Features")
Input = TypeVar("Input")


def piece_of(placement: Placement) -> tuple[int, int]:
    """Most rows and padded tokens of one forward on the device."""
    return CPU_PIECE if placement.device.type == "cpu" else GPU_PIECE


def batch_bounds(piece: tuple[int, int]) -> tuple[int, int]:
    """Rows and characters that are worth sending at once."""
    return PIECES * piece[0], PIECES * piece[1] * CHARS_PER_PIECE_TOKEN


def tokens_of_texts(batch: Batch, read: Callable[[list[str]], tuple[Any, list[int]]]) -> list[int]:
    """Tokens that the model reads of each text, 0 for what is no text; `read` as for `answers_to_texts`."""
    return tokens_of(batch, texts_of(batch)[0], read)


def tokens_of(
    batch: Batch, inputs: dict[int, Input], read: Callable[[list[Input]], tuple[Any, list[int]]]
) -> list[int]:
    """As `tokens_of_texts`, for the inputs of a batch by index; 0 for rows that have none."""
    lengths = read(list(inputs.values()))[1] if inputs else []
    counted = dict(zip(inputs, lengths, strict=True))
    return [counted.get(index, 0) for index in range(len(batch.prompts))]


def answers_to_texts(
    batch: Batch,
    stop: threading.Event,
    piece: tuple[int, int],
    read: Callable[[list[str]], tuple[Features, list[int]]],
    answer: Callable[[Features, list[int]], tuple[Sequence[Any], list[str]]],
) -> Iterator[Answers]:
    """Answer every text of `batch`, a piece at a time; ends soon, with rows left out, when `stop` is set.

    Args:
        piece: most rows and padded tokens of one forward.
        read: from texts to what the model reads of them, and its tokens per text.
        answer: from that and some of its rows to their outputs and finish reasons.

    Raises:
        OutOfMemory: a piece does not fit.
    """
    return answers_to(*texts_of(batch), stop, piece, read, answer)


def answers_to(
    inputs: dict[int, Input],
    errors: dict[int, ErrorInfo],
    stop: threading.Event,
    piece: tuple[int, int],
    read: Callable[[list[Input]], tuple[Features, list[int]]],
    answer: Callable[[Features, list[int]], tuple[Sequence[Any], list[str]]],
) -> Iterator[Answers]:
    """As `answers_to_texts`, for the inputs of a batch by index, and the errors of its other rows."""
    begun = time.perf_counter()
    if errors:
        yield failed(errors, (time.perf_counter() - begun) * 1000.0)
    if not inputs:
        return
    indices = list(inputs)
    with device_memory(), torch.inference_mode():
        features, lengths = read(list(inputs.values()))
        for rows in microbatches(lengths, *piece):
            if stop.is_set():
                return
            outputs, finish_reasons = answer(features, rows)
            yield Answers(
                rows=[indices[row] for row in rows],
                outputs=outputs,
                finish_reasons=finish_reasons,
                prompt_tokens=[lengths[row] for row in rows],
                completion_tokens=[0] * len(rows),
                latency_ms=(time.perf_counter() - begun) * 1000.0,
            )
