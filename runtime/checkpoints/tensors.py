"""Tensors that have not been read yet: where they lie, and how to read them in pieces.

Alone because a conversion is a chain of such tensors, from a file through a cast or a merge into another file, of
which only a piece is in memory at any time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.checkpoints.weights import corrupt, read_header
from runtime.errors import UserError, did_you_mean

PIECE_BYTES = 4 * 2**20

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
_CASTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor on disk.

    Attributes:
        pieces: reads it: its numbers in their order, as one-dimensional tensors of its dtype on the CPU. A piece is
            valid until the next one is asked for.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.numbers * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """The whole of it, in memory of its own."""
        whole = torch.empty(self.numbers, dtype=self.dtype)
        at = 0
        for piece in self.pieces():
            whole[at : at + piece.numel()] = piece
            at += piece.numel()
        return whole.reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers that lie one after the other in a file.

    Attributes:
        offset: of the first one, in bytes.
    """

    file: Path
    dtype: torch.dtype
    offset: int
    count: int

    def part(self, start: int, count: int) -> Numbers:
        """`count` of them from `start` on.

        Raises:
            ValueError: there are not so many.
        """
        if start + count > self.count:
            raise ValueError(count)
        return Numbers(self.file, self.dtype, self.offset + start * self.dtype.itemsize, count)

    def shaped(self, shape: Iterable[int]) -> Stored:
        """A tensor of them."""
        return Stored(self.dtype, tuple(shape), self.pieces)

    def pieces(self) -> Iterator[torch.Tensor]:
        """Read them, as the pieces of a `Stored`. Not mapped: pages of a mapped file would count as our memory."""
        left = self.count * self.dtype.itemsize
        if not left:
            return
        buffer = bytearray(min(left, PIECE_BYTES))  # one for all pieces: fresh memory costs more than the copy
        view = memoryview(buffer)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            while left:
                wanted = min(left, len(buffer))
                got = 0
                while got < wanted:
                    if not (read := stream.readinto(view[got:wanted])):
                        raise corrupt(self.file, "it ended while it was read")
                    got += read
                left -= wanted
                yield torch.frombuffer(buffer, dtype=self.dtype, count=wanted // self.dtype.itemsize)


def in_memory(tensor: torch.Tensor) -> Stored:
    """A tensor that is there already."""
    return Stored(tensor.dtype, tuple(tensor.shape), lambda: split(tensor.reshape(-1)))


def split(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a one-dimensional tensor, each of at most PIECE_BYTES."""
    yield from flat.split(PIECE_BYTES // flat.element_size()) if flat.numel() else ()


def read_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file; only its header is read now, and checked.

    Raises:
        UserError: checkpoint_corrupt, checkpoint_pickled, checkpoint_unreadable, checkpoint_dtype.
    """
    header, start = read_header(file)
    found: dict[str, Stored] = {}
    for name, entry in header.items():
        dtype = _TORCH.get(entry["dtype"])
        if dtype is None:
            raise UserError(
                f'"{file}" holds numbers of the type {str(entry["dtype"])[:20]}, which cannot be converted.',
                code="checkpoint_dtype",
                hint=f"Known: {', '.join(_TORCH)}.",
            )
        first, last = entry["data_offsets"]
        found[name] = Numbers(file, dtype, start + first, (last - first) // dtype.itemsize).shaped(entry["shape"])
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: a piece is soon done, and threads that wait for each other take longer than the disk."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dtype_named(word: str) -> torch.dtype:
    """The number type called `word`.

    Raises:
        UserError: option_value, with the nearest known one.
    """
    found = DTYPES.get(word.strip().lower())
    if found is None:
        near = did_you_mean(word, DTYPES)
        raise UserError(
            f'"{word[:40]}" is no number type.',
            code="option_value",
            hint=f'Did you mean "{near}"?' if near else "Known: float32, float16, bfloat16.",
        )
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """'float32', 'bfloat16', …"""
    return str(dtype).removeprefix("torch.")


def cast(stored: Stored, dtype: torch.dtype) -> Stored:
    """The tensor in another number type; what is no plain float (indices, quantised numbers) stays as it is.

    The pieces raise UserError cast_overflow where a number becomes infinite.
    """
    if stored.dtype is dtype or stored.dtype not in _CASTABLE:
        return stored
    return Stored(dtype, stored.shape, lambda: (_cast(piece, dtype) for piece in stored.pieces()))


def _cast(piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    made = piece.to(dtype)
    if dtype is torch.float16:
        low, high = torch.aminmax(made)
        # The quick look finds what is suspicious; infinite before as after is no overflow.
        if not (low.isfinite() and high.isfinite()) and bool((made.isinf() & ~piece.isinf()).any()):
            raise UserError(
                "A weight is too large for float16 and would become infinite.",
                code="cast_overflow",
                hint='Take bfloat16, which reaches as far as float32: to="bfloat16".',
            )
    return made
