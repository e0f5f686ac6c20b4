"""The header of a GGUF file: what model it is and which tensors it holds, checked, nothing loaded.

Alone because it is the gate for a second format of bytes somebody else wrote: every count, length and offset is
compared with what is there before it is used. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from runtime.checkpoints.folder import open_file, unreadable
from runtime.checkpoints.weights import MAX_NUMBERS, corrupt
from runtime.errors import UserError

MAGIC = b"GGUF"
SUFFIX = ".gguf"
TOKENS = "tokenizer.ggml.tokens"
MAX_HEADER_BYTES = 256 << 20
MAX_KEYS, MAX_TENSORS, MAX_ITEMS = 65_536, 1_000_000, 4_000_000
MAX_RANK, MAX_NAME_BYTES, MAX_NESTING = 8, 1024, 2
READ_BYTES = 1 << 20

_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Number of a type -> its name, numbers in a block, bytes of a block.
_TYPES = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24)},
    **{8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110)},
    **{12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50)},
    **{20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136)},
    **{29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17)},
    **{40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18)},
}
_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)


def bits_of(kind: str) -> int:
    """Whole bits of a number of a type such as Q4_K."""
    block, block_bytes = next((block, size) for name, block, size in _TYPES.values() if name == kind)
    return block_bytes * 8 // block


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the header says.

    Attributes:
        values: by key: texts, numbers, truth values; no lists.
        tokens: the vocabulary; () when there is none.
        counted: numbers in the tensors by the name of their type, such as Q4_K.
    """

    values: Mapping[str, Any]
    tokens: tuple[str, ...]
    counted: Mapping[str, int]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return str(self.values.get("general.architecture") or "")

    def of_model(self, key: str) -> Any:
        """The value of ``<architecture>.<key>``; None when it is not there."""
        return self.values.get(f"{self.architecture}.{key}")


def is_gguf(name: str) -> bool:
    """Whether a file is called so."""
    return name.lower().endswith(SUFFIX)


def gguf_files(path: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """The files of the one GGUF model at `path`, in their order: a file, all parts of a split one, or of a folder.

    Args:
        path: of a file, or a folder.
        names: of the files in the folder, or in the file's.

    Raises:
        UserError: checkpoint_no_weights, there is none; gguf_several, a folder has more than one; checkpoint_corrupt.
    """
    found = sorted(name for name in names if is_gguf(name) and "/" not in name)
    if not path.is_dir():
        return _parts(path.parent, path.name, found)
    models = [name for name in found if not name.lower().startswith("mmproj")]  # eyes and ears of a model beside it
    if not models:
        raise UserError(
            f'"{path}" holds no {SUFFIX} file.', code="checkpoint_no_weights", hint="Give the folder of a model."
        )
    parts = _parts(path, models[0], found)
    if other := next((name for name in models if name not in parts), None):
        raise UserError(
            f'"{path}" holds several GGUF models, such as {models[0]} and {other}.',
            code="gguf_several",
            hint=f'Give the path of one: "{path / models[0]}".',
        )
    return parts


def gguf_model(path: Path) -> list[Path]:
    """The files of the GGUF model at `path`; [] where there is a checkpoint of another form, or nothing.

    Raises:
        UserError: as `gguf_files`.
    """
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir() or (path == folder and (folder / "config.json").exists()):
        return []
    names = tuple(child.name for child in folder.iterdir())
    if not (any(map(is_gguf, names)) if path == folder else is_gguf(path.name) and path.exists()):
        return []
    return [folder / name for name in gguf_files(path, names)]


def _parts(folder: Path, name: str, names: list[str]) -> tuple[str, ...]:
    split = _SPLIT.fullmatch(name)
    if not split:
        return (name,)
    wanted = tuple(f"{split[1]}-{number:05}-of-{split[2]}{name[-5:]}" for number in range(1, int(split[2]) + 1))
    if missing := next((part for part in wanted if part not in names), None):
        raise corrupt(folder / name, f"its part {missing} is not there")
    return wanted


def read_gguf(file: Path) -> GgufHeader:
    """The checked header of a GGUF file.

    Raises:
        UserError: checkpoint_corrupt, gguf_unsupported, checkpoint_unreadable, checkpoint_outside_roots,
            checkpoint_file.
    """
    try:
        with open_file(file) as stream:
            return _Reader(file, stream, file.stat().st_size).header()
    except OSError as error:
        raise unreadable(file, error) from None


class _Reader:
    """Reads a header from its start on; never further than the file reaches."""

    def __init__(self, file: Path, stream: FileIO, size: int) -> None:
        self._file = file
        self._stream = stream
        self._size = size
        self._read = bytearray()
        self._at = 0
        self._items = 0

    def header(self) -> GgufHeader:
        """All of it, compared with the size of the file."""
        if self._take(4) != MAGIC:
            raise corrupt(self._file, "it does not begin as a GGUF file")
        version = self._number("I")
        if version not in (2, 3):
            raise UserError(
                f'"{self._file}" is GGUF of version {version}, or of a machine with another order of bytes.',
                code="gguf_unsupported",
                hint="Convert it again with today's llama.cpp.",
            )
        tensors, keys = self._count("Q", MAX_TENSORS, "tensors"), self._count("Q", MAX_KEYS, "keys")
        values: dict[str, Any] = {}
        tokens: tuple[str, ...] = ()
        for _ in range(keys):
            key = self._name()
            if key in values:
                raise corrupt(self._file, f"its key {key[:80]} is there twice")
            value = self._value(self._number("I"), keep=key == TOKENS)
            if isinstance(value, tuple):
                tokens = value or tokens
                value = None
            values[key] = value
        return GgufHeader(values, tokens, self._tensors(tensors, values.get("general.alignment", 32)))

    def _tensors(self, tensors: int, alignment: Any) -> dict[str, int]:
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise corrupt(self._file, "its alignment is no power of two")
        names: set[str] = set()
        counted: dict[str, int] = {}
        end = 0
        for _ in range(tensors):
            name = self._name()
            if name in names:
                raise corrupt(self._file, f"its tensor {name[:80]} is there twice")
            names.add(name)
            kind, count, used = self._tensor()
            if self._number("Q") != end:
                raise corrupt(self._file, "its tensors overlap or leave gaps")
            last = end + used
            end = _aligned(last, alignment)
            counted[kind] = counted.get(kind, 0) + count
        if tensors and _aligned(self._at, alignment) + last > self._size:
            raise corrupt(self._file, "it ends inside its tensors")
        return counted

    def _tensor(self) -> tuple[str, int, int]:
        """Type, numbers and bytes of the next tensor."""
        rank = self._count("I", MAX_RANK, "dimensions")
        shape = [self._number("Q") for _ in range(rank)]
        number = self._number("I")
        if number not in _TYPES:
            raise UserError(
                f'"{self._file}" holds numbers of the type {number}, which is not known here.',
                code="gguf_unsupported",
                hint="Known are the types of llama.cpp up to Q1_0.",
            )
        kind, block, block_bytes = _TYPES[number]
        count = 1
        for size in shape:
            count *= size
            if count > MAX_NUMBERS:
                raise corrupt(self._file, "the size of a tensor does not fit its shape")
        if (shape[0] if shape else 1) % block:
            raise corrupt(self._file, "a row of a tensor is no whole number of blocks")
        return kind, count, count // block * block_bytes

    def _value(self, kind: int, *, keep: bool = False, depth: int = 0) -> Any:
        """The next value; a list is () unless it is one of texts and to be kept."""
        if kind in _PLAIN:
            return self._number(_PLAIN[kind])
        if kind == _STRING:
            return self._text(MAX_HEADER_BYTES)
        if kind != _ARRAY or depth == MAX_NESTING:
            raise corrupt(self._file, "a value in its header is of no known kind")
        inner, count = self._number("I"), self._count("Q", MAX_ITEMS, "items")
        self._items += count
        if self._items > MAX_ITEMS:
            raise corrupt(self._file, f"its lists hold more than {MAX_ITEMS:,} items")
        if inner in _PLAIN:
            self._take(count * struct.calcsize(_PLAIN[inner]))
        elif keep and inner == _STRING:
            return tuple(self._text(MAX_HEADER_BYTES) for _ in range(count))
        else:
            for _ in range(count):
                self._value(inner, depth=depth + 1)
        return ()

    def _name(self) -> str:
        return self._text(MAX_NAME_BYTES)

    def _text(self, max_bytes: int) -> str:
        return bytes(self._take(self._count("Q", max_bytes, "bytes in a text"))).decode("utf-8", errors="replace")

    def _count(self, kind: str, most: int, what: str) -> int:
        count = int(self._number(kind))
        if count > most:
            raise corrupt(self._file, f"its header claims more than {most:,} {what}")
        return count

    def _number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self._take(struct.calcsize(kind)))[0]

    def _take(self, count: int) -> bytearray:
        """The next bytes; more of the file is read when they are needed."""
        end = self._at + count
        if end > min(self._size, MAX_HEADER_BYTES):
            raise corrupt(self._file, "it ends inside its header, or its header is too large")
        while len(self._read) < end:
            piece = self._stream.read(max(READ_BYTES, end - len(self._read)))
            if not piece:
                raise corrupt(self._file, "it ended while it was read")
            self._read += piece
        self._at = end
        return self._read[end - count : end]


def _aligned(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment
