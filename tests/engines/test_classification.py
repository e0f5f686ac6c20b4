"""The classification engine against the model itself, text by text."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
from asking import ask

from runtime.engines import Engine
from runtime.engines.classification import load
from runtime.spec import Batch, CallOptions, ModelSpec

Engines = Callable[..., Engine]
TEXTS = ["", "good", "the quick brown fox " * 3, *(f"price {n} " * (n % 12) for n in range(150))]


def test_labels_and_scores_equal_the_models(engine: Engines) -> None:
    """Each text has the likeliest label and its softmax probability, whatever its company."""
    import torch

    model: Any = engine("classification", "classifier")
    replies = ask(model, TEXTS)
    for text, reply in zip(TEXTS, replies, strict=True):
        with torch.no_grad():
            scores = model._model(**model._tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        assert reply.output == (models.LABELS[int(scores.argmax())], pytest.approx(float(scores.max()), abs=1e-5))
    assert len({reply.output[0] for reply in replies}) > 1


@pytest.mark.parametrize(
    ("labels", "config", "function"),
    [
        (models.LABELS, {"problem_type": "multi_label_classification"}, "sigmoid"),
        (("spam",), {}, "sigmoid"),
        (("stars",), {"problem_type": "regression"}, "ravel"),
    ],
)
def test_scores_follow_the_kind_of_problem(
    tmp_path: Path, labels: tuple[str, ...], config: dict[str, Any], function: str
) -> None:
    """Several labels at once and a single label are scored by a sigmoid, a regression by its number."""
    import torch

    model: Any = load(ModelSpec("m", "classification", str(models.classifier(tmp_path, labels=labels, **config))))
    with torch.no_grad():
        logits = model._model(**model._tokenizer("good", return_tensors="pt")).logits[0]
    scores = getattr(logits, function)()
    assert ask(model, ["good"])[0].output == (
        labels[int(scores.argmax())],
        pytest.approx(float(scores.max()), abs=1e-5),
    )


def test_a_cut_text_says_so(engine: Engines) -> None:
    """A text longer than the model reads ends 'length', and its tokens are those that were read."""
    model = engine("classification", "classifier")
    replies = ask(model, ["fox " * 62, "fox " * 63, "fox"])
    assert [reply.finish_reason for reply in replies] == ["stop", "length", "stop"]
    assert [reply.prompt_tokens for reply in replies] == [64, 64, 3]
    assert replies[0].output == (replies[1].output[0], pytest.approx(replies[1].output[1]))


def test_bad_rows_get_their_errors(engine: Engines) -> None:
    """A row that is no text has an error and no output."""
    replies = ask(engine("classification", "classifier"), [None, "good", "\udfff"])  # type: ignore[list-item]
    assert [reply.error.code if reply.error else None for reply in replies] == ["prompt_bad", None, "prompt_bad"]
    assert replies[0].output is None


def test_stop_event_ends_the_work(engine: Engines) -> None:
    """Nothing more comes once the event is set."""
    stop = threading.Event()
    pieces = engine("classification", "classifier").run(Batch(1, CallOptions(), TEXTS), stop)
    next(pieces)
    stop.set()
    assert list(pieces) == []
