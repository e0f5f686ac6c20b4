"""config.json and its kin: read, of the right types, of sizes that a model may have, and naming no code.

Alone because everything that follows counts with these numbers: a wrong type is one clear error here instead of any
error anywhere, and a number that no model has must not become an allocation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.checkpoints.folder import read_json, read_object
from runtime.errors import UserError

CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib")

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_encoder_layers", "num_decoder_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "d_ff", "vocab_size")
_HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "num_kv_heads", "head_dim"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_LENGTHS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length"),
    "sliding_window",
)
# The most that a model may say of itself, far above any there is.
_MOST = {
    **dict.fromkeys(_LAYERS, 4_096),
    **dict.fromkeys(_EXPERTS, 16_384),
    **dict.fromkeys(_HEADS, 1 << 20),
    **dict.fromkeys(_WIDTHS, 1 << 26),
    **dict.fromkeys(_LENGTHS, 1 << 40),
}
_TEXTS = ("model_type", "dtype", "torch_dtype")
_LISTS = ("architectures", "layer_types")


def read_config(body: Path) -> dict[str, Any]:
    """What config.json in the folder `body` says, of types and sizes that can be relied on.

    Raises:
        UserError: checkpoint_config, checkpoint_unreadable.
    """
    file = body / "config.json"
    if not file.exists():
        raise UserError(
            f'"{body}" holds no config.json, so it is no checkpoint of Hugging Face form.',
            code="checkpoint_config",
            hint=_nested_hint(body),
        )
    config = read_object(file)
    if not config.get("model_type"):
        raise UserError(
            f'"{file}" names no model_type.',
            code="checkpoint_config",
            hint="Save the model again with save_pretrained() of transformers 4 or later.",
        )
    check_types(file, config)
    return config


def check_types(file: Path, config: dict[str, Any]) -> None:
    """Refuse a configuration with a wrong type, or a size that no model has.

    Raises:
        UserError: checkpoint_config.
    """
    for part in _parts(file, config):
        for key, value in part.items():
            _check(file, key, value)


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a configuration says of how the weights are quantized; {} when they are not."""
    text = config.get("text_config") or {}
    places = (part.get(key) for part in (config, text) for key in ("quantization_config", "compression_config"))
    return next((said for said in places if said), {})


def _nested_hint(body: Path) -> str:
    inner = sorted(child for child in body.iterdir() if (child / "config.json").is_file()) if body.is_dir() else []
    return f'Give "{inner[0]}", which has one.' if inner else "Give the folder that save_pretrained() wrote."


def _parts(file: Path, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration and those of its parts, such as text_config."""
    left = [config]
    while left:
        part = left.pop()
        yield part
        for key, value in part.items():
            if key.endswith("_config") and value is not None:
                if not isinstance(value, dict):
                    raise _wrong(file, key, "no section with keys")
                left.append(value)


def _check(file: Path, key: str, value: Any) -> None:
    if value is None:
        return
    if key in _LISTS and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise _wrong(file, key, "no list of texts")
    if key == "layer_types" and len(value) > _MOST["num_layers"]:
        raise _wrong(file, key, f"longer than {_MOST['num_layers']:,}")
    if key in _TEXTS and not isinstance(value, str):
        raise _wrong(file, key, "no text")
    if key in _MOST and not (key == "sliding_window" and value is False):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | None):
                raise _wrong(file, key, "no whole number")
            if number is not None and number > _MOST[key]:
                raise _wrong(file, key, f"larger than {_MOST[key]:,}, which no model is")


def _wrong(file: Path, key: str, what: str) -> UserError:
    return UserError(
        f'"{file}" is damaged: {key[:80]} is {what}.',
        code="checkpoint_config",
        hint="Copy the checkpoint again, or save it again with save_pretrained().",
    )


def refuse_remote_code(folder: Path, files: Iterable[str]) -> None:
    """Refuse a checkpoint that brings code, or names some to be fetched.

    Args:
        files: names of those in the folder.

    Raises:
        UserError: checkpoint_remote_code, checkpoint_config.
    """
    names = list(files)
    if scripts := [name for name in names if name.lower().endswith(CODE)]:
        raise remote_code(folder, f"its file {scripts[0]}")
    for name in names:
        last = PurePosixPath(name).name.lower()
        if last.endswith(".json") and "config" in last and (what := _named_code(read_json(folder / name))):
            raise remote_code(folder / name, what)


def _named_code(content: Any) -> str:
    """What in a configuration names code of its own, or of a hub; '' when nothing does."""
    left: list[tuple[str, Any]] = [("", content)]
    while left:
        key, value = left.pop()
        if key == "auto_map":
            return key
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            return f'{key}="{value[:80]}", a kernel of the hub'
        if isinstance(value, dict):  # below an implementation its keys are parts of the model
            left += [(key if key.endswith("_implementation") else str(name), each) for name, each in value.items()]
        elif isinstance(value, list):
            left += [(key, each) for each in value]
    return ""


def remote_code(where: Path, what: str) -> UserError:
    """The error for a checkpoint that wants to run code of its own."""
    return UserError(
        f'"{where}" is refused: it wants to run code of its own ({what}).',
        code="checkpoint_remote_code",
        hint="Use a checkpoint that the installed transformers runs by itself, "
        "or remove the code and auto_map if it does.",
    )
