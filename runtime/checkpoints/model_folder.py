"""A model folder to convert: its configuration, its weights as tensors that are not read yet, and its other files.

Alone because converting asks for less than deploying: any architecture will do and no tokenizer is needed, but every
file that is carried over must be the checkpoint's own.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.checkpoints.folder import list_files, open_folder, read_object, require_own
from runtime.checkpoints.inspect import MODULES, module_folders, read_config, refuse_remote_code
from runtime.checkpoints.pickles import load_tensors
from runtime.checkpoints.tensors import Stored, read_safetensors
from runtime.checkpoints.weights import INDEX, PICKLED, check_weights, corrupt
from runtime.errors import UserError

BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
_WEIGHT_SUFFIXES = (*PICKLED, ".safetensors", ".gguf", ".onnx", ".index.json")

Shards = Mapping[str, Mapping[str, Stored]]
"""Name of a weight file without its suffix -> its tensors by name, in their order."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder in Hugging Face form.

    Attributes:
        config: what config.json says.
        others: the files beside the weights that belong to the model, relative.
        shards: the weights; {} when they were not asked for.
        suffix: of the weight files, '.safetensors' or '.bin'.
    """

    path: Path
    config: dict[str, Any]
    others: tuple[str, ...]
    shards: Shards
    suffix: str = ".safetensors"

    def copy_others(self, target: Path, skip: tuple[str, ...] = ()) -> None:
        """Copy what is no weight, as files, wherever links led."""
        for name in self.others:
            if name not in skip:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.path / name, target / name)


def open_model(path: str, *, allow_pickle: bool = False, weights: bool = True) -> ModelFolder:
    """Open the folder of a model; of its weights only headers are read.

    Args:
        allow_pickle: read pickled weights too, where there are no others.
        weights: False when the weights come from elsewhere.

    Raises:
        UserError: with the codes of `inspect`; checkpoint_link for a file that lies elsewhere.
    """
    folder = open_folder(path)
    config = read_config(folder)
    files = list_files(folder)
    refuse_remote_code(folder, files, config)
    module_folders(folder)
    for name in files:
        require_own(folder, folder / name)
    others = tuple(name for name in files if _belongs(folder, name))
    if not weights:
        return ModelFolder(folder, config, others, {})
    if allow_pickle and (names := _pickled_files(folder, files)):
        shards = {name.removesuffix(".bin"): load_tensors(folder / name) for name in names}
        return ModelFolder(folder, config, others, shards, ".bin")
    weight_files = _weight_files(folder, files)
    shards = {name.removesuffix(".safetensors"): read_safetensors(folder / name) for name in weight_files}
    if INDEX in files:
        _check_index(folder / INDEX, shards, ".safetensors")
    return ModelFolder(folder, config, others, shards)


def _belongs(folder: Path, name: str) -> bool:
    """Whether a file is carried over as it is."""
    inner = len(PurePosixPath(name).parts) > 1
    if inner and not (folder / MODULES).exists():  # other forms of the same weights, logs, examples
        return False
    return not name.endswith(PICKLED if inner else _WEIGHT_SUFFIXES)


def _weight_files(folder: Path, files: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return check_weights(folder, tuple(name for name in files if "/" not in name)).files
    except UserError as error:
        if error.code == "checkpoint_pickled" and _pickled_files(folder, files):
            error.hint = 'If you trust where it comes from, add AND allow_pickle="true": only numbers are read.'
        raise


def _pickled_files(folder: Path, files: tuple[str, ...]) -> tuple[str, ...]:
    """The weight files of a model that has only pickled ones."""
    if INDEX in files or "model.safetensors" in files:
        return ()
    if BIN_INDEX not in files:
        return (BIN_SINGLE,) if BIN_SINGLE in files else ()
    weight_map = read_object(folder / BIN_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise corrupt(folder / BIN_INDEX, "it has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if PurePosixPath(name).name != name or not name.endswith(".bin"):
            raise corrupt(folder / BIN_INDEX, "it names a shard that is no .bin file of this folder")
        if name not in files:
            raise corrupt(folder / BIN_INDEX, f"it names {name[:80]}, which is not there")
    return tuple(names)


def _check_index(file: Path, shards: Shards, suffix: str) -> None:
    """Refuse an index that promises tensors which its shards do not hold."""
    for name, shard in read_object(file)["weight_map"].items():
        if name not in shards[str(shard).removesuffix(suffix)]:
            raise corrupt(file, f"it promises a tensor that {shard} does not hold")
