"""The weights of a checkpoint: safetensors headers checked, pickles refused, nothing loaded.

Alone because it is the gate for bytes somebody else wrote. The format: eight bytes that say the length of a JSON
header, the header (name -> dtype, shape, offsets), then the tensors without gaps (huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.checkpoints.folder import check_roots, read_object, unreadable
from runtime.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".msgpack", ".h5")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}


@dataclass(frozen=True, slots=True)
class Weights:
    """What the headers say.

    Attributes:
        files: names of the weight files, relative to their folder.
        parameters: numbers in all tensors together.
        dtype: torch's name of the type that most of them have.
    """

    files: tuple[str, ...]
    parameters: int
    dtype: str


def check_weights(folder: Path, names: tuple[str, ...]) -> Weights:
    """Check the weight files among `names` (directly in `folder`) and add up what their headers say.

    Raises:
        UserError: checkpoint_no_weights, checkpoint_pickled, checkpoint_adapter, checkpoint_corrupt,
            checkpoint_unreadable.
    """
    files = _weight_files(folder, names)
    counted: dict[str, int] = {}
    for name in files:
        for dtype, count in check_file(folder / name).items():
            counted[dtype] = counted.get(dtype, 0) + count
    main = max(counted, key=lambda dtype: counted[dtype], default="F32")
    return Weights(files, sum(counted.values()), _NAMES.get(main, main.lower()))


def _weight_files(folder: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    if INDEX in names:
        return _shards(folder)
    if SINGLE in names:
        return (SINGLE,)
    if "adapter_config.json" in names:
        raise UserError(
            f'"{folder}" is an adapter (LoRA), not a whole model.',
            code="checkpoint_adapter",
            hint='Deploy its base with adapter="…", or merge the two: action="merge".',
        )
    if pickles := [name for name in names if name.endswith(PICKLED)]:
        raise pickled(folder / pickles[0])
    raise UserError(
        f'"{folder}" holds no weights: neither {SINGLE} nor {INDEX}.',
        code="checkpoint_no_weights",
        hint="Copy the checkpoint again with its *.safetensors files.",
    )


def pickled(file: Path) -> UserError:
    """The error for weights in a format that can run code when it is read."""
    return UserError(
        f'"{file}" is refused: pickled weights can run code when they are loaded.',
        code="checkpoint_pickled",
        hint='If you trust where it comes from, action="convert" AND to="safetensors" AND allow_pickle="true" makes '
        "one that is not pickled.",
    )


def _shards(folder: Path) -> tuple[str, ...]:
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise corrupt(folder / INDEX, "it has no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if PurePosixPath(shard).name != shard or not shard.endswith(".safetensors"):
            raise corrupt(folder / INDEX, "it names a shard that is no .safetensors file of this folder")
        if not (folder / shard).exists():
            raise corrupt(folder / INDEX, f"it names {shard}, which is not there")
    return tuple(shards)


def check_file(file: Path) -> dict[str, int]:
    """Numbers per dtype in one safetensors file, as its checked header says.

    Raises:
        UserError: checkpoint_corrupt, checkpoint_pickled, checkpoint_unreadable, checkpoint_outside_roots.
    """
    counted: dict[str, int] = {}
    for entry in read_header(file)[0].values():
        counted[entry["dtype"]] = counted.get(entry["dtype"], 0) + math.prod(entry["shape"])
    return counted


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The checked header of a safetensors file (name -> dtype, shape, data_offsets), and where its tensors begin.

    Raises:
        UserError: as `check_file`.
    """
    check_roots(file.resolve())
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _no_safetensors(file, start, length, size)
            raw = stream.read(length)
    except OSError as error:
        raise unreadable(file, error) from None
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        _check_tensors(file, header, size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise corrupt(file, "its header is not valid") from None
    return header, 8 + length


def _no_safetensors(file: Path, start: bytes, length: int, size: int) -> UserError:
    if start == b"version ":
        return UserError(
            f'"{file}" is a Git LFS pointer, not the weights.',
            code="checkpoint_corrupt",
            hint="Run: git lfs pull, in the folder the checkpoint was cloned to.",
        )
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return pickled(file)
    if length > MAX_HEADER_BYTES:
        return corrupt(file, f"its header claims more than {MAX_HEADER_BYTES // 1_000_000} MB")
    return corrupt(file, f"it ends after {size} bytes, inside its header")


def _check_tensors(file: Path, header: dict[str, Any], data_bytes: int) -> None:
    end = 0
    for entry in sorted(header.values(), key=lambda entry: tuple(entry["data_offsets"])):
        first, last = entry["data_offsets"]
        count = math.prod(entry["shape"])
        if any(type(number) is not int or number < 0 for number in (first, last, *entry["shape"])):
            raise corrupt(file, "a shape or an offset in its header is no count")
        if last > data_bytes:
            raise corrupt(file, f"its tensors need {last} bytes and {data_bytes} are there")
        if first != end or last < first:
            raise corrupt(file, "its tensors overlap or leave gaps")
        if entry["dtype"] in _BITS and (last - first) * 8 != count * _BITS[entry["dtype"]]:
            raise corrupt(file, "the size of a tensor does not fit its shape")
        end = last
    if end != data_bytes:
        raise corrupt(file, f"{data_bytes - end} bytes after its tensors belong to none")


def corrupt(file: Path, why: str) -> UserError:
    """The error for a weight file that is not whole."""
    return UserError(
        f'"{file}" is damaged: {why}.',
        code="checkpoint_corrupt",
        hint="The copy was probably cut short: copy the checkpoint again.",
    )
