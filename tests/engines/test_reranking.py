"""The reranking engine against sentence-transformers' CrossEncoder, pair by pair."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import media_models
import models
import pytest
from asking import ask

from runtime.checkpoints.inspect import inspect
from runtime.engines import Engine
from runtime.engines.reranking import load
from runtime.errors import UserError
from runtime.spec import Batch, CallOptions, Message, ModelSpec, Prompt, Task

Folders = Callable[[str], Path]
PAIRS = [("the quick fox", "jumps " * (n % 9) + f"price {n}") for n in range(140)]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return media_models.reranker(tmp_path_factory.mktemp("reranker") / "model")


@pytest.fixture(scope="module")
def ranking(reranker: Path) -> Engine:
    return load(ModelSpec("m", "reranking", str(reranker)))


def pair(query: str, text: str) -> Prompt:
    return (Message("query", query), Message("text", text))


def scores_of(folder: Path) -> list[float]:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu").predict(PAIRS, show_progress_bar=False).tolist()


def test_scores_equal_those_of_the_library(reranker: Path, ranking: Engine) -> None:
    """A pair has the score of CrossEncoder.predict, whatever its company."""
    replies = ask(ranking, [pair(*each) for each in PAIRS])
    assert [reply.output for reply in replies] == pytest.approx(scores_of(reranker), abs=1e-5)
    assert len({reply.output for reply in replies}) > 10


def test_the_checkpoint_says_what_is_made_of_a_number(tmp_path: Path) -> None:
    """A cross-encoder that was saved to give its raw number gives it."""
    import torch

    folder = media_models.cross_encoder(tmp_path, activation=torch.nn.Identity())
    assert inspect(str(folder)).task is Task.RANK
    replies = ask(load(ModelSpec("m", "reranking", str(folder))), [pair(*each) for each in PAIRS])
    assert [reply.output for reply in replies] == pytest.approx(scores_of(folder), abs=1e-5)
    assert not all(0 <= reply.output <= 1 for reply in replies)


def test_a_cut_pair_says_so(ranking: Engine) -> None:
    """A pair longer than the model reads ends 'length', and its tokens are those that were read."""
    prompts = [pair("fox", "fox"), pair("fox", "fox " * 80)]
    replies = ask(ranking, prompts)
    assert [(reply.finish_reason, reply.prompt_tokens) for reply in replies] == [("stop", 5), ("length", 64)]
    counted: Any = ranking
    assert counted.count_tokens(Batch(1, CallOptions(), prompts)) == [5, 64]


def test_what_is_no_pair_is_an_error_of_its_row(ranking: Engine) -> None:
    """A text alone, and a pair that is no valid text, fail; the others do not."""
    replies = ask(ranking, ["alone", pair("a", "b"), pair("a", "\udfff")])
    assert [reply.error.code if reply.error else None for reply in replies] == ["prompt_bad", None, "prompt_bad"]


def test_stop_event_ends_the_work(ranking: Engine) -> None:
    """Nothing more comes once the event is set."""
    stop = threading.Event()
    pieces = ranking.run(Batch(1, CallOptions(), [pair(*each) for each in PAIRS]), stop)
    next(pieces)
    stop.set()
    assert list(pieces) == []


def test_one_label_ranks_or_classifies_as_it_is_asked(tmp_path: Path) -> None:
    """Without a name the only label is a score of pairs; with one it is a label; either can be asked for."""
    unnamed = models.classifier(tmp_path / "unnamed", labels=("LABEL_0",))
    named = models.classifier(tmp_path / "named", labels=("spam",))
    several = models.classifier(tmp_path / "several")
    assert [inspect(str(each)).task for each in (unnamed, named, several)] == [
        Task.RANK,
        Task.CLASSIFY,
        Task.CLASSIFY,
    ]
    assert inspect(str(unnamed), Task.CLASSIFY).task is Task.CLASSIFY
    assert inspect(str(named), Task.RANK).task is Task.RANK
    with pytest.raises(UserError) as refused:
        inspect(str(several), Task.RANK)
    assert refused.value.code == "checkpoint_task"
