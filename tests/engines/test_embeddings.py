"""The embeddings engine against SentenceTransformer.encode of the same checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import ask

from runtime.engines import Engine
from runtime.errors import UserError
from runtime.spec import Batch, CallOptions, Message

Engines = Callable[..., Engine]
TEXTS = ["", "good", "the quick brown fox " * 3, "Ünïcödé 😀", *(f"price {n} " * (n % 12) for n in range(150))]


@pytest.fixture(params=["encoder", "sentence", "chat"])
def checkpoint(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> tuple[str, Path]:
    """A plain encoder, a sentence-transformers checkpoint and a causal language model."""
    return request.param, folders(request.param)


def encoded(name: str, folder: Path, texts: list[str]) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    if name != "chat":
        return SentenceTransformer(str(folder), device="cpu").encode(texts, batch_size=7)
    text = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    body = Transformer(str(folder), modality_config=text, module_output_name="token_embeddings")
    return SentenceTransformer(modules=[body, Pooling(32, "mean"), Normalize()], device="cpu").encode(texts)


def test_vectors_equal_encode(engine: Engines, checkpoint: tuple[str, Path]) -> None:
    """Every vector is the one `encode` gives, whatever the order and company of the texts."""
    replies = ask(engine("embeddings", checkpoint[0]), TEXTS)
    vectors = np.stack([reply.output for reply in replies])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encoded(*checkpoint, TEXTS), atol=1e-5)
    np.testing.assert_allclose(ask(engine("embeddings", checkpoint[0]), [TEXTS[2]])[0].output, vectors[2], atol=1e-5)


def test_a_language_model_gives_vectors_of_length_one(engine: Engines) -> None:
    """A causal language model that is asked to embed answers with the normalised mean of its last layer."""
    import torch

    model: Any = engine("embeddings", "chat")
    vector = ask(model, ["good morning"])[0].output
    body = model._model[0]
    ids = body.tokenizer("good morning", return_tensors="pt")
    with torch.no_grad():
        mean = body.auto_model(**ids).last_hidden_state[0].mean(dim=0)
    np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)


def test_pieces_are_float32_arrays_of_many_rows(engine: Engines) -> None:
    """A batch comes in a few arrays (rows, dimension), never row by row."""
    model = engine("embeddings", "sentence")
    pieces = list(model.run(Batch(1, CallOptions(), TEXTS), threading.Event()))
    assert 1 < len(pieces) < 20
    for piece in pieces:
        assert piece.outputs.shape == (len(piece.rows), model.info.dimension)  # type: ignore[attr-defined]


def test_a_cut_text_says_so(engine: Engines) -> None:
    """A text longer than the model reads is cut, as `encode` does, and ends 'length'; one that just fits does not."""
    model = engine("embeddings", "encoder")
    limit = model.info.max_model_len
    assert limit == 64
    just, over = "fox " * (limit - 2), "fox " * (limit - 1)
    replies = ask(model, [just, over, "fox"])
    assert [reply.finish_reason for reply in replies] == ["stop", "length", "stop"]
    assert [reply.prompt_tokens for reply in replies] == [limit, limit, 3]
    np.testing.assert_allclose(replies[0].output, replies[1].output, atol=1e-5)


def test_the_length_read_can_be_lowered(engine: Engines) -> None:
    """max_model_len is how many tokens of a text are read."""
    model = engine("embeddings", "encoder", max_model_len=5)
    assert model.info.max_model_len == 5
    assert ask(model, ["fox fox fox", "fox fox fox fox"])[1].finish_reason == "length"


def test_bad_rows_get_their_errors(engine: Engines) -> None:
    """A row that is no text has an error, its neighbours their vectors; a conversation is read as its contents."""
    model = engine("embeddings", "encoder")
    replies = ask(model, ["good", None, "\ud800", (Message("user", "good"),), 5])  # type: ignore[list-item]
    assert [reply.error.code if reply.error else None for reply in replies] == [
        None,
        *["prompt_bad"] * 2,
        None,
        "prompt_bad",
    ]
    np.testing.assert_allclose(replies[0].output, replies[3].output, atol=1e-6)


def test_only_bad_rows_and_no_rows(engine: Engines) -> None:
    """A batch without a readable text calls no model."""
    model = engine("embeddings", "encoder")
    assert ask(model, []) == []
    assert [reply.output for reply in ask(model, [None, None])] == [None, None]  # type: ignore[list-item]


def test_stop_event_ends_the_work(engine: Engines) -> None:
    """Nothing more comes once the event is set."""
    stop = threading.Event()
    pieces = engine("embeddings", "encoder").run(Batch(1, CallOptions(), TEXTS), stop)
    next(pieces)
    stop.set()
    assert list(pieces) == []


def test_a_classifier_does_not_embed(engine: Engines) -> None:
    """A checkpoint made for another task is refused before it loads."""
    with pytest.raises(UserError) as raised:
        engine("embeddings", "classifier")
    assert raised.value.code == "checkpoint_task"
