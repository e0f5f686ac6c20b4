"""LoRA adapters: which folder is one, whether it may be loaded, and which base it belongs to.

Alone because serving, merging and the error for a folder that is only an adapter all ask this, and none of it needs
torch or peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.checkpoints.folder import BASE_LINK, list_files, open_folder, read_object
from runtime.checkpoints.inspect import TOKENIZERS
from runtime.checkpoints.model_config import refuse_remote_code
from runtime.checkpoints.weights import check_file, pickled
from runtime.errors import UserError
from runtime.prompts.style import FORMAT_FILE

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"

# The base is changed when training begins with these, so its own weights are not what the adapter belongs to.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")
# What cannot be worked into the weights of linear layers, or changes more than them.
_BEYOND_LORA = (
    *("trainable_token_indices", "target_parameters", "lora_bias", "layer_replication", "arrow_config"),
    *("alora_invocation_tokens", "use_bdlora", "use_qalora", "monteclora_config", "kasa_config", "mica"),
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that may be loaded.

    Attributes:
        path: real path of its folder.
        weights: its weight file; a pickled one only where that was allowed.
        config: what adapter_config.json says.
        base: real path of the base that it comes with or names; '' when there is none here.
    """

    path: Path
    weights: Path
    config: Mapping[str, Any]
    base: str

    @property
    def has_tokenizer(self) -> bool:
        """Whether it comes with a tokenizer, which then takes the place of its base's."""
        names = {child.name for child in self.path.iterdir()}
        return any(names.issuperset(kind) for kind in TOKENIZERS)

    @property
    def has_style(self) -> bool:
        """Whether it says how conversations are written for it."""
        return self.has_tokenizer or (self.path / FORMAT_FILE).exists()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def open_adapter(path: str, *, allow_pickle: bool = False) -> Adapter:
    """The adapter in the folder `path`.

    Raises:
        UserError: checkpoint_adapter, it is none or of another kind; checkpoint_pickled, _corrupt, _no_weights,
            _remote_code, _link, and those of `open_folder`.
    """
    folder = open_folder(path)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f'"{folder}" holds no {CONFIG}, so it is no adapter.',
            code="checkpoint_adapter",
            hint="Give the folder that a LoRA training has saved, such as …/finetune_model/final.",
        )
    refuse_remote_code(folder, list_files(folder))
    config = read_object(folder / CONFIG)
    _require_lora(folder, config)
    return Adapter(folder, _weights(folder, allow_pickle), config, _base(folder, config))


def model_and_adapter(path: str, adapter: str) -> tuple[str, str]:
    """The base and the adapter that a deployment means: '' = none. A folder of an adapter stands for both.

    Args:
        path: folder of a model or of an adapter.
        adapter: folder of an adapter for it; '' = none is named.

    Raises:
        UserError: as `open_adapter`; adapter_base, the base is not there.
    """
    if adapter:
        return path or require_base(open_adapter(adapter)), str(open_adapter(adapter).path)
    if not path or not is_adapter(open_folder(path)):
        return path, ""
    found = open_adapter(path)
    return require_base(found), str(found.path)


def require_base(adapter: Adapter) -> str:
    """The folder of the adapter's base.

    Raises:
        UserError: adapter_base.
    """
    if not adapter.base:
        named = str(adapter.config.get("base_model_name_or_path") or "")[:200]
        raise UserError(
            f'The base of the adapter "{adapter.path}" is not here: '
            + (f'it names "{named}", which is no folder.' if named else "it names none."),
            code="adapter_base",
            hint='Give both: to deploy, localModelDir="/base" AND adapter="…"; to merge, modelNameOrPath="/base".',
        )
    return adapter.base


def _require_lora(folder: Path, config: Mapping[str, Any]) -> None:
    kind, beginning = str(config.get("peft_type", "")).upper(), config.get("init_lora_weights", True)
    if kind != "LORA":
        what = f"of the kind {kind[:20] or 'unknown'}"
    elif beginning not in _PLAIN_BEGINNINGS:
        what = f"that began as {str(beginning)[:20]}, which changes the base"
    elif part := next((name for name in _BEYOND_LORA if config.get(name)), ""):
        what = f"with {part}"
    else:
        return
    raise UserError(
        f'"{folder}" is an adapter {what}.',
        code="checkpoint_adapter",
        hint="LoRA, DoRA and rsLoRA adapters are taken; save others with peft as plain LoRA.",
    )


def _weights(folder: Path, allow_pickle: bool) -> Path:
    """
    Raises:
        UserError: checkpoint_pickled, checkpoint_no_weights, checkpoint_corrupt, checkpoint_link.
    """
    file = folder / WEIGHTS
    if file.exists():
        check_file(file)
        return file
    if (folder / PICKLED_WEIGHTS).exists():
        if allow_pickle:
            return folder / PICKLED_WEIGHTS
        raise pickled(folder / PICKLED_WEIGHTS)
    raise UserError(
        f'"{folder}" is an adapter without its weights: {WEIGHTS} is not there.',
        code="checkpoint_no_weights",
        hint="Copy the adapter again with its *.safetensors file.",
    )


def _base(folder: Path, config: Mapping[str, Any]) -> str:
    """The base inside the adapter's folder, else the folder that its configuration names."""
    if (folder / BASE_LINK / "config.json").is_file():
        return str(open_folder(str(folder / BASE_LINK)))
    named = config.get("base_model_name_or_path")
    if isinstance(named, str) and Path(named).is_absolute() and (Path(named) / "config.json").is_file():
        return str(open_folder(named))
    return ""
