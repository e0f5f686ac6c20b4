"""What the files of a checkpoint are by their content, whatever they are called.

Alone because what is carried on, into the store or into a converted model, will be trusted by whoever takes it from
there: weights are checked by their headers, and what can run code is refused by its first bytes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterable
from pathlib import Path

from runtime.checkpoints.folder import open_file, unreadable
from runtime.checkpoints.gguf_header import is_gguf, read_gguf
from runtime.checkpoints.weights import check_file, pickled
from runtime.errors import UserError

START_BYTES = 4096
_PROGRAMS = (b"\x7fELF", b"MZ", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"#!")
_ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
_CALLS = ("GLOBAL", "STACK_GLOBAL", "INST", "REDUCE", "BUILD", "OBJ", "NEWOBJ")


def check_contents(folder: Path, names: Iterable[str]) -> None:
    """Look at the beginning of files that are carried on.

    Raises:
        UserError: checkpoint_pickled, a pickle or an archive; checkpoint_remote_code, a program; checkpoint_corrupt
            and the others of `check_file` and `read_gguf` for weights.
    """
    for name in names:
        file = folder / name
        if name.lower().endswith(".safetensors"):
            check_file(file)
        elif is_gguf(name):
            read_gguf(file)
        else:
            _check_start(file)


def _check_start(file: Path) -> None:
    try:
        with open_file(file) as stream:
            start = stream.read(START_BYTES)
    except OSError as error:
        raise unreadable(file, error) from None
    if start.startswith(_ARCHIVES) or _is_pickle(start):
        raise pickled(file)
    if start.startswith(_PROGRAMS):
        raise UserError(
            f'"{file}" is refused: it is a program.',
            code="checkpoint_remote_code",
            hint="A checkpoint needs none: remove the file.",
        )


def _is_pickle(start: bytes) -> bool:
    """Whether a file that begins so is a pickle; those before protocol 2 are known by their operations alone."""
    if len(start) > 1 and start[0] == 0x80 and start[1] <= 5:
        return True
    calls, at = False, 0
    try:
        for operation, _, position in pickletools.genops(start):
            calls, at = calls or operation.name in _CALLS, position or 0
    except ValueError:  # of a text, or where no more of the file was read
        return calls and len(start) == START_BYTES and at > START_BYTES // 2
    return calls
