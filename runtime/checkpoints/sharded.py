"""Sharded checkpoints of torch (DCP, as FSDP saves them) as tensors by name.

Alone because torch.distributed.checkpoint unpickles their `.metadata` as it is: here only its own data classes may
stand in it. The shards themselves torch reads as numbers alone.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from runtime.checkpoints.folder import check_roots, require_own, unreadable
from runtime.checkpoints.tensors import Stored, split
from runtime.checkpoints.weights import corrupt, pickled

METADATA = ".metadata"
_DATA = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(str(dtype).removeprefix("torch.") for dtype in torch.storage._dtype_to_storage_type_map())),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
    "__builtin__": ("set",),
    "builtins": ("set",),
}


class _Unpickler(pickle.Unpickler):
    """Makes only what a `.metadata` consists of: nothing that does anything."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _DATA.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader with metadata that was read safely, and once."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata


def read_sharded(folder: Path) -> dict[str, Stored]:
    """The tensors of the checkpoint whose `.metadata` lies in `folder`; optimizer states are among them.

    Raises:
        UserError: checkpoint_pickled, checkpoint_corrupt, checkpoint_link, checkpoint_unreadable.
    """
    metadata = _read_metadata(folder / METADATA)
    for info in metadata.storage_data.values():
        name = str(info.relative_path)
        if PurePosixPath(name).name != name or not (folder / name).is_file():
            raise corrupt(folder / METADATA, f"it names {name[:80]}, which is no file of this folder")
        require_own(folder, folder / name)
    reader = _Reader(folder, metadata)
    return {
        name: _stored(reader, folder, name, entry)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _read_metadata(file: Path) -> Metadata:
    check_roots(file.resolve())
    try:
        with file.open("rb") as stream:
            found = _Unpickler(stream).load()
    except OSError as error:
        raise unreadable(file, error) from None
    except pickle.UnpicklingError:
        raise pickled(file) from None
    except Exception:  # a damaged pickle fails anywhere in the reader
        raise corrupt(file, "it is no metadata of torch.distributed.checkpoint") from None
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise corrupt(file, "it is no metadata of torch.distributed.checkpoint")
    return found


def _stored(reader: _Reader, folder: Path, name: str, entry: TensorStorageMetadata) -> Stored:
    def pieces() -> Iterable[torch.Tensor]:
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        except (Exception, CheckpointException):  # the latter is none of Python's ordinary exceptions
            raise corrupt(folder, f"the tensor {name[:80]} cannot be read") from None
        return split(tensor.reshape(-1))

    return Stored(entry.properties.dtype, tuple(entry.size), pieces)
