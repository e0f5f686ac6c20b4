"""Where a checkpoint to import comes from: a folder, a GGUF file, a URL, or a repository of the Hugging Face hub.

Alone because the import itself works on a folder of this machine: what lies elsewhere is fetched first, as much of it
as is needed, and what can be known without fetching is asked before.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.checkpoints.folder import open_folder
from runtime.checkpoints.gguf_header import SUFFIX
from runtime.checkpoints.locations import THREADS, fetch_files, open_location, safe_name, shown
from runtime.checkpoints.locks import held, hold
from runtime.checkpoints.model_store import Manifest, cache_folder
from runtime.checkpoints.weights import is_pickled, pickled
from runtime.errors import Cancelled, Retryable, UserError

HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
ABANDONED_S = 7 * 86_400.0
_WEIGHTS = ("pytorch_model", "adapter_model", "model")  # how their files are called
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A checkpoint to import.

    Attributes:
        source: folder, URL or, with a revision, repository of the hub.
        revision: commit of the repository, 40 hexadecimal digits.
        expected: what it must be: model_arch, seq_length, vocab_size, param_count in billions.
        about: kept with it: publisher, description.
    """

    name: str
    source: str
    revision: str = ""
    expected: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Tally:
    """What all copies together have to do and have done, in bytes; changed under `lock`."""

    total: int = 0
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wrote(self, count: int) -> None:
        """Count copied bytes; ends the copy when the statement was stopped."""
        with self.lock:
            self.done += count
        if self.stopped.is_set():
            raise Cancelled("The import was cancelled.")

    def expect(self, count: int) -> None:
        """There is so much more to copy."""
        with self.lock:
            self.total += count

    def line(self) -> str:
        """How far the work is, for a person."""
        if not self.total:
            return "checking"
        seconds = max(0.001, time.monotonic() - self.started)
        return f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB · {self.done / 1e6 / seconds:,.0f} MB/s"


class Source:
    """Where a checkpoint comes from; while the `with` block runs it is a folder, or a GGUF file, of this machine.

    What had to be fetched stays after a failure, so that the next attempt goes on from there.

    Attributes:
        states: of the files at a URL, by name: what changes when their content does, as far as the service tells.
    """

    def __init__(self, wanted: Wanted, again: Callable[[Callable[[], Any]], Any], tally: Tally) -> None:
        self._wanted = wanted
        self._again = again
        self._tally = tally
        self._fetched: Path | None = None
        self._stack = ExitStack()
        self._remote: _Remote | None = None
        self.states: Mapping[str, str] = {}
        if "://" in wanted.source:
            self._remote = again(lambda: _Remote(wanted.source))
            self.states = self._remote.states
        elif wanted.revision:
            _require_pinned(wanted.source, wanted.revision)

    def unchanged_since(self, present: Manifest) -> bool:
        """Whether `present` was made of just this, known without fetching anything."""
        if shown(self._wanted.source) != present.source or self._wanted.revision != present.revision:
            return False
        if self._remote:
            return all(self.states.values()) and self.states == {file.name: file.state for file in present.files}
        return bool(self._wanted.revision)

    def __enter__(self) -> Path:
        wanted, remote = self._wanted, self._remote
        if not remote and not wanted.revision:
            return _own_folder(wanted.source)
        key = f"{wanted.name} {wanted.source} {wanted.revision} {sorted(self.states.items())}"
        incoming = cache_folder() / "incoming"
        _remove_abandoned(incoming)
        fetched = incoming / hashlib.sha256(key.encode()).hexdigest()[:24]
        with ExitStack() as stack:
            stack.enter_context(held(fetched, lambda: self._tally.wrote(0)))
            if remote:
                self._again(lambda: remote.fetch(fetched, self._tally))
            else:
                self._again(lambda: _fetch_repository(wanted.source, wanted.revision, fetched, self._tally))
            self._stack = stack.pop_all()
        self._fetched = fetched
        return fetched

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._fetched:
            shutil.rmtree(self._fetched, ignore_errors=True)
        self._stack.close()


def _remove_abandoned(incoming: Path) -> None:
    """Remove what was fetched for imports that nobody has gone on with for days."""
    for child in incoming.iterdir() if incoming.is_dir() else ():
        if time.time() - child.stat().st_mtime > ABANDONED_S and (handle := hold(child)) is not None:
            shutil.rmtree(child, ignore_errors=True)
            os.close(handle)


def _own_folder(source: str) -> Path:
    try:
        return open_folder(source, SUFFIX)
    except UserError as error:
        if error.code == "checkpoint_missing" and _REPOSITORY.fullmatch(source):
            error.hint = 'If it is a repository of the Hugging Face hub, add AND revision="…", a commit of it.'
        raise


class _Remote:
    """The files at a URL that are imported."""

    def __init__(self, url: str) -> None:
        self._files, root = open_location(url)
        self._root = root.rstrip("/")
        self._files.invalidate_cache()
        found = dict(self._list())
        self._sizes = {name: int(info["size"]) for name, info in found.items() if not is_pickled(name)}
        self.states = {name: _remote_state(found[name]) for name in self._sizes}
        if not found:
            raise UserError(f'There is nothing at "{shown(url)}".', code="checkpoint_missing", hint="Check the URL.")
        refuse_only_pickled(found)

    def fetch(self, folder: Path, tally: Tally) -> None:
        """Bring the files into `folder`, but for those that are there."""
        missing = {
            f"{self._root}/{name}": (name, "")
            for name, size in self._sizes.items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != size
        }
        tally.expect(sum(self._sizes[name] for name, _ in missing.values()))
        fetch_files(self._files, missing, folder, tally.wrote)

    def _list(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for path, info in self._files.find(self._root, detail=True).items():
            name = safe_name(path.removeprefix(self._root).lstrip("/"))
            if not any(part.startswith(".") for part in PurePosixPath(name).parts):
                yield name, info


def _remote_state(info: Mapping[str, Any]) -> str:
    """What changes when the content of a remote file does; '' when the service does not tell."""
    told = next(
        (info[key] for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created") if key in info), ""
    )
    return f"{info['size']} {told}" if told else ""


def _require_pinned(source: str, revision: str) -> None:
    if not _REPOSITORY.fullmatch(source):
        raise UserError(
            f'"{source}" is no repository of the hub, and a revision belongs to one.',
            code="import_revision",
            hint="Write the repository as owner/name, or leave the revision out.",
        )
    if not _COMMIT.fullmatch(revision):
        raise UserError(
            f'The revision "{revision[:80]}" is no commit: what it names may change.',
            code="import_revision",
            hint="Give the 40 hexadecimal digits of a commit; the hub shows them in the history of the files.",
        )


def refuse_only_pickled(names: Iterable[str]) -> None:
    """Refuse weights that are there as a pickle alone: they stay behind, and without them it is no model.

    Raises:
        UserError: checkpoint_pickled.
    """
    listed = sorted(names)
    whole = {str(PurePosixPath(name).parent) for name in listed if name.lower().endswith((".safetensors", SUFFIX))}
    for name in listed:
        path = PurePosixPath(name)
        is_weight = path.name.lower().startswith(_WEIGHTS) or not whole
        if is_pickled(name) and is_weight and str(path.parent) not in whole:
            raise pickled(Path(name))


class _Counter:
    """The hub's idea of a progress bar: counts bytes, and stops the download when the statement was stopped."""

    tally: Tally

    def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
        self.update(initial)

    def update(self, count: float | None = 1) -> None:
        """So many more bytes are there."""
        self.tally.wrote(int(count or 0))

    def update_transfer(self, count: float | None = 1) -> None:
        """So many bytes came over the network; the hub counts them apart."""

    def set_postfix_str(self, *_: Any, **__: Any) -> None:
        """Nobody looks at it."""

    set_transfer_postfix_str = set_description_str = refresh = close = set_postfix_str

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _fetch_repository(repository: str, revision: str, folder: Path, tally: Tally) -> None:
    from httpx2 import TransportError
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    counter = type("Counter", (_Counter,), {"tally": tally})
    endpoint = os.environ.get("HF_ENDPOINT")

    def fetch(name: str) -> None:
        hf_hub_download(repository, name, revision=revision, local_dir=folder, endpoint=endpoint, tqdm_class=counter)

    try:
        listed = HfApi(endpoint).model_info(repository, revision=revision, files_metadata=True).siblings or []
        sizes = {safe_name(file.rfilename): file.size or 0 for file in listed}
        refuse_only_pickled(sizes)
        wanted = [name for name in sizes if any(fnmatch(name, pattern) for pattern in HUB_PATTERNS)]
        tally.expect(sum(sizes[name] for name in wanted))
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(fetch, wanted))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, TransportError):
        raise Retryable(
            "The hub cannot be reached.",
            code="hub_unreachable",
            hint="Check the network and HF_ENDPOINT, or copy the repository's files yourself and import the folder.",
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403, 404):
            raise UserError(
                f'The hub has no repository "{repository}" with this revision, or not for this user ({status}).',
                code="import_repository",
                hint="Check both; for a private or gated one, log in: hf auth login.",
            ) from None
        raise
