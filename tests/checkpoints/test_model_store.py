"""The model store: whole or not at all, resumed where it stopped, and nothing stored that may not be loaded."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import models
import pytest

from runtime.checkpoints import model_import
from runtime.checkpoints.folder import open_folder
from runtime.checkpoints.import_config import read_config
from runtime.checkpoints.import_source import Wanted
from runtime.checkpoints.model_import import Imported, import_models
from runtime.checkpoints.model_store import MANIFEST, ModelStore
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

    def failing(self: ModelStore, manifest: Any, file: Any, *rest: Any) -> None:
        if file.name == "model.safetensors":
            raise OSError(5, "Input/output error")
        put(self, manifest, file, *rest)

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
        def failing(self: ModelStore, manifest: Any, file: Any, *rest: Any) -> None:
            tries.append(file.name)
            if tries.count(file.name) <= times:
                raise error
            put(self, manifest, file, *rest)

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
    """Unless `overwrite` says so; then the old files are gone, and at no time was there none."""
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
    assert store.there(before) == set()


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


def test_a_repository_is_pinned_to_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked for that commit and no code; once stored it is not asked again; a branch is refused."""
    import huggingface_hub

    asked: list[tuple[str, dict[str, Any]]] = []

    def download(repository: str, *, local_dir: Path, **how: Any) -> str:
        asked.append((repository, how))
        models.placeholder(local_dir)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    store = ModelStore()
    assert run(store, "owner/name", "m", revision=COMMIT).state == "imported"
    assert run(store, "owner/name", "m", revision=COMMIT).state == "present"
    ((repository, how),) = asked
    assert (repository, how["revision"]) == ("owner/name", COMMIT)
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in how["allow_patterns"])
    manifest = store.find("m")
    assert manifest
    assert (manifest.source, manifest.revision) == ("owner/name", COMMIT)
    unsaid = run(store, "owner/other", "n")
    assert unsaid.error
    assert "revision" in str(unsaid.error.hint)
    for source, revision in (("owner/name", "main"), (str(tmp_path), COMMIT)):
        refused = run(store, source, "n", revision=revision)
        assert refused.error
        assert refused.error.code == "import_revision"


def test_a_hub_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked as often as `retries` says, then a failed row."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[str] = []

    def download(repository: str, **_: Any) -> str:
        asked.append(repository)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    ended = run(ModelStore(), "owner/name", revision=COMMIT, retries=2)
    assert ended.error
    assert (ended.error.code, len(asked)) == ("hub_unreachable", 3)
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
