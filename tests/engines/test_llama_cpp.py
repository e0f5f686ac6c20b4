"""The engine llama_cpp: GGUF files and converted folders, against the engine transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from asking import ask

from runtime.checkpoints.convert import Conversion, convert
from runtime.engines import Engine, llama_cpp, loader
from runtime.errors import UserError
from runtime.spec import ModelSpec

installed = pytest.mark.skipif(
    find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed, and compiles for minutes: pip install 'sqlext[llama-cpp]'",
)
PROMPTS = ["", "good morning", "the quick brown fox " * 4, *(f"row {n} " * (n % 5 + 1) for n in range(9))]


def load(path: Path, **options: Any) -> Engine:
    return loader("llama_cpp")(ModelSpec("m", "llama_cpp", str(path), options=tuple(sorted(options.items()))))


@installed
@pytest.mark.parametrize("options", [{}, {"stop": ("a",)}, {"extra": (("ignore_eos", True),)}])
def test_a_folder_is_converted_and_answers_as_it_is(
    engine: Callable[..., Engine], folders: Callable[[str], Path], options: dict[str, Any]
) -> None:
    """In float32 token for token, with the same counts and reasons."""
    expected = ask(engine("transformers", "wide"), PROMPTS, max_tokens=12, **options)
    assert ask(engine("llama_cpp", "wide"), PROMPTS, max_tokens=12, **options) == expected


@installed
def test_a_gguf_file_stands_alone(
    engine: Callable[..., Engine], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """The file, or the folder that holds it: tokenizer and chat template are its own."""
    file = tmp_path / "model" / "small.gguf"
    file.parent.mkdir()
    convert(Conversion(str(folders("wide")), str(file), to="f32"))
    expected = ask(engine("transformers", "wide"), PROMPTS[1:], max_tokens=12)
    for path in (file, file.parent):
        alone = load(path)
        assert alone.info.chat_template
        assert ask(alone, PROMPTS[1:], max_tokens=12) == expected
        alone.close()


@installed
def test_answers_fit_their_schema(engine: Callable[..., Engine]) -> None:
    """Compact JSON."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    for reply in ask(engine("llama_cpp", "wide"), PROMPTS, max_tokens=60, schema=json.dumps(schema)):
        value = json.loads(reply.output)
        assert set(value) == {"a", "b"}
        assert reply.output == json.dumps(value, separators=(",", ":"))


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra by its name."""
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _: None)
    with pytest.raises(UserError) as raised:
        llama_cpp.load(ModelSpec("m", "llama_cpp", "x"))
    assert "sqlext[llama-cpp]" in str(raised.value.hint)
