"""Images and recordings in SQL: contents as BLOBs, or paths of files, one or a list of them for a row.

Alone because a path is read here, by the process that runs the query: the workers may be on other machines, and the
content is what an answer belongs to. Only plain files inside the allowed folders are read, and no more than fits.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from runtime.checkpoints.folder import open_file
from runtime.errors import RowError, UserError
from runtime.spec import Prompt

PARAMETERS = ("BLOB[]", "VARCHAR")
"""SQL types of what `columns` gives: contents, or paths as UTF-8; and the type that was written."""

MAX_BYTES = 512 << 20  # of one file; an hour of speech at 48 kHz is 350 MB
PIECE_BYTES = 256 << 20  # of the rows that are asked together

_NOTHING = '"NULL"'  # DuckDB's name of the type of a bare NULL


def columns(argument: str) -> str:
    """The two columns for a macro's argument, which may have any of the types that are understood."""
    return (
        f"CASE WHEN typeof({argument}) = 'BLOB' THEN [{argument}::BLOB] "
        f"WHEN typeof({argument}) = 'BLOB[]' THEN {argument}::BLOB[] "
        f"WHEN {argument} IS NULL THEN NULL "
        f"WHEN typeof({argument}) LIKE '%[]' THEN list_transform({argument}::VARCHAR[], lambda path: encode(path)) "
        f"ELSE [encode({argument}::VARCHAR)] END, typeof({argument})"
    )


class Media:
    """What the rows of a chunk have beside their text."""

    def __init__(self, rows: Sequence[Sequence[bytes | None] | None], are_paths: bool) -> None:
        self._rows = rows
        self._are_paths = are_paths

    @classmethod
    def read(cls, chunk: Sequence[pa.ChunkedArray]) -> Media | None:
        """The media in the two columns of a chunk; None when the call has none."""
        if not chunk:
            return None
        written = chunk[1][0].as_py() if len(chunk[1]) else None
        if written in (None, _NOTHING):
            return None
        return cls(chunk[0].to_pylist(), not written.startswith("BLOB"))

    def is_null(self, row: int) -> bool:
        """Whether the row has a NULL in place of a content."""
        given = self._rows[row]
        return given is None or None in given

    def given(self, row: int) -> list[bytes]:
        """What was written for a row that is not NULL: contents or paths."""
        return [each for each in self._rows[row] or () if each is not None]

    def contents(self, row: int) -> tuple[bytes, ...]:
        """The contents for a row that is not NULL.

        Raises:
            RowError: media_path, media_missing, media_outside_roots, media_too_large.
        """
        given = self.given(row)
        return tuple(read_file(path.decode()) for path in given) if self._are_paths else tuple(map(_bounded, given))


def read_file(path: str) -> bytes:
    """The content of a file; the message has no path, which is a value of the user's table.

    Raises:
        RowError: media_path, media_missing, media_outside_roots, media_too_large.
    """
    try:
        with open_file(Path(path).expanduser()) as file:
            pieces: list[bytes] = []
            left = MAX_BYTES + 1
            while left and (piece := file.read(min(left, 1 << 24))):
                pieces.append(piece)
                left -= len(piece)
    except UserError as error:
        code = "media_outside_roots" if error.code == "checkpoint_outside_roots" else "media_path"
        said = "lies outside the folders that may be read" if code != "media_path" else "is no plain file"
        raise RowError(f"The file that the row names {said}.", code=code) from None
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "it is no path"
        raise RowError(
            f"The file that the row names cannot be read: {why}.",
            code="media_missing",
            hint="A text is the path of a file on the machine that runs the query; give a BLOB for contents.",
        ) from None
    return _bounded(b"".join(pieces))


def _bounded(content: bytes) -> bytes:
    if len(content) > MAX_BYTES:
        raise RowError(
            f"The row's image or recording has more than {MAX_BYTES >> 20} MB.",
            code="media_too_large",
            hint="Make it smaller, or cut it into parts.",
        )
    return content


def media_bytes(prompt: Prompt) -> int:
    """Bytes of the media of a prompt."""
    return 0 if isinstance(prompt, str) else sum(len(each) for turn in prompt for each in turn.media)


def from_base64(text: Any) -> bytes:
    """The content in a text of base64, as Byzer's requests have it.

    Raises:
        RowError: bad_request.
    """
    try:
        return _bounded(base64.b64decode(str(text).encode(), validate=True))
    except (binascii.Error, ValueError):
        raise RowError("The image of the request is no base64.", code="bad_request") from None
