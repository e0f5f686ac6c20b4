"""Which engines can run a checkpoint, on which machines, and the memory that each needs.

Alone because it is arithmetic on what `profile` found, without loading anything. What an engine needs:

    memory = weights + cache + work + runtime

- weights: the numbers in the type the engine computes with; quantized ones as they are stored.
- cache: keys and values of every layer, for the tokens that the engine holds at once: its batch limits, at most its
  rows of the model's full length; a layer with a window holds no more than that of each row, one without attention
  holds nothing.
- work: what one layer makes of the tokens of a batch, twice its inner size and four times its width, and the scores
  over the vocabulary in float32 for each row.
- runtime: Python, torch and its libraries.

`least_bytes` is the same for one row of 2,048 tokens. An engine runs where that fits; where the whole does not, fewer
rows run at once.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime import engines
from runtime.checkpoints.architectures import reads_text_alone
from runtime.checkpoints.profile import Profile
from runtime.engines import choice
from runtime.spec import Task

LEAST_TOKENS = 2_048
RUNTIME_BYTES = {"cpu": 700 << 20, "cuda": 600 << 20}
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_GENERATION_LIMITS = {"cpu": (32, 32_768), "cuda": (128, 262_144)}
_READING_LIMITS = {"cpu": (64, 768), "cuda": (256, 65_536)}
# Rows and padded tokens that run at once, as the engines set them: they import torch, and this module must not.

_TASKS = {
    "transformers": Task.GENERATE,
    "openvino": Task.GENERATE,
    "vision": Task.GENERATE,
    "vllm": Task.GENERATE,
    "deepspeed": Task.GENERATE,
    "llama_cpp": Task.GENERATE,
    "embeddings": Task.EMBED,
    "classification": Task.CLASSIFY,
    "reranking": Task.RANK,
    "diffusers": Task.DRAW,
    "transcription": Task.TRANSCRIBE,
    "speech": Task.SPEAK,
}
_SMALL_WORK = ("diffusers", "transcription", "speech")  # beside their weights; a quarter of these is taken for it
_ENGINE_PACKAGES = {  # by engine: the package, and the extra that brings it, on a CPU and on GPUs
    "vllm": ("vllm", "vllm-cpu", "vllm"),
    "deepspeed": ("deepspeed", "deepspeed", "deepspeed"),
    "llama_cpp": ("llama_cpp", "llama-cpp", "llama-cpp"),
    "openvino": ("openvino_genai", "openvino", "openvino"),
}
_GGUF_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # that can be written as GGUF here
_MORE_RUNTIME_BYTES = {"vllm": 1 << 30}  # measured: 2 GB with a small model
_LLAMA_CPP_LIMITS = (1, 8_192)  # llama_cpp decodes row by row
_NO_CHECKPOINT = {"openai": "it asks a provider and loads no checkpoint", "echo": "it repeats its prompts"}
_PACKAGES = {  # what transformers needs for checkpoints that are quantized already
    "aqlm": ("aqlm", "accelerate"),
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel", "accelerate"),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "compressed-tensors": ("compressed_tensors",),
    "fp8": ("accelerate",),
    "gptq": ("gptqmodel", "optimum"),
    "hqq": ("hqq", "accelerate"),
    "mxfp4": ("accelerate",),
    "torchao": ("torchao",),
}
_UNPACKED_ON_CPU = ("fp8", "mxfp4")  # transformers makes bfloat16 of them where there is no GPU


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that models may run on.

    Attributes:
        name: '' for the one this process runs on.
        memory_bytes: for programs; of a container its limit.
        gpus: memory of each GPU in bytes, 0 where it is not known.
    """

    name: str
    memory_bytes: int
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Suitability:
    """Whether an engine can run a checkpoint.

    Attributes:
        machines: names of those where it fits.
        device: 'cpu' or 'cuda', where it would run; '' when it cannot at all.
        dtype: the type that it would compute with.
        memory_bytes: with the engine's usual batches.
        least_bytes: with one row of `LEAST_TOKENS`.
        why: why it cannot, or what to know about it.
    """

    engine: str
    runs: bool
    machines: tuple[str, ...] = ()
    device: str = ""
    dtype: str = ""
    memory_bytes: int | None = None
    least_bytes: int | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class _Need:
    """Bytes that stay (weights, runtime) and bytes of a row and of a token that is held."""

    device: str
    dtype: str
    fixed: int
    by_row: int
    by_token: int
    rows: int
    tokens: int

    @property
    def whole(self) -> int:
        return self.fixed + self.rows * self.by_row + self.tokens * self.by_token

    @property
    def least(self) -> int:
        return self.fixed + self.by_row + min(LEAST_TOKENS, self.tokens) * self.by_token

    def tokens_in(self, room: int) -> int:
        """Tokens that may be held at once in so many bytes, in round numbers."""
        return max(0, room - self.fixed - self.rows * self.by_row) // max(1, self.by_token) // 1024 * 1024


def suitable(found: Profile, machines: Sequence[Machine], base: Profile | None = None) -> list[Suitability]:
    """Every installed engine, those that can run the checkpoint first, and of these those that need no other package.

    Args:
        machines: at least one.
        base: profile of an adapter's base, where it is known.
    """
    judged = [_judge(engine, found, machines, base) for engine in sorted(engines.available())]
    task, images = (base or found).task, found.images

    def order(each: Suitability) -> tuple[bool, ...]:
        fits = _TASKS.get(each.engine) is not task, images is not (each.engine == "vision")
        return not each.runs, *fits, each.engine in _ENGINE_PACKAGES

    return sorted(judged, key=order)


def _judge(engine: str, found: Profile, machines: Sequence[Machine], base: Profile | None) -> Suitability:
    if engine in _NO_CHECKPOINT:
        return Suitability(engine, False, why=_NO_CHECKPOINT[engine])
    if engine not in _TASKS:
        return Suitability(engine, False, why="it comes from another package and does not say what it can run")
    if found.refusal:
        return Suitability(engine, False, why=f"{found.refusal.message} {found.refusal.hint or ''}".strip())
    if found.adapter:
        return _judge_adapter(engine, found, machines, base)
    if why := _cannot(engine, found) or _not_installed(engine, machines):
        return Suitability(engine, False, why=why)
    needs = [(machine, _need(engine, found, machine)) for machine in machines]
    fitting = [(machine, need) for machine, need in needs if need.least <= _room(machine, need)]
    machine, need = max(fitting or needs, key=lambda pair: _room(*pair) - pair[1].whole)
    notes = [_note(engine, found), _tight(machine, need)]
    return Suitability(
        engine,
        bool(fitting),
        tuple(machine.name for machine, _ in fitting),
        need.device,
        need.dtype,
        need.whole,
        need.least,
        "; ".join(note for note in notes if note),
    )


def _judge_adapter(engine: str, found: Profile, machines: Sequence[Machine], base: Profile | None) -> Suitability:
    """An adapter runs where its base does, with its own weights beside."""
    assert found.adapter
    if _TASKS[engine] is not Task.GENERATE:
        return Suitability(engine, False, why="adapters are put on models that generate")
    if engine in ("llama_cpp", choice.FASTEST):
        return Suitability(engine, False, why="it takes no adapters; merge the two")
    if engine == "vllm" and "DoRA" in found.adapter.kind:
        return Suitability(engine, False, why="it takes no DoRA adapters; merge the two")
    if base is None:
        name = found.adapter.base or "which it does not name"
        return Suitability(engine, False, why=f"its base, {name}, is no folder of this machine")
    alone = _judge(engine, base, machines, None)
    if alone.memory_bytes is None or alone.least_bytes is None:
        return alone
    more = found.weights_bytes
    why = "; ".join(note for note in (f"with its base {base.path}", alone.why) if note)
    return replace(alone, memory_bytes=alone.memory_bytes + more, least_bytes=alone.least_bytes + more, why=why)


def _cannot(engine: str, found: Profile) -> str:
    """Why an engine cannot run a checkpoint on whatever machine; '' when it can."""
    wanted = _TASKS[engine]
    if found.format == "gguf":
        return "" if engine == "llama_cpp" else "it reads safetensors, and this is GGUF"
    embeds = wanted is Task.EMBED and found.task is Task.GENERATE
    if found.task is not wanted and not embeds:
        return f"the checkpoint is made to {found.task}, not to {wanted}"
    if why := _blind(engine, found):
        return why
    if engine == choice.FASTEST:
        return choice.cannot_carry(found.config)
    return _not_written_as_gguf(found) if engine == "llama_cpp" else _not_unpacked(engine, found)


def _not_unpacked(engine: str, found: Profile) -> str:
    """Why an engine cannot read weights that are quantized already; '' when it can."""
    if found.quantization is None or engine == "vllm":  # which has kernels of its own
        return ""
    method = found.quantization.method
    if method not in _PACKAGES:
        return f"weights quantized by {method} are not known here"
    missing = [package for package in _PACKAGES[method] if find_spec(package) is None]
    install = " ".join(package.replace("_", "-") for package in missing)
    return f"weights quantized by {method} need: pip install {install}" if missing else ""


def _not_written_as_gguf(found: Profile) -> str:
    if found.quantization is not None:
        return "its quantized weights cannot be written as GGUF here"
    if found.config.get("model_type") not in _GGUF_TYPES:
        return f"only {', '.join(_GGUF_TYPES)} can be written as GGUF here"
    return ""


def _not_installed(engine: str, machines: Sequence[Machine]) -> str:
    """What to install for an engine whose package is not here; '' when nothing."""
    if engine not in _ENGINE_PACKAGES:
        return ""
    package, on_cpu, on_gpus = _ENGINE_PACKAGES[engine]
    if find_spec(package):
        return ""
    extra = on_gpus if any(machine.gpus for machine in machines) else on_cpu
    return f'it is not installed: pip install "sqlext[{extra}]"'


def _blind(engine: str, found: Profile) -> str:
    """Why an engine and a checkpoint do not see alike; '' when they do."""
    if engine == "vision" and not found.images:
        return "the checkpoint reads no images"
    if engine in ("transformers", *_ENGINE_PACKAGES) and found.images and not reads_text_alone(found.architectures):
        return "the checkpoint reads images, which this engine does not"
    return ""


def _note(engine: str, found: Profile) -> str:
    if engine == "embeddings" and found.task is Task.GENERATE:
        return 'with pretrainedModelType="custom/bge"'
    return ""


def _tight(machine: Machine, need: _Need) -> str:
    """What to know where the usual batches do not fit."""
    room = _room(machine, need)
    where = (
        f"one GPU of {machine.name or 'this machine'}" if need.device == "cuda" else machine.name or "this machine"
    )
    if need.least > room:
        spread = math.ceil(need.least / room)
        if need.device == "cuda" and spread <= len(machine.gpus):
            return f'needs {spread} GPUs: !llm setup "gpus_per_worker={spread}"'
        return f"needs {gigabytes(need.least)} at the least, and {where} has {gigabytes(room)}"
    if need.whole > room:
        tokens = need.tokens_in(room)
        limit = f'backend.max_num_batched_tokens="{tokens}"' if tokens else 'backend.max_num_seqs="1"'
        return f"fits into {where} ({gigabytes(room)}) with fewer tokens at once: {limit}"
    return ""


def gigabytes(count: int) -> str:
    """Bytes for a person: 14.2 GB."""
    return f"{count / 1e9:.1f} GB"


def _room(machine: Machine, need: _Need) -> int:
    if need.device == "cpu":
        return machine.memory_bytes
    return max(machine.gpus) or machine.memory_bytes  # not known: as if it had the machine's


# -- what an engine needs ----------------------------------------------------------------------------------------


def _need(engine: str, found: Profile, machine: Machine) -> _Need:
    device = "cuda" if machine.gpus else "cpu"
    dtype = _dtype(found.dtype, device)
    size = DTYPE_BYTES[dtype]
    if engine in _SMALL_WORK:
        weights = _weights(found, device, size)
        return _Need(device, dtype, weights + weights // 4 + RUNTIME_BYTES[device], 0, 0, 1, 1)
    generates = _TASKS[engine] is Task.GENERATE
    rows, tokens = (_GENERATION_LIMITS if generates else _READING_LIMITS)[device]
    if engine == "llama_cpp":
        rows, tokens = _LLAMA_CPP_LIMITS
    length = found.seq_length or tokens
    tokens = min(tokens, rows * length)
    config = found.config
    width, inner = _width(config), _first(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff")
    work = (2 * (inner or 4 * width) + 4 * width) * size
    cached, windowed = _cache(config, size, length) if generates else (0, 0)
    scores = 4 * (found.vocab_size or 0) if generates else 0
    return _Need(
        device,
        dtype,
        _weights(found, device, size) + RUNTIME_BYTES[device] + _MORE_RUNTIME_BYTES.get(engine, 0),
        windowed + scores,
        cached + work,
        rows,
        tokens,
    )


def _dtype(own: str | None, device: str) -> str:
    """The type that the engines choose: the checkpoint's own unless it is slow or impossible on the device."""
    known = own if own in DTYPE_BYTES else "float32"
    return "float32" if known == "float16" and device == "cpu" else known


def _weights(found: Profile, device: str, size: int) -> int:
    if found.quantization is None:
        return (found.parameters or 0) * size
    if device == "cpu" and found.quantization.method in _UNPACKED_ON_CPU:
        return (found.parameters or 0) * 2
    return found.weights_bytes


def _cache(config: Mapping[str, Any], size: int, length: int) -> tuple[int, int]:
    """Bytes of keys and values for each token that is held, and for each row whatever its tokens."""
    layers = _first(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers") or 0
    window = _first(config, "sliding_window") if config.get("use_sliding_window", True) else None
    if kinds := config.get("layer_types"):
        full, sliding = (
            sum(kind in ("full_attention", "attention") for kind in kinds),
            kinds.count("sliding_attention"),
        )
    else:
        full, sliding = (0, layers) if window else (layers, 0)
    if window is None or window >= length:
        full, sliding = full + sliding, 0
    layer = _key_and_value(config) * size
    return full * layer, sliding * layer * (window or 0)


def _key_and_value(config: Mapping[str, Any]) -> int:
    """Numbers that one layer keeps of a token."""
    heads = _first(config, "num_attention_heads", "n_head", "n_heads", "num_heads") or 1
    if rope := _first(config, "qk_rope_head_dim"):  # keys and values of different widths, kept for each head
        return heads * (rope + (_first(config, "qk_nope_head_dim") or 0) + (_first(config, "v_head_dim") or 0))
    own = 1 if config.get("multi_query") and not config.get("new_decoder_architecture") else heads
    kept = _first(config, "num_key_value_heads", "num_kv_heads") or own
    return 2 * kept * (_first(config, "head_dim") or _width(config) // heads)


def _width(config: Mapping[str, Any]) -> int:
    return _first(config, "hidden_size", "n_embd", "d_model") or 0


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((value for key in keys if isinstance(value := config.get(key), int) and value > 0), None)


# -- this machine ------------------------------------------------------------------------------------------------


def this_machine() -> Machine:
    """Memory and GPUs of the machine this process runs on; starts nothing and imports no torch."""
    import psutil

    return Machine("", min(psutil.virtual_memory().total, _container_limit()), _gpus())


def _container_limit() -> int:
    """Bytes that the control group of this process may use."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        said = Path(file).read_text(encoding="ascii").strip() if Path(file).is_file() else ""
        if said.isdigit():
            return int(said)
    return 1 << 62


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _gpus() -> tuple[int, ...]:
    """Memory of each NVIDIA GPU, by the driver's own library; () where there is none or none is to be seen."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return ()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ()
    count, device, memory = ctypes.c_uint(), ctypes.c_void_p(), _Memory()
    if nvml.nvmlInit_v2():
        return ()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    found = []
    for index in range(count.value):
        nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
        if not nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)):
            found.append(int(memory.total))
    nvml.nvmlShutdown()
    return tuple(found)
