"""The script that trains the examples' model, with too few steps to learn anything."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoints.inspect import inspect
from runtime.spec import Task

SCRIPT = Path(__file__).parents[2] / "examples" / "sql" / "make_small_model.py"


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("make_small_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_can_be_deployed_and_is_the_same_each_time(script: Any, tmp_path: Path) -> None:
    """Two runs give the same bytes, a chat checkpoint of about a million parameters."""
    first, second = (script.make(tmp_path / name, steps=3, count=9) for name in ("a", "b"))
    found = inspect(str(first))
    assert (found.task, found.has_chat_template) == (Task.GENERATE, True)
    assert found.num_parameters > 500_000
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_complete_folder_is_left_as_it_is(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second call trains nothing; another recipe trains again."""
    script.make(tmp_path, steps=1, count=9)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    script.make(tmp_path, steps=1, count=9)
    shown = capsys.readouterr()
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    assert (shown.out, "complete" in shown.err) == ("", True)
    script.make(tmp_path, steps=2, count=9)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns != before


def test_it_learns_what_the_examples_ask(script: Any) -> None:
    """The functions that examples ask about are among those it is trained on."""
    assert {"array_length", "median", "upper"} <= set(script.descriptions())
