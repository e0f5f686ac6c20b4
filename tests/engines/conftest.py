"""Tiny checkpoints and loaded engines, once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest

from runtime.engines import Engine, loader
from runtime.spec import ModelSpec


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny checkpoint with a name, built when first asked for."""
    root = tmp_path_factory.mktemp("checkpoints")
    build: dict[str, Callable[[Path], Path]] = {
        "chat": lambda folder: models.language_model(folder, eos_bias=1.5, max_model_len=128),
        "plain": lambda folder: models.language_model(folder, eos_bias=1.5, chat_template=None),
        # vLLM's attention on CPUs wants heads of at least 32 numbers.
        "wide": lambda folder: models.language_model(folder, eos_bias=1.5, max_model_len=128, head_dim=32),
        "sliding": models.sliding_language_model,
        "encoder": models.encoder,
        "sentence": models.sentence_encoder,
        "classifier": lambda folder: models.classifier(folder, seed=1),
    }

    def folder(name: str) -> Path:
        path = root / name
        return build[name](path) if not path.exists() else (path / "whole" if name == "sentence" else path)

    return folder


@pytest.fixture(scope="session")
def engine(folders: Callable[[str], Path]) -> Callable[..., Engine]:
    """The engine `name` on the checkpoint `folder`, loaded once for each set of options."""
    loaded: dict[tuple[object, ...], Engine] = {}

    def get(name: str, folder: str, **options: Any) -> Engine:
        key = (name, folder, *sorted(options.items()))
        if key not in loaded:
            settings = tuple(sorted(options.items()))
            loaded[key] = loader(name)(ModelSpec("m", name, str(folders(folder)), options=settings))
        return loaded[key]

    return get
