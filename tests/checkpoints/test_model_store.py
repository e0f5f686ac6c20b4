"""The model store: whole or not at all, resumed where it stopped, and nothing stored that may not be loaded."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import models
import pytest

from runtime.checkpoints import model_import
from runtime.checkpoints.folder import open_folder
from runtime.checkpoints.import_config import read_config
from runtime.checkpoints.import_source import Wanted
from runtime.checkpoints.locations import shown
from runtime.checkpoints.model_import import Imported, import_models
from runtime.checkpoints.model_store import MANIFEST, Manifest, ModelStore, StoredFile
from runtime.errors import Cancelled, Retryable, SqlextError, UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQLEXT_MODELS", str(tmp_path / "store"))
    monkeypatch.setattr(model_import, "FIRST_WAIT_S", 0.001)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of a local server that speaks S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    said = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)
    fsspec.filesystem("s3").mkdir("models")
    yield "s3://models"
    server.stop()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(params=["folder", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ModelStore:
    """A store in a folder, on S3, and in fsspec's memory."""
    if request.param == "folder":
        return ModelStore(str(tmp_path / "elsewhere"))
    if request.param == "s3":
        return ModelStore(f"{request.getfixturevalue('s3')}/{tmp_path.name}/deep")
    return ModelStore(f"memory://{tmp_path.name}")


def settled(folder: Path) -> Path:
    """A folder whose files were last changed a while ago."""
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - 100, time.time() - 100))
    return folder


def run(store: ModelStore, source: Path | str, name: str = "m", **how: Any) -> Imported:
    wanted = Wanted(name, str(source), how.pop("revision", ""), how.pop("expected", {}))
    return import_models([wanted], store, **how)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_comes_out_is_what_went_in(tmp_path: Path, store: ModelStore) -> None:
    """Every file, with its SHA-256 in the manifest; a second import copies nothing."""
    folder = settled(models.placeholder(tmp_path / "model"))
    first, second = run(store, folder), run(store, folder)
    assert (first.state, second.state) == ("imported", "present")
    assert (first.files, first.bytes) == (3, sum(len(each) for each in contents(folder).values()))
    assert (first.copied_bytes, second.copied_bytes) == (first.bytes, 0)
    manifest = store.find("m")
    assert manifest
    assert {file.name: file.sha256 for file in manifest.files} == {
        name: hashlib.sha256(content).hexdigest() for name, content in contents(folder).items()
    }
    assert contents(store.folder(manifest)) == contents(folder)
    assert store.names() == ["m"]
    assert store.begun("m") is None


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second import of a large checkpoint takes no time; a changed file is read, and told."""
    folder = settled(models.placeholder(tmp_path / "model"))
    run(ModelStore(), folder)
    read: list[str] = []

    def reading(file: Path) -> str:
        read.append(file.name)
        return hashlib.sha256(file.read_bytes()).hexdigest()

    monkeypatch.setattr(model_import, "sha256_of", reading)
    assert run(ModelStore(), folder).state == "present"
    assert read == []
    (folder / "tokenizer.json").write_text('{"version": "2.0"}')
    changed = run(ModelStore(), folder)
    assert read == ["tokenizer.json"]
    assert changed.error
    assert changed.error.code == "import_exists"


def test_a_model_of_one_store_goes_to_another(tmp_path: Path, store: ModelStore) -> None:
    """From a URL: fetched, checked, stored; a second import sees that nothing changed without fetching it."""
    folder = models.placeholder(tmp_path / "model")
    first = run(store, folder)
    other = ModelStore(f"memory://other-{tmp_path.name}")
    source = first.path if "://" in str(first.path) else f"file://{first.path}"
    assert run(other, str(source)).state == "imported"
    manifest = other.find("m")
    assert manifest
    assert contents(other.folder(manifest)) == contents(folder)
    again = run(other, str(source), retries=0)
    assert (again.state, again.copied_bytes) == ("present", 0)
    incoming = Path(os.environ["SQLEXT_CACHE_DIR"]) / "incoming"
    assert not incoming.exists() or not any(incoming.iterdir())


def test_a_name_stands_where_a_path_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    """In the user's own store, here or remote; a folder of that name goes before it; a near name is proposed."""
    folder = models.placeholder(tmp_path / "model")
    run(ModelStore(), folder, "my-model")
    assert contents(open_folder("my-model")) == contents(folder)
    with pytest.raises(UserError) as raised:
        open_folder("my-modle")
    assert "my-model" in str(raised.value.hint)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    assert open_folder("my-model") == tmp_path / "my-model"
    monkeypatch.setenv("SQLEXT_MODELS", f"{s3}/own")
    run(ModelStore(), folder, "far")
    there = open_folder("far")
    assert contents(there) == contents(folder)
    assert open_folder("far") == there


def test_an_interrupted_import_goes_on_where_it_stopped(
    tmp_path: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that fails leaves no model behind; the next import copies that file only."""
    folder = settled(models.placeholder(tmp_path / "model"))
    put = ModelStore.put

    def failing(self: ModelStore, manifest: Any, file: Any, *rest: Any) -> Any:
        if file.name == "model.safetensors":
            raise OSError(5, "Input/output error")
        return put(self, manifest, file, *rest)

    monkeypatch.setattr(ModelStore, "put", failing)
    failed = run(store, folder, retries=1)
    assert failed.state == "failed"
    assert failed.error
    assert "Input/output error" in failed.error.message
    assert store.find("m") is None
    begun = store.begun("m")
    assert begun
    assert begun.error
    monkeypatch.setattr(ModelStore, "put", put)
    done = run(store, folder)
    assert done.state == "imported"
    assert done.copied_bytes == (folder / "model.safetensors").stat().st_size
    assert store.begun("m") is None


def test_a_copy_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as `retries` says, and not when it would not help."""
    folder = models.placeholder(tmp_path / "model")
    tries: list[str] = []
    put = ModelStore.put

    def flaky(error: Exception, times: int) -> Callable[..., None]:
        def failing(self: ModelStore, manifest: Any, file: Any, *rest: Any) -> Any:
            tries.append(file.name)
            if tries.count(file.name) <= times:
                raise error
            return put(self, manifest, file, *rest)

        return failing

    store = ModelStore()
    monkeypatch.setattr(ModelStore, "put", flaky(OSError("reset"), 2))
    assert run(store, folder, "a", retries=2).state == "imported"
    assert len(tries) == 9
    tries.clear()
    monkeypatch.setattr(ModelStore, "put", flaky(PermissionError(13, "Permission denied"), 2))
    denied = run(store, folder, "b", retries=5)
    assert denied.state == "failed"
    assert "Permission denied" in str(denied.error)
    assert max(map(tries.count, tries)) == 1


def test_killed_while_it_copies(tmp_path: Path) -> None:
    """kill -9 in the middle: no model of that name; the same import then ends well, and is whole."""
    folder = models.placeholder(tmp_path / "model")
    script = f"""
        import os, signal
        from runtime.checkpoints import model_store
        from runtime.checkpoints.import_source import Wanted
        from runtime.checkpoints.model_import import import_models
        def die(source, target, wrote, pump=model_store.pump):
            if "safetensors" in source.name:
                target.write(source.read(8)); target.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return pump(source, target, wrote)
        model_store.pump = die
        import_models([Wanted("m", {str(folder)!r})], model_store.ModelStore())
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert killed.returncode == -signal.SIGKILL
    store = ModelStore()
    assert store.find("m") is None
    assert store.begun("m")
    assert run(store, folder).state == "imported"
    manifest = store.find("m")
    assert manifest
    assert contents(store.folder(manifest)) == contents(folder)


def test_another_model_of_that_name_is_not_replaced(tmp_path: Path, store: ModelStore) -> None:
    """Unless `overwrite` says so. The old one's files stay for those who use them, until the next one comes."""
    old, new = models.placeholder(tmp_path / "old"), models.placeholder(tmp_path / "new", vocab_size=11)
    run(store, old)
    refused = run(store, new)
    assert refused.state == "failed"
    assert refused.error
    assert refused.error.code == "import_exists"
    before = store.find("m")
    assert before
    assert contents(store.folder(before)) == contents(old)
    assert run(store, new, overwrite=True).state == "imported"
    after = store.find("m")
    assert after
    assert contents(store.folder(after)) == contents(new)
    assert store.there(before) == {file.name for file in before.files}
    run(store, models.placeholder(tmp_path / "newest", vocab_size=12), overwrite=True)
    assert store.there(before) == set()
    assert store.there(after) == {file.name for file in after.files}
    run(store, old, overwrite=True)
    again = store.find("m")
    assert again
    assert (again.content, store.there(again)) == (before.content, {file.name for file in before.files})


def test_a_damaged_store_is_repaired(tmp_path: Path, store: ModelStore) -> None:
    """Files of another content in their old size, and a manifest that cannot be read: overwrite makes both good."""
    folder = settled(models.placeholder(tmp_path / "model"))
    path = run(store, folder).path
    files, inside = fsspec.core.url_to_fs(str(path))
    good = files.cat_file(f"{inside}/tokenizer.json")
    files.pipe_file(f"{inside}/tokenizer.json", b"x" * len(good))
    assert run(store, folder).state == "present"  # what nobody asks to repair is not read
    repaired = run(store, folder, overwrite=True)
    assert (repaired.state, repaired.copied_bytes) == ("imported", len(good))
    assert files.cat_file(f"{inside}/tokenizer.json") == good
    assert run(store, folder, overwrite=True).state == "present"
    files.pipe_file(f"{inside}/../{MANIFEST}" if store.is_local else f"{inside.rpartition('/')[0]}/{MANIFEST}", b"{")
    broken = run(store, folder)
    assert broken.error
    assert (broken.error.code, "overwrite" in str(broken.error.hint)) == ("store_damaged", True)
    assert run(store, folder, overwrite=True).state == "imported"
    assert store.find("m")


def test_a_part_of_a_file_is_not_stored(tmp_path: Path, store: ModelStore) -> None:
    """An upload that fails in the middle leaves nothing under the file's name."""
    folder = models.placeholder(tmp_path / "model")
    with (folder / "extra.txt").open("wb") as stream:
        stream.write(b"text\n" * 4_000_000)
    done: list[int] = []

    def failing(count: int) -> None:
        done.append(count)
        if sum(done) > 8 << 20:
            raise OSError(104, "Connection reset by peer")

    size = (folder / "extra.txt").stat().st_size
    file = StoredFile("extra.txt", size, hashlib.sha256((folder / "extra.txt").read_bytes()).hexdigest())
    manifest = Manifest("m", str(folder), (file,))
    with pytest.raises(OSError, match="reset"):
        store.put(manifest, file, folder / "extra.txt", failing)
    assert store.there(manifest) == set()
    files, root = fsspec.core.url_to_fs(f"{store.location}/m")
    files.invalidate_cache()
    assert [path for path in (files.find(root) if files.exists(root) else ()) if not path.endswith(".json")] == []


def test_what_is_stored_has_passed_the_gates(
    tmp_path: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that becomes another one after it was checked, and before it is copied, is not published."""
    folder = models.placeholder(tmp_path / "model")
    put = ModelStore.put

    def swapped(self: ModelStore, manifest: Any, file: Any, source: Path, wrote: Any) -> Any:
        if file.name == "model.safetensors":
            source.write_bytes(b"\x80\x04" + source.read_bytes()[2:])
        return put(self, manifest, file, source, wrote)

    monkeypatch.setattr(ModelStore, "put", swapped)
    ended = run(store, folder, retries=0)
    assert ended.error
    assert ended.error.code in ("checkpoint_pickled", "checkpoint_corrupt", "source_changed")
    assert store.find("m") is None


def test_one_read_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a folder, hashes are made as the files are copied, not in a pass of their own."""
    monkeypatch.setattr(model_import, "sha256_of", lambda _: pytest.fail("read for its hash alone"))
    ended = run(ModelStore(), models.placeholder(tmp_path / "model"))
    assert ended.state == "imported"
    manifest = ModelStore().find("m")
    assert manifest
    assert manifest.hashed


def test_two_processes_import_the_same(tmp_path: Path) -> None:
    """At the same time, into one folder: both end well, one copies, and the model is whole."""
    folder = settled(models.placeholder(tmp_path / "model"))
    (folder / "extra.txt").write_bytes(b"text\n" * 2_000_000)
    settled(folder)
    script = f"""
        from runtime.checkpoints.import_source import Wanted
        from runtime.checkpoints.model_import import import_models
        from runtime.checkpoints.model_store import ModelStore
        print(import_models([Wanted("m", {str(folder)!r})], ModelStore())[0].state)
    """
    started = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert sorted(each.communicate(timeout=200)[0].strip() for each in started) == ["imported", "present", "present"]
    manifest = ModelStore().find("m")
    assert manifest
    assert contents(ModelStore().folder(manifest)) == contents(folder)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of killed copies and folders of imports that did not end go with the next import of the name; what was
    fetched and abandoned goes after some days, and old copies of a remote model with the next one."""
    store = ModelStore()
    run(store, models.placeholder(tmp_path / "old"))
    root = Path(store.location) / "m"
    for leftover in ("0123456789abcdef/config.json", "incoming/.model.safetensors.abc.partial", "incoming/other.txt"):
        (root / leftover).parent.mkdir(exist_ok=True)
        (root / leftover).write_text("{}")
    run(store, models.placeholder(tmp_path / "new", vocab_size=11), overwrite=True)
    manifest = store.find("m")
    assert manifest
    assert {child.name for child in root.iterdir()} == {MANIFEST, manifest.content, manifest.previous}
    incoming = Path(os.environ["SQLEXT_CACHE_DIR"]) / "incoming"
    for name, age_s in (("abandoned", 8 * 86_400), ("recent", 3600)):
        (incoming / name).mkdir(parents=True)
        os.utime(incoming / name, (time.time() - age_s,) * 2)
    run(store, f"file://{tmp_path}/new", "n")
    assert [child.name for child in incoming.iterdir()] == ["recent"]
    far = ModelStore(f"memory://copies-{tmp_path.name}")
    copies = []
    for number in range(3):
        run(far, models.placeholder(tmp_path / f"far{number}", vocab_size=20 + number), overwrite=True)
        found = far.find("m")
        assert found
        copies.append(far.folder(found))
    assert [copy.exists() for copy in copies] == [False, True, True]


def test_a_gguf_file_is_imported(tmp_path: Path, store: ModelStore) -> None:
    """A file, or a folder with one; its header is checked, and what is stored is found as a checkpoint again."""
    model = models.gguf(tmp_path / "gguf" / "tiny.gguf")
    (model.parent / "notes.txt").write_text("beside it")
    of_file, of_folder = run(store, model, "file"), run(store, model.parent, "folder")
    assert (of_file.state, of_file.files, of_folder.files) == ("imported", 1, 2)
    manifest = store.find("file")
    assert manifest
    assert (manifest.about["model_arch"], manifest.about["parameters"]) == ("llama", 96)
    assert contents(store.folder(manifest)) == {"tiny.gguf": model.read_bytes()}
    model.write_bytes(model.read_bytes()[:-40])
    assert run(store, model, "cut").state == "failed"


def test_weights_that_are_only_pickled_are_not_left_out(tmp_path: Path) -> None:
    """From a URL, too: a module whose pickle stays behind would be a model without a layer."""
    folder = models.placeholder(tmp_path / "model")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text("{}")
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    for source in (str(folder), f"file://{folder}"):
        ended = run(ModelStore(), source)
        assert ended.error
        assert ended.error.code == "checkpoint_pickled"


def test_secrets_in_addresses_are_not_told(tmp_path: Path) -> None:
    """Neither password, user, query nor a broken address stands in an error, a status or the store."""
    for source in (
        "s3://key:sesame@bucket/m",
        "https://host/m?token=sesame",
        "https://u:sesa/me@host/m",
        "https://[sesame/m",
        "ftp://sesame@nosuch.invalid/m#sesame",
    ):
        for name in ("m", "not a name"):
            ended = run(ModelStore(), source, name, retries=0)
            assert ended.error
            assert "sesame" not in repr(ended)
            assert "sesa/me" not in repr(ended)
        with pytest.raises(UserError) as raised:
            ModelStore(source)
        assert "sesame" not in f"{raised.value} {raised.value.hint}"
    assert shown("sftp://user@host/a@b") == "sftp://host/a@b"
    assert shown("s3://bucket/a@b") == "s3://bucket/a@b"
    assert shown("/folder/a?b@c") == "/folder/a?b@c"


def test_a_file_that_is_gone_is_copied_again(tmp_path: Path, store: ModelStore) -> None:
    """Present means all files in their size, not just a manifest."""
    folder = models.placeholder(tmp_path / "model")
    path = run(store, folder).path
    files, inside = fsspec.core.url_to_fs(str(path))
    files.rm(f"{inside}/config.json")
    again = run(store, folder)
    assert (again.state, again.copied_bytes) == ("imported", (folder / "config.json").stat().st_size)


@pytest.mark.parametrize("wrong", models.BROKEN)
def test_the_gates_come_first(tmp_path: Path, wrong: str) -> None:
    """What is damaged or wants to run code is a failed row, and not a byte of it is stored."""
    code, change = models.BROKEN[wrong]
    folder = models.placeholder(tmp_path / "folder")
    change(folder)
    store = ModelStore()
    ended = run(store, folder)
    if code in ("checkpoint_unsupported", "checkpoint_no_tokenizer"):  # safe, though no engine runs it here
        assert ended.state == "imported"
        return
    assert ended.state == "failed"
    assert ended.error
    assert ended.error.code in (code, "checkpoint_no_weights")
    assert store.names() == []


def test_an_adapter_is_stored_with_its_base_named(tmp_path: Path) -> None:
    """A LoRA adapter is a checkpoint too."""
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "base_model_name_or_path": "owner/base"}'
    )
    weights = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    models.write_safetensors(folder / "adapter_model.safetensors", weights, 16)
    assert run(ModelStore(), folder).state == "imported"
    manifest = ModelStore().find("m")
    assert manifest
    assert (manifest.about["adapter_of"], manifest.about["parameters"]) == ("owner/base", 4)


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    """A link to a file elsewhere would carry that file into the store."""
    folder = models.placeholder(tmp_path / "model")
    (tmp_path / "secret").write_text("key")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    ended = run(ModelStore(), folder)
    assert ended.error
    assert ended.error.code == "checkpoint_link"


def test_pickled_files_stay_behind(tmp_path: Path) -> None:
    """Optimizer states and a second, pickled copy of the weights are not stored; from a URL not even fetched."""
    folder = models.placeholder(tmp_path / "model")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")
    assert run(ModelStore(), folder).files == 3
    assert run(ModelStore(), f"file://{folder}", "n").files == 3
    (folder / "model.safetensors").unlink()
    ended = run(ModelStore(), f"file://{folder}", "o")
    assert ended.error
    assert ended.error.code == "checkpoint_pickled"


def test_a_manifest_cannot_lead_out_of_the_store(tmp_path: Path) -> None:
    """Names with .. in the manifest of a foreign store, and damaged manifests, are errors."""
    store = ModelStore(f"memory://hostile-{tmp_path.name}")
    run(store, models.placeholder(tmp_path / "model"))
    files, root = fsspec.core.url_to_fs(store.location)
    said = json.loads(files.cat_file(f"{root}/m/{MANIFEST}"))
    said["files"][0]["name"] = "../../../escaped"
    for content in (json.dumps(said), "{", "[]"):
        files.pipe_file(f"{root}/m/{MANIFEST}", content.encode())
        with pytest.raises(SqlextError) as raised:
            store.find("m")
        assert raised.value.code == "store_damaged"


def test_damaged_content_of_a_remote_store_is_noticed(tmp_path: Path) -> None:
    """A file of the right size with another content is not handed out."""
    store = ModelStore(f"memory://damaged-{tmp_path.name}")
    path = run(store, models.placeholder(tmp_path / "model")).path
    files, inside = fsspec.core.url_to_fs(str(path))
    size = files.info(f"{inside}/tokenizer.json")["size"]
    files.pipe_file(f"{inside}/tokenizer.json", b"x" * size)
    manifest = store.find("m")
    assert manifest
    with pytest.raises(SqlextError) as raised:
        store.folder(manifest)
    assert raised.value.code == "store_damaged"


def test_several_at_once_and_one_bad_one(tmp_path: Path, store: ModelStore) -> None:
    """Results in their order; the failure is a row, not an omission."""
    folders = [models.placeholder(tmp_path / f"m{i}", vocab_size=10 + i) for i in range(5)]
    (folders[2] / "model.safetensors").unlink()
    wanted = [Wanted(folder.name, str(folder)) for folder in folders]
    ended = import_models(wanted, store, max_parallel_jobs=3)
    assert [each.name for each in ended] == ["m0", "m1", "m2", "m3", "m4"]
    assert [each.state for each in ended] == ["imported", "imported", "failed", "imported", "imported"]
    assert store.names() == ["m0", "m1", "m3", "m4"]


def test_a_stopped_import_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `tell` raises ends all copies."""
    folder = models.placeholder(tmp_path / "model")
    monkeypatch.setattr(model_import, "TICK_S", 0.01)
    monkeypatch.setattr(model_import, "FIRST_WAIT_S", 30.0)

    def failing(*_: Any) -> None:
        raise OSError("reset")

    def stop(_: str) -> None:
        raise Cancelled("stop")

    monkeypatch.setattr(ModelStore, "put", failing)
    with pytest.raises(Cancelled):
        run(ModelStore(), folder, tell=stop)
    assert ModelStore().find("m") is None


def test_expectations_are_checked(tmp_path: Path) -> None:
    """What a config says of a checkpoint must be so."""
    folder = models.placeholder(tmp_path / "model")
    right = {"model_arch": "llama", "seq_length": 128, "vocab_size": 10}
    assert run(ModelStore(), folder, expected=right).state == "imported"
    wrong = run(ModelStore(), folder, "n", expected={**right, "vocab_size": 32000})
    assert wrong.error
    assert wrong.error.code == "import_mismatch"
    assert "vocab_size is 10, not 32000" in wrong.error.message
    small = run(ModelStore(), folder, "o", expected={"param_count": 8})
    assert small.error
    assert small.error.code == "import_mismatch"


class Hub(ThreadingHTTPServer):
    """A hub with one repository: what the library asks of the real one for a commit and its files.

    Attributes:
        asked: paths in their order.
        delay_s: before each piece of a file.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.folder = folder
        self.asked: list[str] = []
        self.delay_s = 0.0


class HubRequest(BaseHTTPRequestHandler):
    """One request to a `Hub`."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if path == f"/api/models/owner/name/revision/{COMMIT}":
            files = [file for file in self.server.folder.rglob("*") if file.is_file()]
            listed = [
                {"rfilename": str(file.relative_to(self.server.folder)), "size": file.stat().st_size}
                for file in files
            ]
            self.answer(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": listed}).encode(), body)
        elif path.startswith(f"/owner/name/resolve/{COMMIT}/"):
            self.answer((self.server.folder / path.split("/", 5)[5]).read_bytes(), body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        for at in range(0, len(content) if body else 0, 1 << 20):
            time.sleep(self.server.delay_s)
            self.wfile.write(content[at : at + (1 << 20)])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub whose repository is a small model with a README."""
    folder = models.placeholder(tmp_path / "repository")
    (folder / "README.md").write_text("")
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_a_repository_is_pinned_to_a_commit(tmp_path: Path, hub: Hub) -> None:
    """The hub is asked for that commit and no code; once stored it is not asked again; a branch is refused."""
    store = ModelStore()
    assert run(store, "owner/name", "m", revision=COMMIT).state == "imported"
    asked = len(hub.asked)
    assert run(store, "owner/name", "m", revision=COMMIT).state == "present"
    assert len(hub.asked) == asked
    assert not any("README" in path for path in hub.asked)
    manifest = store.find("m")
    assert manifest
    assert (manifest.source, manifest.revision) == ("owner/name", COMMIT)
    assert contents(store.folder(manifest)) == {
        name: content for name, content in contents(hub.folder).items() if name != "README.md"
    }
    unsaid = run(store, "owner/other", "n")
    assert unsaid.error
    assert "revision" in str(unsaid.error.hint)
    for source, revision in (("owner/name", "main"), (str(tmp_path), COMMIT)):
        refused = run(store, source, "n", revision=revision)
        assert refused.error
        assert refused.error.code == "import_revision"
    gone = run(store, "owner/gone", "n", revision=COMMIT)
    assert gone.error
    assert gone.error.code == "import_repository"


def test_a_download_tells_how_far_it_is_and_can_be_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that come from the hub are counted, and a stopped statement ends the download."""
    monkeypatch.setattr(model_import, "TICK_S", 0.01)
    (hub.folder / "large.txt").write_bytes(b"text\n" * 4_000_000)
    told: list[str] = []
    assert run(ModelStore(), "owner/name", revision=COMMIT, tell=told.append).state == "imported"
    assert any("of 20 MB" in line for line in told)
    hub.delay_s = 1.0

    def stop(line: str) -> None:
        if "of 20 MB" in line:
            raise Cancelled("stop")

    begun = time.monotonic()
    with pytest.raises(Cancelled):
        run(ModelStore(), "owner/name", "n", revision=COMMIT, tell=stop)
    assert time.monotonic() - begun < 19  # the whole of it would take 20 seconds
    assert ModelStore().find("n") is None


def test_a_repository_with_a_pickled_layer_is_refused(hub: Hub) -> None:
    """What would stay behind is part of the model."""
    (hub.folder / "2_Dense").mkdir()
    (hub.folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    ended = run(ModelStore(), "owner/name", revision=COMMIT)
    assert ended.error
    assert ended.error.code == "checkpoint_pickled"


def test_a_hub_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked as often as `retries` says, then a failed row."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    ended = run(ModelStore(), "owner/name", revision=COMMIT, retries=2)
    assert ended.error
    assert ended.error.code == "hub_unreachable"
    assert issubclass(Retryable, SqlextError)


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("nosuch://models", "store_location"),
        ("simplecache::s3://models", "store_location"),
        ("gs://models", "store_package"),
        ("a\0b", "store_location"),
        ("ftp://user:password@host/models", "store_location"),
    ],
)
def test_a_location_that_cannot_be_opened(location: str, code: str) -> None:
    """An unknown protocol, a chain, a missing package: one clear error."""
    with pytest.raises(UserError) as raised:
        ModelStore(location)
    assert raised.value.code == code
    assert raised.value.hint
    assert "user:password" not in str(raised.value)


def test_roots_hold_for_stores_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SQLEXT_ROOTS limits what may be read, no store outside is opened, and no URL."""
    monkeypatch.setenv("SQLEXT_ROOTS", str(tmp_path / "allowed"))
    for location in (str(tmp_path / "other"), "s3://models"):
        with pytest.raises(UserError) as raised:
            ModelStore(location)
        assert raised.value.code == "checkpoint_outside_roots"
    assert ModelStore(str(tmp_path / "allowed" / "store")).names() == []


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", "x" * 97, "-a"])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    """A name is one plain word, so that it can be a folder anywhere."""
    ended = run(ModelStore(), models.placeholder(tmp_path / "model"), name)
    assert ended.error
    assert ended.error.code == "import_name"


GOOD = """\
sambastudio:
  snapi_path: ""
checkpoints:
  - model_name: first
    checkpoint_path: /models/first
    publisher: somebody
    description:
    param_count: 8
    model_arch: llama
    seq_length: 4096
    vocab_size: 32000
    app_id: 12-34
  - model_name: second
    checkpoint_path: owner/second
    revision: 0123456789abcdef0123456789abcdef01234567
composite_model:
  model_name: both
  rdu_required: true
  model_list:
    - first
    - third
project:
  project_name: p
endpoint:
  endpoint_name: e
  endpoint_instances: 1
  hyperparams: {temperature: 0.1}
"""


def test_a_config_of_the_documents_shape(tmp_path: Path) -> None:
    """All sections are understood; members of the bundle that are not imported keep their place."""
    (tmp_path / "config.yaml").write_text(GOOD)
    config = read_config(str(tmp_path / "config.yaml"))
    first, second = config.checkpoints
    assert (first.name, first.path, first.about) == ("first", "/models/first", {"publisher": "somebody"})
    assert first.expected == {"model_arch": "llama", "seq_length": 4096, "vocab_size": 32000, "param_count": 8}
    assert (second.path, second.revision) == ("owner/second", COMMIT)
    assert config.others == ("sambastudio", "composite_model", "project", "endpoint")
    ((name, place),) = config.members
    assert (name, place.line) == ("third", 21)


@pytest.mark.parametrize(
    ("before", "after", "line", "said"),
    [
        ("    publisher", "    publischer", 6, "publisher"),
        ("  - model_name: first\n    checkpoint_path: /models/first", "  - model_name: first", 4, "checkpoint_path"),
        ("model_name: second", "model_name: first", 13, "first"),
        ("seq_length: 4096", "seq_length: many", 10, "whole number"),
        ("vocab_size: 32000", "vocab_size: true", 11, "whole number"),
        ("param_count: 8", "param_count: 8\n    param_count: 9", 9, "twice"),
        ("project:\n", "projects:\n", 22, "project"),
        ("checkpoints:\n", "checkpoint:\n", 3, "checkpoints"),
        ("  model_list:\n    - first\n    - third\n", "", 17, "model_list"),
        ("project_name: p", "project_name: [p]", 23, "text"),
        ("endpoint_name: e", "endpoint_name: ", 25, "endpoint_name"),
        ("    app_id: 12-34", "   app_id: 12-34", 12, ""),
    ],
)
def test_a_mistake_in_the_config_is_told_with_its_line(
    tmp_path: Path, before: str, after: str, line: int, said: str
) -> None:
    """Unknown, missing, doubled and mistyped keys, and what is no YAML."""
    file = tmp_path / "config.yaml"
    file.write_text(GOOD.replace(before, after, 1))
    with pytest.raises(UserError) as raised:
        read_config(str(file))
    error = raised.value
    assert error.code == "import_config"
    assert error.place
    assert error.place.line == line
    assert error.place.file == str(file)
    assert said in f"{error.message} {error.hint}"


@pytest.mark.parametrize(
    "content",
    ["", "- a\n- b", "checkpoints: []", "a: &a [*a]", "!!python/object:os.system x", "checkpoints: \0", "\t"],
)
def test_what_is_no_config_is_one_clear_error(tmp_path: Path, content: str) -> None:
    """Empty, of another shape, hostile: never anything but import_config."""
    file = tmp_path / "config.yaml"
    file.write_text(content)
    for path in (file, tmp_path / "missing.yaml"):
        with pytest.raises(UserError) as raised:
            read_config(str(path))
        assert raised.value.code == "import_config"
        assert raised.value.hint
