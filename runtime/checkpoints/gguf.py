"""GGUF: a checkpoint as the one file that llama.cpp and its kin read.

Alone because of its own names, its own order of rotated weights and its own form of tokenizer. The file itself and
the quantisation are those of the `gguf` package; what goes into it follows llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from runtime.checkpoints.convert import GGUF_TYPES, Converted, Output
from runtime.checkpoints.folder import read_object
from runtime.checkpoints.model_config import quantization_of
from runtime.checkpoints.model_folder import ModelFolder
from runtime.checkpoints.output import whole
from runtime.checkpoints.skeleton import skeleton
from runtime.checkpoints.tensors import Stored, cast
from runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import gguf

_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
_UNUSED_BYTES = 64 * 2**20  # room for the metadata and the tokenizer

# How a byte-level tokenizer cuts a text before it merges, and llama.cpp's name for that.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}


def write_gguf(model: ModelFolder, tensors: Mapping[str, Stored], output: Output, kind: str) -> Converted:
    """Write a model as one GGUF file: `output.target` where that ends in .gguf, else model-<kind>.gguf below it.

    Args:
        kind: type of the matrices, one of GGUF_TYPES; vectors stay float32, and a matrix whose rows do not fit into
            blocks becomes f16.

    Raises:
        UserError: gguf_missing, gguf_unsupported, option_value.
    """
    kind = _require(kind, model)
    import gguf

    config = skeleton(model.path).config
    arch = gguf.MODEL_ARCH[_ARCHITECTURES[config.model_type]]
    planned = [_plan(name, tensor, config, arch, kind) for name, tensor in tensors.items()]
    planned += _rope_factors(config)
    total = sum(each.bytes for each in planned)
    single = output.target.suffix == ".gguf"
    with whole(output.target, overwrite=output.overwrite, bytes_needed=total + _UNUSED_BYTES) as place:
        if not single:
            place.mkdir()
        file = place if single else place / f"model-{kind}.gguf"
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
        _describe(writer, model, config, kind)
        _add_tokenizer(writer, model.path, int(config.vocab_size))
        _write(writer, planned, output.counting(total))
        difference = output.checked(place)
    return output.made(list(tensors.values()), kind, difference)


@dataclass(frozen=True, slots=True)
class _Planned:
    """A tensor as it will stand in the file; `read` makes its numbers, quantised."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    read: Callable[[], np.ndarray[Any, Any]]

    @property
    def bytes(self) -> int:
        from gguf.quants import quant_shape_to_byte_shape

        one = {"F32": 4, "F16": 2}.get(self.kind.name)
        shape = self.shape if one else quant_shape_to_byte_shape(self.shape, self.kind)
        return int(np.prod(shape)) * (one or 1)


def _require(kind: str, model: ModelFolder) -> str:
    """The kind, when this model can be written so here."""
    if not find_spec("gguf"):
        raise UserError(
            "Writing GGUF needs the package gguf.", code="gguf_missing", hint='Run: pip install "sqlext[gguf]".'
        )
    if kind not in GGUF_TYPES:
        near = did_you_mean(kind, GGUF_TYPES)
        raise UserError(
            f'"{kind[:40]}" is no type of GGUF that can be written here.',
            code="option_value",
            hint=f'Did you mean "{near}"?' if near else f"Known: {', '.join(GGUF_TYPES)}.",
        )
    quantized = bool(quantization_of(model.config))
    if quantized or model.config.get("model_type") not in _ARCHITECTURES:
        what = "quantized" if quantized else f"of the type {model.config['model_type']}"
        raise _unsupported(f'"{model.path}" is {what}')
    return kind


def _unsupported(what: str) -> UserError:
    return UserError(
        f"{what}, which is not written as GGUF here.",
        code="gguf_unsupported",
        hint=f"Written are plain checkpoints of {', '.join(_ARCHITECTURES)}; llama.cpp's own converter knows more.",
    )


def _plan(name: str, tensor: Stored, config: Any, arch: Any, kind: str) -> _Planned:
    import gguf

    names = gguf.get_tensor_name_map(arch, int(config.num_hidden_layers))
    new = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if new is None:
        raise _unsupported(f"The tensor {name[:120]} has no place in a {config.model_type} of llama.cpp")
    wanted = gguf.GGMLQuantizationType[kind.upper()] if len(tensor.shape) > 1 else gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    if tensor.shape[-1] % block:
        wanted = gguf.GGMLQuantizationType.F16
    heads = _rotated_heads(name, config)

    def read() -> np.ndarray[Any, Any]:
        narrow = cast(tensor, torch.float16) if wanted is gguf.GGMLQuantizationType.F16 else tensor
        numbers = narrow.load().float()
        if heads:  # llama.cpp rotates pairs that lie together, transformers halves of a head
            numbers = numbers.reshape(heads, 2, -1, *numbers.shape[1:]).transpose(1, 2).reshape(numbers.shape)
        return gguf.quantize(numbers.contiguous().numpy(), wanted)

    return _Planned(new, tensor.shape, wanted, read)


def _rotated_heads(name: str, config: Any) -> int:
    """The number of heads in a weight that llama.cpp keeps in another order; 0 for all others."""
    if _ARCHITECTURES[config.model_type] != "LLAMA":
        return 0
    if re.search(r"\.q_proj\.(weight|bias)$", name):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if re.search(r"\.k_proj\.(weight|bias)$", name) else 0


def _rope_factors(config: Any) -> list[_Planned]:
    """Llama 3's stretched frequencies, as the tensor that llama.cpp divides its own by."""
    import gguf

    rope = config.rope_parameters
    if rope.get("rope_type", "default") in ("default", "linear"):
        return []
    if rope["rope_type"] != "llama3":
        raise _unsupported(f'The rope_type "{rope["rope_type"]}" of the positions is one')
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head = _head_dim(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = (plain / stretched).numpy()
    return [_Planned("rope_freqs.weight", factors.shape, gguf.GGMLQuantizationType.F32, lambda: factors)]


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _describe(writer: gguf.GGUFWriter, model: ModelFolder, config: Any, kind: str) -> None:
    import gguf

    rope = config.rope_parameters
    writer.add_name(model.path.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if _ARCHITECTURES[config.model_type] == "LLAMA":
        writer.add_rope_dimension_count(_head_dim(config))
        writer.add_vocab_size(config.vocab_size)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    words = {"f32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[words.get(kind, f"MOSTLY_{kind.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write(writer: gguf.GGUFWriter, planned: list[_Planned], wrote: Callable[[int], None]) -> None:
    """The file, tensor by tensor."""
    for each in planned:
        dtype = {"F32": np.float32, "F16": np.float16}.get(each.kind.name)
        if dtype:
            writer.add_tensor_info(each.name, each.shape, np.dtype(dtype), each.bytes)
        else:
            from gguf.quants import quant_shape_to_byte_shape

            stored = quant_shape_to_byte_shape(each.shape, each.kind)
            writer.add_tensor_info(each.name, stored, np.dtype(np.uint8), each.bytes, raw_dtype=each.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in planned:
            writer.write_tensor_data(each.read())
            wrote(each.bytes)
    finally:
        writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """The tokenizer of tokenizer.json: a byte-level one, or one in the manner of SentencePiece.

    Raises:
        UserError: gguf_unsupported, checkpoint_no_tokenizer, checkpoint_config.
    """
    import gguf

    logging.getLogger("gguf").setLevel(logging.ERROR)  # its hints are for those who write its metadata by hand
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f'"{folder}" holds no tokenizer.json, which GGUF is made from.',
            code="checkpoint_no_tokenizer",
            hint="Save the tokenizer again: AutoTokenizer.from_pretrained(folder).save_pretrained(folder).",
        )
    content = read_object(folder / "tokenizer.json")
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise _unsupported(f'The tokenizer of "{folder}" is {model.get("type")}')
    added = {int(token["id"]): token for token in content.get("added_tokens") or ()}
    texts = {int(number): text for text, number in model["vocab"].items()}
    texts |= {number: str(token["content"]) for number, token in added.items()}
    sentencepiece = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else _cut(content, folder))
    if beyond := [number for number in texts if number >= vocab_size]:
        raise _unsupported(f"The tokenizer has the number {max(beyond)}, the model embeds {vocab_size} of them: it")
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(vocab_size)])
    writer.add_token_types(
        [_token_type(number, texts, added, model.get("unk_token")) for number in range(vocab_size)]
    )
    if sentencepiece:
        ranks = {"".join(pair if isinstance(pair, list) else pair.split(" ")): -float(rank) for rank, pair in
                 enumerate(model.get("merges") or (), 1)}  # fmt: skip
        writer.add_token_scores([ranks.get(texts.get(number, ""), 0.0) for number in range(vocab_size)])
        writer.add_add_space_prefix(_prefixes_space(content))
    gguf.SpecialVocab(folder, load_merges=not sentencepiece, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _token_type(number: int, texts: Mapping[int, str], added: Mapping[int, Any], unknown: str | None) -> int:
    import gguf

    text = texts.get(number)
    if text is None:
        return int(gguf.TokenType.UNUSED)
    if text == unknown:
        return int(gguf.TokenType.UNKNOWN)
    if number in added:
        return int(gguf.TokenType.CONTROL if added[number].get("special") else gguf.TokenType.USER_DEFINED)
    return int(gguf.TokenType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else gguf.TokenType.NORMAL)


def _cut(content: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name for how the tokenizer cuts a text."""
    cutter = content.get("pre_tokenizer") or {}
    steps = cutter.get("pretokenizers") or [cutter]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (name := _CUTS.get(str((steps[0].get("pattern") or {}).get("Regex")))):
        return name
    raise _unsupported(f'The way the tokenizer of "{folder}" cuts a text is one')


def _prefixes_space(content: Mapping[str, Any]) -> bool:
    """Whether a text is read as if it began with a space."""
    cutter, normalizer = content.get("pre_tokenizer") or {}, content.get("normalizer") or {}
    if cutter.get("type") == "Metaspace":
        return cutter.get("prepend_scheme", "always") != "never"
    return any(step.get("type") == "Prepend" for step in normalizer.get("normalizers") or [normalizer])
