"""Pickled weights, read without running what may stand in them.

Alone because it is the only place where a pickle is opened: torch's reader takes tensors and plain containers and no
call (`weights_only`), and before that the archive and after that every tensor is looked at, as a few bytes can claim
terabytes. https://pytorch.org/docs/stable/notes/serialization.html#weights-only-security
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from runtime.checkpoints.folder import open_file, unreadable
from runtime.checkpoints.tensors import Numbers, Stored, in_memory, split
from runtime.checkpoints.weights import corrupt
from runtime.errors import UserError

MAX_NESTING = 50
Known = Sequence[tuple[Callable[..., Any], str]]
"""Classes that may stand in a file beside tensors: what is made in place of one, and its full name."""


def load_pickled(file: Path, known: Known = ()) -> Any:
    """What a file of torch.save holds. Its tensors are on the meta device; `stored` reads their numbers.

    Of files from before torch 1.6, which are no archives, the tensors are there.

    Raises:
        UserError: checkpoint_pickled, it asks for more than tensors; checkpoint_corrupt; checkpoint_unreadable;
            checkpoint_outside_roots.
    """
    try:
        place = "meta" if _is_archive(file) else "cpu"
        with torch.serialization.safe_globals(list(known)):
            content = torch.load(file, map_location=place, weights_only=True)
    except OSError as error:
        raise unreadable(file, error) from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle fails anywhere in the reader
        if isinstance(error, pickle.UnpicklingError) and (asked := re.search(r"GLOBAL ([\w.]{1,80})", str(error))):
            raise _refused(file, asked[1]) from None
        raise corrupt(file, "it is no file of torch.save with nothing but tensors") from None
    for tensor in _tensors(content):
        _check_tensor(file, tensor, place)
    return content


def load_tensors(file: Path) -> dict[str, Stored]:
    """The tensors by name of a weight file such as pytorch_model.bin; raises like `load_pickled`.

    Of those that share their numbers, each is a tensor of its own.
    """
    content = load_pickled(file)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise corrupt(file, "it holds something else than tensors by name")
    if "__metadata__" in content:
        raise corrupt(file, "one of its tensors is called __metadata__, which no tensor can be in safetensors")
    return {name: stored(file, tensor) for name, tensor in content.items()}


def stored(file: Path, tensor: torch.Tensor) -> Stored:
    """A tensor of `load_pickled`, as one that is not read yet."""
    if not tensor.is_meta:
        return in_memory(tensor)
    if tensor.is_contiguous():
        return numbers(file, tensor).shaped(tensor.shape)
    whole = numbers(file, tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0))

    def pieces() -> Iterator[torch.Tensor]:  # its numbers lie in another order
        flat = whole.shaped((whole.count,)).load()
        return split(flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1))

    return Stored(tensor.dtype, tuple(tensor.shape), pieces)


def numbers(file: Path, tensor: torch.Tensor) -> Numbers:
    """Where the numbers of a contiguous tensor of `load_pickled` lie.

    Raises:
        UserError: checkpoint_corrupt, a file from before torch 1.6.
    """
    if not tensor.is_meta:
        raise corrupt(file, "it is from before torch 1.6")
    start = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
    return Numbers(file, tensor.dtype, start, tensor.numel())


def _is_archive(file: Path) -> bool:
    """Whether it is the zip archive of today's torch.save; one that would grow when it is read is refused."""
    with open_file(file) as stream:
        if stream.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise corrupt(file, "its archive is not whole") from None
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename:
            raise corrupt(file, "a name in its archive leads out of it")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise corrupt(file, "its archive is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise corrupt(file, "its archive claims more bytes than it has")
    return True


def _refused(file: Path, asked: str) -> UserError:
    return UserError(
        f'"{file}" is refused: it asks for {asked} when it is read.',
        code="checkpoint_pickled",
        hint="Weights are numbers alone. Do not load this file; copy the checkpoint from where you trust it.",
    )


def _tensors(content: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list | tuple) and depth < MAX_NESTING:
        for item in content.values() if isinstance(content, dict) else content:
            yield from _tensors(item, depth + 1)


def _check_tensor(file: Path, tensor: torch.Tensor, place: str) -> None:
    """Refuse a tensor that is larger than what is stored of it, or that is not there."""
    if tensor.layout is torch.strided and tensor.device.type == place and not tensor.is_quantized:
        storage = tensor.untyped_storage()
        held = storage.nbytes() // tensor.element_size()
        last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        begins = storage._checkpoint_offset if place == "meta" else 0
        there = begins is not None and begins + storage.nbytes() <= file.stat().st_size
        if there and tensor.numel() <= held and (not tensor.numel() or 0 <= last < held):
            return
    raise corrupt(file, "one of its tensors is not stored as plain numbers")
