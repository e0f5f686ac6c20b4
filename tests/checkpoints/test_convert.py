"""Converting: what is read stays as it is, what is made answers the same, and nothing is ever half there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import trained
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime.checkpoints import locks, output
from runtime.checkpoints.convert import Conversion, Converted, convert
from runtime.checkpoints.inspect import inspect
from runtime.checkpoints.tensors import in_memory
from runtime.errors import UserError

TEXT = "good morning, how are you today? 123 {[()]}"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model in one file."""
    return models.language_model(tmp_path_factory.mktemp("base") / "llama.7b.chat")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The same in several files."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output embeddings are its input embeddings."""
    return trained.tied_model(tmp_path_factory.mktemp("tied") / "model")


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """What DeepSpeed and FSDP save of a training on two ranks."""
    return trained.of_two_ranks(base, tmp_path_factory.mktemp("two") / "ranks")


def logits(folder: Path, **more: Any) -> torch.Tensor:
    """What the model in `folder` answers to a text."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, **more).eval()(ids).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def state(folder: Path) -> Mapping[str, tuple[bytes, int]]:
    """Content and time of every file."""
    return {
        str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file()
    }


def refused(wanted: Conversion) -> str:
    """The code of the error; nothing may be left beside the place of the result."""
    parent = Path(wanted.target).parent
    before = set(parent.iterdir())
    with pytest.raises(UserError) as raised:
        convert(wanted)
    assert raised.value.hint
    assert set(parent.iterdir()) == before
    return raised.value.code


# --- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "sharded", "tied"])
def test_to_bin_and_back(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A model becomes .bin and safetensors again, bit for bit, file by file, and the original is not touched."""
    original = request.getfixturevalue(name)
    before = state(original)
    there = convert(Conversion(str(original), str(tmp_path / "bin"), to="bin"))
    assert state(original) == before
    assert not list((tmp_path / "bin").glob("*.safetensors*"))
    assert torch.equal(logits(tmp_path / "bin", use_safetensors=False), logits(original))
    back = convert(Conversion(there.path, str(tmp_path / "back"), to="safetensors", allow_pickle=True))
    assert {n: t.tolist() for n, t in weights(tmp_path / "back").items()} == {
        n: t.tolist() for n, t in weights(original).items()
    }
    assert sorted(back.files) == sorted(before)
    assert inspect(back.path).num_parameters == back.parameters == there.parameters


def test_shards_keep_their_place_in_the_index(sharded: Path, tmp_path: Path) -> None:
    """The index of a sharded model is rewritten and renamed; every tensor is in the shard of the same number."""
    convert(Conversion(str(sharded), str(tmp_path / "bin"), to="bin"))
    old = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    new = json.loads((tmp_path / "bin" / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert new == {
        name: file.replace("model", "pytorch_model").replace(".safetensors", ".bin") for name, file in old.items()
    }
    for name, file in new.items():
        assert name in torch.load(tmp_path / "bin" / file, weights_only=True, mmap=True)


def test_shards_with_dots_in_their_names(sharded: Path, tmp_path: Path) -> None:
    """What stands between the dots of a file's name stays."""
    odd = tmp_path / "odd"
    shutil.copytree(sharded, odd)
    index = json.loads((odd / "model.safetensors.index.json").read_text())
    for file in {*index["weight_map"].values()}:
        (odd / file).rename(odd / file.replace("model-", "llama.2.7b-"))
    index["weight_map"] = {name: file.replace("model-", "llama.2.7b-") for name, file in index["weight_map"].items()}
    (odd / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(Conversion(str(odd), str(tmp_path / "bin"), to="bin"))
    names = {file.name for file in (tmp_path / "bin").glob("*.bin")}
    assert names == {file.replace(".safetensors", ".bin") for file in index["weight_map"].values()}
    assert torch.equal(logits(tmp_path / "bin", use_safetensors=False), logits(sharded))


def test_files_that_would_be_called_alike_are_numbered(sharded: Path, tmp_path: Path) -> None:
    """Two shards whose new names are one keep all their tensors."""
    odd = tmp_path / "odd"
    shutil.copytree(sharded, odd)
    index = json.loads((odd / "model.safetensors.index.json").read_text())
    first, second, *_ = sorted({*index["weight_map"].values()})
    new = {first: "model-x.safetensors", second: "pytorch_model-x.safetensors"}
    for old, name in new.items():
        (odd / old).rename(odd / name)
    index["weight_map"] = {name: new.get(file, file) for name, file in index["weight_map"].items()}
    (odd / "model.safetensors.index.json").write_text(json.dumps(index))
    made = convert(Conversion(str(odd), str(tmp_path / "bin"), to="bin"))
    assert sum(file.endswith(".bin") for file in made.files) == len({*index["weight_map"].values()})
    assert torch.equal(logits(tmp_path / "bin", use_safetensors=False), logits(sharded))


def test_the_layers_around_an_encoder_are_converted_too(tmp_path: Path) -> None:
    """Pickled weights of a sentence-transformers module are refused, and when allowed become safetensors."""
    from sentence_transformers import SentenceTransformer

    folder = models.sentence_encoder(tmp_path / "st")
    dense = folder / "2_Dense"
    dense.mkdir()
    layer = {"linear.weight": torch.randn(8, 32), "linear.bias": torch.randn(8)}
    torch.save(layer, dense / "pytorch_model.bin")
    said = {
        "in_features": 32,
        "out_features": 8,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (dense / "config.json").write_text(json.dumps(said))
    listed = json.loads((folder / "modules.json").read_text())
    kind = "sentence_transformers.models.Dense"
    listed[2:] = [{"idx": 2, "name": "2", "path": "2_Dense", "type": kind}]
    (folder / "modules.json").write_text(json.dumps(listed))
    out = tmp_path / "out"
    assert refused(Conversion(str(folder), str(out), to="float32")) == "checkpoint_pickled"
    convert(Conversion(str(folder), str(out), to="float32", allow_pickle=True))
    assert {n: t.tolist() for n, t in load_file(out / "2_Dense" / "model.safetensors").items()} == {
        n: t.tolist() for n, t in layer.items()
    }
    vectors = [SentenceTransformer(str(each), device="cpu").encode([TEXT]) for each in (folder, out)]
    assert (vectors[0] == vectors[1]).all()
    assert inspect(str(out)).sentence_transformers


def test_tied_weights_are_written_once(tied: Path, tmp_path: Path) -> None:
    """Two names for one tensor in a .bin are one in safetensors, as the configuration ties them."""
    model = AutoModelForCausalLM.from_pretrained(tied)
    old = tmp_path / "old"
    shutil.copytree(tied, old, ignore=shutil.ignore_patterns("*.safetensors"))
    assert "lm_head.weight" in model.state_dict()
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    convert(Conversion(str(old), str(tmp_path / "new"), to="safetensors", allow_pickle=True))
    assert "lm_head.weight" not in weights(tmp_path / "new")
    assert torch.equal(logits(tmp_path / "new"), logits(tied))


def test_a_name_that_is_tied_no_more_is_kept(tied: Path, tmp_path: Path) -> None:
    """A .bin whose two embeddings differ loses neither of them."""
    old = tmp_path / "old"
    shutil.copytree(tied, old, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: t.clone() for name, t in AutoModelForCausalLM.from_pretrained(tied).state_dict().items()}
    tensors["lm_head.weight"] += 1
    torch.save(tensors, old / "pytorch_model.bin")
    convert(Conversion(str(old), str(tmp_path / "new"), to="safetensors", allow_pickle=True))
    assert torch.equal(weights(tmp_path / "new")["lm_head.weight"], tensors["lm_head.weight"])


def test_files_of_the_old_torch_are_read(base: Path, tmp_path: Path) -> None:
    """A .bin from before torch 1.6, which is no archive, is read too."""
    old = tmp_path / "old"
    shutil.copytree(base, old, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(weights(base), old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(Conversion(str(old), str(tmp_path / "new"), to="safetensors", allow_pickle=True))
    assert torch.equal(logits(tmp_path / "new"), logits(base))


# --- number types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_cast_is_what_loading_in_that_type_is(sharded: Path, tmp_path: Path, dtype: str) -> None:
    """The cast model equals the original loaded in that type, and says so in its configuration; what the cast costs
    in the answers is told, and is nothing where nothing is cast."""
    made = convert(Conversion(str(sharded), str(tmp_path / "cast"), to=dtype, check=True))
    assert made.dtype == dtype == json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"]
    assert made.max_logit_difference is not None
    largest = float((logits(tmp_path / "cast").float() - logits(sharded)).abs().max())
    if dtype == "float32":
        assert made.max_logit_difference == 0
    else:
        assert 0 < made.max_logit_difference < 20 * largest + 0.1
    assert torch.equal(logits(tmp_path / "cast"), logits(sharded, dtype=getattr(torch, dtype)))


def test_format_and_type_at_once(base: Path, tmp_path: Path) -> None:
    """`to` names the format and `dtype` the type."""
    made = convert(Conversion(str(base), str(tmp_path / "out"), to="bin", dtype="bf16"))
    assert (made.dtype, "pytorch_model.bin" in made.files) == ("bfloat16", True)


def test_numbers_that_are_no_floats_stay(base: Path, tmp_path: Path) -> None:
    """Indices and masks are not cast, empty and single numbers are carried over."""
    odd = tmp_path / "odd"
    shutil.copytree(base, odd)
    more = {
        "buffers.index": torch.arange(5),
        "buffers.mask": torch.tensor([True, False, True]),
        "buffers.none": torch.empty(0, 3),
        "buffers.one": torch.tensor(1.5),
        "buffers.byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
    }
    save_file({**weights(base), **more}, odd / "model.safetensors", metadata={"format": "pt"})
    convert(Conversion(str(odd), str(tmp_path / "cast"), to="bfloat16"))
    found = weights(tmp_path / "cast")
    for name, tensor in more.items():
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


def test_no_weight_becomes_infinite_in_silence(base: Path, tmp_path: Path) -> None:
    """A number beyond float16 is an error that names bfloat16; an infinity that was there before is not."""
    for value, code in ((1e6, "cast_overflow"), (float("-inf"), "")):
        odd = tmp_path / f"odd{value}"
        shutil.copytree(base, odd)
        tensors = weights(base)
        tensors["lm_head.weight"][3, 3] = value
        save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
        wanted = Conversion(str(odd), str(tmp_path / f"out{value}"), to="float16")
        if code:
            assert refused(wanted) == code
        else:
            assert convert(wanted).dtype == "float16"


def test_large_tensors_pass_in_pieces(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that end inside a row make the same file as whole tensors."""
    from runtime.checkpoints import tensors

    convert(Conversion(str(base), str(tmp_path / "whole"), to="bfloat16"))
    monkeypatch.setattr(tensors, "PIECE_BYTES", 1000)
    convert(Conversion(str(base), str(tmp_path / "pieces"), to="bfloat16"))
    assert (tmp_path / "pieces" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_quantized_checkpoint_is_not_cast(base: Path, tmp_path: Path) -> None:
    """Numbers that mean nothing without their scales are left alone."""
    odd = tmp_path / "odd"
    shutil.copytree(base, odd)
    config = json.loads((odd / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (odd / "config.json").write_text(json.dumps(config))
    assert refused(Conversion(str(odd), str(tmp_path / "out"), to="bfloat16")) == "checkpoint_quantized"
    assert convert(Conversion(str(odd), str(tmp_path / "bin"), to="bin")).dtype == "float32"


# --- trainings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_equals_deepspeeds_own_converter(two_ranks: Path, base: Path, tmp_path: Path, stage: int) -> None:
    """Every stage, partitioned over two ranks, with frozen weights: the very numbers that DeepSpeed's tool finds."""
    folder = two_ranks / f"zero{stage}"
    made = convert(
        Conversion(str(base), str(tmp_path / "out"), training=str(folder), tag="Epoch-1", dtype="float32", check=True)
    )
    found, expected = weights(tmp_path / "out"), load_file(folder / "expected.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].float()) for name in found)
    assert made.max_logit_difference == 0
    assert not any(torch.equal(found[name], tensor) for name, tensor in weights(base).items())
    assert inspect(made.path).has_chat_template


def test_sharded_checkpoints_of_fsdp(two_ranks: Path, base: Path, tmp_path: Path) -> None:
    """The shards of two ranks become one model; what is no weight is left out. With or without naming the folder."""
    expected = load_file(two_ranks / "fsdp" / "expected.safetensors")
    for number, (root, tag) in enumerate(
        [
            (two_ranks / "fsdp", "checkpoint-1"),
            (two_ranks / "fsdp" / "checkpoint-1", ""),
            (two_ranks / "fsdp" / "checkpoint-1" / "pytorch_model_fsdp_0", ""),
        ]
    ):
        out = tmp_path / str(number)
        convert(Conversion(str(base), str(out), training=str(root), tag=tag))
        found = weights(out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert not any(torch.equal(found[name], tensor) for name, tensor in weights(base).items())


def test_without_a_tag_the_latest_counts(two_ranks: Path, base: Path, tmp_path: Path) -> None:
    """The file `latest` names the checkpoint, and the number type is that of the model."""
    made = convert(Conversion(str(base), str(tmp_path / "out"), training=str(two_ranks / "zero2")))
    assert made.dtype == "float32" == json.loads((base / "config.json").read_text())["dtype"]


def test_an_epoch_in_hugging_face_form_counts_too(base: Path, sharded: Path, tmp_path: Path) -> None:
    """A training without DeepSpeed saves whole models; the same statement takes them, and not the base's weights."""
    epoch = trained.perturbed(sharded, tmp_path / "job" / "Epoch-1")
    convert(Conversion(str(base), str(tmp_path / "out"), training=str(tmp_path / "job"), tag="Epoch-1"))
    assert torch.equal(logits(tmp_path / "out"), logits(epoch))
    assert not torch.equal(logits(tmp_path / "out"), logits(base))


def test_what_is_wrong_with_a_training_is_said(two_ranks: Path, base: Path, tmp_path: Path) -> None:
    """A wrong tag, model or folder, a rank that is missing: each has its code, and a wrong tag names the right ones."""
    out, zero = str(tmp_path / "out"), two_ranks / "zero2"
    for tag in ("Epoch-2", "../zero2/Epoch-1", "..", str(zero / "Epoch-1")):
        assert refused(Conversion(str(base), out, training=str(zero), tag=tag)) == "checkpoint_tag"
    with pytest.raises(UserError, match="It has: Epoch-1"):
        convert(Conversion(str(base), out, training=str(zero), tag="Epoch-2"))
    assert refused(Conversion(str(base), out, training=str(tmp_path))) == "checkpoint_tag"
    other = models.language_model(tmp_path / "other", tie=True)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    assert refused(Conversion(str(other), out, training=str(zero))) == "checkpoint_mismatch"
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert refused(Conversion(str(other), out, training=str(zero))) == "weights_missing"
    for name, code in {
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": "checkpoint_corrupt",
        "mp_rank_00_model_states.pt": "checkpoint_tag",
    }.items():
        part = tmp_path / name
        shutil.copytree(zero, part)
        (part / "Epoch-1" / name).unlink()
        assert refused(Conversion(str(base), out, training=str(part), tag="Epoch-1")) == code
    parallel = tmp_path / "parallel"
    shutil.copytree(zero, parallel)
    shutil.copy(
        parallel / "Epoch-1" / "mp_rank_00_model_states.pt", parallel / "Epoch-1" / "mp_rank_01_model_states.pt"
    )
    assert refused(Conversion(str(base), out, training=str(parallel), tag="Epoch-1")) == "zero_unsupported"


# --- the place of the result --------------------------------------------------------------------------------------


def test_what_is_there_is_not_replaced_unasked(base: Path, tmp_path: Path) -> None:
    """A second run needs overwrite, which replaces a model as a whole."""
    out = tmp_path / "out"
    wanted = Conversion(str(base), str(out), to="bin")
    convert(wanted)
    (out / "LICENSE").write_text("")
    assert refused(wanted) == "output_exists"
    convert(Conversion(str(base), str(out), to="bfloat16", overwrite=True))
    assert not (out / "LICENSE").exists()
    assert not (out / "pytorch_model.bin").exists()
    assert inspect(str(out)).dtype == "bfloat16"


@pytest.mark.parametrize("kind", ["letters", "a config", "a page", "a model inside", "a hidden folder", "a file"])
def test_what_is_no_model_is_never_replaced(base: Path, tmp_path: Path, kind: str) -> None:
    """Only a folder that holds a model and nothing else: not one with anything beside it, above it or in its guise."""
    home = tmp_path / "home.gguf"
    if kind == "a file":
        home.write_text("GGU")
    else:
        shutil.copytree(base, home) if kind != "letters" else home.mkdir()
    if kind == "letters":
        (home / "letter.txt").write_text("")
    elif kind == "a config":
        (home / "config.json").write_text('{"editor": "vim"}')
    elif kind == "a page":
        (home / "thesis.docx").write_text("")
    elif kind == "a model inside":
        shutil.copytree(base, home / "other")
    elif kind == "a hidden folder":
        (home / ".git").mkdir()
    before = home.read_bytes() if home.is_file() else state(home)
    for overwrite, code in ((False, "output_exists"), (True, "output_foreign")):
        assert refused(Conversion(str(base), str(home), to="bin", overwrite=overwrite)) == code
    assert before == (home.read_bytes() if home.is_file() else state(home))


def test_a_result_goes_into_a_folder(base: Path, tmp_path: Path) -> None:
    """A URL is refused, with the statement that brings a result to a store."""
    with pytest.raises(UserError) as raised:
        convert(Conversion(str(base), "s3://bucket/model", to="bin"))
    assert raised.value.code == "output_remote"
    assert 'action="import"' in str(raised.value.hint)


def test_what_is_read_is_never_replaced(base: Path, tmp_path: Path) -> None:
    """The result may be neither the model itself, nor a folder that holds it, by whatever name."""
    model = tmp_path / "models" / "m"
    shutil.copytree(base, model)
    (tmp_path / "models" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    for target in (model, model.parent, tmp_path / "link", f"{model}/../m"):
        assert refused(Conversion(str(model), str(target), to="bin", overwrite=True)) == "output_is_input"


def test_a_result_outside_the_roots_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLEXT_ROOTS holds for what is written too."""
    monkeypatch.setenv("SQLEXT_ROOTS", str(base))
    assert refused(Conversion(str(base), str(tmp_path / "out"), to="bin")) == "checkpoint_outside_roots"


@pytest.mark.parametrize("to", ["bfloat16", "bin", "q8_0"])
def test_a_full_disk_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """When the disk runs full in the middle, the error says so, and neither a part nor the old model is lost."""
    out = tmp_path / "out"
    convert(Conversion(str(base), str(out), to=to))
    before = state(out)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output, "_sync", full)
    assert refused(Conversion(str(base), str(out), to=to, overwrite=True)) == "disk_full"
    assert state(out) == before


def test_a_disk_without_room_is_noticed_before(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No work is begun that cannot end."""
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    assert refused(Conversion(str(base), str(tmp_path / "out"), to="bin")) == "disk_full"


def test_a_device_that_takes_nothing_is_a_full_disk(tmp_path: Path) -> None:
    """The error of a write that really failed is understood."""
    tensors = {"a": in_memory(torch.zeros(1_000_000))}
    with pytest.raises(UserError) as raised, output.whole(tmp_path / "out"):
        output.write_safetensors(Path("/dev/full"), tensors, lambda _: None)
    assert raised.value.code == "disk_full"
    assert not list(tmp_path.iterdir())


def test_any_tool_can_look_into_a_bin(base: Path, tmp_path: Path) -> None:
    """The archive is one that Python's zipfile opens, with a pickle whose checksum is right."""
    convert(Conversion(str(base), str(tmp_path / "out"), to="bin"))
    with zipfile.ZipFile(tmp_path / "out" / "pytorch_model.bin") as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        assert b"lm_head.weight" in archive.read(pickled)


@pytest.mark.parametrize("to", ["bfloat16", "bin", "q8_0"])
def test_a_stopped_conversion_leaves_nothing(base: Path, tmp_path: Path, to: str) -> None:
    """Whoever watches the progress can stop it by raising."""

    def stop(done: int, total: int) -> None:
        assert 0 <= done <= total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(Conversion(str(base), str(tmp_path / "out"), to=to), stop)
    assert not list(tmp_path.iterdir())


def test_the_progress_ends_at_the_whole(sharded: Path, tmp_path: Path) -> None:
    """It grows, and ends where it said it would."""
    told: list[tuple[int, int]] = []
    convert(Conversion(str(sharded), str(tmp_path / "out"), to="bf16"), lambda *now: told.append(now))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0


def killed(base: Path, out: Path, where: str) -> None:
    """A conversion that is killed with SIGKILL in a process of its own."""
    script = f"""
        import os, signal
        from pathlib import Path
        from runtime.checkpoints import locks, output
        from runtime.checkpoints.convert import Conversion, convert
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        rename = os.rename
        def rename_and_die(source, target):
            rename(source, target)
            die()
        if {where!r} == "between the renames":
            output.os.rename = rename_and_die
        progress = die if {where!r} == "while it writes" else lambda *_: None
        convert(Conversion({str(base)!r}, {str(out)!r}, to="bfloat16", overwrite=True), progress)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_a_killed_conversion_leaves_nothing_that_counts(base: Path, tmp_path: Path) -> None:
    """Killed while it writes: no model; the same statement then ends well and removes what was left."""
    out = tmp_path / "out"
    killed(base, out, "while it writes")
    assert not out.exists()
    assert list(tmp_path.iterdir())
    convert(Conversion(str(base), str(out), to="bfloat16"))
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_a_model_that_was_being_replaced_comes_back(base: Path, tmp_path: Path) -> None:
    """Killed in the moment between the old model and the new: the old one is there again for the next statement."""
    out = tmp_path / "out"
    convert(Conversion(str(base), str(out), to="bin"))
    before = state(out)
    killed(base, out, "between the renames")
    assert not out.exists()
    assert refused_with_leftovers(Conversion(str(base), str(out), to="bin")) == "output_exists"
    assert state(out) == before
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def refused_with_leftovers(wanted: Conversion) -> str:
    with pytest.raises(UserError) as raised:
        convert(wanted)
    return raised.value.code


def test_a_model_that_cannot_be_replaced_stays(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the new model cannot take its place, and the old one cannot go back at once, it is kept and goes back later."""
    out = tmp_path / "out"
    convert(Conversion(str(base), str(out), to="bin"))
    before, rename = state(out), os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target) == out:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(output.os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        convert(Conversion(str(base), str(out), to="bfloat16", overwrite=True))
    monkeypatch.setattr(output.os, "rename", rename)
    assert not out.exists()
    assert refused_with_leftovers(Conversion(str(base), str(out), to="bin")) == "output_exists"
    assert state(out) == before


def test_what_another_process_works_in_stays(base: Path, tmp_path: Path) -> None:
    """A place that is held is not cleared, whatever the number of its process; other folders are not touched."""
    (tmp_path / ".out.mine").mkdir()
    held = tmp_path / ".out.abc.partial"
    held.mkdir()
    handle = locks.hold(held)
    assert handle is not None
    convert(Conversion(str(base), str(tmp_path / "out"), to="bin"))
    assert held.exists()
    os.close(handle)
    convert(Conversion(str(base), str(tmp_path / "out"), to="bin", overwrite=True))
    assert sorted(child.name for child in tmp_path.iterdir()) == [".out.mine", "out"]


def test_what_cannot_be_compared_is_not_made(base: Path, tmp_path: Path) -> None:
    """The check comes before the result takes its place: without a tokenizer there are no texts, and no result."""
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*token*"))
    out = tmp_path / "out"
    convert(Conversion(str(base), str(out), to="bin"))
    before = state(out)
    assert refused(Conversion(str(bare), str(out), to="bf16", check=True, overwrite=True)) == "check_failed"
    assert state(out) == before


def test_a_check_that_finds_no_numbers_fails(base: Path, tmp_path: Path) -> None:
    """Answers that are not finite are no difference of 0."""
    odd = tmp_path / "odd"
    shutil.copytree(base, odd)
    tensors = weights(base)
    tensors["lm_head.weight"][3, 3] = float("nan")
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    assert refused(Conversion(str(odd), str(tmp_path / "out"), to="bfloat16", check=True)) == "check_failed"


def test_words_that_mean_nothing(base: Path, tmp_path: Path) -> None:
    """A wrong word names the nearest right one; nothing to do is said."""
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match='Did you mean "safetensors"'):
        convert(Conversion(str(base), out, to="safetensor"))
    assert refused(Conversion(str(base), out, to="bfloat16", dtype="float16")) == "option_value"
    assert refused(Conversion(str(base), out, to="bin", dtype="int3")) == "option_value"
    assert refused(Conversion(str(base), out)) == "option_missing"
    assert refused(Conversion(str(base), "", to="bin")) == "output_missing"


@pytest.fixture(scope="session")
def made_everywhere(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    """Conversions by their word."""
    folder = tmp_path_factory.mktemp("made")
    return lambda to: convert(Conversion(str(base), str(folder / to), to=to))


def test_the_row_tells_what_is_there(made_everywhere: Callable[[str], Converted]) -> None:
    """Files, bytes and parameters are those of the folder."""
    made = made_everywhere("bfloat16")
    there = [file for file in Path(made.path).rglob("*") if file.is_file()]
    assert sorted(made.files) == sorted(file.name for file in there)
    assert made.bytes == sum(file.stat().st_size for file in there)
    assert made.parameters == inspect(made.path).num_parameters
