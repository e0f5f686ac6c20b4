"""GGUF as it comes: a model told by its header, and headers made to do harm."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import models
import pytest

from runtime.checkpoints.gguf_header import MAX_ITEMS, MAX_TENSORS, read_gguf
from runtime.checkpoints.profile import profile
from runtime.checkpoints.suitability import Machine, suitable
from runtime.errors import UserError
from runtime.spec import Task


def text(said: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(said.encode()) if length is None else length) + said.encode()


def value(key: str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def tensor(name: str = "a", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def header(
    values: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 1024,
) -> bytes:
    said = counts or (len(tensors), len(values))
    return magic + struct.pack("<IQQ", version, *said) + b"".join((*values, *tensors)) + bytes(data)


def an_array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + raw


def nested(depth: int) -> bytes:
    return an_array(9, 1, nested(depth - 1)) if depth else an_array(0, 0)


ONE = (value("a", 4, struct.pack("<I", 1)),)
HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "another magic": header(magic=b"GGML"),
    "only the magic": b"GGUF",
    "no end of tensors": header(counts=(MAX_TENSORS + 1, 0)),
    "no end of keys": header(counts=(0, 1 << 60)),
    "more keys than there are": header(ONE, counts=(0, 9), data=0),
    "a text longer than the file": header((text("k", 1 << 40),)),
    "a text that overflows": header((text("k", (1 << 64) - 1),)),
    "a value longer than the file": header((value("k", 8, text("v", 1 << 30)),)),
    "a list longer than the file": header((value("k", 9, an_array(10, 1 << 20)),)),
    "a list without end": header((value("k", 9, an_array(0, MAX_ITEMS + 1)),)),
    "lists that are long together": header(
        tuple(value(f"k{i}", 9, an_array(0, 3_000_000, bytes(3_000_000))) for i in range(2))
    ),
    "lists in lists in lists": header((value("k", 9, nested(9)),)),
    "a value of no kind": header((value("k", 13, b"\0" * 8),)),
    "a key that is there twice": header(ONE * 2),
    "an alignment of 0": header((value("general.alignment", 4, struct.pack("<I", 0)),)),
    "an alignment of 3": header((value("general.alignment", 4, struct.pack("<I", 3)),)),
    "an alignment that is a text": header((value("general.alignment", 8, text("32")),)),
    "a tensor of giant rank": header((), (text("a") + struct.pack("<I", 1 << 31),)),
    "a tensor of giant size": header((), (tensor(shape=(1 << 40, 1 << 40)),)),
    "a tensor larger than the file": header((), (tensor(shape=(1 << 20,)),)),
    "a tensor that begins elsewhere": header((), (tensor(offset=64),)),
    "tensors that overlap": header((), (tensor(), tensor("b"))),
    "a tensor that is there twice": header((), (tensor(), tensor(offset=32))),
    "half a block": header((), (tensor(shape=(33,), kind=8),)),
    "a name without end": header((), (text("n" * 2000),)),
    "absurd layers": header(
        (
            value("general.architecture", 8, text("llama")),
            value("llama.block_count", 4, struct.pack("<I", 1 << 31)),
        ),
        (tensor(),),
    ),
    "a wrong type": header(
        (value("general.architecture", 8, text("llama")), value("llama.block_count", 8, text("two"))), (tensor(),)
    ),
}


@pytest.mark.parametrize("wrong", HOSTILE)
def test_hostile_headers(tmp_path: Path, wrong: str) -> None:
    """Counts, lengths, offsets and types are compared with what is there before they are used."""
    (tmp_path / "x.gguf").write_bytes(HOSTILE[wrong])
    with pytest.raises(UserError) as raised:
        profile(str(tmp_path / "x.gguf"))
    assert raised.value.code in ("checkpoint_corrupt", "checkpoint_config")
    assert raised.value.hint


@pytest.mark.parametrize("raw", [header(version=1), header(version=0x03000000), header((), (tensor(kind=99),))])
def test_what_is_not_known_is_said(tmp_path: Path, raw: bytes) -> None:
    """Old versions, the other order of bytes, and new types of numbers are named as such."""
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(UserError) as raised:
        read_gguf(tmp_path / "x.gguf")
    assert raised.value.code == "gguf_unsupported"


def test_noise_is_an_error_and_nothing_else(tmp_path: Path) -> None:
    """Whatever byte of a header is another one: it is read, or refused in words."""
    good = models.gguf(tmp_path / "good.gguf").read_bytes()
    dice = random.Random(0)
    for _ in range(400):
        raw = bytearray(good[: dice.randrange(4, len(good))] if dice.random() < 0.2 else good)
        for _ in range(dice.randrange(1, 4)):
            raw[dice.randrange(4, min(600, len(raw)) if len(raw) > 4 else 5) % len(raw)] = dice.randrange(256)
        (tmp_path / "x.gguf").write_bytes(raw)
        try:
            suitable(profile(str(tmp_path / "x.gguf")), (Machine("", 1 << 40),))
        except UserError as error:
            assert error.hint  # noqa: PT017 - not every change is an error


def test_a_gguf_model_is_told(tmp_path: Path) -> None:
    """Of a file as of the folder that holds it: architecture, sizes, words; only its own file when it is named."""
    file = models.gguf(tmp_path / "tiny.gguf")
    (tmp_path / "notes.md").write_text("notes")
    of_file, of_folder = profile(str(file)), profile(str(tmp_path))
    for found in (of_file, of_folder):
        assert (found.format, found.model_arch, found.task) == ("gguf", "llama", Task.GENERATE)
        assert (found.parameters, found.seq_length, found.vocab_size, found.dtype) == (96, 128, 4, "float32")
        assert (found.special_tokens, found.chat_template) == ({"bos": "<s>", "eos": "</s>"}, "{{ messages }}")
    assert [each.name for each in of_file.files] == ["tiny.gguf"]
    assert [each.name for each in of_folder.files] == ["notes.md", "tiny.gguf"]
    transformers = next(each for each in suitable(of_file, (Machine("", 1 << 40),)) if each.engine == "transformers")
    assert not transformers.runs
    assert "GGUF" in transformers.why


def test_parts_belong_together_and_models_do_not(tmp_path: Path) -> None:
    """A split model is one, when all parts are there; of several models in a folder one must be named."""
    for number in (1, 2):
        models.gguf(tmp_path / f"big-{number:05}-of-00002.gguf")
    assert profile(str(tmp_path)).parameters == profile(str(tmp_path / "big-00001-of-00002.gguf")).parameters == 192
    models.gguf(tmp_path / "mmproj-f16.gguf")
    assert profile(str(tmp_path)).parameters == 192
    models.gguf(tmp_path / "other.gguf")
    codes: list[Any] = []
    for change in (lambda: None, lambda: [each.unlink() for each in tmp_path.glob("*2-of*")]):
        change()
        with pytest.raises(UserError) as raised:
            profile(str(tmp_path))
        codes.append(raised.value.code)
    assert codes == ["gguf_several", "checkpoint_corrupt"]


def test_quantized_types_are_told(tmp_path: Path) -> None:
    """The type of most numbers, and its bits."""
    raw = header((value("general.architecture", 8, text("llama")),), (tensor(shape=(256, 2), kind=12),))
    (tmp_path / "q.gguf").write_bytes(raw)
    found = profile(str(tmp_path / "q.gguf"))
    assert (found.dtype, found.parameters) == ("q4_k", 512)
    assert found.quantization
    assert (found.quantization.method, found.quantization.bits) == ("gguf", 4)
