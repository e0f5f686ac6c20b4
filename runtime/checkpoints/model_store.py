"""The model store: checkpoints by name, in a folder or in object storage.

    <store>/<name>/manifest.json        what the model is, and every file with its SHA-256
    <store>/<name>/<content>/…          its files; <content> is the hash of the manifest's list of files
    <store>/<name>/incomplete.json      an import that is under way, was interrupted, or failed
    <store>/<name>/incoming/…           the files of that one, in a folder: their hashes are made as they are copied

Alone because its promise is in this order: files are there before the manifest that names them, and it is written
last. A model is there whole or not at all, an interrupted import goes on where it stopped, and one model takes the
place of another in the moment in which its manifest does. The one that it replaced stays until the next comes, for
those who still read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from uuid import uuid4

from runtime.checkpoints.folder import data_folder, open_file
from runtime.checkpoints.locations import (
    PARTIAL,
    PIECE_BYTES,
    Wrote,
    fetch_files,
    open_location,
    pump,
    safe_name,
    shown,
    unreachable,
)
from runtime.checkpoints.locks import held, hold, new_folder
from runtime.errors import Fatal, UserError

VARIABLE = "SQLEXT_MODELS"
MANIFEST, INCOMPLETE, INCOMING = "manifest.json", "incomplete.json", "incoming"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a model.

    Attributes:
        name: relative, with slashes.
        sha256: '' = not known yet, of an import that is under way.
        state: of the file it was copied from; while that is the same, so is its content. '' = not known.
    """

    name: str
    bytes: int
    sha256: str = ""
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
        previous: content of the model that it took the place of; '' = none.
    """

    name: str
    source: str
    files: tuple[StoredFile, ...]
    revision: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    time: str = ""
    error: str = ""
    previous: str = ""

    @property
    def hashed(self) -> bool:
        """Whether the hashes of all files are known."""
        return all(file.sha256 for file in self.files)

    @property
    def content(self) -> str:
        """16 hexadecimal digits for the names and contents of all files; '' while they are not known."""
        if not self.hashed:
            return ""
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
        return f"{shown(self.location).rstrip('/')}/{manifest.name}/{manifest.content}"

    @contextmanager
    def importing(self, name: str, tick: Callable[[], None]) -> Iterator[None]:
        """While the block runs no other process of the machines that share a folder imports a model of this name.

        Args:
            tick: called while it waits; it may raise.
        """
        if not self.is_local:
            yield
            return
        with held(Path(self._path(name)), tick):
            try:
                yield
            finally:
                with suppress(OSError):  # nothing came of it
                    os.rmdir(self._path(name))

    def there(self, manifest: Manifest) -> set[str]:
        """Names of the files of `manifest` that are in the store; a file has its name when all of it is there."""
        self._files.invalidate_cache()
        found: set[str] = set()
        for folder in [manifest.content] * manifest.hashed + [INCOMING] * self.is_local:
            sizes = self._sizes(self._path(manifest.name, folder))
            found |= {file.name for file in manifest.files if sizes.get(file.name) == file.bytes}
        return found

    def damaged(self, manifest: Manifest) -> set[str]:
        """Names of the files of a whole model whose content is another one than it was; every file is read."""
        folder = self._path(manifest.name, manifest.content)
        sizes = self._sizes(folder)
        return {
            file.name
            for file in manifest.files
            if file.name in sizes and self._sha256(f"{folder}/{file.name}") != file.sha256
        }

    def _sizes(self, folder: str) -> dict[str, int]:
        try:
            found = self._files.find(folder, detail=True)
        except FileNotFoundError:
            return {}
        return {path.removeprefix(folder).lstrip("/"): info["size"] for path, info in found.items()}

    def _sha256(self, path: str) -> str:
        with self._files.open(path, "rb", block_size=PIECE_BYTES) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def begin(self, manifest: Manifest) -> None:
        """Note that a model is being imported, or, with its error, that it was not."""
        self._write(self._path(manifest.name, INCOMPLETE), _to_json(manifest))

    def put(self, manifest: Manifest, file: StoredFile, source: Path, wrote: Wrote) -> StoredFile:
        """Copy one file of a model, again from its start; the file with its hash.

        Raises:
            UserError: source_changed, its content is not what it was.
            OSError: of the disk or the service.
        """
        if not self.is_local:
            target = self._path(manifest.name, manifest.content, file.name)
            return self._put_remote(target, file, source, wrote)
        target = self._path(manifest.name, INCOMING, file.name)
        with _written(Path(target)) as stream:
            return _copy(source, stream, file, wrote)

    def _put_remote(self, target: str, file: StoredFile, source: Path, wrote: Wrote) -> StoredFile:
        stream = self._files.open(target, "wb", block_size=PIECE_BYTES)
        try:
            copied = _copy(source, stream, file, wrote)
        except BaseException:
            # To close it would store the part as if it were the file.
            with suppress(Exception):
                stream.discard()
            with suppress(AttributeError):  # else it would be closed when it is forgotten
                stream.closed = True
            with suppress(Exception):
                self._files.rm_file(target)
            raise
        stream.close()
        return copied

    def incoming(self, name: str) -> Path:
        """The folder that the files of an import into a folder are copied to."""
        return Path(self._path(name, INCOMING))

    def publish(self, manifest: Manifest, older: Manifest | None) -> None:
        """All files are there: from now on the model is, in the place of `older`, which stays until the next one."""
        if older:
            previous = older.content if older.content != manifest.content else older.previous
            manifest = replace(manifest, previous=previous)
        if self.is_local:
            self._take_in(manifest)
        self._write(self._path(manifest.name, MANIFEST), _to_json(manifest))
        with suppress(FileNotFoundError):
            self._files.rm(self._path(manifest.name, INCOMPLETE))
        if older and older.previous not in ("", manifest.content, manifest.previous):
            with suppress(FileNotFoundError):
                self._files.rm(self._path(older.name, older.previous), recursive=True)
        if older and self.is_local:
            self._remove_orphans(manifest)

    def _take_in(self, manifest: Manifest) -> None:
        """Put the files that were copied under the hash of all of them."""
        incoming, content = self.incoming(manifest.name), Path(self._path(manifest.name, manifest.content))
        for file in manifest.files:
            if (incoming / file.name).exists():
                (content / file.name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(incoming / file.name, content / file.name)
        shutil.rmtree(incoming, ignore_errors=True)

    def _remove_orphans(self, manifest: Manifest) -> None:
        """Remove folders that imports have left which did not end."""
        for child in Path(self._path(manifest.name)).iterdir():
            if child.is_dir() and child.name not in (manifest.content, manifest.previous):
                shutil.rmtree(child, ignore_errors=True)

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
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_unused(target.parent)
            partial, handle = new_folder(target.parent, ".", PARTIAL)
            try:
                wanted = {f"{inside}/{file.name}": (file.name, file.sha256) for file in manifest.files}
                fetch_files(self._files, wanted, partial, lambda _: None)
                with suppress(OSError):  # another process was quicker
                    os.rename(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                if handle is not None:
                    os.close(handle)
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
                hint='Import the model again with overwrite="true".',
            ) from None

    def _write(self, path: str, text: str) -> None:
        if self.is_local:
            with _written(Path(path)) as stream:
                stream.write(text.encode())
        else:
            self._files.pipe_file(path, text.encode())


@contextmanager
def _written(file: Path) -> Iterator[BinaryIO]:
    """A stream for a file that appears whole, under a name that nobody else writes to, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid4().hex}{PARTIAL}")
    try:
        with partial.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _remove_unused(copies: Path) -> None:
    """Of copies of a remote model all but the newest, which may be in use, and parts that nobody fetches."""
    whole = sorted(
        (child for child in copies.iterdir() if child.name[0] != "."), key=lambda child: child.stat().st_mtime
    )
    left = [child for child in copies.iterdir() if child.name[0] == "." and child.name.endswith(PARTIAL)]
    for folder in [*whole[:-1], *left]:
        if (handle := hold(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


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


def _copy(source: Path, stream: Any, file: StoredFile, wrote: Wrote) -> StoredFile:
    with open_file(source) as opened:
        got = pump(opened, stream, wrote)
    if got != (file.sha256 or got):
        raise UserError(
            f'"{source}" changed while it was copied.',
            code="source_changed",
            hint="Import the model again when nobody writes to it any more.",
        )
    return replace(file, sha256=got)


def _to_json(manifest: Manifest) -> str:
    return json.dumps({**asdict(manifest), "content": manifest.content}, indent=1, ensure_ascii=False) + "\n"


def _from_json(name: str, raw: bytes) -> Manifest:
    said = json.loads(raw)
    files = tuple(StoredFile(safe_name(item["name"]), *_facts(item)) for item in said["files"])
    texts = {key: str(said.get(key, "")) for key in ("source", "revision", "time", "error", "previous")}
    return Manifest(name, files=files, about=dict(said.get("about") or {}), **texts)


def _facts(item: Mapping[str, Any]) -> Iterable[Any]:
    return int(item["bytes"]), str(item["sha256"]), str(item.get("state", ""))
