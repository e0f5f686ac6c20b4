"""The fingerprint of a checkpoint: a hash of the content that decides its answers, wherever the folder lies.

Alone because stored answers hang on it: two folders with equal content share them, and a folder whose weights,
tokenizer or templates changed does not find the old ones. A large checkpoint is read once; each file's hash is
remembered together with what tells that the file was changed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from runtime.checkpoints.folder import check_roots, unreadable

CHUNK_BYTES = 64 * 2**20  # hashed by one thread
READ_BYTES = 2**20
MAX_THREADS = 8
SETTLED_S = 2.0  # a file changed less long ago may change again without a new time
SKIPPED_NAMES = ("README", "LICENSE", "NOTICE", "USE_POLICY")  # without their suffix
SKIPPED_SUFFIX = ".md"


class Memory(Protocol):
    """A small lasting map: what the result store has for facts about models."""

    def recall(self, name: str) -> str | None:
        """The text remembered under `name`."""
        ...

    def remember(self, name: str, text: str) -> None:
        """Keep `text` under `name`."""
        ...


def checkpoint_fingerprint(folder: Path, store: Memory) -> str:
    """32 hexadecimal digits for the content of the checkpoint in `folder`; links are followed.

    Raises:
        UserError: checkpoint_unreadable, checkpoint_outside_roots.
    """
    try:
        files = sorted(_files(folder))
        hashes = _hashes([file for _, file in files], store)
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error) from None
    whole = hashlib.blake2b(digest_size=16)
    for (name, _), content in zip(files, hashes, strict=True):
        encoded = os.fsencode(name)
        whole.update(len(encoded).to_bytes(8, "little") + encoded + bytes.fromhex(content))
    return whole.hexdigest()


def _files(folder: Path, above: tuple[Path, ...] = (), prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Name below the checkpoint and real path of every file that counts, linked folders' files too."""
    real = Path(os.path.realpath(folder))
    check_roots(real)
    if real in above:  # a link that leads back up
        return
    if real.is_file():  # a GGUF model, however the file is called
        yield f"model{real.suffix}", real
        return
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        name = prefix + entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path), (*above, real), f"{name}/")
        elif not entry.name.endswith(SKIPPED_SUFFIX) and entry.name.split(".")[0].upper() not in SKIPPED_NAMES:
            file = Path(os.path.realpath(entry.path))
            check_roots(file)
            yield name, file


def _hashes(files: list[Path], store: Memory) -> list[str]:
    """The files' hashes, in their order; those that are not remembered are read, several parts at a time."""
    found: list[str | tuple[str, list[Future[bytes]]]] = []
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        for file in files:
            state = _state(file)
            known, _, content = (store.recall(_fact(file)) or "").rpartition(" ")
            if known == state:
                found.append(content)
                continue
            size = file.stat().st_size
            parts = [threads.submit(_hash_part, file, start) for start in range(0, max(1, size), CHUNK_BYTES)]
            found.append((state, parts))
        return [
            entry if isinstance(entry, str) else _remembered(file, *entry, store)
            for file, entry in zip(files, found, strict=True)
        ]


def _remembered(file: Path, state: str, parts: list[Future[bytes]], store: Memory) -> str:
    content = hashlib.blake2b(b"".join(part.result() for part in parts), digest_size=32).hexdigest()
    settled = time.time() - file.stat().st_mtime > SETTLED_S
    if settled and _state(file) == state:
        store.remember(_fact(file), f"{state} {content}")
    return content


def _hash_part(file: Path, start: int) -> bytes:
    made = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    left = CHUNK_BYTES
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while left and (count := stream.readinto(buffer[: min(left, READ_BYTES)])):
            made.update(buffer[:count])
            left -= count
    return made.digest()


def _fact(file: Path) -> str:
    return f"sha256 {os.fsencode(file)!r}"


def _state(file: Path) -> str:
    """What changes when the file's content does."""
    found = file.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"
