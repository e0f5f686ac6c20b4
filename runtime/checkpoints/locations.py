"""Places outside a folder of this machine: a file system of fsspec for a URL, and copying to and from it.

Alone because what comes from elsewhere is not trusted: URLs are checked before anything is opened, names before
anything is written, and contents as they pass.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from runtime.checkpoints.folder import ROOTS_VARIABLE, check_roots
from runtime.errors import Fatal, UserError
from runtime.secrets import first_line, redact

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


def shown(location: str) -> str:
    """A folder or URL as it may be shown and stored: without user, password, query and fragment."""
    scheme, separator, rest = location.partition("://")
    if not separator:
        return location
    try:
        urlsplit(location)
    except ValueError:
        return f"{scheme}://…"
    bare = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = bare.partition("/")
    if ":" in host and "@" in path:  # a slash in a password
        return f"{scheme}://{bare.rpartition('@')[2]}"
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def check_location(location: str) -> None:
    """Refuse what cannot be opened, and URLs that hold a secret, before anything is done with them.

    Raises:
        UserError: store_location, checkpoint_outside_roots.
    """
    if "\0" in location or "::" in location:
        raise _no_location(location)
    if "://" not in location:
        return
    try:
        parts = urlsplit(location)
        cut = ":" in parts.netloc and not parts.netloc.rpartition(":")[2].isdigit()  # a slash in a password
        secret = parts.password or parts.query or parts.fragment or (cut and "@" in parts.path)
    except ValueError:
        raise _no_location(location) from None
    if secret:
        raise UserError(
            f'The URL "{shown(location)}" holds a password or a query, which would be stored and shown.',
            code="store_location",
            hint="Leave it out, and give it in the environment or the service's own configuration file.",
        )
    if allowed := [root for root in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if root]:
        raise UserError(
            f'"{shown(location)}" is outside the folders that may be read.',
            code="checkpoint_outside_roots",
            hint=f"Allowed by {ROOTS_VARIABLE}: {', '.join(allowed)}.",
        )


def open_location(location: str) -> tuple[Any, str]:
    """fsspec's file system for a folder or URL, and the path in it.

    Raises:
        UserError: store_location, store_package, checkpoint_outside_roots.
    """
    import fsspec

    check_location(location)
    if "://" not in location:
        root = os.path.realpath(os.path.expanduser(location))
        check_roots(Path(root))
        return fsspec.filesystem("file"), root
    protocol = location.partition("://")[0].lower()
    try:
        files, root = fsspec.core.url_to_fs(location)
    except ImportError:
        package = _PACKAGES.get(protocol, f"the fsspec package for {protocol}://")
        raise UserError(
            f'"{shown(location)}" needs a package that is not installed.',
            code="store_package",
            hint=f"Run: pip install {package}.",
        ) from None
    except ValueError:
        raise _no_location(location) from None
    return files, str(root)


def _no_location(location: str) -> UserError:
    return UserError(
        f'"{shown(location)}" is neither a folder nor a URL that can be opened.',
        code="store_location",
        hint="Give a folder, or a URL such as s3://bucket/models.",
    )


def unreachable(location: str, error: OSError) -> UserError:
    """The error for a folder or service that does not answer."""
    return UserError(
        f'"{shown(location)}" cannot be read or written: {reason(error)}.',
        code="store_unreachable",
        hint="Check the address, the rights and the credentials; for s3, AWS_ENDPOINT_URL and AWS_ACCESS_KEY_ID.",
    )


def reason(error: BaseException) -> str:
    """What went wrong, in a line without keys."""
    said = error.strerror if isinstance(error, OSError) else None
    return redact(said.splitlines()[0])[:200] if said else first_line(error)


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


def pump(source: RawIOBase, target: BinaryIO, wrote: Wrote) -> str:
    """Copy all bytes; their SHA-256 in hexadecimal, made while they are written."""
    made = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE_BYTES))
    with ThreadPoolExecutor(1) as hashing:
        while count := source.readinto(buffer) or 0:
            hashed = hashing.submit(made.update, buffer[:count])
            target.write(buffer[:count])
            hashed.result()
            wrote(count)
    return made.hexdigest()
