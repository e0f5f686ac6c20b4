"""Output that appears whole or not at all: a folder or a file is made beside its place, made safe, and renamed.

Alone because every conversion ends in it, and a half-written model must never be taken for a whole one, whatever
stops the work: an error, a full disk, Ctrl-C or `kill -9`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from runtime.checkpoints.folder import check_roots
from runtime.checkpoints.model_folder import BIN_INDEX, Shards
from runtime.checkpoints.pickles import load_pickled, numbers
from runtime.checkpoints.tensors import SAFETENSORS_NAMES, Stored
from runtime.checkpoints.weights import INDEX
from runtime.errors import UserError

SHARD_BYTES = 5_000_000_000
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MODEL_FILES = ("config.json", "adapter_config.json")

Wrote = Callable[[int], None]
"""Told how many bytes were written since the last time; it may raise to stop the work."""


def output_path(path: str, *, overwrite: bool, inputs: Iterable[Path]) -> Path:
    """The real path for the output, checked before any work is done.

    Args:
        inputs: folders that are read, and must not be replaced.

    Raises:
        UserError: output_missing, output_exists, output_is_input, output_foreign, checkpoint_outside_roots.
    """
    if not path or "\0" in path:
        raise UserError(
            "The statement does not say where the result goes.",
            code="output_missing",
            hint='Add AND savePath="/path/for/the/result".',
        )
    target = Path(os.path.realpath(os.path.expanduser(path)))
    check_roots(target)
    if any(source == target or source.is_relative_to(target) for source in inputs):
        raise UserError(
            f'"{target}" is read, or holds what is read; the result needs a place of its own.',
            code="output_is_input",
            hint=f'For example savePath="{target}-converted".',
        )
    if not _occupied(target):
        return target
    if not overwrite:
        raise UserError(
            f'"{target}" is there already.',
            code="output_exists",
            hint='Choose another savePath, or add AND overwrite="true" to replace it.',
        )
    if not _is_model(target):
        raise UserError(
            f'"{target}" holds no model, so it is not replaced.',
            code="output_foreign",
            hint="Choose another savePath, or empty the folder yourself.",
        )
    return target


def _occupied(target: Path) -> bool:
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def _is_model(target: Path) -> bool:
    if target.is_file():
        return target.suffix == ".gguf"
    return any((target / name).exists() for name in _MODEL_FILES) or any(target.glob("*.gguf"))


@contextmanager
def whole(target: Path, *, overwrite: bool = False, bytes_needed: int = 0) -> Iterator[Path]:
    """A path to make the output at; it takes the place of `target` when the block ends well, and is gone otherwise.

    Args:
        overwrite: replace what is at `target`.
        bytes_needed: refuse to begin when the disk has less room.

    Raises:
        UserError: disk_full, output_exists, output_unwritable.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        _require_room(target, bytes_needed)
        place = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=".partial", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from None
    try:
        yield place / target.name
        _sync(place / target.name)
        _put(place, target, overwrite)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _disk_full(target) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _put(place: Path, target: Path, overwrite: bool) -> None:
    new, old = place / target.name, place / "replaced"
    if overwrite and _occupied(target):
        os.rename(target, old)
    try:
        if _occupied(target):  # os.rename would replace a file
            raise FileExistsError
        os.rename(new, target)
    except OSError as error:
        if old.exists():
            os.rename(old, target)
        if isinstance(error, FileExistsError) or error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise UserError(
                f'"{target}" has appeared while the result was made.',
                code="output_exists",
                hint="Somebody else writes there: choose another savePath.",
            ) from None
        raise
    _sync_folder(target.parent)


def _prefix(target: Path) -> str:
    return f".{target.name}.{socket.gethostname()}-{os.getpid()}-"


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes of this machine have left beside `target`."""
    ours = re.compile(re.escape(f".{target.name}.{socket.gethostname()}-") + r"(\d+)-\w+\.partial")
    for entry in target.parent.iterdir():
        if (match := ours.fullmatch(entry.name)) and not _alive(int(match[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _require_room(target: Path, bytes_needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if bytes_needed > free:
        raise UserError(
            f'The result needs {_gb(bytes_needed)}, and the disk of "{target.parent}" has {_gb(free)} free.',
            code="disk_full",
            hint="Make room, or choose a savePath on another disk.",
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _disk_full(target: Path) -> UserError:
    return UserError(
        f'The disk became full while "{target}" was written; nothing was left there.',
        code="disk_full",
        hint="Make room, or choose a savePath on another disk.",
    )


def _unwritable(target: Path, error: OSError) -> UserError:
    return UserError(
        f'"{target}" cannot be written: {error.strerror or type(error).__name__}.',
        code="output_unwritable",
        hint="Choose a savePath where you may write.",
    )


def _sync(path: Path) -> None:
    """Wait until a file, or all of a folder, is on the disk."""
    if path.is_dir():
        for child in path.iterdir():
            _sync(child)
        _sync_folder(path)
        return
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_weights(folder: Path, shards: Shards, suffix: str, wrote: Wrote) -> None:
    """Write shards as weight files of Hugging Face form, with an index where there are several.

    Args:
        shards: by the names of the files without their suffix; one is written under the name of a single file.
        suffix: '.safetensors' or '.bin'.
    """
    safe = suffix == ".safetensors"
    write = write_safetensors if safe else write_bin
    stem = "model" if safe else "pytorch_model"
    names = {old: f"{stem}{suffix}" if len(shards) == 1 else f"{_renamed(old, stem)}{suffix}" for old in shards}
    for old, tensors in shards.items():
        write(folder / names[old], tensors, wrote)
        _sync(folder / names[old])  # now, not at the end: a pile of unwritten pages slows all writing down
    if len(shards) > 1:
        total = sum(tensor.bytes for tensors in shards.values() for tensor in tensors.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: names[old] for old, tensors in shards.items() for name in tensors},
        }
        write_json(folder / (INDEX if safe else BIN_INDEX), index)


def _renamed(old: str, stem: str) -> str:
    """The name of a shard with what its suffix is to begin with; names of another kind keep theirs."""
    return re.sub(r"^(pytorch_)?model(?=[-.])", stem, old)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as Hugging Face's libraries do."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(file: Path, tensors: Mapping[str, Stored], wrote: Wrote) -> None:
    """Write one safetensors file, of which never more than a piece is in memory.

    The library's own writer wants all tensors at once. The format: https://github.com/huggingface/safetensors.
    """
    # Wider numbers first, as the library does it: each then lies at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        offsets = [end, end + tensor.bytes]
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for _, tensor in ordered:
            _write(stream, tensor, wrote)


def write_bin(file: Path, tensors: Mapping[str, Stored], wrote: Wrote) -> None:
    """Write one file of torch.save, of which never more than a piece is in memory.

    torch.save leaves room for the numbers, and they are put there; its checksums of them stay 0, which torch.load
    does not read. https://docs.pytorch.org/docs/stable/notes/serialization.html#torch.serialization.skip_data
    """
    with torch.serialization.skip_data():  # the memory of these is never touched
        torch.save({name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}, file)
    places = {name: numbers(file, tensor).offset for name, tensor in load_pickled(file).items()}
    with file.open("r+b") as stream:
        for name, tensor in tensors.items():
            stream.seek(places[name])
            _write(stream, tensor, wrote)


def _write(stream: BinaryIO, tensor: Stored, wrote: Wrote) -> None:
    for piece in tensor.pieces():
        stream.write(memoryview(piece.contiguous().view(torch.uint8).numpy()))
        wrote(piece.nbytes)


def by_size(tensors: Mapping[str, Stored], shard_bytes: int = SHARD_BYTES) -> Shards:
    """Tensors dealt out, in their order, to shards of at most `shard_bytes` (a larger tensor has its own)."""
    dealt: list[dict[str, Stored]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if tensor.bytes > room and dealt[-1]:
            dealt.append({})
            room = shard_bytes
        dealt[-1][name] = tensor
        room -= tensor.bytes
    return {f"model-{number:05}-of-{len(dealt):05}": shard for number, shard in enumerate(dealt, 1)}
