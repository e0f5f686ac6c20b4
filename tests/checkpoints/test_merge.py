"""Merging: what comes out is, number for number, what peft makes in memory, and answers as the adapter did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import trained
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime.checkpoints.adapter import model_and_adapter, open_adapter
from runtime.checkpoints.inspect import inspect
from runtime.checkpoints.merge import Merge, merge, merge_into
from runtime.errors import UserError

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "ranks of its own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "all layers": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "a whole module": {"modules_to_save": ["lm_head"]},
    "both embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
}
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model."""
    return models.language_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output embeddings are its input embeddings, in several files."""
    folder = tmp_path_factory.mktemp("tied")
    whole = trained.tied_model(folder / "whole")
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder / "model", max_shard_size="60KB")
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A plain adapter of `base`."""
    return trained.adapter(base, tmp_path_factory.mktemp("adapter") / "final")


def logits(model: Any) -> torch.Tensor:
    """What a model answers."""
    with torch.inference_mode():
        return model.eval()(IDS).logits


def load(folder: Path, **more: Any) -> Any:
    """The model in a folder, in its own number type unless told."""
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **more})


def refused(wanted: Merge) -> str:
    """The code of the error; there must be no result."""
    with pytest.raises(UserError) as raised:
        merge(wanted)
    assert raised.value.hint
    assert not Path(wanted.target).exists()
    return raised.value.code


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_pefts_own_merge(base: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    """Every kind of adapter in every number type: the same tensors, so a difference of 0."""
    made = trained.adapter(base, tmp_path / "adapter", **KINDS[kind])
    row = merge(Merge(str(made), str(tmp_path / "out"), model=str(base), dtype=dtype))
    expected = PeftModel.from_pretrained(load(base, dtype=getattr(torch, dtype)), str(made)).merge_and_unload()
    found = load(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.state_dict().items())
    assert row.dtype == dtype
    assert not torch.equal(
        found["model.layers.0.self_attn.q_proj.weight"].float(),
        load(base).state_dict()["model.layers.0.self_attn.q_proj.weight"],
    )


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"bias": "all"},
        {},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_tied_embeddings_answer_as_they_were_trained(tied: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    """Where the adapter changes one of two tied embeddings, they part, and the answers are those of the training."""
    made = trained.adapter(tied, tmp_path / "adapter", **config)
    row = merge(Merge(str(made), str(tmp_path / "out"), check=True))
    as_trained = PeftModel.from_pretrained(load(tied), str(made))
    merged = load(tmp_path / "out")
    assert torch.allclose(logits(as_trained), logits(merged), atol=1e-4)
    parted = "modules_to_save" in config or "embed_tokens" in config.get("target_modules", ())
    assert merged.config.tie_word_embeddings == (not parted)
    assert row.max_logit_difference is not None
    assert row.max_logit_difference < 1e-4
    in_memory = load(tied)
    merge_into(in_memory, tied, open_adapter(str(made)))
    assert torch.equal(logits(in_memory), logits(merged))


@pytest.mark.filterwarnings("ignore")
def test_added_tokens(base: Path, tmp_path: Path) -> None:
    """An adapter that was trained with more tokens brings its embeddings and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>", "<newer>"])
    model = load(base)
    model.resize_token_embeddings(len(tokenizer))
    wider = tmp_path / "wider"
    model.save_pretrained(wider)
    made = trained.adapter(wider, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    tokenizer.save_pretrained(made)
    merge(Merge(str(made), str(tmp_path / "out"), model=str(base)))
    merged = load(tmp_path / "out")
    assert merged.config.vocab_size == len(tokenizer) == len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert torch.equal(logits(merged), logits(PeftModel.from_pretrained(load(wider), str(made)).merge_and_unload()))
    in_memory = load(base)
    merge_into(in_memory, base, open_adapter(str(made)))
    assert torch.equal(logits(in_memory), logits(merged))


def test_the_base_is_found(base: Path, adapter: Path, tmp_path: Path) -> None:
    """It is named, lies inside the adapter's folder, or is what the adapter names; else the error says how to."""
    final = tmp_path / "final"
    shutil.copytree(adapter, final)
    config = json.loads((final / "adapter_config.json").read_text())
    for number, named in enumerate((str(base), "somebody/llama")):
        (final / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        if number:
            assert refused(Merge(str(final), str(tmp_path / "none"))) == "adapter_base"
            shutil.copytree(base, final / "pretrained_model")
        merge(Merge(str(final), str(tmp_path / f"out{number}")))
    assert (tmp_path / "out0" / "model.safetensors").read_bytes() == (
        tmp_path / "out1" / "model.safetensors"
    ).read_bytes()
    assert model_and_adapter(str(final), "") == (str(final / "pretrained_model"), str(final))
    assert model_and_adapter(str(base), "") == (str(base), "")
    assert model_and_adapter(str(base), str(final)) == (str(base), str(final))


def test_the_adapters_tokenizer_wins(base: Path, adapter: Path, tmp_path: Path) -> None:
    """What the training has saved of tokenizer, template and format is what the merged model has."""
    final = tmp_path / "final"
    shutil.copytree(adapter, final)
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "prompt_format.json").write_text("{}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(final)
    merge(Merge(str(final), str(tmp_path / "out"), model=str(tmp_path / "base")))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert not (tmp_path / "out" / "prompt_format.json").exists()
    assert inspect(str(tmp_path / "out")).has_chat_template


def test_old_adapters_are_read_when_allowed(base: Path, adapter: Path, tmp_path: Path) -> None:
    """adapter_model.bin needs allow_pickle, and gives the same."""
    old = tmp_path / "old"
    shutil.copytree(adapter, old)
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    assert refused(Merge(str(old), str(tmp_path / "out"), model=str(base))) == "checkpoint_pickled"
    merge(Merge(str(old), str(tmp_path / "out"), model=str(base), allow_pickle=True))
    merge(Merge(str(adapter), str(tmp_path / "new"), model=str(base)))
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(tmp_path / "new")))


def test_what_does_not_fit_is_refused(base: Path, tied: Path, adapter: Path, tmp_path: Path) -> None:
    """Another base, another kind of adapter, damaged or missing tensors: each says so, and nothing is written."""
    out = str(tmp_path / "out")
    assert refused(Merge(str(adapter), out, model=str(models.encoder(tmp_path / "bert")))) == "adapter_mismatch"
    wider = models.language_model(tmp_path / "wide")
    config = json.loads((wider / "config.json").read_text()) | {"hidden_size": 64}
    (wider / "config.json").write_text(json.dumps(config))
    assert refused(Merge(str(adapter), out, model=str(wider))) == "adapter_mismatch"
    assert refused(Merge(str(base), out, model=str(base))) == "checkpoint_adapter"

    def changed(**fields: Any) -> str:
        folder = tmp_path / str(sorted(fields.items()))
        shutil.copytree(adapter, folder)
        said = json.loads((folder / "adapter_config.json").read_text()) | fields
        (folder / "adapter_config.json").write_text(json.dumps(said))
        return str(folder)

    for fields in (
        {"peft_type": "IA3"},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1]},
        {"lora_bias": True},
        {"peft_type": None},
    ):
        assert refused(Merge(changed(**fields), out, model=str(base))) == "checkpoint_adapter"
    assert refused(Merge(changed(r=5), out, model=str(base))) == "adapter_mismatch"
    assert refused(Merge(changed(target_modules=["q_proj"]), out, model=str(base))) == "adapter_mismatch"
    for name, change in {"none": lambda t: None, "nan": lambda t: t * float("nan")}.items():
        folder = tmp_path / name
        shutil.copytree(adapter, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        first = next(iter(tensors))
        tensors = {n: change(t) if n == first else t for n, t in tensors.items()}
        save_file({n: t for n, t in tensors.items() if t is not None}, folder / "adapter_model.safetensors")
        assert refused(Merge(str(folder), out, model=str(base))) == "adapter_mismatch"


def test_the_adapters_folder_may_hold_the_result(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A result inside the adapter's folder, or beside it, is fine; in its place it is not."""
    final = tmp_path / "final"
    shutil.copytree(adapter, final)
    merge(Merge(str(final), str(final / "merged"), model=str(base)))
    with pytest.raises(UserError) as raised:
        merge(Merge(str(final), str(final), model=str(base), overwrite=True))
    assert raised.value.code == "output_is_input"
    assert (final / "adapter_model.safetensors").exists()
