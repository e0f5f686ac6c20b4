"""The engine deepspeed: the answers of the engine transformers, and clear words where it cannot run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from asking import ask

from runtime.engines import Engine, deepspeed
from runtime.errors import UserError
from runtime.spec import ModelSpec

PROMPTS = ["good morning", "select name", "the fox " * 5]


@pytest.fixture
def _no_accelerator_named() -> Iterator[None]:
    """DeepSpeed remembers in the environment what it found."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_no_accelerator_named")
@pytest.mark.filterwarnings("ignore")
def test_its_answers_are_those_of_transformers(engine: Callable[..., Engine]) -> None:
    """On a CPU too, where DeepSpeed puts no kernels of its own in."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'sqlext[deepspeed]'")
    prepared = engine("deepspeed", "chat")
    assert prepared.info.engine == "deepspeed"
    assert ask(prepared, PROMPTS, max_tokens=12) == ask(engine("transformers", "chat"), PROMPTS, max_tokens=12)


def test_several_gpus_are_refused(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to type instead."""
    monkeypatch.setattr(deepspeed, "find_spec", lambda _: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="one GPU"):
        deepspeed.load(ModelSpec("m", "deepspeed", str(folders("chat"))))


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra by its name."""
    monkeypatch.setattr(deepspeed, "find_spec", lambda _: None)
    with pytest.raises(UserError) as raised:
        deepspeed.load(ModelSpec("m", "deepspeed", "x"))
    assert "sqlext[deepspeed]" in str(raised.value.hint)
