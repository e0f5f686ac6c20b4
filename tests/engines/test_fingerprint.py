"""When two checkpoint folders count as one model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import models
import pytest

from runtime.checkpoints import fingerprint
from runtime.checkpoints.fingerprint import checkpoint_fingerprint
from runtime.errors import UserError


class Facts(dict[str, str]):
    """A memory that lasts as long as the test."""

    def recall(self, name: str) -> str | None:
        return self.get(name)

    def remember(self, name: str, text: str) -> None:
        self[name] = text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint that was written long ago."""
    made = models.placeholder(tmp_path / "model")
    (made / "1_Pooling").mkdir()
    (made / "1_Pooling" / "config.json").write_text("{}")
    for file in made.rglob("*"):
        os.utime(file, (1_700_000_000, 1_700_000_000))
    return made


def test_neither_place_nor_time_counts(folder: Path, tmp_path: Path) -> None:
    """A copy elsewhere, written now, has the fingerprint of the original."""
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert checkpoint_fingerprint(copy, Facts()) == checkpoint_fingerprint(folder, Facts())


CHANGES: dict[str, Callable[[Path], object]] = {
    "one byte of the weights": lambda f: _flip(f / "model.safetensors"),
    "the configuration": lambda f: (f / "config.json").write_text((f / "config.json").read_text() + " "),
    "a chat template": lambda f: (f / "chat_template.jinja").write_text(""),
    "a file of a module": lambda f: (f / "1_Pooling" / "config.json").write_text("{ }"),
    "a file that went": lambda f: (f / "tokenizer.json").unlink(),
    "a name": lambda f: (f / "tokenizer.json").rename(f / "tokenizer2.json"),
}


def _flip(file: Path) -> None:
    """Change the last byte; the size stays as it is."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("change", CHANGES)
def test_content_counts(folder: Path, change: str) -> None:
    """Whatever decides answers changes the fingerprint, though the files' hashes were remembered."""
    facts = Facts()
    before = checkpoint_fingerprint(folder, facts)
    CHANGES[change](folder)
    assert checkpoint_fingerprint(folder, facts) != before


def test_papers_do_not_count(folder: Path) -> None:
    """A README, a licence and hidden files leave the fingerprint as it is."""
    before = checkpoint_fingerprint(folder, Facts())
    for name in ("README.md", "LICENSE", "LICENSE.txt", "notes.md", ".gitattributes"):
        (folder / name).write_text("new")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("new")
    assert checkpoint_fingerprint(folder, Facts()) == before


def test_a_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was hashed before is remembered, and only a file that changed is read again."""
    read: list[str] = []
    hash_part = fingerprint._hash_part

    def watched(file: Path, start: int) -> bytes:
        read.append(file.name)
        return hash_part(file, start)

    monkeypatch.setattr(fingerprint, "_hash_part", watched)
    facts = Facts()
    first = checkpoint_fingerprint(folder, facts)
    assert len(read) == 4
    assert checkpoint_fingerprint(folder, facts) == first
    assert len(read) == 4
    os.utime(folder / "tokenizer.json", (1_700_000_001, 1_700_000_001))
    assert checkpoint_fingerprint(folder, facts) == first
    assert read[4:] == ["tokenizer.json"]


def test_a_file_changed_just_now_is_not_remembered(folder: Path) -> None:
    """It may be changed again without getting another time."""
    facts = Facts()
    (folder / "config.json").write_text("{}")
    checkpoint_fingerprint(folder, facts)
    assert len(facts) == 3


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """A farm of links, as hub caches are, is the same model; a link that leads back up ends nowhere."""
    farm = tmp_path / "farm"
    farm.mkdir()
    for entry in folder.iterdir():
        (farm / entry.name).symlink_to(entry)
    assert checkpoint_fingerprint(farm, Facts()) == checkpoint_fingerprint(folder, Facts())
    (farm / "up").symlink_to(farm)
    assert checkpoint_fingerprint(farm, Facts()) == checkpoint_fingerprint(folder, Facts())


def test_parts_of_a_large_file_keep_their_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file read in parts has one fingerprint, and not that of its parts exchanged."""
    monkeypatch.setattr(fingerprint, "CHUNK_BYTES", 4096)
    large = folder / "large.safetensors"
    one, two = os.urandom(4096), os.urandom(4096)
    large.write_bytes(one + two + b"end")
    first = checkpoint_fingerprint(folder, Facts())
    assert checkpoint_fingerprint(folder, Facts()) == first
    large.write_bytes(two + one + b"end")
    assert checkpoint_fingerprint(folder, Facts()) != first


def test_a_link_to_nothing_is_named(folder: Path) -> None:
    """A hub cache whose blob is gone is an error with the file's name."""
    (folder / "gone.json").symlink_to(folder / "nowhere")
    with pytest.raises(UserError, match="nowhere") as raised:
        checkpoint_fingerprint(folder, Facts())
    assert raised.value.code == "checkpoint_unreadable"


def test_roots_hold_for_links(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No link leads the hashing out of the allowed folders."""
    (tmp_path / "secret").write_text("")
    (folder / "link.json").symlink_to(tmp_path / "secret")
    monkeypatch.setenv("SQLEXT_ROOTS", str(folder))
    with pytest.raises(UserError) as raised:
        checkpoint_fingerprint(folder, Facts())
    assert raised.value.code == "checkpoint_outside_roots"
