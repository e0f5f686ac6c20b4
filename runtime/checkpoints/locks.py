"""A folder that one process at a time holds.

Alone because both conversions and imports must tell a folder that somebody works in from one that was left behind. A
lock ends with its process, however that ends, while the number of a process may be another one's by then.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TICK_S = 0.2
_ATTEMPTS = 3  # after these the file system has no locks


def hold(folder: Path) -> int | None:
    """A handle that holds the folder until it is closed; None when somebody else has it, or it cannot be had."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


@contextmanager
def held(folder: Path, tick: Callable[[], None]) -> Iterator[None]:
    """The folder, made when it is not there, held while the block runs; waits for who has it.

    Args:
        tick: called now and then while it waits; it may raise to stop.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            while not _locked(handle):
                tick()
                time.sleep(TICK_S)
            if folder.exists() and os.path.samestat(os.fstat(handle), os.stat(folder)):
                yield
                return
        finally:
            os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def new_folder(parent: Path, prefix: str, suffix: str) -> tuple[Path, int | None]:
    """A new folder in `parent` and the handle that holds it; None on a file system that has no locks."""
    for _ in range(_ATTEMPTS):  # somebody who clears up may take it before it is held
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
        if (handle := hold(folder)) is not None:
            break
    return folder, handle
