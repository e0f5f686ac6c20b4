"""Tokens counted without an answer: the same figures that a run gives, for every engine that can count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from asking import ask

from runtime.engines import Engine, echo
from runtime.prompts.chat import DEFAULT_MAX_TOKENS
from runtime.spec import Batch, CallOptions, Message, ModelSpec, Prompt

Engines = Callable[..., Engine]
TEXTS: list[Prompt] = ["", "fox", "the quick brown fox " * 6, "Grüße 🦊", "good morning " * 80, "bad \ud800 text"]
TALK: Prompt = (Message("system", "be short"), Message("user", "good morning"), Message("assistant", "hi"))


def counted(engine: Engine, prompts: list[Prompt], **options: Any) -> tuple[list[int] | None, list[int]]:
    """What `count_tokens` says, and what a run of the same prompts says."""
    told = engine.count_tokens(Batch(1, CallOptions(**options), prompts))
    return told, [reply.prompt_tokens for reply in ask(engine, prompts, **options)]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("transformers", "chat"),
        ("transformers", "plain"),
        ("embeddings", "sentence"),
        ("embeddings", "encoder"),
        ("classification", "classifier"),
    ],
)
def test_counted_tokens_are_those_of_a_run(engine: Engines, name: str, folder: str) -> None:
    """Empty, long, cut, foreign and unreadable texts count what a run counts; what cannot be asked counts 0."""
    options = {"max_tokens": 2} if name == "transformers" else {}
    told, ran = counted(engine(name, folder), [*TEXTS, TALK], **options)
    assert told == ran
    assert told is not None
    assert told[5] == 0
    assert len(set(told)) > 3


def test_the_system_message_is_counted(engine: Engines) -> None:
    """A system message costs its tokens on every row, as in a run."""
    model = engine("transformers", "chat")
    told, ran = counted(model, ["fox", TALK], system="be kind", max_tokens=2)
    without, _ = counted(model, ["fox", TALK], max_tokens=2)
    assert told == ran
    assert told is not None
    assert without is not None
    assert (told[0] > without[0], told[1] == without[1]) == (True, True)  # a conversation brings its own


@pytest.mark.parametrize("name", ["transformers", "embeddings", "classification"])
def test_nothing_counts_nothing(engine: Engines, name: str) -> None:
    """An empty batch and one of unreadable rows are counted without the model being asked."""
    folder = {"transformers": "chat", "embeddings": "sentence", "classification": "classifier"}[name]
    model = engine(name, folder)
    assert model.count_tokens(Batch(1, CallOptions(), [])) == []
    assert model.count_tokens(Batch(1, CallOptions(), ["\ud800"])) == [0]


def test_echo_counts_characters() -> None:
    """One character is one token, of the last turn of a conversation."""
    told, ran = counted(echo.load(ModelSpec("m", "echo")), ["", "fox", TALK])
    assert told == ran == [0, 3, 2]


def test_the_longest_answer_is_the_default_or_what_was_deployed(engine: Engines, folders: Any) -> None:
    """What bounds an answer that no call bounds: the default, or generation.max_tokens of the deployment."""
    from runtime.engines.transformers import load

    assert engine("transformers", "chat").info.max_answer_tokens == DEFAULT_MAX_TOKENS
    spec = ModelSpec("m", "transformers", str(folders("chat")), defaults=CallOptions(max_tokens=7))
    assert load(spec).info.max_answer_tokens == 7
