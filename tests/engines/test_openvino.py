"""The engine openvino: what it carries over, how it is kept, and when it is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from asking import ask

from runtime.cache_folder import cache_folder
from runtime.checkpoints.conversions import kept_conversion
from runtime.engines import choice
from runtime.engines.transformers import load as load_reference
from runtime.errors import UserError
from runtime.spec import ModelSpec

pytest.importorskip("openvino_genai")
PROMPTS = ["good morning", "the quick brown fox " * 4, *(f"row {n} " * (n % 9 + 1) for n in range(8))]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def small(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A model of one of transformers' classes, with biases that are not 0."""
    tokenizer = models.text_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = getattr(transformers, f"{kind}Config")(
        **{
            **shape,
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "max_position_embeddings": 256,
            **config,
        }
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(made)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spec(engine: str, folder: Path, **options: Any) -> ModelSpec:
    return ModelSpec("m", engine, str(folder), options=tuple(sorted(options.items())))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
        ("Mistral", {"sliding_window": None, "num_key_value_heads": 4}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_float32_answers_are_those_of_the_reference(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Every kind of model that is carried answers in float32 as transformers does, from bfloat16 weights, too."""
    from runtime.engines.openvino import load

    folder = small(kind, tmp_path / "model", torch.bfloat16, **config)
    made, reference = (
        load(spec("openvino", folder, dtype="float32")),
        load_reference(spec("transformers", folder, dtype="float32")),
    )
    assert ask(made, PROMPTS, max_tokens=24) == ask(reference, PROMPTS, max_tokens=24)
    made.close()


def test_workers_that_start_together_convert_once(tmp_path: Path) -> None:
    """One makes the conversion, the others wait; a failed one leaves nothing, another content is another conversion."""
    source = models.placeholder(tmp_path / "model")
    made: list[Path] = []

    def make(target: Path) -> None:
        made.append(target)
        (target / "file").write_text("whole")

    def fail(target: Path) -> None:
        (target / "file").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        kept_conversion(source, "form", fail)
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(lambda _: kept_conversion(source, "form", make), range(4)))
    assert len(made) == len(found) == 1
    assert [file.read_text() for file in found.pop().iterdir()] == ["whole"]
    (source / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert kept_conversion(source, "form", make) != kept_conversion(models.placeholder(tmp_path / "b"), "form", make)
    kept = [each for each in (cache_folder() / "conversions").iterdir() if each.name.endswith("-form")]
    assert len([each for each in kept if not each.name.startswith(".")]) == 2


@pytest.mark.parametrize(
    ("config", "dtype", "options", "gpus", "engine", "why"),
    [
        ({}, "bfloat16", {}, False, "openvino", "fastest"),
        ({}, "bfloat16", {}, True, "transformers", "GPUs"),
        ({}, "float32", {}, False, "transformers", "model.generate"),
        ({}, "bfloat16", {"dtype": "float32"}, False, "transformers", "model.generate"),
        ({}, "bfloat16", {"adapter": "x"}, False, "transformers", "adapter"),
        ({"model_type": "gpt2"}, "bfloat16", {}, False, "transformers", "gpt2"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "bfloat16", {}, False, "transformers", "dynamic"),
        ({"model_type": "mistral", "sliding_window": 8}, "bfloat16", {}, False, "transformers", "window"),
        ({"quantization_config": {"quant_method": "gptq"}}, "bfloat16", {}, False, "transformers", "quantized"),
    ],
)
def test_the_engine_that_is_chosen(
    config: dict[str, Any], dtype: str, options: dict[str, Any], gpus: bool, engine: str, why: str
) -> None:
    """OpenVINO on a CPU for what it carries in bfloat16, else the reference; the words say why."""
    given = {"model_type": "llama", "max_position_embeddings": 128, **config}
    found = choice.choose(given, dtype, options, gpus=gpus)
    assert found.engine == engine
    assert why in found.note


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without OpenVINO the reference is chosen and the words say what to install; asked for, it is that error."""
    from runtime.engines.openvino import load

    monkeypatch.setattr(choice, "find_spec", lambda _: None)
    found = choice.choose({"model_type": "llama"}, "bfloat16", {}, gpus=False)
    assert found.engine == "transformers"
    assert 'pip install "sqlext[openvino]"' in found.note
    with pytest.raises(UserError) as raised:
        load(spec("openvino", tmp_path))
    assert raised.value.code == "engine_missing"
    assert 'pip install "sqlext[openvino]"' in str(raised.value.hint)


def test_what_would_be_computed_otherwise_is_refused(tmp_path: Path) -> None:
    """A window of attention is not left out in silence."""
    from runtime.engines.openvino import load

    with pytest.raises(UserError, match="window") as raised:
        load(spec("openvino", models.sliding_language_model(tmp_path / "model")))
    assert raised.value.code == "engine_unfit"


def test_answers_with_a_schema_fit_it(tmp_path: Path) -> None:
    """An untrained model writes JSON of the schema."""
    from runtime.engines.openvino import load

    made = load(spec("openvino", models.language_model(tmp_path / "model")))
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    assert made.info.schemas
    replies = ask(made, PROMPTS, max_tokens=400, schema=json.dumps({**schema, "additionalProperties": False}))
    for reply in replies:
        if reply.finish_reason == "stop":
            assert json.loads(str(reply.output))["a"] in ("x", "y")
    assert any(reply.finish_reason == "stop" for reply in replies)
    made.close()


def test_prefix_caching_is_still_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Canary: when this fails, OpenVINO's prefix caching is right, and can be used."""
    from runtime.engines import openvino_engine

    scheduler: Callable[..., Any] = openvino_engine._scheduler

    def caching(*arguments: Any) -> Any:
        made = scheduler(*arguments)
        made.enable_prefix_caching = True
        return made

    monkeypatch.setattr(openvino_engine, "_scheduler", caching)
    folder = models.language_model(tmp_path / "model", chat_template=None)
    made, reference = openvino_engine.load(spec("openvino", folder)), load_reference(spec("transformers", folder))
    begin = "the quick brown fox jumps " * 6
    prompts = [f"{begin}{n}" for n in range(8)]
    ask(made, [begin], max_tokens=1)
    assert ask(made, prompts, max_tokens=9) != ask(reference, prompts, max_tokens=9)
    made.close()
