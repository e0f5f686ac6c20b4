"""What a model folder holds, and whether it can be deployed.

Alone because it must be quick and harmless: it reads configuration files and safetensors headers, never weights, and
imports neither torch nor transformers, so that a statement with a bad folder fails before anything is started.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.checkpoints.architectures import reads_images, reads_text_alone, task_of
from runtime.checkpoints.folder import list_files, open_folder, read_object, read_objects, total_bytes
from runtime.checkpoints.model_config import read_config, refuse_remote_code, remote_code
from runtime.checkpoints.pipelines import PIPELINE, read_pipeline
from runtime.checkpoints.weights import SINGLE, Weights, check_weights, is_pickled, pickled
from runtime.errors import UserError
from runtime.spec import Task

MODULES = "modules.json"  # marks a sentence-transformers checkpoint
TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
)
PROCESSORS = frozenset(("preprocessor_config.json", "processor_config.json"))
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that can be deployed.

    Attributes:
        path: real path of the folder.
        model_type, architectures: as config.json says.
        task: what it answers, or what was asked of it.
        max_model_len: tokens it was built to read; None when it does not say.
        dtype: torch's name of the type of its weights.
        sentence_transformers: it is a sentence-transformers checkpoint (modules.json).
        images: it reads images beside the text.
        labels: of a classifier.
        num_parameters: numbers in its weights.
        files: every file below the folder, relative and sorted.
        bytes: of all files together.
    """

    path: str
    model_type: str
    architectures: tuple[str, ...]
    task: Task
    max_model_len: int | None
    vocab_size: int | None
    hidden_size: int | None
    dtype: str
    has_chat_template: bool
    sentence_transformers: bool
    num_parameters: int
    files: tuple[str, ...]
    bytes: int
    images: bool = False
    labels: tuple[str, ...] = ()


def inspect(path: str, task: Task | None = None, *, needs_weights: bool = True) -> Checkpoint:
    """Read the folder `path`, asked for `task` or for what it is made for.

    Args:
        needs_weights: False where its own weights are not used, and may be missing.

    Raises:
        UserError: with a stable code. checkpoint_path, _missing, _not_folder, _outside_roots, _unreadable: the
            folder; _config, _no_weights, _pickled, _adapter, _corrupt, _no_tokenizer, _no_processor: what is in it;
            _remote_code, _unsupported, _task: what it would need.
    """
    folder = open_folder(path)
    files = list_files(folder)  # first: what is not the checkpoint's own is not read
    found = _inspect_pipeline(folder, files) if PIPELINE in files else _inspect_model(folder, files, needs_weights)
    return found if task in (None, found.task) else _asked_for(found, task)


def _inspect_pipeline(folder: Path, files: tuple[str, ...]) -> Checkpoint:
    """A folder of diffusers."""
    refuse_remote_code(folder, files)
    pipeline = read_pipeline(folder, files)
    return Checkpoint(
        path=str(folder),
        model_type="diffusers",
        architectures=(pipeline.kind,),
        task=Task.DRAW,
        max_model_len=None,
        vocab_size=pipeline.vocab_size,
        hidden_size=None,
        dtype=pipeline.dtype,
        has_chat_template=False,
        sentence_transformers=False,
        num_parameters=pipeline.parameters,
        files=files,
        bytes=total_bytes(folder, files),
    )


def _inspect_model(folder: Path, files: tuple[str, ...], needs_weights: bool) -> Checkpoint:
    """A folder of transformers or sentence-transformers."""
    modules = module_folders(folder)
    body = modules[0] if modules else folder  # where the transformer itself lies
    config = read_config(body)
    refuse_remote_code(folder, files)
    architectures = tuple(config.get("architectures") or ())
    model_type = str(config.get("model_type", ""))
    ranks = _is_cross_encoder(folder, config)
    natural = Task.EMBED if modules and not ranks else task_of(architectures, model_type, folder)
    labels = _labels(config) if natural is Task.CLASSIFY else ()
    if ranks and (len(labels) == 1 or natural is Task.GENERATE):
        natural = Task.RANK
    images = natural is Task.GENERATE and reads_images(architectures)
    if natural is Task.TRANSCRIBE or (images and not reads_text_alone(architectures)):
        _require_processor(folder, files)
    weights = check_weights(body, _names_in(body)) if needs_weights else Weights((), 0, "float32")
    for module in modules[1:]:
        _refuse_pickles(module)
    _require_tokenizer(folder, {*_names_in(folder), *_names_in(body)}, natural)
    text = config.get("text_config") or config
    return Checkpoint(
        path=str(folder),
        model_type=model_type,
        architectures=architectures,
        task=natural,
        max_model_len=_max_model_len(folder, text),
        vocab_size=_whole(text.get("vocab_size")),
        hidden_size=_whole(text.get("hidden_size") or text.get("n_embd") or text.get("d_model")),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or weights.dtype),
        has_chat_template=_has_chat_template(folder, files),
        sentence_transformers=bool(modules),
        num_parameters=weights.parameters,
        files=files,
        bytes=total_bytes(folder, files),
        images=images and not PROCESSORS.isdisjoint(files),
        labels=labels,
    )


def _asked_for(found: Checkpoint, task: Task | None) -> Checkpoint:
    """`found`, used for a task that it was not made for.

    A language model also embeds; a classifier with one label also ranks, as all rerankers are made, and the reverse.
    """
    if task is Task.EMBED and found.task is Task.GENERATE:
        return replace(found, task=Task.EMBED)
    if {task, found.task} == {Task.CLASSIFY, Task.RANK} and len(found.labels) == 1:
        return replace(found, task=task or found.task)
    raise UserError(
        f'"{found.path}" is made to {found.task}, not to {task}.',
        code="checkpoint_task",
        hint=f"Leave the task out, or deploy a checkpoint that can {task}.",
    )


def _names_in(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(child.name for child in folder.iterdir() if child.is_file()))


def module_folders(folder: Path) -> list[Path]:
    """The folders of a sentence-transformers checkpoint's modules, the transformer's first; [] for any other.

    Raises:
        UserError: checkpoint_remote_code, checkpoint_config.
    """
    if not (folder / MODULES).exists():
        return []
    modules = read_objects(folder / MODULES)
    kinds = [str(module.get("type", "")) for module in modules]
    paths = [folder / str(module.get("path", "")) for module in modules]
    if foreign := [kind for kind in kinds if not kind.startswith("sentence_transformers.")]:
        raise remote_code(folder / MODULES, f"the module {foreign[0]}")
    if any(not path.resolve().is_relative_to(folder) for path in paths):
        raise remote_code(folder / MODULES, "a module outside its folder")
    if any(part.startswith(".") for path in paths for part in path.relative_to(folder).parts):
        raise remote_code(folder / MODULES, "a module in a hidden folder")
    return paths


def _refuse_pickles(module: Path) -> None:
    if not module.is_dir():
        return
    names = _names_in(module)
    bad = [name for name in names if is_pickled(name)]
    if bad and SINGLE not in names:
        raise pickled(module / bad[0])


def _is_cross_encoder(folder: Path, config: dict[str, Any]) -> bool:
    """Whether it scores pairs of texts: sentence-transformers says so, or its only label has no name."""
    own = folder / "config_sentence_transformers.json"
    if own.exists():
        return read_object(own).get("model_type") == "CrossEncoder"
    unnamed = _labels(config) == ("LABEL_0",) and config.get("problem_type") is None
    return unnamed or isinstance(config.get("sentence_transformers"), dict)


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's labels; transformers writes none of the two that it takes when nothing is said."""
    said = config.get("id2label")
    return tuple(map(str, said.values())) if isinstance(said, dict) else ("LABEL_0", "LABEL_1")


def _require_processor(folder: Path, files: tuple[str, ...]) -> None:
    if PROCESSORS.isdisjoint(files):
        raise UserError(
            f'"{folder}" does not say how images or sound are prepared for it.',
            code="checkpoint_no_processor",
            hint="Copy preprocessor_config.json or processor_config.json from the model it was trained from.",
        )


def _require_tokenizer(folder: Path, names: set[str], task: Task) -> None:
    kinds = (*TOKENIZERS, ("vocab.json",)) if task is Task.SPEAK else TOKENIZERS
    if not any(names.issuperset(kind) for kind in kinds):
        raise UserError(
            f'"{folder}" holds no tokenizer.',
            code="checkpoint_no_tokenizer",
            hint="Copy tokenizer.json and tokenizer_config.json from the model it was trained from.",
        )


def _has_chat_template(folder: Path, files: tuple[str, ...]) -> bool:
    if "chat_template.jinja" in files or "chat_template.json" in files:
        return True
    config = "tokenizer_config.json"
    return config in files and bool(read_object(folder / config).get("chat_template"))


def _max_model_len(folder: Path, config: dict[str, Any]) -> int | None:
    limits = folder / "sentence_bert_config.json"
    if limits.exists() and (length := _whole(read_object(limits).get("max_seq_length"))):
        return length
    return next((length for key in _LENGTHS if (length := _whole(config.get(key)))), None)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
