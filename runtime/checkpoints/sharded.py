"""Sharded checkpoints of torch (DCP, as FSDP saves them) as tensors by name.

Alone because torch.distributed.checkpoint unpickles their `.metadata` as it is. Here every class in it is made as an
inert stand-in of ours, so that nothing a pickle can say reaches a class that the program uses; torch's own metadata
is then built from the plain values found in them. The shards themselves torch reads as numbers alone.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from runtime.checkpoints.folder import read_small, require_own
from runtime.checkpoints.tensors import Stored, split
from runtime.checkpoints.weights import corrupt, pickled
from runtime.errors import UserError
from runtime.secrets import first_line

METADATA = ".metadata"
MAX_METADATA_BYTES = 256 << 20

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in torch.storage._dtype_to_storage_type_map()}
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
    "__builtin__": ("set",),
    "builtins": ("set",),
}


class _Inert(dict[Any, Any]):
    """Stands for an object that was made of `made_of` and given `state`; as a dictionary it takes items."""

    made_of: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *made_of: Any) -> _Inert:
        self = super().__new__(cls)
        self.made_of = made_of
        return self

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:  # type: ignore[override]  # it stands as a key, too
        return id(self)


class _Unpickler(pickle.Unpickler):
    """Makes only stand-ins of what a `.metadata` consists of; each file has classes of its own for them."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._made: dict[str, type[_Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return self._made.setdefault(name, type(name, (_Inert,), {}))


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
    metadata = _read_metadata(folder)
    sizes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        name = info.relative_path
        if name not in sizes:
            sizes[name] = _size(folder, name)
        if not (0 <= info.offset <= info.offset + info.length <= sizes[name]):
            raise corrupt(folder / METADATA, f"it names bytes of {name[:80]} that are not there")
    reader, there = _Reader(folder, metadata), sum(sizes.values())
    return {
        name: _stored(reader, folder, name, entry, there)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _size(folder: Path, name: str) -> int:
    """Of a shard, which is a plain file of this folder."""
    file = folder / name
    if PurePosixPath(name).name != name or not file.is_file():
        raise corrupt(folder / METADATA, f"it names {name[:80]}, which is no file of this folder")
    require_own(folder, file)
    return file.stat().st_size


def _read_metadata(folder: Path) -> Metadata:
    file = folder / METADATA
    require_own(folder, file)
    raw = read_small(file, MAX_METADATA_BYTES)
    try:
        return _metadata(_fields(_Unpickler(io.BytesIO(raw)).load(), "Metadata"))
    except pickle.UnpicklingError:
        raise pickled(file) from None
    except Exception:  # a damaged pickle fails anywhere in the reader
        raise corrupt(file, "it is no metadata of torch.distributed.checkpoint") from None


def _fields(found: Any, name: str) -> Mapping[str, Any]:
    """The fields of an object of the class `name`.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(found, _Inert) or type(found).__name__ != name or not isinstance(found.state, dict):
        raise TypeError(name)
    return found.state


def _metadata(found: Mapping[str, Any]) -> Metadata:
    """torch's metadata with the tensors of the checkpoint and where they lie; other objects are left out."""
    tensors = {
        _checked(name, str): _tensor(_fields(entry, "TensorStorageMetadata"))
        for name, entry in found["state_dict_metadata"].items()
        if type(entry).__name__ != "BytesStorageMetadata"
    }
    places = [(_fields(index, "MetadataIndex"), info) for index, info in found["storage_data"].items()]
    storage = {
        _index(index): _place(_fields(info, "_StorageInfo")) for index, info in places if index["fqn"] in tensors
    }
    return Metadata(tensors, storage_data=storage)


def _tensor(entry: Mapping[str, Any]) -> TensorStorageMetadata:
    dtype, _, *_ = entry["properties"].state
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in entry["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(_checked(dtype, torch.dtype)),
        _shape(entry["size"]),
        [ChunkStorageMetadata(_shape(chunk["offsets"]), _shape(chunk["sizes"])) for chunk in chunks],
    )


def _index(found: Mapping[str, Any]) -> MetadataIndex:
    offset, index = found.get("offset"), found.get("index")
    return MetadataIndex(
        _checked(found["fqn"], str),
        None if offset is None else _shape(offset),
        None if index is None else _checked(index, int),
    )


def _place(found: Mapping[str, Any]) -> _StorageInfo:
    if found.get("transform_descriptors"):
        raise ValueError("transformed")
    path = found["relative_path"]
    path = "/".join(path.made_of) if isinstance(path, _Inert) else _checked(path, str)
    return _StorageInfo(path, _checked(found["offset"], int), _checked(found["length"], int))


def _shape(found: Any) -> torch.Size:
    numbers = found.made_of[0] if found.made_of else ()
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise ValueError("shape")
    return torch.Size(numbers)


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(kind.__name__)
    return value


def _stored(reader: _Reader, folder: Path, name: str, entry: TensorStorageMetadata, there: int) -> Stored:
    if math.prod(entry.size) * entry.properties.dtype.itemsize > there:
        raise corrupt(folder / METADATA, f"its tensor {name[:80]} is larger than the files that hold it")

    def pieces() -> Iterable[torch.Tensor]:
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        except UserError:
            raise
        except (Exception, CheckpointException) as error:  # the latter is none of Python's ordinary exceptions
            raise corrupt(folder, f"the tensor {name[:80]} cannot be read ({first_line(_root(error))})") from None
        return split(tensor.reshape(-1))

    return Stored(entry.properties.dtype, tuple(entry.size), pieces)


def _root(error: BaseException) -> BaseException:
    """What torch's exception, which lists those of all ranks, was made of."""
    failures = getattr(error, "failures", None)
    return next((wrapped[0] for wrapped in failures.values()), error) if failures else error
