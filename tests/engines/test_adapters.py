"""Adapters on served models: the answers are those of the merged checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import models
import pytest
import torch
from asking import ask

from runtime.checkpoints.adapter import open_adapter
from runtime.checkpoints.merge import Merge, merge
from runtime.engines import Engine
from runtime.engines.adapters import put_on
from runtime.engines.transformers import load
from runtime.errors import UserError
from runtime.spec import ModelSpec

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
import trained

PROMPTS = ["good morning", "select name", "the fox", "how are you"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model."""
    return models.language_model(tmp_path_factory.mktemp("base") / "model")


def serve(path: Path, **options: str) -> Engine:
    """The engine on a folder."""
    return load(ModelSpec("x", "transformers", str(path), options=tuple(sorted(options.items()))))


def said(engine: Engine) -> list[str]:
    """What it answers."""
    return [reply.output for reply in ask(engine, PROMPTS, max_tokens=12)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True])
def test_it_answers_as_the_merged_model(base: Path, tmp_path: Path, dora: bool, dtype: str) -> None:
    """Token for token, in every number type; and not as the base."""
    adapter = trained.adapter(base, tmp_path / "a", use_dora=dora, target_modules="all-linear", lora_alpha=64)
    merge(Merge(str(adapter), str(tmp_path / "merged"), model=str(base), dtype=dtype))
    served = serve(base, adapter=str(adapter), dtype=dtype)
    assert said(served) == said(serve(tmp_path / "merged"))
    assert said(served) != said(serve(base, dtype=dtype))
    assert served.info.notes[-1] == f"with the adapter {adapter}"


@pytest.mark.filterwarnings("ignore")
def test_tied_embeddings(tmp_path: Path) -> None:
    """Where the adapter changes one of two tied embeddings, serving it parts them as merging does."""
    tied = trained.tied_model(tmp_path / "tied")
    adapter = trained.adapter(tied, tmp_path / "a", target_modules=["embed_tokens", "q_proj"], lora_alpha=64)
    merge(Merge(str(adapter), str(tmp_path / "merged")))
    assert said(serve(tied, adapter=str(adapter))) == said(serve(tmp_path / "merged"))


def test_its_own_tokenizer_and_format_are_used(base: Path, tmp_path: Path) -> None:
    """What the training saved of tokenizer and format beside the adapter counts."""
    adapter = trained.adapter(base, tmp_path / "a")
    tokenizer = models.text_tokenizer(None)
    tokenizer.save_pretrained(adapter)
    assert serve(base).info.chat_template
    assert not serve(base, adapter=str(adapter)).info.chat_template
    style = '{"system": "{instruction}", "user": "Q: {instruction}\\n", "assistant": "A: {instruction}\\n"}'
    (adapter / "prompt_format.json").write_text(style)
    assert serve(base, adapter=str(adapter)).info.chat_template


def test_beside_quantized_weights(tmp_path: Path) -> None:
    """On a quantized model the adapter stays beside the weights, and changes what comes out."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = trained.tied_model(tmp_path / "wide", width=64)
    adapter = open_adapter(str(trained.adapter(base, tmp_path / "a", lora_alpha=64)))
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=bits, device_map="cpu").eval()
    ids = torch.arange(3, 23)[None]
    with torch.inference_mode():
        before = model(ids).logits
        put_on(model, base, adapter, quantized=True)
        after = model(ids).logits
    assert not torch.allclose(before, after, atol=0.1)
    assert type(model.model.layers[0].self_attn.q_proj.base_layer).__name__ == "Linear4bit"


def test_an_adapter_of_another_base(base: Path, tmp_path: Path) -> None:
    """It is refused with its own code, whether it would be worked in or put beside."""
    adapter = trained.adapter(trained.tied_model(tmp_path / "tied"), tmp_path / "a", bias="all")
    with pytest.raises(UserError) as raised:
        serve(base, adapter=str(adapter))
    assert raised.value.code == "adapter_mismatch"
    with pytest.raises(UserError) as raised:
        put_on(None, base, open_adapter(str(adapter)), quantized=True)
    assert raised.value.code == "adapter_mismatch"
