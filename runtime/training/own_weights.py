"""Weights from elsewhere: a folder behind any address that fsspec knows, brought into the job's own folder.

Alone because it is the one place where a training reads from the network. Only what a checkpoint needs is fetched:
safetensors, configuration and tokenizer, never pickles or code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.checkpoints.folder import ROOTS_VARIABLE, open_folder
from runtime.errors import SqlextError, UserError
from runtime.secrets import redact
from runtime.training.whole import whole_folder

SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")
_LOCAL = ("file", "local")


def is_address(path: str) -> bool:
    """Whether a path must be fetched: it begins with the name of a protocol that is not the machine's own files."""
    protocol, found, _ = path.partition("://")
    return bool(found) and protocol not in _LOCAL


def local_path(path: str) -> str:
    """A local path without the `file://` it may have."""
    protocol, found, rest = path.partition("://")
    return rest if found and protocol in _LOCAL else path


def fetch(address: str, into: Path, tick: Callable[[str], None]) -> Path:
    """Copy the checkpoint behind `address` into the new folder `into`, which appears whole or not at all.

    Args:
        address: of a folder: s3://…, gs://…, http://… or whatever fsspec knows.
        tick: told which file is copied; may raise to stop.

    Raises:
        UserError: weights_address, weights_unreachable, weights_missing, checkpoint_outside_roots.
    """
    check_address(address)
    shown = redact(address)
    try:
        system, names = _listed(address)
        if not names:
            raise UserError(
                f'There is no checkpoint at "{shown}".',
                code="weights_missing",
                hint="Give the folder that holds config.json and the *.safetensors files.",
            )
        with whole_folder(into) as unfinished:
            for name, remote in names.items():
                tick(f"fetching {name}")
                target = unfinished / name
                target.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(remote, str(target))
    except SqlextError:
        raise
    except Exception as error:  # of whatever library the protocol has
        cause = redact(next(iter(str(error).splitlines()), ""))[:200]
        raise UserError(
            f'"{shown}" could not be fetched: {type(error).__name__}: {cause}',
            code="weights_unreachable",
            hint="Check the address and the credentials in the environment; some need a package: s3fs, gcsfs.",
        ) from None
    return open_folder(str(into))


def check_address(address: str) -> None:
    """Refuse an address that may not be read.

    Raises:
        UserError: weights_address: protocols in a chain, which may lead back to local files;
            checkpoint_outside_roots: folders are limited, and this is none of them.
    """
    if "::" in address:
        raise UserError(
            f'"{redact(address)}" chains protocols.',
            code="weights_address",
            hint="Give the address of the folder itself: s3://bucket/folder.",
        )
    roots = os.environ.get(ROOTS_VARIABLE)
    if roots:
        raise UserError(
            f'"{redact(address)}" is outside the folders that may be read.',
            code="checkpoint_outside_roots",
            hint=f"Allowed by {ROOTS_VARIABLE}: {roots}. Copy the checkpoint there first.",
        )


def _listed(address: str) -> tuple[Any, dict[str, str]]:
    """The file system behind an address, and the files to fetch: their names in the folder, and there."""
    import fsspec

    system, root = fsspec.core.url_to_fs(address)
    found = {}
    for remote in system.find(root):
        name = str(remote).removeprefix(root.rstrip("/")).lstrip("/")
        parts = PurePosixPath(name).parts
        if name.endswith(SUFFIXES) and not any(part.startswith(".") for part in parts):
            found[name] = str(remote)
    return system, found
