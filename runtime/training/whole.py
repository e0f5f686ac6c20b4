"""Files and folders that appear whole or not at all, whatever kills the process that writes them.

Alone because checkpoints, prepared rows, fetched weights and the status all promise it, and one kind of leftover can
be swept in one place: hidden names that end in `.unfinished` or `.old`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UNFINISHED, OLD = ".unfinished", ".old"


def unfinished_of(whole: Path, writer: str = "") -> Path:
    """Where `whole` is written until it is done: beside it, hidden.

    Args:
        writer: tells several writers of the same file apart.
    """
    return whole.with_name(f".{whole.name}{writer}{UNFINISHED}")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, that takes the place of `out` when the block ends well, and is gone otherwise.

    For one writer at a time.
    """
    unfinished = unfinished_of(out)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        settle(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def settle(unfinished: Path, whole: Path) -> None:
    """Let a folder appear under its name once its files are on the disk; what had the name before goes."""
    for parent, _, names in os.walk(unfinished):
        for name in [*names, "."]:
            _sync(os.path.join(parent, name))
    if whole.exists():
        old = whole.with_name(f".{whole.name}{OLD}")
        shutil.rmtree(old, ignore_errors=True)
        whole.rename(old)
        unfinished.rename(whole)
        shutil.rmtree(old, ignore_errors=True)
    else:
        unfinished.rename(whole)
    _sync(str(whole.parent))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(file, json.dumps(content, indent=1))


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all; several processes may do so at once, and the last one counts."""
    unfinished = unfinished_of(file, f".{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes have left half written in `folder`; for who alone writes there."""
    for left in (*folder.glob(f".*{UNFINISHED}"), *folder.glob(f".*{OLD}")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def is_full(error: OSError) -> bool:
    """Whether the disk, or the user's part of it, has no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _sync(path: str) -> None:
    if not os.path.exists(path):  # a link to a folder of another machine
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
