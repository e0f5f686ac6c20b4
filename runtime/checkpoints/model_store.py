"""The model store: checkpoints by name, in a folder or in object storage.

    <store>/<name>/manifest.json        what the model is, and every file with its SHA-256
    <store>/<name>/<content>/…          its files; <content> is the hash of the manifest's list of files
    <store>/<name>/incomplete.json      an import that is under way, was interrupted, or failed

Alone because its promise is in this order: files lie under the hash of what they are to be, and the manifest is
written last. A model is there whole or not at all, an interrupted import goes on where it stopped, and one model
takes the place of another in the moment in which its manifest does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.checkpoints.folder import data_folder
from runtime.checkpoints.locations import (
    PARTIAL,
    PIECE_BYTES,
    Wrote,
    fetch_files,
    open_location,
    pump,
    safe_name,
    unreachable,
)
from runtime.errors import Fatal, UserError

VARIABLE = "SQLEXT_MODELS"
MANIFEST, INCOMPLETE = "manifest.json", "incomplete.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a model.

    Attributes:
        name: relative, with slashes.
        state: of the file it was copied from; while that is the same, so is its content. '' = not known.
    """

    name: str
    bytes: int
    sha256: str
    state: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A model of the store.

    Attributes:
        source: where it came from: a folder, a URL or a repository of the hub.
        revision: the commit it is pinned to, of a repository.
        about: what else is known: model_arch, parameters, dtype, publisher, description.
        time: when it was written, in ISO form.
        error: why its import failed, of an incomplete one.
    """

    name: str
    source: str
    files: tuple[StoredFile, ...]
    revision: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    time: str = ""
    error: str = ""

    @property
    def content(self) -> str:
        """16 hexadecimal digits for the names and contents of all files."""
        lines = "".join(f"{file.sha256}  {file.name}\n" for file in sorted(self.files, key=lambda file: file.name))
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


class ModelStore:
    """Models by name under one folder or URL. Thread-safe: models of different names do not touch each other.

    Args:
        location: a folder, or a URL of fsspec such as s3://bucket/models; '' for the user's own.

    Raises:
        UserError: store_location, store_package, checkpoint_outside_roots.
    """

    def __init__(self, location: str = "") -> None:
        self.location = (location or default_location()).removeprefix("file://")
        self._files, self._root = open_location(self.location)
        self.is_local = "://" not in self.location

    def names(self) -> list[str]:
        """What there are folders for, sorted: models, and imports that have not ended well."""
        self._files.invalidate_cache()
        try:
            found = self._files.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        names = (PurePosixPath(entry["name"]).name for entry in found if entry["type"] == "directory")
        return sorted(name for name in names if is_name(name))

    def find(self, name: str) -> Manifest | None:
        """The whole model of that name."""
        return self._read(name, MANIFEST) if is_name(name) else None

    def begun(self, name: str) -> Manifest | None:
        """The import of that name that has not ended."""
        return self._read(name, INCOMPLETE)

    def path(self, manifest: Manifest) -> str:
        """Folder or URL of a model's files."""
        return f"{self.location.rstrip('/')}/{manifest.name}/{manifest.content}"

    def there(self, manifest: Manifest) -> set[str]:
        """Names of the files of `manifest` that are in the store; a file has its name when all of it is there."""
        self._files.invalidate_cache()
        folder = self._path(manifest.name, manifest.content)
        with suppress(FileNotFoundError):
            sizes = {path: info["size"] for path, info in self._files.find(folder, detail=True).items()}
            return {file.name for file in manifest.files if sizes.get(f"{folder}/{file.name}") == file.bytes}
        return set()

    def begin(self, manifest: Manifest) -> None:
        """Note that a model is being imported, or, with its error, that it was not."""
        self._write(self._path(manifest.name, INCOMPLETE), _to_json(manifest))

    def put(self, manifest: Manifest, file: StoredFile, source: Path, wrote: Wrote) -> None:
        """Copy one file of a model, again from its start.

        Raises:
            UserError: source_changed, its content is not what it was.
            OSError: of the disk or the service.
        """
        target = self._path(manifest.name, manifest.content, file.name)
        if self.is_local:
            partial = Path(target + PARTIAL)
            partial.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                _copy(source, stream, file, wrote)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, target)
        else:
            with self._files.open(target, "wb", block_size=PIECE_BYTES) as stream:
                _copy(source, stream, file, wrote)

    def publish(self, manifest: Manifest) -> None:
        """All files are there: from now on the model is, in the place of an older one of its name."""
        older = self.find(manifest.name)
        self._write(self._path(manifest.name, MANIFEST), _to_json(manifest))
        with suppress(FileNotFoundError):
            self._files.rm(self._path(manifest.name, INCOMPLETE))
        if older and older.content != manifest.content:
            with suppress(FileNotFoundError):
                self._files.rm(self._path(older.name, older.content), recursive=True)

    def folder(self, manifest: Manifest) -> Path:
        """The model's files on this machine; those of a remote store are fetched once, and their hashes compared.

        Raises:
            Fatal: store_damaged.
            OSError: of the disk or the service.
        """
        inside = self._path(manifest.name, manifest.content)
        if self.is_local:
            return Path(inside)
        store = hashlib.sha256(self.location.encode()).hexdigest()[:12]
        target = cache_folder() / "models" / store / manifest.name / manifest.content
        if not target.is_dir():
            partial = target.with_name(f"{manifest.content}{PARTIAL}-{os.getpid()}")
            wanted = {f"{inside}/{file.name}": (file.name, file.sha256) for file in manifest.files}
            fetch_files(self._files, wanted, partial, lambda _: None)
            with suppress(OSError):  # another process was quicker
                os.rename(partial, target)
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def _path(self, *parts: str) -> str:
        return "/".join((self._root.rstrip("/"), *parts))

    def _read(self, name: str, file: str) -> Manifest | None:
        path = self._path(name, file)
        try:
            return _from_json(name, self._files.cat_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError):
            raise Fatal(
                f'"{path}" is damaged.',
                code="store_damaged",
                hint="Remove the model's folder from the store and import the model again.",
            ) from None

    def _write(self, path: str, text: str) -> None:
        if self.is_local:
            partial = Path(path + PARTIAL)
            partial.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        else:
            self._files.pipe_file(path, text.encode())


def is_name(word: str) -> bool:
    """Whether a model can be called so."""
    return bool(_NAME.fullmatch(word)) and not word.endswith(PARTIAL)


def default_location() -> str:
    """Where the user's models lie: $SQLEXT_MODELS, or the user's data folder."""
    if said := os.environ.get(VARIABLE):
        return said
    return str(data_folder() / "models")


def cache_folder() -> Path:
    """Where copies of what is remote lie: beside the result store."""
    from runtime.gateway.store_file import default_path

    return default_path().parent


def stored_folder(name: str) -> Path | None:
    """The folder of the model `name` of the user's store; None when there is none.

    Raises:
        SqlextError: the store cannot be read.
    """
    if not is_name(name):
        return None
    if (store := _users_own()) is None:
        return None
    try:
        manifest = store.find(name)
        return store.folder(manifest) if manifest else None
    except OSError as error:
        raise unreachable(store.location, error) from None


def stored_names() -> list[str]:
    """Names of the models of the user's store, when it is on this machine."""
    store = _users_own()
    return [name for name in store.names() if store.find(name)] if store and store.is_local else []


def _users_own() -> ModelStore | None:
    """The user's store; None where it lies outside the folders that may be read."""
    try:
        return ModelStore()
    except UserError as error:
        if error.code == "checkpoint_outside_roots":
            return None
        raise


def _copy(source: Path, stream: Any, file: StoredFile, wrote: Wrote) -> None:
    with source.open("rb") as opened:
        got = pump(opened, stream, wrote)
    if got != file.sha256:
        raise UserError(
            f'"{source}" changed while it was copied.',
            code="source_changed",
            hint="Import the model again when nobody writes to it any more.",
        )


def _to_json(manifest: Manifest) -> str:
    return json.dumps({**asdict(manifest), "content": manifest.content}, indent=1, ensure_ascii=False) + "\n"


def _from_json(name: str, raw: bytes) -> Manifest:
    said = json.loads(raw)
    files = tuple(StoredFile(safe_name(item["name"]), *_facts(item)) for item in said["files"])
    texts = {key: str(said.get(key, "")) for key in ("source", "revision", "time", "error")}
    return Manifest(name, files=files, about=dict(said.get("about") or {}), **texts)


def _facts(item: Mapping[str, Any]) -> Iterable[Any]:
    return int(item["bytes"]), str(item["sha256"]), str(item.get("state", ""))
