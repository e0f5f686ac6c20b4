"""GGUF: what transformers reads back is the model that was written, as near as the type allows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import trained
import transformers
from gguf import GGUFReader
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime.checkpoints.convert import GGUF_TYPES, Conversion, convert
from runtime.checkpoints.tensors import read_safetensors
from runtime.errors import UserError

TEXT = "select name, price from goods <|user|> 123 Grüße"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def small(kind: str, folder: Path, *, tokenizer: Any = None, **config: Any) -> Path:
    """A model of one of transformers' classes, in blocks that quantise."""
    tokenizer = tokenizer or models.text_tokenizer()
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": len(tokenizer) + 3,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.1,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **config,
        }
    )
    getattr(transformers, f"{kind}ForCausalLM")(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads are wider than usual."""
    return small("Llama", tmp_path_factory.mktemp("llama") / "model", head_dim=32)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Llama", {"head_dim": 32}),
        ("Mistral", {}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 128}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_float32_is_read_back_as_it_was(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Names, order of the heads and settings: the logits differ by 0."""
    model = small(kind, tmp_path / "model", **config)
    made = convert(Conversion(str(model), str(tmp_path / "out"), to="f32", check=True))
    assert made.files == ("model-f32.gguf",)
    assert made.max_logit_difference == 0


def test_biases_are_rotated_with_their_weights(tmp_path: Path) -> None:
    """The biases of q and k are in the order of the rows that they belong to; transformers cannot read these back."""
    model = small("Llama", tmp_path / "model", attention_bias=True)
    tensors = {name: stored.load() for name, stored in read_safetensors(model / "model.safetensors").items()}
    marked = torch.arange(64.0)
    tensors["model.layers.0.self_attn.q_proj.bias"] = marked
    tensors["model.layers.0.self_attn.q_proj.weight"] = marked[:, None].expand(64, 64).contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    convert(Conversion(str(model), str(tmp_path / "out"), to="f32"))
    found = {t.name: torch.tensor(t.data) for t in GGUFReader(tmp_path / "out" / "model-f32.gguf").tensors}
    assert torch.equal(found["blk.0.attn_q.bias"], found["blk.0.attn_q.weight"][:, 0])
    assert found["blk.0.attn_q.bias"].tolist()[:6] == [0, 8, 1, 9, 2, 10]


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_every_type_is_near(llama: Path, tmp_path: Path, kind: str) -> None:
    """Each type's error is as small as its bits make it, and the file as small."""
    made = convert(Conversion(str(llama), str(tmp_path / "model.gguf"), to="gguf", dtype=kind))
    assert (made.path, made.files, made.dtype) == (str(tmp_path / "model.gguf"), ("model.gguf",), kind)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    bits = {"f32": 24, "f16": 11, "bf16": 8, "q8_0": 7}.get(kind, int(kind[1]) - 1 if kind[0] == "q" else 0)
    for name, stored in read_safetensors(llama / "model.safetensors").items():
        tensor = stored.load()
        assert (found[name] - tensor).abs().max() <= tensor.abs().max() * 2.0**-bits * (1 if bits > 8 else 1.01)
    assert made.bytes < 40_000 + made.parameters * {"f32": 4, "f16": 2, "bf16": 2}.get(kind, (bits + 2.01) / 8)


def test_rows_that_fit_no_block_become_f16(tmp_path: Path) -> None:
    """A matrix whose rows are no multiple of a block is kept in half precision, the others are quantised."""
    model = small("Llama", tmp_path / "model", intermediate_size=80)
    convert(Conversion(str(model), str(tmp_path / "out"), to="q4_0"))
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "out" / "model-q4_0.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_the_stretched_positions_of_llama_3(tmp_path: Path) -> None:
    """The tensor of factors is what makes plain frequencies those of the model."""
    model = small("Llama", tmp_path / "model", rope_parameters=LLAMA3)
    convert(Conversion(str(model), str(tmp_path / "out"), to="f16"))
    tensors = {t.name: torch.tensor(t.data) for t in GGUFReader(tmp_path / "out" / "model-f16.gguf").tensors}
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    used = AutoModelForCausalLM.from_pretrained(model).model.rotary_emb.inv_freq
    assert torch.allclose(plain / tensors["rope_freqs.weight"], used)
    assert tensors["rope_freqs.weight"].max() == 8


def test_the_tokenizer_and_the_template_go_along(llama: Path, tmp_path: Path) -> None:
    """Tokens, merges, special tokens, padding of the vocabulary and the chat template are in the file."""
    made = convert(Conversion(str(llama), str(tmp_path / "out"), to="q8_0"))
    original = AutoTokenizer.from_pretrained(llama)
    found = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=made.files[0])
    ids = original(TEXT, add_special_tokens=False).input_ids
    assert found(TEXT, add_special_tokens=False).input_ids == ids
    assert found.decode(ids) == original.decode(ids)
    assert (found.chat_template, found.eos_token) == (original.chat_template, original.eos_token)
    fields = GGUFReader(tmp_path / "out" / made.files[0]).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert len(fields["tokenizer.ggml.tokens"].data) == fields["llama.vocab_size"].contents() == len(original) + 3


def test_a_tokenizer_in_the_manner_of_sentencepiece(tmp_path: Path) -> None:
    """Bytes, scores that rank the merges, and the leading space are told; what is read back spells the same."""
    tokenizer = sentencepiece_tokenizer()
    model = small("Llama", tmp_path / "model", tokenizer=tokenizer)
    made = convert(Conversion(str(model), str(tmp_path / "out"), to="f16"))
    fields = GGUFReader(tmp_path / "out" / made.files[0]).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
    types, tokens = fields["tokenizer.ggml.token_type"].contents(), fields["tokenizer.ggml.tokens"].contents()
    assert types[tokens.index("<0x0A>")] == 6
    assert types[tokens.index("<s>")] == 3
    scores = fields["tokenizer.ggml.scores"].contents()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    ranked = [scores[tokens.index("".join(pair))] for pair in merges]
    assert ranked == sorted(ranked, reverse=True)
    found = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=made.files[0])
    for text in ("the length of the list", "good morning\n 42 ü"):
        assert found(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


def sentencepiece_tokenizer() -> Any:
    """A tokenizer like that of Llama 2: merges over whole texts, spaces as ▁, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, normalizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([f" {word}" for text in models.CORPUS for word in text.split()], trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def test_a_trained_model_becomes_gguf_at_once(tmp_path: Path) -> None:
    """The words of the format go with those of a training: here an epoch that was saved as a whole model."""
    base = trained.tied_model(tmp_path / "base")
    other = trained.tied_model(tmp_path / "job" / "Epoch-1")
    made = convert(Conversion(str(base), str(tmp_path / "out"), to="q8_0", training=str(other.parent), tag="Epoch-1"))
    assert made.files == ("model-q8_0.gguf",)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "gguf_unsupported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gguf_unsupported"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "gguf_unsupported"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_would_be_wrong_is_not_written(llama: Path, tmp_path: Path, change: dict[str, Any], code: str) -> None:
    """What llama.cpp would read differently is an error, and no file."""
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    config = json.loads((model / "config.json").read_text()) | change
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as raised:
        convert(Conversion(str(model), str(tmp_path / "out"), to="f16"))
    assert raised.value.code == code
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_knows_more_than_the_model_embeds(llama: Path, tmp_path: Path) -> None:
    """As many tokens as rows are written; a token beyond them is an error, as llama.cpp would not load the file."""
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    content = json.loads((model / "tokenizer.json").read_text())
    for number, code in ((rows - 1, ""), (rows, "gguf_unsupported")):
        added = {**content["added_tokens"][0], "id": number, "content": "<further>"}
        (model / "tokenizer.json").write_text(
            json.dumps({**content, "added_tokens": [*content["added_tokens"], added]})
        )
        wanted = Conversion(str(model), str(tmp_path / f"{number}.gguf"), to="f16")
        if code:
            with pytest.raises(UserError) as raised:
                convert(wanted)
            assert raised.value.code == code
        else:
            tokens = GGUFReader(convert(wanted).path).fields["tokenizer.ggml.tokens"]
            assert (len(tokens.data), tokens.contents(rows - 1)) == (rows, "<further>")


def test_an_unknown_way_to_cut_texts_is_not_guessed(llama: Path, tmp_path: Path) -> None:
    """A tokenizer that llama.cpp would be told the wrong name of is refused, as its tokens would differ."""
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    content = json.loads((model / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as raised:
        convert(Conversion(str(model), str(tmp_path / "out"), to="f16"))
    assert raised.value.code == "gguf_unsupported"


def test_a_misspelt_type_names_the_right_one(llama: Path, tmp_path: Path) -> None:
    """k-quants cannot be made here, and the nearest type is named."""
    with pytest.raises(UserError, match=r"Did you mean .q4_") as raised:
        convert(Conversion(str(llama), str(tmp_path / "out"), to="gguf", dtype="q4_k"))
    assert raised.value.code == "option_value"
