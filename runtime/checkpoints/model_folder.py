"""A model folder to convert: its configuration, its weights as tensors that are not read yet, and its other files.

Alone because converting asks for less than deploying: any architecture will do and no tokenizer is needed, but every
file that is carried over must be the checkpoint's own.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.checkpoints.contents import check_contents
from runtime.checkpoints.folder import list_files, open_folder
from runtime.checkpoints.inspect import MODULES, module_folders
from runtime.checkpoints.model_config import read_config, refuse_remote_code
from runtime.checkpoints.pickles import load_tensors
from runtime.checkpoints.tensors import Stored, read_safetensors
from runtime.checkpoints.weights import (
    INDEX,
    SINGLE,
    check_weights,
    corrupt,
    is_pickled,
    pickled,
    read_index,
    shards_of,
)
from runtime.errors import UserError

BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".index.json")

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
        modules: pickled weights of the modules around a transformer (sentence-transformers), relative, by the names
            of the safetensors files that they become.
    """

    path: Path
    config: dict[str, Any]
    others: tuple[str, ...]
    shards: Shards
    suffix: str = ".safetensors"
    modules: Mapping[str, Mapping[str, Stored]] = field(default_factory=dict)

    def copy_others(self, target: Path) -> None:
        """Copy what is no weight, as files, wherever links led."""
        for name in self.others:
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
    files = list_files(folder)
    config = read_config(folder)
    refuse_remote_code(folder, files)
    modules = _modules(folder, files, allow_pickle)
    others = tuple(name for name in files if _belongs(folder, name))
    check_contents(folder, others)
    if not weights:
        return ModelFolder(folder, config, others, {}, modules=modules)
    if allow_pickle and (names := _pickled_files(folder, files)):
        shards = {name.removesuffix(".bin"): load_tensors(folder / name) for name in names}
        _check_shards(folder, BIN_INDEX if BIN_INDEX in files else "", shards, ".bin")
        return ModelFolder(folder, config, others, shards, ".bin", modules)
    weight_files = _weight_files(folder, files)
    shards = {name.removesuffix(".safetensors"): read_safetensors(folder / name) for name in weight_files}
    _check_shards(folder, INDEX if INDEX in files else "", shards, ".safetensors")
    return ModelFolder(folder, config, others, shards, modules=modules)


def _belongs(folder: Path, name: str) -> bool:
    """Whether a file is carried over as it is."""
    inner = len(PurePosixPath(name).parts) > 1
    if inner and not (folder / MODULES).exists():  # other forms of the same weights, logs, examples
        return False
    return not is_pickled(name) and (inner or not name.lower().endswith(_WEIGHT_SUFFIXES))


def _modules(folder: Path, files: tuple[str, ...], allow_pickle: bool) -> Mapping[str, Mapping[str, Stored]]:
    """The pickled weights of a sentence-transformers checkpoint's modules that have no others.

    Raises:
        UserError: checkpoint_pickled, they may not be read; and those of `module_folders` and `load_tensors`.
    """
    found: dict[str, Mapping[str, Stored]] = {}
    for module in module_folders(folder):
        inside = module.relative_to(folder)
        pickled_one, safe = (inside / BIN_SINGLE).as_posix(), (inside / SINGLE).as_posix()
        if inside.parts and pickled_one in files and safe not in files:
            if not allow_pickle:
                raise _not_allowed(pickled(folder / pickled_one))
            found[safe] = load_tensors(folder / pickled_one)
    return found


def _weight_files(folder: Path, files: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return check_weights(folder, tuple(name for name in files if "/" not in name)).files
    except UserError as error:
        if error.code == "checkpoint_pickled" and _pickled_files(folder, files):
            raise _not_allowed(error) from None
        raise


def _not_allowed(error: UserError) -> UserError:
    error.hint = 'If you trust where it comes from, add AND allow_pickle="true": only numbers are read.'
    return error


def _pickled_files(folder: Path, files: tuple[str, ...]) -> tuple[str, ...]:
    """The weight files of a model that has only pickled ones."""
    if INDEX in files or SINGLE in files:
        return ()
    if BIN_INDEX in files:
        return shards_of(folder, BIN_INDEX, files)
    return (BIN_SINGLE,) if BIN_SINGLE in files else ()


def _check_shards(folder: Path, index: str, shards: Shards, suffix: str) -> None:
    """Refuse an index that promises tensors which its shards do not hold, and a tensor that is there twice."""
    held: set[str] = set()
    for stem, shard in shards.items():
        if twice := held & shard.keys():
            raise corrupt(folder / f"{stem}{suffix}", f"its tensor {min(twice)[:80]} is in another file, too")
        held |= shard.keys()
    for name, file in read_index(folder, index).items() if index else ():
        if name not in shards[file.removesuffix(suffix)]:
            raise corrupt(folder / index, f"it promises a tensor that {file} does not hold")
