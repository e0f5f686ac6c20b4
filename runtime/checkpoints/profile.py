"""What a checkpoint is: everything its small files and weight headers tell, as data.

Alone because it answers a person's question, where `inspect` answers the engines': an adapter, a quantized checkpoint
or one that no engine here can run is described too, with the reason. It reads no weights (but for their hashes, when
asked) and imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.checkpoints.adapter import CONFIG, WEIGHTS, is_adapter, open_adapter
from runtime.checkpoints.folder import list_files, open_file, open_folder, read_object, read_text, unreadable
from runtime.checkpoints.gguf_header import SUFFIX, bits_of, gguf_files, is_gguf, read_gguf
from runtime.checkpoints.inspect import MODULES, Checkpoint, inspect, module_folders
from runtime.checkpoints.model_config import check_types, quantization_of, read_config
from runtime.checkpoints.pipelines import PIPELINE
from runtime.checkpoints.weights import check_file, check_weights, read_header
from runtime.errors import ErrorInfo, UserError
from runtime.spec import Task

SPECIAL_TOKENS = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
MAX_THREADS = 8
# Nothing is damaged, and nothing was run: what else the folder says may be told.
_DESCRIBED = ("checkpoint_unsupported", "checkpoint_pickled", "checkpoint_remote_code", "checkpoint_no_tokenizer")
_DESCRIBED_ADAPTER = ("checkpoint_adapter", "checkpoint_pickled", "checkpoint_remote_code")


@dataclass(frozen=True, slots=True)
class File:
    """A file of the checkpoint: name relative to the folder, and its SHA-256 in hexadecimal when asked for."""

    name: str
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """What adapter_config.json says.

    Attributes:
        kind: such as LORA or LORA (DoRA).
        base: the base as it is named there.
        folder: of the base, where it is on this machine; '' where it is not.
        r: rank.
        targets: the modules that it changes.
    """

    kind: str
    base: str
    folder: str
    r: int | None
    alpha: float | None
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the weights are stored: `method` as in config.json, bits of a weight, weights that share a scale."""

    method: str
    bits: int | None
    group_size: int | None


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known of a checkpoint; None = it does not say.

    Attributes:
        path: real path of the folder, or of a GGUF file.
        format: how its weights are stored: 'safetensors' or 'gguf'.
        task: what it answers; None where no engine here can run it.
        images: it reads images beside the text.
        model_arch: config.json's model_type.
        seq_length: tokens it was built to read.
        parameters: numbers in its weights; quantized weights count as the numbers they stand for.
        dtype: torch's name of the type it computes with.
        weights_bytes: of its weight files.
        chat_template: its default one, as text.
        special_tokens: by short name: bos, eos, pad, …; `additional` are the further ones.
        config: of its transformer (the text part of a model of several), for sizes.
        refusal: why it cannot be deployed, beside memory; None when it can.
    """

    path: str
    task: Task | None
    model_arch: str | None
    architectures: tuple[str, ...]
    seq_length: int | None
    vocab_size: int | None
    parameters: int | None
    dtype: str | None
    bytes: int
    weights_bytes: int
    files: tuple[File, ...]
    adapter: Adapter | None = None
    quantization: Quantization | None = None
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    additional_tokens: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    refusal: ErrorInfo | None = None
    format: str = "safetensors"
    images: bool = False


def profile(path: str, *, hashes: bool = False) -> Profile:
    """Describe the checkpoint in the folder `path`, or in a GGUF file.

    Args:
        hashes: read every file for its SHA-256.

    Raises:
        UserError: as `inspect`, for a folder that is not there, holds no checkpoint, or is damaged.
    """
    folder = open_folder(path, SUFFIX)
    if folder.is_file():
        return _gguf(folder, hashes)
    names = list_files(folder)
    if not (folder / "config.json").exists() and any(is_gguf(name) for name in names):
        return _gguf(folder, hashes)
    files = _files(folder, names, hashes)
    if PIPELINE in names:
        return _pipeline(folder, files)
    if is_adapter(folder):
        return _adapter(folder, files)
    return _model(folder, files)


def _model(folder: Path, files: tuple[File, ...]) -> Profile:
    found, refusal = _gates(folder)
    body = _body(folder)
    config = read_config(body)
    text = config.get("text_config") or config
    weights = [file for file in files if _is_weight(file.name, folder, body)]
    quantization = _quantization(config)
    return Profile(
        path=str(folder),
        task=found.task if found else None,
        model_arch=str(config.get("model_type")),
        architectures=tuple(str(name) for name in config.get("architectures") or ()),
        seq_length=found.max_model_len if found else _number(text, "max_position_embeddings"),
        vocab_size=_number(text, "vocab_size"),
        parameters=_parameters(body, found, quantization, refusal),
        dtype=found.dtype if found else _text(config.get("dtype") or config.get("torch_dtype")),
        bytes=sum(file.bytes for file in files),
        weights_bytes=sum(file.bytes for file in weights),
        files=files,
        quantization=quantization,
        config=text,
        refusal=refusal,
        images=bool(found and found.images),
        **_words(folder),
    )


def _pipeline(folder: Path, files: tuple[File, ...]) -> Profile:
    """A folder of diffusers."""
    found = inspect(str(folder))
    return Profile(
        path=str(folder),
        task=found.task,
        model_arch=found.architectures[0],
        architectures=found.architectures,
        seq_length=None,
        vocab_size=found.vocab_size,
        parameters=found.num_parameters,
        dtype=found.dtype,
        bytes=found.bytes,
        weights_bytes=sum(file.bytes for file in files if file.name.endswith(".safetensors")),
        files=files,
    )


def _adapter(folder: Path, files: tuple[File, ...]) -> Profile:
    config = read_object(folder / CONFIG)
    base, counted, refusal = "", dict[str, int](), None
    try:
        opened = open_adapter(str(folder))
        base, counted = opened.base, check_file(opened.weights)
    except UserError as error:
        if error.code not in _DESCRIBED_ADAPTER:
            raise
        refusal = error.info
    targets, alpha = config.get("target_modules") or (), config.get("lora_alpha")
    targets = targets if isinstance(targets, str | list) else ()
    kind = str(config.get("peft_type") or "LORA")
    kind += " (DoRA)" if config.get("use_dora") else " (rsLoRA)" if config.get("use_rslora") else ""
    return Profile(
        path=str(folder),
        task=None,
        model_arch=None,
        architectures=(),
        seq_length=None,
        vocab_size=None,
        parameters=sum(counted.values()) if counted else None,
        dtype=None,
        bytes=sum(file.bytes for file in files),
        weights_bytes=sum(file.bytes for file in files if file.name == WEIGHTS),
        files=files,
        adapter=Adapter(
            kind,
            str(config.get("base_model_name_or_path") or ""),
            base,
            _number(config, "r"),
            float(alpha) if isinstance(alpha, int | float) and not isinstance(alpha, bool) else None,
            (targets,) if isinstance(targets, str) else tuple(sorted(map(str, targets))),
        ),
        refusal=refusal,
        **_words(folder),
    )


_GGUF_SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}
_GGUF_TOKENS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # spelt so there
_GGUF_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _gguf(place: Path, hashes: bool) -> Profile:
    """The model of a GGUF file, or of the one in a folder."""
    folder = place if place.is_dir() else place.parent
    beside = list_files(folder) if place.is_dir() else tuple(each.name for each in folder.iterdir())
    parts = gguf_files(place, beside)
    heads = [read_gguf(folder / part) for part in parts]
    first = heads[0]
    counted: dict[str, int] = {}
    for kind, count in (pair for head in heads for pair in head.counted.items()):
        counted[kind] = counted.get(kind, 0) + count
    main = max(counted, key=lambda kind: counted[kind], default="F32")
    config = {name: value for key, name in _GGUF_SIZES.items() if (value := first.of_model(key)) is not None}
    config["vocab_size"] = len(first.tokens) or first.of_model("vocab_size")
    check_types(folder / parts[0], config)
    files = _files(folder, beside if place.is_dir() else parts, hashes)
    named = {
        short: first.values.get(f"tokenizer.ggml.{_GGUF_TOKENS.get(short, short)}_token_id")
        for short in SPECIAL_TOKENS
    }
    return Profile(
        path=str(place),
        task=Task.EMBED if first.of_model("pooling_type") is not None else Task.GENERATE,
        model_arch=first.architecture or None,
        architectures=(),
        seq_length=_whole(first.of_model("context_length")),
        vocab_size=_whole(config["vocab_size"]),
        parameters=sum(counted.values()),
        dtype=_GGUF_NAMES.get(main, main.lower()),
        bytes=sum(file.bytes for file in files),
        weights_bytes=sum(file.bytes for file in files if file.name in parts),
        files=files,
        quantization=None if main in _GGUF_NAMES else Quantization("gguf", bits_of(main), None),
        chat_template=_text(first.values.get("tokenizer.chat_template")),
        special_tokens={
            short: first.tokens[number]
            for short, number in named.items()
            if isinstance(number, int) and 0 <= number < len(first.tokens)
        },
        config=config,
        format="gguf",
    )


def _gates(folder: Path) -> tuple[Checkpoint | None, ErrorInfo | None]:
    """The folder as the engines see it, or why none of them takes it."""
    try:
        return inspect(str(folder)), None
    except UserError as error:
        if error.code not in _DESCRIBED or not (_body(folder) / "config.json").is_file():
            raise
        return None, error.info


def _body(folder: Path) -> Path:
    """Where the transformer itself lies."""
    if not (folder / MODULES).exists():
        return folder
    try:
        return module_folders(folder)[0]
    except UserError:  # told by the gates
        return folder


def _is_weight(name: str, folder: Path, body: Path) -> bool:
    """Whether a file is of the weights; those beside an index do not count twice."""
    return name.endswith(".safetensors") and (folder / name).parent == body


def _files(folder: Path, names: tuple[str, ...], hashes: bool) -> tuple[File, ...]:
    try:
        sizes = [(folder / name).stat().st_size for name in names]
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
            sums = list(threads.map(lambda name: sha256_of(folder / name), names)) if hashes else [None] * len(names)
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error) from None
    return tuple(File(*entry) for entry in zip(names, sizes, sums, strict=True))


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content in hexadecimal, as `sha256sum` prints it."""
    with open_file(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- numbers ---------------------------------------------------------------------------------------------------


def _quantization(config: Mapping[str, Any]) -> Quantization | None:
    said = quantization_of(config)
    if not said:
        return None
    method = str(said.get("quant_method") or "unknown").lower()
    bits = _number(said, "bits", "w_bit")
    if method == "bitsandbytes":
        bits = 4 if said.get("load_in_4bit") else 8
    elif bits is None:
        bits = {"fp8": 8, "mxfp8": 8, "fbgemm_fp8": 8, "mxfp4": 4, "nvfp4": 4, "bitnet": 2}.get(method)
    return Quantization(method, bits, _number(said, "group_size", "q_group_size"))


def _parameters(
    body: Path, found: Checkpoint | None, quantization: Quantization | None, refusal: ErrorInfo | None
) -> int | None:
    if refusal and refusal.code == "checkpoint_pickled":
        return None
    if quantization and quantization.bits:
        return _unpacked(body, quantization)
    names = tuple(child.name for child in body.iterdir())
    return found.num_parameters if found else check_weights(body, names).parameters


# Tensors that belong to the packing: scales, zero points and orders, not numbers of the model.
_PACKING = ("qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "absmax", "quant_map", "SCB")
_PACKING_PARTS = (".quant_state.", ".nested_", "_scales", ".weight_format")
_PACKED = {"I32": 32, "U8": 8, "I8": 8}


def _unpacked(body: Path, quantization: Quantization) -> int:
    """Numbers that packed weights stand for: a stored whole number holds several of them."""
    total = 0
    for name, dtype, count in _tensors(body):
        if name.rpartition(".")[2] in _PACKING or any(part in name for part in _PACKING_PARTS):
            continue
        packed = dtype in _PACKED and quantization.bits
        total += count * _PACKED[dtype] // (quantization.bits or 1) if packed else count
    return total


def _tensors(body: Path) -> list[tuple[str, str, int]]:
    """Name, type and count of numbers of every tensor."""
    found: list[tuple[str, str, int]] = []
    for file in check_weights(body, tuple(child.name for child in body.iterdir())).files:
        header, _ = read_header(body / file)
        found += [(name, entry["dtype"], math.prod(entry["shape"])) for name, entry in header.items()]
    return found


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these keys that holds a positive whole number."""
    return next((number for key in keys if (number := _whole(config.get(key)))), None)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


# -- words -----------------------------------------------------------------------------------------------------


def _words(folder: Path) -> dict[str, Any]:
    """Chat template and special tokens, as arguments of a `Profile`."""
    file = folder / "tokenizer_config.json"
    said = read_object(file) if file.exists() else {}
    further = folder / "special_tokens_map.json"
    said = {**(read_object(further) if further.exists() else {}), **said}
    tokens = {short: token for short in SPECIAL_TOKENS if (token := _token(said.get(f"{short}_token")))}
    further_tokens = said.get("additional_special_tokens") or said.get("extra_special_tokens") or ()
    additional = further_tokens.values() if isinstance(further_tokens, dict) else further_tokens
    additional = additional if isinstance(additional, Iterable) else ()
    return {
        "chat_template": _chat_template(folder, said),
        "special_tokens": tokens,
        "additional_tokens": tuple(token for item in additional if (token := _token(item))),
    }


def _chat_template(folder: Path, said: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_text(file)
    if (folder / "chat_template.json").exists():
        said = read_object(folder / "chat_template.json")
    template = said.get("chat_template")
    if isinstance(template, list):  # several with names; the one called default counts
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default") or next(iter(named.values()), None)
    return _text(template)


def _token(said: object) -> str | None:
    return _text(said.get("content") if isinstance(said, dict) else said)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
