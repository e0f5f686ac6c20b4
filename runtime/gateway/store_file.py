"""The file of the result store: where it lies, how it is made and opened, and what is said when that fails.

Alone because each way to fail has a message of its own, and none may touch what is in the file. SQLite, in WAL mode:
a commit is safe against the end of its process at once, and against a power cut from the next checkpoint on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from runtime.cache_folder import cache_folder
from runtime.errors import Fatal, UserError

VERSION = 1
APPLICATION_ID = 0x53514C58  # «SQLX»: tells our files from those of other programs
BUSY_TIMEOUT_S = 30.0  # to wait for another process that writes
CACHE_KIB = 4096  # pages kept by the connection; the operating system keeps the others
CHECKPOINT_PAGES = 4000  # the write-ahead file is copied into the file when it has grown to this
OTHER_PLACE = "or name another folder in SQLEXT_CACHE_DIR"
TURN_OFF = 'or go on without stored answers: !llm setup "cache=off"'

# places: where the result with a key lies. `head` is half of the key, `place` the block's id * 256 + its row there.
# It is filled from the blocks in large sorted portions; `settled` is the last block whose keys it holds.
_SCHEMA = f"""
PRAGMA page_size = 4096;
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
CREATE TABLE models (id INTEGER PRIMARY KEY, model TEXT, fingerprint TEXT, UNIQUE (model, fingerprint));
CREATE TABLE blocks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    model INTEGER, created REAL, rows INTEGER, bytes INTEGER, keys BLOB, reasons TEXT, data BLOB
);
CREATE INDEX blocks_of_model ON blocks (model, created, rows, bytes);
CREATE TABLE places (head INTEGER PRIMARY KEY, place INTEGER);
CREATE TABLE progress (name TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID;
CREATE TABLE facts (name TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID;
CREATE TABLE measured (
    fingerprint TEXT PRIMARY KEY, calls INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER, seconds REAL
) WITHOUT ROWID;
INSERT INTO progress VALUES ('settled', 0), ('swept', -9223372036854775808);
"""


_of_parents: list[sqlite3.Connection] = []  # after a fork they may not even be closed

_CAUSES = (
    (
        ("SQLITE_CORRUPT", "SQLITE_NOTADB"),
        "store_corrupt",
        "is damaged",
        "Delete it, only stored answers are lost (rm {path}*)",
    ),
    (
        ("SQLITE_READONLY", "SQLITE_CANTOPEN"),
        "store_readonly",
        "cannot be opened for writing",
        "Make the file and its folder writable",
    ),
    (
        ("SQLITE_BUSY", "SQLITE_LOCKED"),
        "store_locked",
        "stayed locked by another process",
        "End that process (fuser {path} shows it)",
    ),
    (("SQLITE_FULL",), "store_full", "has no room on its disk", "Make room"),
)


def default_path() -> Path:
    """Where results lie when nobody says: $SQLEXT_CACHE_DIR, $XDG_CACHE_HOME/sqlext or ~/.cache/sqlext."""
    return cache_folder() / "results.sqlite"


class StoreFile:
    """The one connection of this process to the store at `path`, behind a lock.

    Args:
        start: called with the connection when it is new, and when a transaction was undone: what was known of the
            file does not hold any more.

    Raises:
        UserError: store_path, store_folder, store_readonly, store_corrupt, store_version, store_foreign.
        Fatal: store_locked, store_read.
    """

    def __init__(self, path: Path, start: Callable[[sqlite3.Connection], None]) -> None:
        self._path = path
        self._start = start
        self._open()

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._db = _connect(self._path)
        self._start(self._db)

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._db.close()

    @contextmanager
    def reading(self, code: str = "store_read") -> Iterator[None]:
        """Hold the lock; what SQLite raises becomes an error with the code."""
        if os.getpid() != self._pid:  # a fork: neither the connection nor a lock that was held there is of use here
            _of_parents.append(self._db)
            self._open()
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise failure(self._path, error, code) from None

    def altering(self) -> AbstractContextManager[None]:
        """`reading` for statements that alter the file and cannot be in a transaction."""
        return self.reading("store_write")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction: done whole, or undone when the block raises.

        Raises:
            Fatal: store_write.
        """
        with self.altering():
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._start(self._db)
                raise


def _connect(path: Path) -> sqlite3.Connection:
    """A new connection to the store at `path`, made when it is missing; statements commit by themselves."""
    _make(path)
    try:
        connection = sqlite3.connect(
            path.absolute().as_uri() + "?mode=rw",
            uri=True,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
        )
    except sqlite3.Error as error:
        raise failure(path, error, "store_read") from None
    try:
        _check(path, connection)
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.Error):
            raise failure(path, error, "store_read") from None
        raise
    return connection


def _make(path: Path) -> None:
    """Make the store whole under another name, then give it its own, so that nobody ever opens half of one."""
    if path.is_dir():
        raise UserError(
            f'"{path}" is a folder; the result store is a file.',
            code="store_path",
            hint=f"Move the folder away, {OTHER_PLACE}.",
        )
    unfinished = ""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            return
        handle, unfinished = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)  # mode 0600
        os.close(handle)
        with contextlib.closing(sqlite3.connect(unfinished, isolation_level=None)) as connection:
            connection.executescript(_SCHEMA)
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(unfinished, path)
    except (OSError, sqlite3.Error) as error:
        raise _not_made(path, error) from None
    finally:
        if unfinished:
            os.unlink(unfinished)


def _not_made(path: Path, error: Exception) -> UserError:
    why = error.strerror if isinstance(error, OSError) else str(error)
    room = "Make room on its disk" if getattr(error, "errno", None) == errno.ENOSPC else "Make the folder writable"
    return UserError(
        f'The result store "{path}" cannot be made: {why}.', code="store_folder", hint=f"{room}, {OTHER_PLACE}."
    )


def _check(path: Path, connection: sqlite3.Connection) -> None:
    """Refuse what is not a store of this version that can be written; set what holds for this connection only."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise UserError(
            f'"{path}" is no result store of sqlext, but a file of another program.',
            code="store_foreign",
            hint=f"Move it away, {OTHER_PLACE}.",
        )
    if version != VERSION:
        newer = version > VERSION
        raise UserError(
            f'The result store "{path}" has format {version}; this sqlext reads format {VERSION}.',
            code="store_version",
            hint=f"{'Upgrade sqlext' if newer else f'Delete it (rm {path}*)'}, {OTHER_PLACE}.",
        )
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    connection.execute("PRAGMA journal_size_limit = 67108864")
    # A file that cannot be written is named now, not after the first answer was paid.
    connection.execute("UPDATE progress SET number = 0 WHERE false")


def failure(path: Path, error: sqlite3.Error, code: str) -> UserError | Fatal:
    """What to tell the user when SQLite could not do something with the store at `path`.

    Writing fails with the code store_write whatever the cause; the other causes have codes of their own.
    """
    name = getattr(error, "sqlite_errorname", "")
    for names, named_code, what, todo in _CAUSES:
        if name.startswith(names):
            message = f'The result store "{path}" {what}.'
            hint = todo.format(path=path)
            if code == "store_write":
                return Fatal(message, code=code, hint=f"{hint}, {TURN_OFF}.")
            kind = Fatal if named_code == "store_locked" else UserError
            return kind(message, code=named_code, hint=f"{hint}, {OTHER_PLACE}.")
    verb = "written" if code == "store_write" else "read"
    return Fatal(
        f'The result store "{path}" cannot be {verb}: {error}.',
        code=code,
        hint=f"See whether its disk is full or failing, {TURN_OFF}.",
    )
