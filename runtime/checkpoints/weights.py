"""The weights of a checkpoint: safetensors headers checked, pickles refused, nothing loaded.

Alone because it is the gate for bytes somebody else wrote. The format: eight bytes that say the length of a JSON
header, the header (name -> dtype, shape, offsets), then the tensors without gaps (huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.checkpoints.folder import open_file, read_object, unreadable
from runtime.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_RANK = 64
MAX_NUMBERS = 1 << 60  # in a tensor: more than there is room for anywhere
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".msgpack", ".h5")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
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


def is_pickled(name: str) -> bool:
    """Whether a file is called as pickled weights or other states are."""
    return name.lower().endswith(_PICKLED)


def check_weights(folder: Path, names: tuple[str, ...]) -> Weights:
    """Check the weight files among `names` (directly in `folder`) and add up what their headers say.

    Raises:
        UserError: checkpoint_no_weights, checkpoint_pickled, checkpoint_adapter, checkpoint_corrupt,
            checkpoint_dtype, checkpoint_unreadable.
    """
    files = _weight_files(folder, names)
    counted: dict[str, int] = {}
    for name in files:
        for dtype, count in check_file(folder / name).items():
            counted[dtype] = counted.get(dtype, 0) + count
    return Weights(files, sum(counted.values()), main_dtype(counted))


def main_dtype(counted: dict[str, int]) -> str:
    """torch's name of the type that most of the numbers counted have."""
    main = max(counted, key=lambda dtype: counted[dtype], default="F32")
    return _NAMES.get(main, main.lower())


def _weight_files(folder: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    if INDEX in names:
        return shards_of(folder, INDEX, names)
    if SINGLE in names:
        return (SINGLE,)
    if "adapter_config.json" in names:
        raise UserError(
            f'"{folder}" is an adapter (LoRA), not a whole model.',
            code="checkpoint_adapter",
            hint='Deploy its base with adapter="…", or merge the two: action="merge".',
        )
    if pickles := [name for name in names if is_pickled(name)]:
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


def read_index(folder: Path, index: str) -> dict[str, str]:
    """Tensor -> weight file, as the file `index` in `folder` says.

    Raises:
        UserError: checkpoint_corrupt, checkpoint_config.
    """
    said = read_object(folder / index).get("weight_map")
    if not isinstance(said, dict) or not said or {*map(type, said.values())} != {str}:
        raise corrupt(folder / index, "it has no weight_map of names")
    return said


def shards_of(folder: Path, index: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The weight files that an index names, each a file of this folder and of its kind.

    Args:
        names: of the files in `folder`.
    """
    suffix = ".safetensors" if index == INDEX else ".bin"
    shards = sorted(set(read_index(folder, index).values()))
    for shard in shards:
        if PurePosixPath(shard).name != shard or shard.startswith(".") or not shard.endswith(suffix):
            raise corrupt(folder / index, f"it names a shard that is no {suffix} file of this folder")
        if shard not in names:
            raise corrupt(folder / index, f"it names {shard[:80]}, which is not there")
    return tuple(shards)


def check_file(file: Path) -> dict[str, int]:
    """Numbers per dtype in one safetensors file, as its checked header says.

    Raises:
        UserError: checkpoint_corrupt, checkpoint_pickled, checkpoint_dtype, checkpoint_unreadable,
            checkpoint_outside_roots, checkpoint_file.
    """
    return _read(file)[2]


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The checked header of a safetensors file (name -> dtype, shape, data_offsets), and where its tensors begin.

    Raises:
        UserError: as `check_file`.
    """
    header, start, _ = _read(file)
    return header, start


def _read(file: Path) -> tuple[dict[str, Any], int, dict[str, int]]:
    try:
        size = file.stat().st_size
        with open_file(file) as stream:
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
        counted = _check_tensors(file, header, size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise corrupt(file, "its header is not valid") from None
    return header, 8 + length, counted


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


def _check_tensors(file: Path, header: dict[str, Any], data_bytes: int) -> dict[str, int]:
    """Numbers per dtype, when the tensors are what a header may hold.

    Types and ranks come first, as a product of what is no count never ends; all tensors of a file are looked at
    together, as a large checkpoint has a hundred thousand.
    """
    entries = sorted(header.values(), key=itemgetter("data_offsets"))
    offsets, shapes, dtypes = (list(map(itemgetter(key), entries)) for key in ("data_offsets", "shape", "dtype"))
    if not {*map(type, (*shapes, *offsets))} <= {list} or max(map(len, shapes), default=0) > MAX_RANK:
        raise corrupt(file, f"a shape in its header is no list of at most {MAX_RANK} counts")
    numbers = list(chain.from_iterable((*shapes, *offsets)))
    if not {*map(type, numbers)} <= {int} or (numbers and not 0 <= min(numbers) <= max(numbers) <= MAX_NUMBERS):
        raise corrupt(file, "a shape or an offset in its header is no count")
    if unknown := {*dtypes} - _BITS.keys():
        raise _unknown(file, str(min(map(str, unknown))))
    firsts, lasts = [first for first, _ in offsets], [last for _, last in offsets]
    end = max(lasts, default=0)
    if end > data_bytes:
        raise corrupt(file, f"its tensors need {end} bytes and {data_bytes} are there")
    if firsts != [0, *lasts][:-1]:
        raise corrupt(file, "its tensors overlap or leave gaps")
    counts = list(map(math.prod, shapes))
    bits = [count * _BITS[dtype] for count, dtype in zip(counts, dtypes, strict=True)]
    if bits != [(last - first) * 8 for first, last in offsets]:
        raise corrupt(file, "the size of a tensor does not fit its shape")
    if end != data_bytes:
        raise corrupt(file, f"{data_bytes - end} bytes after its tensors belong to none")
    counted: dict[str, int] = {}
    for dtype, count in zip(dtypes, counts, strict=True):
        counted[dtype] = counted.get(dtype, 0) + count
    return counted


def _unknown(file: Path, dtype: str) -> UserError:
    return UserError(
        f'"{file}" holds numbers of the type {dtype[:20]}, which is none of safetensors.',
        code="checkpoint_dtype",
        hint=f"Known: {', '.join(_BITS)}.",
    )


def corrupt(file: Path, why: str) -> UserError:
    """The error for a weight file that is not whole."""
    return UserError(
        f'"{file}" is damaged: {why}.',
        code="checkpoint_corrupt",
        hint="The copy was probably cut short: copy the checkpoint again.",
    )
