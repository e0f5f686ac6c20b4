"""What may be relied on of answers that were stored: they are there, whole, and found again, or an error says why."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from runtime.errors import Fatal, SqlextError, UserError
from runtime.gateway import store_file, store_places
from runtime.gateway.store import Measured, ResultStore, Row, Stored, default_path
from runtime.gateway.store_blocks import MAX_BLOCK_BYTES, pack

ROOT = Path(__file__).parents[2]


def key(number: object) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def answers(*numbers: object) -> list[Row]:
    return [(key(n), f"answer {n}", "stop", 3, 4, 1.5) for n in numbers]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "results.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[ResultStore]:
    opened = ResultStore(path)
    yield opened
    opened.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the store's clock to a number of epoch seconds."""

    def set_clock(now: float) -> None:
        monkeypatch.setattr("runtime.gateway.store.time.time", lambda: now)

    set_clock(1000.0)
    return set_clock


def run(program: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """A Python process of its own with this file's names at hand; `store` is opened on the first argument."""
    start = (
        f"import sys, os; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\nfrom test_store import *\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", start + program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


# -- put and find ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output",
    ["", "text", "a\0b", "\ud83d lone \udcff", "\U0001f600", b"", b"\0\xff" * 800, "long " * 100_000],
    ids=["empty", "text", "nul", "surrogates", "emoji", "no bytes", "bytes", "long"],
)
def test_an_output_comes_back_as_it_was(store: ResultStore, output: str | bytes) -> None:
    """Texts come back as texts with every character, bytes as bytes, between others and from another process's view."""
    row = (key("it"), output, "length", 7, 8, 0.1)
    store.put("chat", "f", [*answers(1, 2), row, *answers(3)])
    found = store.find([key("it")])
    assert found == {key("it"): row[1:]}
    assert type(found[key("it")]) is tuple
    assert [batch_row[3] for batch_row in next(store.scan()) if batch_row[0] == key("it")] == [output]


def test_only_what_is_stored_is_found(store: ResultStore) -> None:
    """Keys without an answer are left out, keys that are asked twice come once, and no key is no question."""
    store.put("chat", "f", answers(*range(100)))
    asked = [key(n) for n in range(50, 150)] * 2
    assert store.find(asked) == {row[0]: row[1:] for row in answers(*range(50, 100))}
    assert store.find([]) == {}


def test_keys_with_equal_halves_are_told_apart(store: ResultStore) -> None:
    """A key is compared whole."""
    one, two = b"12345678" + b"a" * 8, b"12345678" + b"b" * 8
    store.put("chat", "f", [(one, "one", "stop", 1, 1, 1.0)])
    assert store.find([two]) == {}
    with pytest.raises(ValueError, match="16 bytes"):
        store.find([b"short"])


def test_the_first_answer_is_kept(store: ResultStore) -> None:
    """A key that has an answer keeps it, also within one put and across models; nothing is stored twice."""
    store.put("chat", "f", [(key(1), "first", "stop", 1, 1, 1.0), (key(1), "second", "stop", 1, 1, 1.0)])
    store.put("other", "g", [(key(1), "third", "stop", 1, 1, 1.0), *answers(2)])
    assert store.find([key(1)])[key(1)][0] == "first"
    assert [(line.model, line.results) for line in store.summary()] == [("chat", 1), ("other", 1)]


def test_answers_in_any_order_and_portion(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was put is found however it was cut, mixed with keys that are not there, while keys move to the table."""
    monkeypatch.setattr(store_places, "SETTLE_ROWS", 300)
    rng = random.Random(5)
    expected: dict[bytes, Stored] = {}
    for start in range(0, 3000, 150):
        rows = [(k, o * rng.choice([1, 1, 1, 300]), *rest) for k, o, *rest in answers(*range(start, start + 150))]
        store.put("chat", "f", rows)
        expected.update({row[0]: row[1:] for row in rows})
        asked = [*rng.sample(sorted(expected), rng.randrange(1, 150)), *(key(f"no {n}") for n in range(20))]
        rng.shuffle(asked)
        assert store.find(asked) == {k: expected[k] for k in asked if k in expected}
    other = ResultStore(store_path(store))
    assert other.find(list(expected)) == expected
    other.close()


def store_path(store: ResultStore) -> Path:
    return Path(store._file._path)


def test_blocks_fit_into_a_page() -> None:
    """Small answers share blocks of one page; a large one has a block of its own."""
    blocks = list(pack([*answers(*range(200)), (key("l"), "x" * 9000, "stop", 1, 1, 1.0), *answers("after")]))
    assert sum(block.rows for block in blocks) == 202
    assert all(block.size <= MAX_BLOCK_BYTES or block.rows == 1 for block in blocks)
    assert len(blocks) < 10


# -- age and size ----------------------------------------------------------------------------------------------


def test_old_answers_are_not_found_and_replaced(path: Path, clock: Callable[[float], None]) -> None:
    """An answer past max_age_s counts as not there: it is not found, and a new one takes its place."""
    store = ResultStore(path, max_age_s=60)
    store.put("chat", "f", [(key(1), "old", "stop", 1, 1, 1.0)])
    clock(1059)
    assert key(1) in store.find([key(1)])
    clock(1061)
    assert store.find([key(1)]) == {}
    store.put("chat", "f", [(key(1), "new", "stop", 1, 1, 1.0)])
    assert store.find([key(1)])[key(1)][0] == "new"
    store.close()


@pytest.mark.parametrize("size", [60, 20_000])
def test_the_file_keeps_its_bound(path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest answers make room for new ones: the file stays near max_bytes, and the newest are all there."""
    monkeypatch.setattr(store_places, "SETTLE_ROWS", 2000)
    bound = 3_000_000
    store = ResultStore(path, max_bytes=bound)
    per_put = 1000 if size == 60 else 20
    for start in range(0, 80 * per_put, per_put):
        store.put("chat", "f", [(k, "x" * size, *rest) for k, _, *rest in answers(*range(start, start + per_put))])
        assert path.stat().st_size < bound * 1.3
    last = 80 * per_put
    assert len(store.find([key(n) for n in range(last - per_put, last)])) == per_put
    assert store.find([key(n) for n in range(per_put)]) == {}
    assert sum(line.bytes for line in store.summary()) > bound * 0.5
    store.close()


def size_of(path: Path) -> int:
    """Bytes of the file and of what is not copied into it yet."""
    return sum(file.stat().st_size for file in path.parent.iterdir())


def test_clear_and_prune_give_space_back(store: ResultStore, path: Path, clock: Callable[[float], None]) -> None:
    """Answers of one model, old ones, or all are forgotten; the others stay, and the file shrinks."""
    store.put("chat", "f", [(k, "x" * 1000, *rest) for k, _, *rest in answers(*range(2000))])
    clock(2000)
    store.put("embed", "g", [(k, b"y" * 1000, *rest) for k, _, *rest in answers(*range(2000, 3000))])
    clock(2100)
    full = size_of(path)
    assert store.prune(older_than_s=1000) == 2000
    assert size_of(path) < full / 2
    assert len(store.find([key(n) for n in range(3000)])) == 1000
    store.put("chat", "f", answers(1, 2, 3))
    assert store.clear("embed") == 1000
    assert store.find([key(n) for n in range(3000)]).keys() == {key(1), key(2), key(3)}
    assert (store.clear("unknown"), store.clear(), store.clear()) == (0, 3, 0)
    assert size_of(path) < full / 10
    assert store.summary() == []
    store.put("chat", "f", answers(1))
    assert store.find([key(1)])


def test_another_process_view_follows_clear(store: ResultStore, path: Path) -> None:
    """Who has the file open sees what others cleared and stored again."""
    other = ResultStore(path)
    store.put("chat", "f", answers(1, 2))
    assert len(other.find([key(1), key(2)])) == 2
    store.clear()
    assert other.find([key(1)]) == {}
    other.put("chat", "f", [(key(1), "anew", "stop", 1, 1, 1.0)])
    assert store.find([key(1), key(2)])[key(1)][0] == "anew"
    other.close()


# -- reading all -----------------------------------------------------------------------------------------------


def test_scan_gives_everything_oldest_first(store: ResultStore, clock: Callable[[float], None]) -> None:
    """Every answer once, in the order they came, in lists of the size asked for, also while others write."""
    store.put("chat", "f", answers(*range(700)))
    clock(1001)
    store.put("embed", "g", [(key("v"), b"vector", "stop", 1, 0, 2.5)])
    batches = store.scan(batch_rows=300)
    first = next(batches)
    store.put("chat", "f", answers("later"))
    rows = [*first, *(row for batch in batches for row in batch)]
    assert [row[0] for row in rows[:701]] == [*(key(n) for n in range(700)), key("v")]
    assert rows[0] == (key(0), "chat", "f", "answer 0", "stop", 3, 4, 1.5, 1000.0)
    assert rows[700] == (key("v"), "embed", "g", b"vector", "stop", 1, 0, 2.5, 1001.0)
    assert [len(batch) for batch in store.scan(batch_rows=300)] == [300, 300, 102]


def test_summary_counts_by_model_and_content(store: ResultStore, clock: Callable[[float], None]) -> None:
    """One line per model and fingerprint, with the time of the oldest and the newest answer."""
    store.put("chat", "f", answers(1, 2))
    clock(1010)
    store.put("chat", "f", answers(3))
    store.put("chat", "g", answers(4))
    lines = store.summary()
    assert [(n.model, n.fingerprint, n.results, n.oldest, n.newest) for n in lines] == [
        ("chat", "f", 3, 1000.0, 1010.0),
        ("chat", "g", 1, 1010.0, 1010.0),
    ]
    assert lines[0].bytes > 2 * lines[1].bytes > 0


# -- facts and sums --------------------------------------------------------------------------------------------


def test_facts_last(store: ResultStore, path: Path) -> None:
    """A text is remembered under its name until another takes its place."""
    assert store.recall("order") is None
    store.remember("order", "a,b")
    store.remember("order", "b,a")
    other = ResultStore(path)
    assert other.recall("order") == "b,a"
    other.close()


def test_sums_of_two_processes_add_up(store: ResultStore, path: Path) -> None:
    """Nothing is lost when two processes add at the same time."""
    assert store.measured("f") is None
    program = "s = ResultStore(Path(sys.argv[1]))\nfor _ in range(200): s.add_measured('f', Measured(1, 2, 3, 0.5))\ns.close()"
    for process in [run(program, path), run(program, path)]:
        said(process)
    assert store.measured("f") == Measured(400, 800, 1200, 200.0)


# -- threads and processes -------------------------------------------------------------------------------------


def test_threads_and_processes_write_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes that make the file together, and eight threads, all find what each of them put."""
    program = (
        "store_places.SETTLE_ROWS = 500\n"
        "s, me = ResultStore(Path(sys.argv[1])), sys.argv[2]\n"
        "for n in range(40): s.put(me, 'f', answers(*(f'{me} {n} {i}' for i in range(25))))\ns.close()"
    )
    monkeypatch.setattr(store_places, "SETTLE_ROWS", 500)
    processes = [run(program, path, name) for name in ("p0", "p1", "p2")]
    store = ResultStore(path)

    def write(name: str) -> None:
        for n in range(40):
            rows = answers(*(f"{name} {n} {i}" for i in range(25)))
            store.put(name, "f", rows)
            assert len(store.find([row[0] for row in rows])) == 25

    threads = [f"t{n}" for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, threads))
    for process in processes:
        said(process)
    names = [*threads, "p0", "p1", "p2"]
    assert {line.model: line.results for line in store.summary()} == dict.fromkeys(names, 1000)
    everything = answers(*(f"{name} {n} {i}" for name in names for n in range(40) for i in range(25)))
    assert store.find([row[0] for row in everything]) == {row[0]: row[1:] for row in everything}
    store.close()


@pytest.mark.parametrize("returned", [5, 60])
def test_a_killed_writer_loses_nothing_it_was_told_is_stored(path: Path, returned: int) -> None:
    """After kill -9 in the middle of writing, every put that returned is there and the file is sound."""
    program = (
        "store_places.SETTLE_ROWS = 400\n"
        "s, n = ResultStore(Path(sys.argv[1])), 0\n"
        "while True:\n"
        "    s.put('chat', 'f', answers(*range(n * 100, n * 100 + 100))); n += 1; print(n, flush=True)\n"
    )
    process = run(program, path)
    assert process.stdout
    assert process.stderr
    count = 0
    while count < returned:
        count = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    count = int((process.stdout.read().split() or [count])[-1])
    process.wait()
    process.stdout.close()
    process.stderr.close()
    store = ResultStore(path)
    assert len(store.find([key(n) for n in range(count * 100)])) == count * 100
    total = store.summary()[0].results
    assert total in (count * 100, count * 100 + 100)  # the last may have been stored and not said
    store.put("chat", "f", answers("after"))
    store.close()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


def test_threads_leave_no_open_files(store: ResultStore) -> None:
    """Threads that used the store and ended hold nothing."""
    store.put("chat", "f", answers(1))
    before = psutil.Process().num_fds()
    for _ in range(20):
        thread = threading.Thread(target=store.find, args=([key(1)],))
        thread.start()
        thread.join()
    assert psutil.Process().num_fds() <= before


def test_a_forked_child_has_its_own_connection(path: Path) -> None:
    """The store works in a child made by fork, and in its parent afterwards."""
    program = (
        "s = ResultStore(Path(sys.argv[1])); s.put('chat', 'f', answers(1))\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    s.put('chat', 'f', answers(2)); os._exit(0 if len(s.find([key(1), key(2)])) == 2 else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0; assert len(s.find([key(1), key(2)])) == 2; s.close()\n"
    )
    said(run(program, path))


# -- what goes wrong -------------------------------------------------------------------------------------------


def content(path: Path) -> dict[str, bytes]:
    """Every file of the folder."""
    return {file.name: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}


def refusal(path: Path) -> SqlextError:
    """The error that opening raises: short, with a hint and the file's name, and no byte of the file touched."""
    before = content(path)
    with pytest.raises((UserError, Fatal)) as raised:
        ResultStore(path)
    assert {name: data for name, data in content(path).items() if name in before} == before
    assert raised.value.hint
    assert str(path) in raised.value.message
    assert len(str(raised.value).splitlines()) == 2
    return raised.value


def open_and_find(path: Path) -> None:
    with contextlib.closing(ResultStore(path)) as store:
        store.find([key(1)])


@pytest.mark.parametrize("version", [0, 2])
def test_another_version_is_refused(store: ResultStore, path: Path, version: int) -> None:
    """A file of a newer or older format is left as it is."""
    store.put("chat", "f", answers(1))
    store.close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {version}")
    db.close()
    assert refusal(path).code == "store_version"


def test_a_file_of_another_program_is_refused(path: Path) -> None:
    """A database that is not ours is not written to."""
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE mine (a)")
    db.close()
    assert refusal(path).code == "store_foreign"


def test_a_damaged_file_is_refused(store: ResultStore, path: Path) -> None:
    """A file that is no database at all, or ends in the middle, is named with what to delete."""
    store.put("chat", "f", answers(*range(1000)))
    store.close()
    whole = path.read_bytes()
    path.write_bytes(b"not a database " * 1000)
    error = refusal(path)
    assert (error.code, f"rm {path}*" in str(error)) == ("store_corrupt", True)
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(UserError) as raised:
        open_and_find(path)
    assert raised.value.code == "store_corrupt"


def test_a_folder_in_its_place_is_refused(path: Path) -> None:
    """The store is a file, and a file in the place of its folder is in the way."""
    path.mkdir(parents=True)
    assert refusal(path).code == "store_path"
    shutil.rmtree(path)
    path.write_text("")
    with pytest.raises(UserError) as raised:
        ResultStore(path / "below" / "results.sqlite")
    assert raised.value.code == "store_folder"


PROBE = (
    "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)  # permissions do not bind root\n"
    "try:\n    s = ResultStore(Path(sys.argv[1])); print('opened')\n"
    "except SqlextError as error: print(type(error).__name__, error.code, error.hint)\n"
)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_cannot_be_written_is_named(what: str) -> None:
    """A read-only file or folder is refused when the store is opened, and the file stays as it is."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    path = folder / "results.sqlite"
    try:
        store = ResultStore(path)
        store.put("chat", "f", answers(1))
        store.close()
        before = path.read_bytes()
        path.chmod(0o444 if what == "file" else 0o666)
        folder.chmod(0o777 if what == "file" else 0o555)
        assert said(run(PROBE, path)).startswith("UserError store_readonly")
        assert path.read_bytes() == before
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_a_folder_that_cannot_be_made_is_named() -> None:
    """A place where nobody may make folders is an error with the way out."""
    with pytest.raises(UserError, match="/proc/nothing") as raised:
        ResultStore(Path("/proc/nothing/results.sqlite"))
    assert raised.value.code == "store_folder"
    assert "SQLEXT_CACHE_DIR" in str(raised.value.hint)


def test_a_full_disk_stops_the_statement_and_not_the_store(path: Path) -> None:
    """Put fails with a hint, stores nothing of the batch, says nothing of its texts; what was there is found."""
    program = (
        "import resource\ns = ResultStore(Path(sys.argv[1])); s.put('chat', 'f', answers(1))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))\n"
        "try: s.put('chat', 'f', [(k, 'secret' * 1000, *r) for k, _, *r in answers(*range(2000))])\n"
        "except Fatal as error: print(error.code, 'cache=off' in error.hint, 'secret' in str(error))\n"
        "print(len(s.find([key(n) for n in range(2000)])))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "s.put('chat', 'f', answers(*range(2000))); print(len(s.find([key(n) for n in range(2000)]))); s.close()\n"
    )
    assert said(run(program, path)).split() == ["store_write", "True", "False", "1", "2000"]


def test_a_locked_file_is_named(store: ResultStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that never ends its writing is named as the cause; reading goes on."""
    store.put("chat", "f", answers(1))
    monkeypatch.setattr(store_file, "BUSY_TIMEOUT_S", 0.05)
    patient = ResultStore(path)
    holder = run(
        "db = sqlite3.connect(sys.argv[1], isolation_level=None); db.execute('BEGIN IMMEDIATE')\n"
        "print('held', flush=True); sys.stdin.readline()",
        path,
        stdin=subprocess.PIPE,
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    assert refusal(path).code == "store_locked"
    with pytest.raises(Fatal, match="another process") as raised:
        patient.put("chat", "f", answers(2))
    assert raised.value.code == "store_write"
    assert patient.find([key(1), key(2)]).keys() == {key(1)}
    holder.communicate("\n", timeout=60)
    patient.put("chat", "f", answers(2))
    assert len(patient.find([key(1), key(2)])) == 2
    patient.close()


# -- where it lies ---------------------------------------------------------------------------------------------


def test_only_its_owner_can_read_it(store: ResultStore, path: Path) -> None:
    """Folder 0700, files 0600, and nothing else is left in the folder."""
    store.put("chat", "f", answers(1))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    names = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert names == dict.fromkeys(["results.sqlite", "results.sqlite-wal", "results.sqlite-shm"], 0o600)


def test_the_place_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SQLEXT_CACHE_DIR, else XDG_CACHE_HOME when it is absolute, else ~/.cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SQLEXT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_path() == tmp_path / ".cache" / "sqlext" / "results.sqlite"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_path() == Path("/xdg/sqlext/results.sqlite")
    monkeypatch.setenv("SQLEXT_CACHE_DIR", "~/mine")
    assert default_path() == tmp_path / "mine" / "results.sqlite"
