"""What a checkpoint is, told without loading it, and which engines have room for it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest

from runtime.checkpoints.profile import profile
from runtime.checkpoints.suitability import Machine, Suitability, suitable
from runtime.errors import UserError
from runtime.spec import Task

GB = 10**9
BIG = Machine("", 10_000 * GB)
SEVEN_B = {  # as Llama 2 7B says of itself
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "dtype": "bfloat16",
}


def described(folder: Path, stored: str = "BF16", parameters: int = 6_738_000_000, **config: Any) -> Path:
    """A folder that says it is large; its weights are a file with a hole."""
    models.placeholder(folder, **{**SEVEN_B, **config})
    bits = {"BF16": 16, "F16": 16, "F32": 32, "I32": 32, "U8": 8}[stored]
    size = parameters * bits // 8
    header = json.dumps(
        {"layer.qweight": {"dtype": stored, "shape": [parameters], "data_offsets": [0, size]}}
    ).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
    return folder


OPTIONAL = {"vllm", "deepspeed", "llama_cpp", "openvino"}
"""Engines of packages that need not be installed."""


def engine(folder: Path, name: str, *machines: Machine) -> Suitability:
    return next(each for each in suitable(profile(str(folder)), machines or (BIG,)) if each.engine == name)


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("build", "task", "engines"),
    [
        (models.language_model, Task.GENERATE, {"transformers", "embeddings"}),
        (models.encoder, Task.EMBED, {"embeddings"}),
        (models.sentence_encoder, Task.EMBED, {"embeddings"}),
        (models.classifier, Task.CLASSIFY, {"classification"}),
    ],
)
def test_a_real_checkpoint_says_what_it_is(
    tmp_path: Path, build: Callable[[Path], Path], task: Task, engines: set[str]
) -> None:
    """Task, sizes, files and the engines that run it; the parameters are those that torch counts."""
    from transformers import AutoModel

    folder = build(tmp_path / "model")
    found = profile(str(folder))
    assert found.task is task
    assert {each.engine for each in suitable(found, (BIG,)) if each.runs} - OPTIONAL == engines
    assert found.bytes == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert found.parameters is not None
    body = sum(each.numel() for each in AutoModel.from_pretrained(folder).parameters())
    assert body <= found.parameters <= body * 1.5  # with its head


def test_the_words_of_a_chat_model(tmp_path: Path) -> None:
    """Chat template and special tokens come from the tokenizer's files, in their old and new places."""
    found = profile(str(models.language_model(tmp_path / "chat")))
    assert found.chat_template == models.CHAT_TEMPLATE
    assert found.special_tokens == {"bos": "<s>", "eos": "<|end|>", "pad": "<pad>"}
    assert found.additional_tokens == ("<|system|>", "<|user|>", "<|assistant|>")
    old = models.placeholder(tmp_path / "old")
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write_json(old / "tokenizer_config.json", {"chat_template": named, "eos_token": {"content": "</s>"}})
    write_json(old / "special_tokens_map.json", {"unk_token": "?", "eos_token": "less exact"})
    found = profile(str(old))
    assert (found.chat_template, found.special_tokens) == ("D", {"eos": "</s>", "unk": "?"})


def test_hashes_are_those_of_sha256sum(tmp_path: Path) -> None:
    """Only when they are asked for."""
    folder = models.placeholder(tmp_path / "model")
    assert {file.sha256 for file in profile(str(folder)).files} == {None}
    for file in profile(str(folder), hashes=True).files:
        assert file.sha256 == hashlib.sha256((folder / file.name).read_bytes()).hexdigest()


def adapter(folder: Path, base: str, **config: Any) -> Path:
    folder.mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 8, "lora_alpha": 16}
    write_json(folder / "adapter_config.json", {**said, "target_modules": ["v_proj", "q_proj"], **config})
    weights = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    models.write_safetensors(folder / "adapter_model.safetensors", weights, 16)
    return folder


def test_an_adapter_names_its_base_and_runs_with_it(tmp_path: Path) -> None:
    """Kind, rank and modules are told; it runs where its base is known and runs."""
    base = models.placeholder(tmp_path / "base")
    found = profile(str(adapter(tmp_path / "lora", str(base), use_dora=True)))
    assert found.adapter
    assert (found.adapter.kind, found.adapter.base, found.adapter.r) == ("LORA (DoRA)", str(base), 8)
    assert found.adapter.folder == str(base)
    assert found.adapter.targets == ("q_proj", "v_proj")
    assert found.parameters == 4
    alone, beside = suitable(found, (BIG,)), suitable(found, (BIG,), profile(str(base)))
    assert not any(each.runs for each in alone)
    assert [each.engine for each in beside if each.runs and each.engine not in OPTIONAL] == ["transformers"]
    assert str(base) in next(each.why for each in alone if each.engine == "transformers")
    assert beside[0].engine == "transformers"
    assert beside[0].runs


def test_a_damaged_or_pickled_adapter_is_told(tmp_path: Path) -> None:
    """Weights that are not there or cut are an error; pickled ones are described, and no engine takes them."""
    cut = adapter(tmp_path / "cut", "base")
    (cut / "adapter_model.safetensors").write_bytes(b"\0" * 4)
    bare = adapter(tmp_path / "bare", "base")
    (bare / "adapter_model.safetensors").unlink()
    for folder, code in ((cut, "checkpoint_corrupt"), (bare, "checkpoint_no_weights")):
        with pytest.raises(UserError) as raised:
            profile(str(folder))
        assert raised.value.code == code
    (bare / "adapter_model.bin").write_bytes(b"\x80\x04")
    found = profile(str(bare))
    assert found.refusal
    assert found.refusal.code == "checkpoint_pickled"


DESCRIBED = {"checkpoint_unsupported", "checkpoint_pickled", "checkpoint_remote_code", "checkpoint_no_tokenizer"}


@pytest.mark.parametrize("wrong", models.BROKEN)
def test_a_broken_folder_is_an_error_or_a_reason(tmp_path: Path, wrong: str) -> None:
    """What is damaged is an error with the gate's code; what only cannot run here is described, with that reason."""
    code, change = models.BROKEN[wrong]
    folder = models.placeholder(tmp_path / "folder")
    change(folder)
    if code not in DESCRIBED:
        with pytest.raises(UserError) as raised:
            profile(str(folder))
        assert raised.value.code == code
        return
    found = profile(str(folder))
    assert found.refusal
    assert found.refusal.code == code
    assert not any(each.runs for each in suitable(found, (BIG,)))


@pytest.mark.parametrize(
    ("method", "config", "dtype", "stored", "bits", "package"),
    [
        ("gptq", {"bits": 4, "group_size": 128}, "I32", 100, 4, "gptqmodel"),
        ("awq", {"bits": 4, "group_size": 64}, "I32", 100, 4, "gptqmodel"),
        ("bitsandbytes", {"load_in_4bit": True}, "U8", 400, 4, ""),
        ("made-up", {"bits": 8}, "U8", 800, 8, "not known"),
    ],
)
def test_quantized_weights_count_as_what_they_stand_for(
    tmp_path: Path, method: str, config: dict[str, Any], dtype: str, stored: int, bits: int, package: str
) -> None:
    """800 numbers in fewer bytes; the engine says which package it lacks, and needs the bytes as they are stored."""
    folder = described(
        tmp_path / "q", dtype, stored, quantization_config={"quant_method": method, **config}, dtype="float16"
    )
    found = profile(str(folder))
    assert found.quantization
    assert (found.quantization.method, found.quantization.bits) == (method, bits)
    assert found.quantization.group_size == config.get("group_size")
    assert found.parameters == 800
    judged = engine(folder, "transformers")
    assert judged.runs is not bool(package)
    assert package in judged.why


def test_memory_is_weights_cache_work_and_runtime(tmp_path: Path) -> None:
    """Llama 2 7B on a CPU: 13.5 GB of weights, 0.5 MB of cache for each of 32,768 tokens, and what a layer makes."""
    judged = engine(described(tmp_path / "7b"), "transformers")
    assert (judged.device, judged.dtype) == ("cpu", "bfloat16")
    cache = 32_768 * 32 * 2 * 4096 * 2
    work = 32_768 * (2 * 11008 + 4 * 4096) * 2 + 32 * 32000 * 4
    assert judged.memory_bytes == 6_738_000_000 * 2 + cache + work + (700 << 20)
    assert judged.least_bytes
    assert judged.least_bytes < 16 * GB < judged.memory_bytes


def test_windows_and_shared_heads_need_less(tmp_path: Path) -> None:
    """Grouped heads keep less of a token; a layer with a window keeps no more than that; one without attention none."""
    plain = engine(described(tmp_path / "plain"), "transformers").memory_bytes or 0
    grouped = engine(described(tmp_path / "grouped", num_key_value_heads=8), "transformers").memory_bytes or 0
    windowed = engine(described(tmp_path / "windowed", sliding_window=128), "transformers").memory_bytes or 0
    kinds = ["linear_attention", "full_attention"] * 16
    mixed = engine(described(tmp_path / "mixed", layer_types=kinds), "transformers").memory_bytes or 0
    cache = 32_768 * 32 * 2 * 4096 * 2
    assert plain - grouped == cache * 3 // 4
    assert plain - windowed == cache - 32 * 128 * 32 * 2 * 4096 * 2
    assert plain - mixed == cache // 2


def test_half_precision_is_computed_in_full_on_a_cpu(tmp_path: Path) -> None:
    """float16 weights take twice their bytes there, and their own on a GPU."""
    folder = described(tmp_path / "7b", "F16", dtype="float16")
    assert engine(folder, "transformers").dtype == "float32"
    on_gpu = engine(folder, "transformers", Machine("", 64 * GB, (80 * GB,)))
    assert (on_gpu.device, on_gpu.dtype) == ("cuda", "float16")


def test_the_machines_where_it_fits_are_named(tmp_path: Path) -> None:
    """A small machine is left out; where no machine has room it says what is needed and what is there."""
    folder = described(tmp_path / "7b")
    small, large = Machine("", 8 * GB), Machine("node-2", 300 * GB)
    both = engine(folder, "transformers", small, large)
    assert (both.runs, both.machines) == (True, ("node-2",))
    alone = engine(folder, "transformers", small)
    assert not alone.runs
    assert "this machine has 8.0 GB" in alone.why


def test_a_tight_machine_is_told_how_to_fit(tmp_path: Path) -> None:
    """Fewer tokens at once on 24 GB, or several GPUs where one has no room for the weights."""
    folder = described(tmp_path / "7b")
    tight = engine(folder, "transformers", Machine("", 24 * GB))
    assert tight.runs
    tokens = int(tight.why.split('"')[1])
    assert tokens % 1024 == 0
    assert 0 < tokens < 32_768
    spread = engine(folder, "transformers", Machine("", 64 * GB, (12 * GB, 12 * GB)))
    assert '"gpus_per_worker=2"' in spread.why


def test_limits_are_those_of_the_engines() -> None:
    """The arithmetic knows the same batch limits as the engines, which it must not import."""
    from runtime.checkpoints import suitability
    from runtime.engines import loading, reading, transformers

    cpu, gpu = transformers.CPU_LIMITS, transformers.GPU_LIMITS
    assert {"cpu": (cpu.rows, cpu.tokens), "cuda": (gpu.rows, gpu.tokens)} == suitability._GENERATION_LIMITS
    assert suitability._READING_LIMITS == {"cpu": reading.CPU_PIECE, "cuda": reading.GPU_PIECE}
    assert set(suitability.DTYPE_BYTES) == {str(dtype).removeprefix("torch.") for dtype in loading.DTYPES.values()}


def test_a_hundred_shards_are_told_without_torch(tmp_path: Path) -> None:
    """Everything about 100 shards of 80 tensors is known in a process that never imported torch or transformers."""
    folder = models.placeholder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for shard in range(100):
        name = f"model-{shard + 1:05}-of-00100.safetensors"
        tensors = {
            f"layer.{shard}.{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
            for i in range(80)
        }
        models.write_safetensors(folder / name, tensors, 320)
        weight_map |= dict.fromkeys(tensors, name)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    script = (
        "import sys; from runtime.checkpoints.profile import profile;"
        "from runtime.checkpoints.suitability import suitable, this_machine;"
        f"p = profile({str(folder)!r}); s = suitable(p, [this_machine()]);"
        "print(p.parameters, s[0].engine, s[0].runs, {'torch', 'transformers', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8000", "transformers", "True", "set()"]


WRONG: tuple[Any, ...] = (5, -1, 1.5, True, "x", [], [5], {}, {"a": 1}, [{}], None, 10**30)
ASKED = {
    "config.json": (
        *("architectures", "model_type", "text_config", "quantization_config", "dtype", "torch_dtype", "vocab_size"),
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "layer_types", "sliding_window", "use_sliding_window", "max_position_embeddings"),
        *("compression_config", "multi_query", "qk_rope_head_dim", "num_experts", "vision_config"),
    ),
    "tokenizer_config.json": (
        *("chat_template", "eos_token", "additional_special_tokens", "extra_special_tokens", "auto_map"),
    ),
    "special_tokens_map.json": ("unk_token", "additional_special_tokens"),
    "sentence_bert_config.json": ("max_seq_length",),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in ASKED.items() for key in keys])
def test_a_wrong_type_is_a_clear_error(tmp_path: Path, name: str, key: str) -> None:
    """Whatever stands where a number, a text or a list should: it is told, or an error with a hint."""
    folder = models.placeholder(tmp_path / "model")
    file = folder / name
    said = json.loads(file.read_text()) if file.exists() else {}
    for wrong in WRONG:
        write_json(file, {**said, key: wrong})
        try:
            suitable(profile(str(folder)), (BIG,))
        except UserError as error:
            assert (bool(error.hint), error.code[:11]) == (True, "checkpoint_")  # noqa: PT017 - not each is an error


@pytest.mark.parametrize(
    "key", ["r", "lora_alpha", "target_modules", "base_model_name_or_path", "peft_type", "use_dora"]
)
def test_a_wrong_type_of_an_adapter_is_a_clear_error(tmp_path: Path, key: str) -> None:
    """The same for what an adapter says."""
    for number, wrong in enumerate(WRONG):
        folder = adapter(tmp_path / str(number), "base", **{key: wrong})
        try:
            found = profile(str(folder))
        except UserError as error:
            assert error.hint  # noqa: PT017 - not every value is an error
        else:
            assert found.adapter
            assert isinstance(found.adapter.alpha, float | None)


@pytest.mark.parametrize(
    "absurd",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**9, "layer_types": None, "sliding_window": 4},
        {"layer_types": ["full_attention"] * 5000},
        {"vocab_size": 10**12},
        {"text_config": {"n_layer": 10**9}},
        {"num_experts": 10**7},
    ],
    ids=lambda said: str(said)[:60],
)
def test_absurd_sizes_are_refused(tmp_path: Path, absurd: dict[str, Any]) -> None:
    """A number that no model has is an error before anything is counted or made with it."""
    folder = models.placeholder(tmp_path / "model", **absurd)
    with pytest.raises(UserError) as raised:
        profile(str(folder))
    assert raised.value.code == "checkpoint_config"


def test_windows_are_counted_without_lists(tmp_path: Path) -> None:
    """Layers are counted, not laid out: kinds that are listed and those that are not give the same."""
    listed = ["sliding_attention"] * 8 + ["full_attention"] * 24
    one = engine(described(tmp_path / "one", sliding_window=128, layer_types=listed), "transformers").memory_bytes
    plain = engine(described(tmp_path / "plain"), "transformers").memory_bytes
    assert one
    assert plain
    layer = 2 * 4096 * 2
    assert plain - one == 32_768 * 8 * layer - 32 * 8 * 128 * layer


@pytest.mark.parametrize("name", ["vllm", "deepspeed", "llama_cpp"])
def test_an_engine_of_another_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Where it is not installed; where it is, it runs a plain language model, and no encoder."""
    from runtime.checkpoints import suitability

    folder = models.placeholder(tmp_path / "model")
    monkeypatch.setattr(suitability, "find_spec", lambda _: None)
    assert "sqlext[" in engine(folder, name).why
    monkeypatch.setattr(suitability, "find_spec", lambda _: True)
    assert engine(folder, name).runs
    assert not engine(models.encoder(tmp_path / "encoder"), name).runs
