"""Kept conversions: a checkpoint in the form that an engine reads, made once and found again by its content.

Alone because several engines need it and several workers start together: one of them makes the form, the others wait
for it, and it appears whole or not at all. The folder `conversions` of the cache may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from runtime.cache_folder import cache_folder
from runtime.checkpoints.fingerprint import checkpoint_fingerprint
from runtime.checkpoints.locks import held
from runtime.checkpoints.output import whole


def kept_conversion(source: Path, form: str, make: Callable[[Path], None]) -> Path:
    """The folder that holds the checkpoint in the folder `source` in another form.

    Args:
        form: name and version of the form.
        make: writes the form into a new folder; one process at a time does so.

    Raises:
        UserError: disk_full, output_unwritable, those of `checkpoint_fingerprint` and those of `make`.
    """
    root = cache_folder() / "conversions"
    found = root / f"{checkpoint_fingerprint(source, _Facts(root / 'facts'))}-{form}"
    if not found.is_dir():
        with held(root / f".{found.name}", lambda: None):
            if not found.is_dir():
                with whole(found) as place:
                    place.mkdir()
                    make(place)
    return found


class _Facts:
    """The hashes of files that did not change, a small file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recall(self, name: str) -> str | None:
        file = self._file(name)
        return file.read_text(encoding="ascii") if file.is_file() else None

    def remember(self, name: str, text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._folder, delete=False, encoding="ascii") as file:
            file.write(text)
        os.replace(file.name, self._file(name))

    def _file(self, name: str) -> Path:
        return self._folder / hashlib.sha256(name.encode()).hexdigest()
