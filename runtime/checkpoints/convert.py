"""`convert`: a checkpoint in one form becomes one in another.

From Hugging Face's form (safetensors, or pickled weights where that is allowed), DeepSpeed's ZeRO or torch's sharded
form, to safetensors, `.bin` or GGUF, in any plain number type. It stands alone because it only joins a reader and a
writer: tensors pass from one to the other piece by piece.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from runtime.checkpoints.adapter import Adapter
from runtime.checkpoints.folder import open_folder, read_text, require_own
from runtime.checkpoints.model_config import quantization_of
from runtime.checkpoints.model_folder import ModelFolder, Shards, open_model
from runtime.checkpoints.output import (
    Wrote,
    by_size,
    output_path,
    whole,
    write_json,
    write_safetensors,
    write_weights,
)
from runtime.checkpoints.sharded import METADATA, read_sharded
from runtime.checkpoints.skeleton import skeleton, tied, weights_of
from runtime.checkpoints.tensors import DTYPES, Stored, cast, dtype_name, dtype_named, one_thread
from runtime.checkpoints.zero import MODEL_FILES, read_zero
from runtime.errors import UserError, did_you_mean
from runtime.prompts.style import FORMAT_FILE

Progress = Callable[[int, int], None]
"""Told the bytes that are written and those of the whole; it may raise to stop the work."""

FORMATS = ("safetensors", "bin", "gguf")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
DTYPE_WORDS = ("float32", "float16", "bfloat16")
_GGUF_SPELLINGS = (("float32", "f32"), ("float16", "f16"), ("bfloat16", "bf16"))
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", FORMAT_FILE),
)
FSDP_FOLDER = "pytorch_model_fsdp_0"  # where accelerate puts the model of an FSDP training


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to convert, and into what.

    Attributes:
        model: folder of the model; with `training`, only its configuration and tokenizer are taken.
        target: folder for the result; for GGUF also a file that ends in .gguf.
        to: 'safetensors', 'bin', 'gguf', a number type, or one of GGUF's; '' = as it is, safetensors of a training.
        dtype: number type; '' = as it is, or as config.json says for a training's weights.
        training: folder with the checkpoints of a training, or one of them; '' = the model has its own weights.
        tag: which of them; '' = the one that its file `latest` names, or the folder itself.
        allow_pickle: read pickled weights, as numbers alone.
        check: compare the logits of what is read and what is made, before it takes its place.
    """

    model: str
    target: str
    to: str = ""
    dtype: str = ""
    training: str = ""
    tag: str = ""
    overwrite: bool = False
    allow_pickle: bool = False
    check: bool = False


@dataclass(frozen=True, slots=True)
class Converted:
    """What was made.

    Attributes:
        files: relative to `path`, or its name where it is a file.
        parameters: numbers in all weights.
        dtype: the type of most of them.
        max_logit_difference: between what was read and what was made, on real texts, each in its own number type;
            None when it was not asked for.
    """

    path: str
    files: tuple[str, ...]
    bytes: int
    parameters: int
    dtype: str
    seconds: float
    max_logit_difference: float | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """Where the result goes, and who watches.

    Attributes:
        begun: time.monotonic() when the work began.
        check: told where the result lies before it takes its place; how far its logits are from what was read.
    """

    target: Path
    overwrite: bool
    progress: Progress
    begun: float
    check: Callable[[Path], float] | None = None

    def counting(self, total: int) -> Wrote:
        """What is told the bytes as they are written, and tells the progress."""
        done = 0

        def wrote(count: int) -> None:
            nonlocal done
            done += count
            self.progress(done, total)

        return wrote

    def checked(self, place: Path) -> float | None:
        """The difference, when it was asked for."""
        return self.check(place) if self.check else None

    def made(self, tensors: list[Stored], dtype: str, difference: float | None) -> Converted:
        """What there is now."""
        inside = self.target.is_dir()
        found = sorted(file for file in self.target.rglob("*") if file.is_file()) if inside else [self.target]
        return Converted(
            path=str(self.target),
            files=tuple(str(file.relative_to(self.target if inside else self.target.parent)) for file in found),
            bytes=sum(file.stat().st_size for file in found),
            parameters=sum(tensor.numbers for tensor in tensors),
            dtype=dtype,
            seconds=time.monotonic() - self.begun,
            max_logit_difference=difference,
        )


def ignore_progress(done: int, total: int) -> None:
    """A progress that nobody watches."""


@one_thread()
def convert(wanted: Conversion, progress: Progress = ignore_progress) -> Converted:
    """Make a checkpoint of another form; what is read stays as it is.

    Raises:
        UserError: a folder, a word or a file is wrong; nothing was written.
    """
    begun = time.monotonic()
    form, asked = _form(wanted)
    model = open_model(wanted.model, allow_pickle=wanted.allow_pickle, weights=not wanted.training)
    training = _training_folder(wanted.training, wanted.tag) if wanted.training else None
    target = output_path(
        wanted.target, overwrite=wanted.overwrite, inputs=[model.path, training] if training else [model.path]
    )
    shards = by_size(_trained(model, training)) if training else _without_copies(model)
    check = _check(model, shards, gguf=form == "gguf", trained=bool(training)) if wanted.check else None
    output = Output(target, wanted.overwrite, progress, begun, check)
    if form == "gguf":
        from runtime.checkpoints.gguf import write_gguf

        return write_gguf(model, joined(shards), output, asked)
    dtype = dtype_named(asked) if asked else own_dtype(model.config) if training else None
    if dtype:
        refuse_quantized(model)
    return write_model(model, _cast(shards, dtype), output, f".{form}" if form else model.suffix)


def _cast(shards: Shards, dtype: torch.dtype | None) -> Shards:
    if dtype is None:
        return shards
    return {stem: {name: cast(tensor, dtype) for name, tensor in shard.items()} for stem, shard in shards.items()}


def _check(model: ModelFolder, shards: Shards, *, gguf: bool, trained: bool) -> Callable[[Path], float]:
    """How far the logits of a result are from those of what is read; of GGUF both are computed in float32."""
    from runtime.checkpoints.logits import largest_difference, of_tensors, saved

    tensors = joined(shards)
    own = torch.float32 if gguf else main_dtype(list(tensors.values()))

    def read() -> Any:
        if trained:
            return of_tensors(model.path, tensors, own)
        return saved(model.path, own, pickled=model.suffix == ".bin")

    return lambda place: largest_difference(read, lambda: saved(place, torch.float32 if gguf else "auto"), model.path)


def write_model(
    model: ModelFolder,
    shards: Shards,
    output: Output,
    suffix: str = ".safetensors",
    *,
    config: Mapping[str, Any] | None = None,
    adapter: Adapter | None = None,
) -> Converted:
    """Write shards with the model's other files as a folder of Hugging Face form.

    Args:
        suffix: '.safetensors' or '.bin'.
        config: fields of config.json that change.
        adapter: its tokenizer takes the place of the model's.
    """
    tensors = list(joined(shards).values())
    total, dtype = sum(tensor.bytes for tensor in tensors), main_dtype(tensors)
    with whole(output.target, overwrite=output.overwrite, bytes_needed=total) as place:
        place.mkdir()
        model.copy_others(place)
        if adapter:
            copy_tokenizer(adapter, place)
        write_json(place / "config.json", {**_with_dtype(model.config, dtype_name(dtype)), **(config or {})})
        write_weights(place, shards, suffix, output.counting(total))
        for name, module in model.modules.items():
            write_safetensors(place / name, module, lambda _: None)
        difference = output.checked(place)
    return output.made(tensors, dtype_name(dtype), difference)


def joined(shards: Shards) -> dict[str, Stored]:
    """The tensors of all shards."""
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def main_dtype(tensors: list[Stored]) -> torch.dtype:
    """The number type of most numbers."""
    counted: dict[torch.dtype, int] = {}
    for tensor in tensors:
        counted[tensor.dtype] = counted.get(tensor.dtype, 0) + tensor.numbers
    return max(counted, key=lambda dtype: counted[dtype], default=torch.float32)


def own_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The number type that config.json names; None when it names none."""
    text = config.get("text_config") or {}
    word = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return DTYPES.get(str(word))


def refuse_quantized(model: ModelFolder) -> None:
    """Refuse to change the numbers of a quantized checkpoint: they mean nothing without their scales.

    Raises:
        UserError: checkpoint_quantized.
    """
    if quantization_of(model.config):
        raise UserError(
            f'"{model.path}" is quantized, so its numbers cannot be changed.',
            code="checkpoint_quantized",
            hint="Take the checkpoint that it was quantized from.",
        )


def copy_tokenizer(adapter: Adapter, target: Path) -> None:
    """Put the adapter's tokenizer and its way to write conversations, when it has them, in place of the base's."""
    names = _TOKENIZER_FILES if adapter.has_tokenizer else (FORMAT_FILE,) if adapter.has_style else ()
    for name in names:
        (target / name).unlink(missing_ok=True)
        if (adapter.path / name).is_file():
            shutil.copyfile(adapter.path / name, target / name)


def _form(wanted: Conversion) -> tuple[str, str]:
    """The format ('' = as it is) and the number type ('' = as it is) that `to` and `dtype` ask for.

    Raises:
        UserError: option_value, option_missing.
    """
    word, dtype = wanted.to.strip().lower(), wanted.dtype.strip().lower()
    if word in ("safetensors", "bin"):
        return word, dtype
    if word == "gguf":
        return word, dict(_GGUF_SPELLINGS).get(dtype, dtype) or "f16"
    if not dtype and word in GGUF_TYPES and word not in DTYPES:
        return "gguf", word
    if not dtype and word in DTYPES:
        return "", word
    if word:
        known = (*FORMATS, *DTYPE_WORDS, *GGUF_TYPES)
        near = did_you_mean(word, known)
        raise UserError(
            f'to="{word[:40]}" with dtype="{dtype[:40]}" says two number types.'
            if dtype and word in known
            else f'to="{word[:40]}" is neither a format nor a number type.',
            code="option_value",
            hint=f'Did you mean "{near}"?' if near and near != word else f"Known: {', '.join(known)}.",
        )
    if not dtype and not wanted.training:
        raise UserError(
            "The statement does not say what to make of the checkpoint.",
            code="option_missing",
            hint='Add AND to="safetensors", "bin", "bfloat16", "q8_0", … or AND checkpointDir="…" of a training.',
        )
    return "safetensors" if wanted.training else "", dtype


def _training_folder(path: str, tag: str) -> Path:
    """The folder of one checkpoint of a training.

    Raises:
        UserError: checkpoint_tag, and those of `open_folder`.
    """
    root = open_folder(path)
    latest = root / "latest"
    if not tag and latest.is_file() and not _kind(root):
        require_own(root, latest)
        tag = read_text(latest)[:200].strip()
    if tag and (PurePosixPath(tag).name != tag or tag == ".." or not (root / tag).is_dir()):
        raise _no_tag(root, f'has no checkpoint "{tag[:80]}"')
    folder = open_folder(str(root / tag)) if tag else root
    if not _kind(folder):
        raise _no_tag(root, "is no checkpoint of DeepSpeed or FSDP" if not tag else f'has none in "{tag[:80]}"')
    return folder


def _no_tag(root: Path, what: str) -> UserError:
    tags = sorted(child.name for child in root.iterdir() if child.is_dir() and _kind(child))
    return UserError(
        f'"{root}" {what}.',
        code="checkpoint_tag",
        hint=f"It has: {', '.join(tags[:10])}. Give one as tag." if tags else "Give the folder that holds the tags.",
    )


def _kind(folder: Path) -> str:
    """'sharded', 'fsdp', 'zero', 'model' or '' for a folder that is none of these."""
    if (folder / METADATA).is_file():
        return "sharded"
    if (folder / FSDP_FOLDER / METADATA).is_file():
        return "fsdp"
    if any(folder.glob(MODEL_FILES)):
        return "zero"
    return "model" if (folder / "config.json").is_file() else ""


def _trained(model: ModelFolder, training: Path) -> dict[str, Stored]:
    """The weights that a training has saved, under the names of the model."""
    kind = _kind(training)
    if kind == "model":
        return joined(open_model(str(training)).shards)
    found = (
        read_zero(training)
        if kind == "zero"
        else read_sharded(training / FSDP_FOLDER if kind == "fsdp" else training)
    )
    return weights_of(skeleton(model.path), found, training)


def _without_copies(model: ModelFolder) -> Shards:
    """The model's shards; of pickled ones without the weights that only repeat others, as safetensors has them."""
    if model.suffix != ".bin":
        return model.shards
    tensors = joined(model.shards)
    try:
        same = tied(skeleton(model.path))
    except UserError:  # an architecture that is not known here: everything is kept
        return model.shards
    copies = {
        name
        for name, first in same.items()
        if name in tensors and first in tensors and torch.equal(tensors[name].load(), tensors[first].load())
    }
    return {
        stem: {name: tensor for name, tensor in shard.items() if name not in copies}
        for stem, shard in model.shards.items()
    }


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with another number type wherever it names one."""
    return {
        key: _with_dtype(value, dtype)
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config"
        else dtype
        if key in ("dtype", "torch_dtype")
        else value
        for key, value in config.items()
    }
