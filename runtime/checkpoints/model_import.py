"""Importing: from a folder, a URL or a repository of the hub into a model store.

Alone because it is the work between a checkpoint and the store: what is elsewhere is fetched first, everything passes
the gates before a byte is stored and again where it is stored, a copy that fails is tried again, and each checkpoint
ends as one row whatever happened to it. Pickled files (optimizer states, a second copy of the weights) stay behind.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from runtime.checkpoints.contents import check_contents
from runtime.checkpoints.fingerprint import SETTLED_S
from runtime.checkpoints.folder import list_files
from runtime.checkpoints.gguf_header import gguf_files
from runtime.checkpoints.import_source import Source, Tally, Wanted, refuse_only_pickled
from runtime.checkpoints.locations import THREADS, check_location, reason, shown
from runtime.checkpoints.model_config import refuse_remote_code
from runtime.checkpoints.model_store import Manifest, ModelStore, StoredFile, is_name
from runtime.checkpoints.profile import Profile, profile, sha256_of
from runtime.checkpoints.weights import is_pickled
from runtime.errors import Cancelled, ErrorInfo, Fatal, Retryable, SqlextError, UserError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0  # between two attempts
TICK_S = 0.2

_REFUSED = ("checkpoint_pickled", "checkpoint_remote_code")


@dataclass(frozen=True, slots=True)
class Imported:
    """How the import of one checkpoint ended.

    Attributes:
        state: 'imported', 'present' (all of it was there already) or 'failed'.
        copied_bytes: of what was copied this time.
    """

    name: str
    state: str
    path: str | None = None
    bytes: int | None = None
    files: int | None = None
    copied_bytes: int = 0
    seconds: float = 0.0
    error: ErrorInfo | None = None


def import_models(
    wanted: Sequence[Wanted],
    store: ModelStore,
    *,
    retries: int = 3,
    max_parallel_jobs: int = 4,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Imported]:
    """Import checkpoints, several at a time; one result for each, in their order. Failures are results.

    Args:
        retries: how often a failed copy is tried again.
        overwrite: let a model take the place of another one of its name.
        tell: told now and then how far the work is; what it raises stops the work.
    """
    tally = Tally()
    with ThreadPoolExecutor(max_parallel_jobs) as threads:
        jobs = [threads.submit(_Import(each, store, retries, overwrite, tally).run) for each in wanted]
        try:
            open_jobs = set(jobs)
            while open_jobs:
                _, open_jobs = wait(open_jobs, TICK_S, FIRST_COMPLETED)
                if open_jobs:
                    tell(f"importing · {len(jobs) - len(open_jobs)} of {len(jobs)} · {tally.line()}")
        except BaseException:
            tally.stopped.set()
            for job in jobs:
                job.cancel()
            raise
    return [job.result() for job in jobs]


class _Import:
    """One checkpoint on its way."""

    def __init__(self, wanted: Wanted, store: ModelStore, retries: int, overwrite: bool, tally: Tally) -> None:
        self._wanted = wanted
        self._store = store
        self._retries = retries
        self._overwrite = overwrite
        self._tally = tally
        self._copied_bytes = 0

    def run(self) -> Imported:
        """Import it; every failure becomes the result."""
        started = time.monotonic()
        try:
            ended = self._run()
        except Cancelled:
            raise
        except SqlextError as error:
            ended = self._failed(error.info)
        except Exception as error:  # of the many libraries behind fsspec
            ended = self._failed(ErrorInfo("import_failed", f"The copy failed: {reason(error)}."))
        return replace(ended, copied_bytes=self._copied_bytes, seconds=round(time.monotonic() - started, 3))

    def _run(self) -> Imported:
        if not is_name(self._wanted.name):
            raise UserError(
                f'"{self._wanted.name[:80]}" is no name for a model.',
                code="import_name",
                hint="Use letters, digits, dots, hyphens and underscores; begin with a letter or a digit.",
            )
        check_location(self._wanted.source)
        with self._store.importing(self._wanted.name, lambda: self._tally.wrote(0)):
            return self._import()

    def _import(self) -> Imported:
        present = self._present()
        source = Source(self._wanted, self._again, self._tally)
        if present and not self._overwrite and source.unchanged_since(present) and not self._missing(present):
            return self._ended(present, "present")
        with source as place:
            before = {name: _content_state(place, name) for name in kept_files(place)}
            found = checked(place, self._wanted.expected)
            manifest = self._manifest(place, found, present, source.states)
            if present or not self._store.is_local:
                manifest = self._hashed(place, manifest)
            same = present is not None and present.content == manifest.content
            if present and not same and not self._overwrite:
                raise UserError(
                    f'The store has another model "{present.name}".',
                    code="import_exists",
                    hint='Choose another name, or add AND overwrite="true" to replace it.',
                )
            missing = self._missing(manifest)
            if same and self._overwrite:
                damaged = self._again(lambda: self._store.damaged(manifest))
                missing += [file for file in manifest.files if file.name in damaged]
            if same and not missing:
                return self._ended(manifest, "present")
            manifest = self._copied(place, manifest, missing)
            self._check_stored(place, manifest, before)
            self._again(lambda: self._store.publish(manifest, present))
        return self._ended(manifest, "imported")

    def _present(self) -> Manifest | None:
        """The model of that name; one whose manifest is damaged only counts until it is overwritten."""
        try:
            found: Manifest | None = self._again(lambda: self._store.find(self._wanted.name))
        except Fatal:
            if not self._overwrite:
                raise
            return None
        return found

    def _missing(self, manifest: Manifest) -> list[StoredFile]:
        there = self._again(lambda: self._store.there(manifest))
        return [file for file in manifest.files if not file.sha256 or file.name not in there]

    def _copied(self, place: Path, manifest: Manifest, missing: Sequence[StoredFile]) -> Manifest:
        """The manifest with the hashes of all files, which are in the store now."""
        self._again(lambda: self._store.begin(manifest))
        self._tally.expect(sum(file.bytes for file in missing))
        files = {file.name: file for file in manifest.files}
        noting = Lock()

        def put(file: StoredFile) -> None:
            copied = self._again(lambda: self._store.put(manifest, file, _file(place, file.name), self._tally.wrote))
            with noting:
                files[file.name] = copied
                self._copied_bytes += file.bytes
                if not file.sha256:  # so that an import that is interrupted need not copy it again
                    self._again(lambda: self._store.begin(replace(manifest, files=tuple(files.values()))))

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(put, missing))
        return replace(manifest, files=tuple(files.values()))

    def _check_stored(self, place: Path, manifest: Manifest, before: Mapping[str, str]) -> None:
        """Refuse to publish what did not pass the gates: in a folder they look again, else nothing may have changed.

        Raises:
            UserError: source_changed, and those of `checked`.
        """
        if self._store.is_local and self._store.there(manifest) == {file.name for file in manifest.files}:
            incoming = self._store.incoming(manifest.name)
            check_contents(incoming, [file.name for file in manifest.files if (incoming / file.name).exists()])
            if all((incoming / file.name).exists() for file in manifest.files):
                _remove_others(incoming, {file.name for file in manifest.files})
                checked(incoming, self._wanted.expected)
                return
        if {name: _content_state(place, name) for name in before} != before:
            raise UserError(
                f'"{place}" changed while it was copied.',
                code="source_changed",
                hint="Import the model again when nobody writes to it any more.",
            )

    def _manifest(self, place: Path, found: Profile, present: Manifest | None, states: Mapping[str, str]) -> Manifest:
        """What the store is to hold; hashes of files that have not changed since they were last taken are kept."""
        older = [manifest for manifest in (present, self._begun()) if manifest]
        known = {
            (file.name, file.bytes, file.state): file.sha256
            for manifest in older
            for file in manifest.files
            if file.state and file.sha256
        }
        facts = {"model_arch": found.model_arch, "parameters": found.parameters, "dtype": found.dtype}
        if found.adapter:
            facts["adapter_of"] = found.adapter.base
        files: list[StoredFile] = []
        for name in kept_files(place):
            size, state = _file(place, name).stat().st_size, states.get(name) or _state(_file(place, name))
            files.append(StoredFile(name, size, known.get((name, size, state), ""), state))
        return Manifest(
            self._wanted.name,
            shown(self._wanted.source),
            tuple(files),
            self._wanted.revision,
            {**facts, **self._wanted.about},
            datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _hashed(self, place: Path, manifest: Manifest) -> Manifest:
        """The manifest with all hashes, for a store that must know what it has before a byte is copied."""

        def hashed(file: StoredFile) -> StoredFile:
            self._tally.wrote(0)
            return file if file.sha256 else replace(file, sha256=sha256_of(_file(place, file.name)))

        with ThreadPoolExecutor(THREADS) as threads:
            return replace(manifest, files=tuple(threads.map(hashed, manifest.files)))

    def _begun(self) -> Manifest | None:
        """The import of that name that has not ended; a damaged note of one does not count."""
        with suppress(Fatal):
            return self._again(lambda: self._store.begun(self._wanted.name))
        return None

    def _again(self, work: Callable[[], Any]) -> Any:
        """Do `work`, again after a while when it fails for a reason that may pass."""
        for attempt in range(self._retries + 1):
            try:
                return work()
            except Exception as error:
                if attempt == self._retries or not _may_pass(error):
                    raise
                if self._tally.stopped.wait(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)):
                    raise Cancelled("The import was cancelled.") from None
        raise AssertionError("the last attempt returns or raises")

    def _ended(self, manifest: Manifest, state: str) -> Imported:
        path = self._store.path(manifest)
        return Imported(manifest.name, state, path, manifest.bytes, len(manifest.files))

    def _failed(self, error: ErrorInfo) -> Imported:
        """The result of a failure, which an import that had begun also leaves in the store."""
        with suppress(Exception):
            if begun := self._begun():
                self._store.begin(replace(begun, error=str(error)))
        return Imported(self._wanted.name, "failed", error=error)


def _may_pass(error: Exception) -> bool:
    """Whether the same work may succeed later."""
    lasting = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
    return isinstance(error, Retryable) or not isinstance(error, (SqlextError, *lasting))


def checked(place: Path, expected: Mapping[str, Any]) -> Profile:
    """The checkpoint in a folder or a GGUF file, let through the gates.

    Raises:
        UserError: as `profile`; the reason why it may not be loaded; checkpoint_link; import_mismatch.
    """
    found = profile(str(place))
    if found.refusal and found.refusal.code in _REFUSED:
        raise UserError(found.refusal.message, code=found.refusal.code, hint=found.refusal.hint)
    if place.is_dir():
        names = list_files(place)
        refuse_remote_code(place, names)
        refuse_only_pickled(names)
        check_contents(place, kept_files(place))
    for key, said in expected.items():
        is_so = round((found.parameters or 0) / 1e9, 3) if key == "param_count" else getattr(found, key)
        near = abs(is_so - said) <= 0.1 * said if key == "param_count" else is_so == said
        if not near:
            raise UserError(
                f'"{place}" is not what the config says: {key} is {is_so}, not {said}.',
                code="import_mismatch",
                hint=f'Correct {key}; action="inspect" tells what the checkpoint is.',
            )
    return found


def kept_files(place: Path) -> list[str]:
    """Names of the files that are imported: all but pickled ones, whose content nobody needs and nobody may load."""
    if place.is_dir():
        return [name for name in list_files(place) if not is_pickled(name)]
    return list(gguf_files(place, tuple(child.name for child in place.parent.iterdir())))


def _file(place: Path, name: str) -> Path:
    return (place if place.is_dir() else place.parent) / name


def _remove_others(folder: Path, names: set[str]) -> None:
    """Remove files that an earlier import has left in its folder and that this one does not have."""
    for name in set(list_files(folder)) - names:
        (folder / name).unlink()


def _content_state(place: Path, name: str) -> str:
    """What changes when a file is written to."""
    found = _file(place, name).stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def _state(file: Path) -> str:
    """What changes when the file's content does; '' while it may still be written to."""
    found = file.stat()
    if time.time() - found.st_mtime < SETTLED_S:
        return ""
    return f"{os.path.realpath(file)} {found.st_size} {found.st_mtime_ns} {found.st_ino}"
