"""Places outside a folder of this machine: a file system of fsspec for a URL, and copying to and from it.

Alone because what comes from elsewhere is not trusted: URLs are checked before anything is opened, names before
anything is written, and contents as they pass.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from runtime.checkpoints.folder import ROOTS_VARIABLE, check_roots
from runtime.errors import Fatal, UserError

PIECE_BYTES = 8 << 20
PARTIAL = ".partial"
THREADS = 4  # files of one model that are copied at the same time

_PACKAGES = {
    "s3": "'sqlext[s3]'",
    "s3a": "'sqlext[s3]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
}

Wrote = Callable[[int], None]
"""Told how many bytes were copied since the last time; it may raise to stop the work."""


def open_location(location: str) -> tuple[Any, str]:
    """fsspec's file system for a folder or URL, and the path in it.

    Raises:
        UserError: store_location, store_package, checkpoint_outside_roots.
    """
    import fsspec

    if "\0" in location or "::" in location:
        raise _no_location(location)
    if "://" not in location:
        root = os.path.realpath(os.path.expanduser(location))
        check_roots(Path(root))
        return fsspec.filesystem("file"), root
    _check_remote_roots(location)
    if urlsplit(location).password:
        raise UserError(
            "The URL holds a password, which would be stored and shown.",
            code="store_location",
            hint="Leave it out, and give it in the environment or the service's own configuration file.",
        )
    protocol = location.partition("://")[0].lower()
    try:
        files, root = fsspec.core.url_to_fs(location)
    except ImportError:
        package = _PACKAGES.get(protocol, f"the fsspec package for {protocol}://")
        raise UserError(
            f'"{location}" needs a package that is not installed.',
            code="store_package",
            hint=f"Run: pip install {package}.",
        ) from None
    except ValueError:
        raise _no_location(location) from None
    return files, str(root)


def _check_remote_roots(location: str) -> None:
    allowed = [root for root in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if root]
    if allowed:
        raise UserError(
            f'"{location}" is outside the folders that may be read.',
            code="checkpoint_outside_roots",
            hint=f"Allowed by {ROOTS_VARIABLE}: {', '.join(allowed)}.",
        )


def _no_location(location: str) -> UserError:
    return UserError(
        f'"{location}" is neither a folder nor a URL that can be opened.',
        code="store_location",
        hint="Give a folder, or a URL such as s3://bucket/models.",
    )


def unreachable(location: str, error: OSError) -> UserError:
    """The error for a folder or service that does not answer."""
    return UserError(
        f'"{location}" cannot be read or written: {reason(error)}.',
        code="store_unreachable",
        hint="Check the address, the rights and the credentials; for s3, AWS_ENDPOINT_URL and AWS_ACCESS_KEY_ID.",
    )


def reason(error: BaseException) -> str:
    """What went wrong, in a line."""
    said = error.strerror if isinstance(error, OSError) else None
    return (said or type(error).__name__).splitlines()[0][:200]


def fetch_files(files: Any, wanted: Mapping[str, tuple[str, str]], folder: Path, wrote: Wrote) -> None:
    """Bring files of a remote file system into `folder`; those that are there in full size stay.

    Args:
        wanted: path -> name relative to `folder`, and SHA-256 or '' when it is not known.

    Raises:
        Fatal: store_damaged, a hash is another one.
        OSError: of the disk or the service.
    """

    def fetch(path: str) -> None:
        name, sha256 = wanted[path]
        target = folder / safe_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + PARTIAL)
        with files.open(path, "rb", block_size=PIECE_BYTES) as source, partial.open("wb") as stream:
            got = pump(source, stream, wrote)
        if sha256 and got != sha256:
            raise Fatal(
                f'"{path}" is damaged: its content is not what the manifest says.',
                code="store_damaged",
                hint='Import the model again with overwrite="true".',
            )
        os.replace(partial, target)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(fetch, wanted))


def safe_name(name: str) -> str:
    """A name from elsewhere that stays inside the folder it is put into.

    Raises:
        Fatal: store_damaged.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise Fatal(
            "A file of the model has a name that leads out of its folder.",
            code="store_damaged",
            hint="Do not use this model: somebody has tampered with it.",
        )
    return name


def pump(source: BinaryIO, target: BinaryIO, wrote: Wrote) -> str:
    """Copy all bytes; their SHA-256 in hexadecimal."""
    made = hashlib.sha256()
    while piece := source.read(PIECE_BYTES):
        made.update(piece)
        target.write(piece)
        wrote(len(piece))
    return made.hexdigest()
