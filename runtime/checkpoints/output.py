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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import torch

from runtime.checkpoints.fingerprint import SKIPPED_NAMES
from runtime.checkpoints.folder import check_roots, read_json
from runtime.checkpoints.gguf_header import MAGIC, is_gguf
from runtime.checkpoints.inspect import module_folders
from runtime.checkpoints.locks import hold, new_folder
from runtime.checkpoints.model_folder import BIN_INDEX, Shards
from runtime.checkpoints.pickles import load_pickled, numbers
from runtime.checkpoints.tensors import SAFETENSORS_NAMES, Stored
from runtime.checkpoints.weights import INDEX
from runtime.errors import UserError

SHARD_BYTES = 5_000_000_000
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_KINDS = {"config.json": "model_type", "adapter_config.json": "peft_type"}  # and what each of them must say
_SUFFIXES = (
    *(".json", ".safetensors", ".bin", ".gguf", ".txt", ".model", ".jinja", ".tiktoken", ".md"),
    ".gitattributes",
)
_REPLACED = "replaced"  # what was there before, until the new one is
_LEFTOVER = ".partial"

Wrote = Callable[[int], None]
"""Told how many bytes were written since the last time; it may raise to stop the work."""


def output_path(path: str, *, overwrite: bool, inputs: Iterable[Path]) -> Path:
    """The real path for the output, checked before any work is done.

    Args:
        inputs: folders that are read, and must not be replaced.

    Raises:
        UserError: output_missing, output_remote, output_exists, output_is_input, output_foreign,
            checkpoint_outside_roots.
    """
    if not path or "\0" in path:
        raise UserError(
            "The statement does not say where the result goes.",
            code="output_missing",
            hint='Add AND savePath="/path/for/the/result".',
        )
    if "://" in path:
        raise UserError(
            "savePath is a folder of this machine, not a URL.",
            code="output_remote",
            hint='Save it in a folder, and bring that to the store: action="import" AND store="s3://bucket/models".',
        )
    target = Path(os.path.realpath(os.path.expanduser(path)))
    check_roots(target)
    if target.parent.is_dir():
        _settle_leftovers(target)
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
    if foreign := _foreign(target):
        raise UserError(
            f'"{target}" {foreign}, so it is not replaced.',
            code="output_foreign",
            hint="Choose another savePath, or empty the folder yourself.",
        )
    return target


def _occupied(target: Path) -> bool:
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def _foreign(target: Path) -> str:
    """Why what is there is not a model and nothing else; '' when it is."""
    if not target.is_dir():
        return "" if _begins_as_gguf(target) else "is no model"
    if not any(_says(target / name, key) for name, key in _KINDS.items()) and not any(
        is_gguf(file.name) and _begins_as_gguf(file) for file in target.iterdir()
    ):
        return "holds no model"
    inner = {module.name for module in module_folders(target)}
    for child in target.iterdir():
        if child.is_dir() and child.name not in inner:
            return f'holds the folder "{child.name}", which is no part of a model'
        for file in child.iterdir() if child.is_dir() else [child]:
            known = file.name.lower().endswith(_SUFFIXES) or file.name.upper().startswith(SKIPPED_NAMES)
            if file.is_dir() or not known:
                return f'holds "{file.relative_to(target)}", which is no part of a model'
    return ""


def _begins_as_gguf(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def _says(file: Path, key: str) -> bool:
    """Whether a JSON file is there that says something of `key`."""
    try:
        said = read_json(file) if file.is_file() else None
    except UserError:
        return False
    return isinstance(said, dict) and bool(said.get(key))


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
        _settle_leftovers(target)
        _require_room(target, bytes_needed)
        place, handle = new_folder(target.parent, _prefix(target), _LEFTOVER)
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
        with suppress(OSError):
            _settle(place, target)
        if handle is not None:
            os.close(handle)


def _put(place: Path, target: Path, overwrite: bool) -> None:
    if overwrite and _occupied(target):
        os.rename(target, place / _REPLACED)
    try:
        if _occupied(target):  # os.rename would replace a file
            raise FileExistsError
        os.rename(place / target.name, target)
    except OSError as error:
        if isinstance(error, FileExistsError) or error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise UserError(
                f'"{target}" has appeared while the result was made.',
                code="output_exists",
                hint="Somebody else writes there: choose another savePath.",
            ) from None
        raise
    _sync_folder(target.parent)


def _prefix(target: Path) -> str:
    return f".{target.name}."


def _settle_leftovers(target: Path) -> None:
    """Settle what killed processes have left beside `target`; what a process works in is left alone."""
    ours = re.compile(re.escape(_prefix(target)) + r"\w+" + re.escape(_LEFTOVER))
    for entry in target.parent.iterdir():
        if ours.fullmatch(entry.name) and (handle := hold(entry)) is not None:
            with suppress(OSError):
                _settle(entry, target)
            os.close(handle)


def _settle(place: Path, target: Path) -> None:
    """Remove the place where an output was made. What it was to replace goes back when nothing took its place.

    Raises:
        OSError: it cannot go back; everything stays.
    """
    if (place / _REPLACED).exists() and not _occupied(target):
        os.rename(place / _REPLACED, target)
    shutil.rmtree(place, ignore_errors=True)


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
    names = _names(list(shards), stem, suffix)
    with ThreadPoolExecutor(1) as syncing:
        synced: list[Future[None]] = []
        for old, tensors in shards.items():
            write(folder / names[old], tensors, wrote)
            # Now, one file behind the writing: a pile of unwritten pages slows all writing down.
            synced.append(syncing.submit(_sync, folder / names[old]))
            if len(synced) > 1:
                synced[-2].result()
        synced[-1].result()
    if len(shards) > 1:
        total = sum(tensor.bytes for tensors in shards.values() for tensor in tensors.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: names[old] for old, tensors in shards.items() for name in tensors},
        }
        write_json(folder / (INDEX if safe else BIN_INDEX), index)


def _names(shards: list[str], stem: str, suffix: str) -> dict[str, str]:
    """Names of the files of shards; where two of them would be called alike, all are numbered."""
    if len(shards) == 1:
        return {shards[0]: f"{stem}{suffix}"}
    names = {old: f"{_renamed(old, stem)}{suffix}" for old in shards}
    if len(set(names.values())) == len(shards):
        return names
    return {old: f"{stem}-{number:05}-of-{len(shards):05}{suffix}" for number, old in enumerate(shards, 1)}


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
        for _, pieces in _begun_ahead(ordered):
            _write(stream, pieces, wrote)


def write_bin(file: Path, tensors: Mapping[str, Stored], wrote: Wrote) -> None:
    """Write one file of torch.save, of which never more than a piece is in memory.

    torch.save leaves room for the numbers, and they are put there; its checksums of them stay 0, which torch.load
    does not read. https://docs.pytorch.org/docs/stable/notes/serialization.html#torch.serialization.skip_data
    """
    with torch.serialization.skip_data():  # the memory of these is never touched
        torch.save({name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}, file)
    places = {name: numbers(file, tensor).offset for name, tensor in load_pickled(file).items()}
    with file.open("r+b") as stream:
        for name, pieces in _begun_ahead(tensors.items()):
            stream.seek(places[name])
            _write(stream, pieces, wrote)


def _begun_ahead(tensors: Iterable[tuple[str, Stored]]) -> Iterator[tuple[str, Iterable[torch.Tensor]]]:
    """Names and pieces of tensors; while one is written the next is begun, which is all the work for a merged one."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as ahead:
        before: tuple[str, Future[Iterable[torch.Tensor]]] | None = None
        for name, tensor in tensors:
            begun = ahead.submit(_begin, tensor)
            if before:
                yield before[0], before[1].result()
            before = name, begun
        if before:
            yield before[0], before[1].result()


def _begin(tensor: Stored) -> Iterable[torch.Tensor]:
    pieces = iter(tensor.pieces())
    return chain(list(islice(pieces, 1)), pieces)


def _write(stream: BinaryIO, pieces: Iterable[torch.Tensor], wrote: Wrote) -> None:
    for piece in pieces:
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
