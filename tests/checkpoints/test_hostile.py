"""Checkpoints made to do harm: each is refused with its own code, no byte of theirs runs, and nothing is written."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from runtime.checkpoints import convert as conversions
from runtime.checkpoints import folder as folders
from runtime.checkpoints import sharded as sharding
from runtime.checkpoints.adapter import open_adapter
from runtime.checkpoints.contents import check_contents
from runtime.checkpoints.convert import Conversion, convert
from runtime.checkpoints.import_source import Wanted
from runtime.checkpoints.inspect import inspect
from runtime.checkpoints.model_import import import_models
from runtime.checkpoints.model_store import ModelStore
from runtime.checkpoints.pickles import load_pickled
from runtime.checkpoints.profile import profile
from runtime.errors import UserError
from runtime.prompts.preview import writer

HARMFUL = ("checkpoint_corrupt", "checkpoint_pickled", "checkpoint_remote_code", "checkpoint_config")


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def archived(content: Any) -> bytes:
    """What torch.save makes of something."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def rezipped(raw: bytes, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> bytes:
    """An archive of torch.save written anew, entry by entry."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            change(new, name, old.read(name))
    return stream.getvalue()


def compressed(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(name, content, zipfile.ZIP_DEFLATED)


def slipping(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(name, content)
    if name.endswith("data.pkl"):
        archive.writestr("../../escaped", content)


def claiming(raw: bytes) -> bytes:
    """The archive with an entry that claims a terabyte."""
    at = raw.rindex(b"PK\x01\x02")
    return raw[: at + 24] + struct.pack("<I", 0xFFFFFFF0) + raw[at + 28 :]


PICKLES: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "a call in an archive": ("checkpoint_pickled", lambda file: archived({"a": Canary(file)})),
    "a call in a bare pickle": ("checkpoint_pickled", lambda file: pickle.dumps({"a": Canary(file)}, 2)),
    "a call in the newest protocol": ("checkpoint_corrupt", lambda file: pickle.dumps(Canary(file), 5)),
    "a call under the name of a tensor": ("checkpoint_pickled", lambda file: archived(Canary(file))),
    "a compressed archive": ("checkpoint_corrupt", lambda _: rezipped(archived({"a": torch.zeros(9)}), compressed)),
    "a name that leads out": ("checkpoint_corrupt", lambda _: rezipped(archived({"a": torch.zeros(9)}), slipping)),
    "an entry that claims gigabytes": ("checkpoint_corrupt", lambda _: claiming(archived({"a": torch.zeros(9)}))),
    "a tensor that claims terabytes": (
        "checkpoint_corrupt",
        lambda _: archived({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}),
    ),
    "a tensor that is not there": ("checkpoint_corrupt", lambda _: archived({"a": torch.empty(9, device="meta")})),
    "a sparse tensor": ("checkpoint_corrupt", lambda _: archived({"a": torch.eye(3).to_sparse()})),
    "something else than tensors": ("checkpoint_corrupt", lambda _: archived(["a", 1])),
    "an archive that was cut": ("checkpoint_corrupt", lambda _: archived({"a": torch.zeros(999)})[:-300]),
    "an empty archive": ("checkpoint_corrupt", lambda _: b"PK\x05\x06" + bytes(18)),
    "no pickle at all": ("checkpoint_corrupt", lambda _: b"\x80\x02" + os.urandom(64)),
    "nothing": ("checkpoint_corrupt", lambda _: b""),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with one tensor, and room beside it."""
    return models.placeholder(tmp_path / "in" / "model")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Is made by code that runs."""
    return tmp_path / "canary"


def refused(tmp_path: Path, model: Path, **more: Any) -> str:
    """The code of the error; nothing may have been made, inside or outside."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as raised:
        convert(Conversion(str(model), str(tmp_path / "out"), **{"to": "bin", **more}))
    assert raised.value.hint
    assert sorted(tmp_path.rglob("*")) == before
    return raised.value.code


def as_bin(model: Path, content: bytes) -> Path:
    """The model with this file of weights."""
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(content)
    return model


@pytest.mark.parametrize("wrong", [name for name, (code, _) in models.BROKEN.items() if code in HARMFUL])
def test_what_is_not_deployed_is_not_converted(tmp_path: Path, model: Path, wrong: str) -> None:
    """Bombs in headers, overlaps, cuts, code, renamed pickles: converting refuses what deploying refuses."""
    code, change = models.BROKEN[wrong]
    change(model)
    assert refused(tmp_path, model) == code


@pytest.mark.parametrize("wrong", PICKLES)
def test_hostile_pickles(tmp_path: Path, model: Path, canary: Path, wrong: str) -> None:
    """Without being allowed, no pickle is opened; when allowed, only numbers come out of it."""
    code, make = PICKLES[wrong]
    as_bin(model, make(canary))
    assert refused(tmp_path, model, to="safetensors") == "checkpoint_pickled"
    assert refused(tmp_path, model, to="safetensors", allow_pickle=True) == code
    assert not canary.exists()


@pytest.mark.parametrize("wrong", PICKLES)
def test_a_pickle_under_another_name(tmp_path: Path, model: Path, canary: Path, wrong: str) -> None:
    """What a file is called does not count: as model.safetensors it is refused, whatever is allowed."""
    (model / "model.safetensors").write_bytes(PICKLES[wrong][1](canary))
    assert refused(tmp_path, model, allow_pickle=True) in ("checkpoint_pickled", "checkpoint_corrupt")
    assert not canary.exists()


@pytest.mark.parametrize("file", ["model", "optimizer"])
@pytest.mark.parametrize("hidden", ["at the top", "deep inside"])
def test_a_call_in_a_checkpoint_of_deepspeed(
    tmp_path: Path, model: Path, canary: Path, file: str, hidden: str
) -> None:
    """ZeRO files are read without DeepSpeed's unpickling, so no call in them runs."""
    tag = tmp_path / "zero" / "tag"
    tag.mkdir(parents=True)
    bad = (
        Canary(canary)
        if hidden == "at the top"
        else {"module": {"a": torch.zeros(1)}, "x": [[{"y": Canary(canary)}]]}
    )
    good = {"module": {"a": torch.zeros(2, 3)}}
    torch.save(bad if file == "model" else good, tag / "mp_rank_00_model_states.pt")
    torch.save(bad if file == "optimizer" else good, tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert refused(tmp_path, model, to="", training=str(tmp_path / "zero"), tag="tag") == "checkpoint_pickled"
    assert not canary.exists()


@pytest.mark.parametrize(
    "spoilt",
    [
        {"zero_stage": 2, "partition_count": 2},
        {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": []},
        {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": [torch.zeros(5)]},
        {"zero_stage": 3, "partition_count": 1, "fp32_flat_groups": [torch.zeros(5)]},
        {"zero_stage": 3, "partition_count": 1, "fp32_flat_groups": "no"},
        {"zero_stage": "x", "partition_count": 1},
    ],
    ids=str,
)
def test_files_of_deepspeed_that_do_not_fit_together(tmp_path: Path, model: Path, spoilt: dict[str, Any]) -> None:
    """Too few ranks, groups or numbers are a damaged checkpoint, not a crash."""
    tag = tmp_path / "zero" / "tag"
    tag.mkdir(parents=True)
    shapes = [{"a": torch.Size([2, 3])}]
    torch.save({"module": {}, "buffer_names": [], "param_shapes": shapes}, tag / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": spoilt}, tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert refused(tmp_path, model, to="", training=str(tmp_path / "zero"), tag="tag") == "checkpoint_corrupt"


def sharded(folder: Path) -> Path:
    """A sharded checkpoint of torch."""
    dcp.save({"a": torch.zeros(2, 3)}, checkpoint_id=str(folder), no_dist=True)
    return folder


def test_a_call_in_the_metadata_of_a_sharded_checkpoint(tmp_path: Path, model: Path, canary: Path) -> None:
    """`.metadata` is a pickle that torch opens as it is; here only its own classes may be in it."""
    folder = sharded(tmp_path / "dcp")
    (folder / ".metadata").write_bytes(pickle.dumps(Canary(canary)))
    assert refused(tmp_path, model, to="", training=str(folder)) == "checkpoint_pickled"
    (folder / ".metadata").write_bytes(b"\x80\x04cut")
    assert refused(tmp_path, model, to="", training=str(folder)) in ("checkpoint_corrupt", "checkpoint_pickled")
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    assert refused(tmp_path, model, to="", training=str(folder)) == "checkpoint_corrupt"
    assert not canary.exists()


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "gone.distcp"])
def test_a_sharded_checkpoint_that_reads_elsewhere(tmp_path: Path, model: Path, path: str) -> None:
    """Its metadata may only name files of its own folder."""
    folder = sharded(tmp_path / "dcp")
    (tmp_path / "secret").write_bytes((folder / "__0_0.distcp").read_bytes())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = path
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert refused(tmp_path, model, to="", training=str(folder)) == "checkpoint_corrupt"


def setting(module: str, name: str, attribute: str) -> bytes:
    """A pickle that sets an attribute of a class to another class, as BUILD with a second state does it."""
    return f"\x80\x02c{module}\n{name}\n(N}}V{attribute}\ncbuiltins\nset\nstb.".encode("latin-1")


@pytest.mark.parametrize(
    "cls",
    [("pathlib", "PosixPath"), ("pathlib", "Path"), ("torch.distributed.checkpoint.metadata", "Metadata")],
)
def test_metadata_changes_no_class(tmp_path: Path, model: Path, cls: tuple[str, str]) -> None:
    """A pickle that sets attributes of the classes which may stand in it changes none that the program uses."""
    folder = sharded(tmp_path / "dcp")
    (folder / ".metadata").write_bytes(setting(*cls, "seen_by_the_program"))
    assert refused(tmp_path, model, to="", training=str(folder)) == "checkpoint_corrupt"
    assert not any(hasattr(each, "seen_by_the_program") for each in (type(Path()), Path, dcp.metadata.Metadata))


def test_metadata_is_read_within_bounds(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is too large is not unpickled; a tensor that claims more than its files hold is not made."""
    folder = sharded(tmp_path / "dcp")
    raw = (folder / ".metadata").read_bytes()
    metadata = pickle.loads(raw)
    metadata.state_dict_metadata["a"].size = torch.Size([2**20, 2**20])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert refused(tmp_path, model, to="", training=str(folder)) == "checkpoint_corrupt"
    (folder / ".metadata").write_bytes(raw)
    monkeypatch.setattr(sharding, "MAX_METADATA_BYTES", len(raw) - 1)
    assert refused(tmp_path, model, to="", training=str(folder)) == "checkpoint_config"


def test_a_call_in_a_shard_of_torch(tmp_path: Path, canary: Path) -> None:
    """A shard is read as numbers alone, too."""
    base = models.language_model(tmp_path / "base")
    folder = tmp_path / "dcp"
    dcp.save({"model": load_file(base / "model.safetensors")}, checkpoint_id=str(folder), no_dist=True)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    hostile = archived(Canary(canary))
    (folder / "__0_0.distcp").write_bytes(hostile)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(hostile)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert refused(tmp_path, base, to="", training=str(folder)) == "checkpoint_corrupt"
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "config.json", "prompt_format.json", "latest", "modules.json"]
)
@pytest.mark.parametrize("what", ["link", "device", "pipe", "linked folder"])
def test_only_plain_files_of_its_own_are_read(tmp_path: Path, model: Path, name: str, what: str) -> None:
    """Links out of the folder, devices and pipes are found before anything is read: by all that look into a folder."""
    (tmp_path / "secret").write_text("secret text")
    (model / name).unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(model / name)
    elif what == "linked folder":
        (tmp_path / "elsewhere").mkdir()
        (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
        (model / name).write_text("{}")
    else:
        (model / name).symlink_to("/dev/zero" if what == "device" else tmp_path / "secret")
    code = "checkpoint_file" if what == "pipe" else "checkpoint_link"
    for look in (inspect, profile, writer, open_adapter if name == "latest" else inspect):
        with pytest.raises(UserError) as raised:
            look(str(model))
        assert raised.value.code in (code, "checkpoint_adapter")
        assert "secret text" not in str(raised.value)
    assert refused(tmp_path, model) == code


def test_the_base_that_a_training_links_may_be_there(tmp_path: Path, model: Path) -> None:
    """A folder of that name is a link to the base; it is not gone into."""
    (tmp_path / "base").mkdir()
    (model / "pretrained_model").symlink_to(tmp_path / "base")
    assert inspect(str(model)).files == ("config.json", "model.safetensors", "tokenizer.json")


def test_small_files_are_read_within_bounds(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that has no end is not read to it."""
    monkeypatch.setattr(folders.read_small, "__defaults__", (1000,))
    (model / "config.json").write_text('{"model_type": "llama", "a": "' + "a" * 1000 + '"}')
    assert refused(tmp_path, model) == "checkpoint_config"


CARRIED = {
    "a pickle": ("checkpoint_pickled", pickle.dumps({"a": [1, 2]}, 4)),
    "an old pickle": ("checkpoint_pickled", b"cos\nsystem\n(S'true'\ntR."),
    "an archive": ("checkpoint_pickled", archived({"a": torch.zeros(1)})),
    "a program": ("checkpoint_remote_code", b"\x7fELF\x02\x01\x01"),
    "a script": ("checkpoint_remote_code", b"#!/bin/sh\ntrue\n"),
}


@pytest.mark.parametrize("kind", CARRIED)
@pytest.mark.parametrize("name", ["notes.txt", "README.md", "vocab.json", "blob"])
def test_files_that_are_carried_on_are_known_by_content(tmp_path: Path, model: Path, kind: str, name: str) -> None:
    """Neither a converted model nor the store takes over what can run code, whatever it is called."""
    code, content = CARRIED[kind]
    (model / name).write_bytes(content)
    assert refused(tmp_path, model) == code
    ended = import_models([Wanted("m", str(model))], ModelStore(str(tmp_path / "store")))[0]
    assert ended.error
    assert ended.error.code == code


def test_texts_are_no_pickles(tmp_path: Path, model: Path) -> None:
    """Words that look like operations of a pickle, and texts of all kinds, are taken over."""
    for number, text in enumerate(("cat\ndog\n", "(a)\n", "", ".", "I am.\n", "}\n", "#version: 0.2\nĠ t\n" * 900)):
        (model / f"text{number}.txt").write_text(text)
    check_contents(model, [file.name for file in model.iterdir()])


def test_every_safetensors_file_is_checked(tmp_path: Path, model: Path) -> None:
    """Not only the one that is loaded: a pickle in the guise of another one is not stored."""
    (model / "other.safetensors").write_bytes(pickle.dumps({"a": 1}))
    ended = import_models([Wanted("m", str(model))], ModelStore(str(tmp_path / "store")))[0]
    assert ended.error
    assert ended.error.code == "checkpoint_pickled"


@pytest.mark.parametrize("name", ["MODEL.BIN", "x.PT", "Custom.PY", "lib.So"])
def test_capitals_change_nothing(tmp_path: Path, model: Path, name: str) -> None:
    """A suffix counts in capitals too."""
    (model / name).write_bytes(b"\x80\x04")
    if name.lower().endswith((".py", ".so")):
        assert refused(tmp_path, model) == "checkpoint_remote_code"
        return
    made = convert(Conversion(str(model), str(tmp_path / "out"), to="bin"))
    assert name not in made.files


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "x.X"}}),
        ("generation_config.json", {"deep": {"er": [{"auto_map": {}}]}}),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "x.X"}}}),
        ("config.json", {"attn_implementation": "owner/kernel"}),
        ("config.json", {"_attn_implementation": "owner/kernel@main:function"}),
        ("config.json", {"vision_config": {"experts_implementation": "owner/kernel"}}),
        ("config.json", {"attn_implementation": {"text_config": "owner/kernel"}}),
    ],
    ids=str,
)
def test_no_configuration_names_code(tmp_path: Path, model: Path, name: str, said: dict[str, Any]) -> None:
    """Code of its own and kernels of a hub are refused in every configuration, however deep."""
    file = model / name
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **said}))
    assert refused(tmp_path, model) == "checkpoint_remote_code"
    for look in (inspect, writer):
        with pytest.raises(UserError) as raised:
            look(str(model))
        assert raised.value.code == "checkpoint_remote_code"


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "extra.txt"])
def test_a_link_out_of_the_folder(tmp_path: Path, model: Path, name: str) -> None:
    """What a link leads to would be carried into the result, so it is refused; inside the folder it may point."""
    secret = tmp_path / "secret"
    secret.write_bytes((model / name).read_bytes() if (model / name).exists() else b"key")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    assert refused(tmp_path, model) == "checkpoint_link"
    (model / name).unlink()
    secret.rename(model / "own")
    (model / name).symlink_to("own")
    convert(Conversion(str(model), str(tmp_path / "out"), to="bin"))
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_the_hubs_cache_is_made_of_links(tmp_path: Path) -> None:
    """A snapshot of the Hugging Face cache, whose files lie in `blobs` beside it, is read."""
    snapshot = models.placeholder(tmp_path / "models--a--b" / "snapshots" / "abc")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    made = convert(Conversion(str(snapshot), str(tmp_path / "out"), to="bin"))
    assert set(made.files) == {"config.json", "pytorch_model.bin", "tokenizer.json"}


@pytest.mark.parametrize(
    "weight_map",
    [{"a": "../model.safetensors"}, {"a": "x.bin", "b": "/etc/passwd"}, {"a": "gone.bin"}, [], {}, {"a": {"b": 1}}],
    ids=str,
)
def test_an_index_of_pickles_that_leads_out(tmp_path: Path, model: Path, weight_map: Any) -> None:
    """Shards are files of the folder, by plain names."""
    as_bin(model, archived({"a": torch.zeros(1)})).joinpath("pytorch_model.bin").rename(model / "x.bin")
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert refused(tmp_path, model, to="safetensors", allow_pickle=True) == "checkpoint_corrupt"


def test_an_index_of_pickles_that_promises_too_much(tmp_path: Path, model: Path) -> None:
    """As with safetensors: a tensor that its shard does not hold, and one that is in two of them."""
    as_bin(model, archived({"a": torch.zeros(1)})).joinpath("pytorch_model.bin").rename(model / "x.bin")
    shutil.copy(model / "x.bin", model / "y.bin")
    for weight_map in ({"a": "x.bin", "b": "x.bin"}, {"a": "x.bin", "b": "y.bin"}):
        (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert refused(tmp_path, model, to="safetensors", allow_pickle=True) == "checkpoint_corrupt"


def test_a_tensor_that_is_there_twice(tmp_path: Path, model: Path) -> None:
    """Two files that hold a tensor of one name: nobody knows which counts."""
    for name in ("model-1.safetensors", "model-2.safetensors"):
        shutil.copy(model / "model.safetensors", model / name)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(tmp_path, model) == "checkpoint_corrupt"


def test_a_tensor_with_the_name_of_the_metadata(tmp_path: Path, model: Path) -> None:
    """It would take the place of the header's own entry."""
    as_bin(model, archived({"__metadata__": torch.zeros(1)}))
    assert refused(tmp_path, model, to="safetensors", allow_pickle=True) == "checkpoint_corrupt"


def test_an_index_that_promises_too_much(tmp_path: Path, model: Path) -> None:
    """A tensor that its shard does not hold is missed before anything is written."""
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(tmp_path, model) == "checkpoint_corrupt"


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0.0, 24.0]},
        {"dtype": "F32", "shape": [True, 6], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 24]},
        {"dtype": "BOOL", "shape": [25], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": "23", "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": ["ab", 2**40], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [[0] * 9, 2**40], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [9**4000] * 60, "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2] * 100_000, "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24, 48]},
        {"dtype": "U8", "shape": [2, 3], "data_offsets": [0, 24]},
        {"dtype": "F8_E4M3", "shape": [25], "data_offsets": [0, 24]},
        {"dtype": "F8_E8M0", "shape": [23], "data_offsets": [0, 24]},
        {"dtype": "F4", "shape": [24], "data_offsets": [0, 24]},
        {"dtype": "F6_E2M3", "shape": [33], "data_offsets": [0, 24]},
        {"dtype": ["F32"], "shape": [6], "data_offsets": [0, 24]},
    ],
    ids=lambda entry: str(entry)[:60],
)
def test_a_header_whose_numbers_are_none(tmp_path: Path, model: Path, entry: dict[str, Any]) -> None:
    """Negative, broken and giant shapes, and sizes that do not fit, are found in the header."""
    models.write_safetensors(model / "model.safetensors", {"a": entry}, 24)
    assert refused(tmp_path, model) == "checkpoint_corrupt"


def test_numbers_of_an_unknown_kind(tmp_path: Path, model: Path) -> None:
    """A type that cannot be read is named, not guessed."""
    entry = {"dtype": "F4_E2M1", "shape": [48], "data_offsets": [0, 24]}
    models.write_safetensors(model / "model.safetensors", {"a": entry}, 24)
    assert refused(tmp_path, model) == "checkpoint_dtype"


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is cut after its header was checked makes an error, not a shorter model."""
    wanted = Conversion(str(model), str(tmp_path / "out"), to="bin")
    real = conversions.output_path

    def cut(*args: Any, **options: Any) -> Path:
        raw = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(raw[:-5])
        return real(*args, **options)

    monkeypatch.setattr(conversions, "output_path", cut)
    with pytest.raises(UserError) as raised:
        convert(wanted)
    assert raised.value.code == "checkpoint_corrupt"
    assert not (tmp_path / "out").exists()


def hostile_adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(1, 2)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("wrong", ["code", "pickle", "renamed pickle", "link", "nested config", "no weights"])
def test_hostile_adapters(tmp_path: Path, canary: Path, wrong: str) -> None:
    """An adapter is judged as strictly as a model."""
    folder = hostile_adapter(tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    if wrong == "code":
        (folder / "custom.py").write_text("")
    elif wrong == "pickle":
        weights.unlink()
        (folder / "adapter_model.bin").write_bytes(archived({"a": Canary(canary)}))
    elif wrong == "renamed pickle":
        weights.write_bytes(archived({"a": Canary(canary)}))
    elif wrong == "link":
        shutil.move(weights, tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
    elif wrong == "nested config":
        (folder / "adapter_config.json").write_text("[" * 100_000)
    else:
        weights.unlink()
    with pytest.raises(UserError) as raised:
        open_adapter(str(folder))
    assert (
        raised.value.code
        == {
            "code": "checkpoint_remote_code",
            "pickle": "checkpoint_pickled",
            "renamed pickle": "checkpoint_pickled",
            "link": "checkpoint_link",
            "nested config": "checkpoint_config",
            "no weights": "checkpoint_no_weights",
        }[wrong]
    )
    assert not canary.exists()


def test_the_error_names_what_was_asked_for(tmp_path: Path, canary: Path) -> None:
    """The message says which call stands in the file; the rest of it is not repeated."""
    (tmp_path / "x.bin").write_bytes(archived({"secret text": Canary(canary)}))
    with pytest.raises(UserError, match=r"asks for posix\.mkdir") as raised:
        load_pickled(tmp_path / "x.bin")
    assert "secret" not in str(raised.value)
