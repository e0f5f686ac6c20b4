"""What a model folder holds, and whether it can be deployed.

Alone because it must be quick and harmless: it reads configuration files and safetensors headers, never weights, and
imports neither torch nor transformers, so that a statement with a bad folder fails before anything is started.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.checkpoints.architectures import task_of
from runtime.checkpoints.folder import list_files, open_folder, read_object, read_objects, total_bytes
from runtime.checkpoints.weights import PICKLED, SINGLE, check_weights, pickled
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


def inspect(path: str, task: Task | None = None) -> Checkpoint:
    """Read the folder `path`, asked for `task` or for what it is made for.

    Raises:
        UserError: with a stable code. checkpoint_path, _missing, _not_folder, _outside_roots, _unreadable: the
            folder; _config, _no_weights, _pickled, _adapter, _corrupt, _no_tokenizer: what is in it; _remote_code,
            _unsupported, _task: what it would need.
    """
    folder = open_folder(path)
    modules = module_folders(folder)
    body = modules[0] if modules else folder  # where the transformer itself lies
    config = read_config(body)
    files = list_files(folder)
    refuse_remote_code(folder, files, config)
    architectures = tuple(str(name) for name in config.get("architectures") or ())
    model_type = str(config.get("model_type", ""))
    natural = Task.EMBED if modules else task_of(architectures, model_type, folder)
    weights = check_weights(body, _names_in(body))
    for module in modules[1:]:
        _refuse_pickles(module)
    _require_tokenizer(folder, {*_names_in(folder), *_names_in(body)})
    text = config.get("text_config") or config
    found = Checkpoint(
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
    )
    return found if task in (None, natural) else _asked_for(found, task)


def _asked_for(found: Checkpoint, task: Task | None) -> Checkpoint:
    """`found`, used for a task that it was not made for; a language model also embeds."""
    if task is Task.EMBED and found.task is Task.GENERATE:
        return replace(found, task=Task.EMBED)
    raise UserError(
        f'"{found.path}" is made to {found.task}, not to {task}.',
        code="checkpoint_task",
        hint=f"Leave the task out, or deploy a checkpoint that can {task}.",
    )


def read_config(body: Path) -> dict[str, Any]:
    """What config.json in the folder `body` says.

    Raises:
        UserError: checkpoint_config, checkpoint_unreadable.
    """
    file = body / "config.json"
    if not file.exists():
        raise UserError(
            f'"{body}" holds no config.json, so it is no checkpoint of Hugging Face form.',
            code="checkpoint_config",
            hint=_nested_hint(body),
        )
    config = read_object(file)
    if not config.get("model_type"):
        raise UserError(
            f'"{file}" names no model_type.',
            code="checkpoint_config",
            hint="Save the model again with save_pretrained() of transformers 4 or later.",
        )
    return config


def _nested_hint(body: Path) -> str:
    inner = sorted(child for child in body.iterdir() if (child / "config.json").is_file())
    return f'Give "{inner[0]}", which has one.' if inner else "Give the folder that save_pretrained() wrote."


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
        raise _remote_code(folder / MODULES, f"the module {foreign[0]}")
    if any(not path.resolve().is_relative_to(folder) for path in paths):
        raise _remote_code(folder / MODULES, "a module outside its folder")
    return paths


def _refuse_pickles(module: Path) -> None:
    if not module.is_dir():
        return
    names = _names_in(module)
    bad = [name for name in names if name.endswith(PICKLED)]
    if bad and SINGLE not in names:
        raise pickled(module / bad[0])


def refuse_remote_code(folder: Path, files: tuple[str, ...], config: dict[str, Any]) -> None:
    """Refuse a checkpoint that brings code, or names some to be fetched.

    Raises:
        UserError: checkpoint_remote_code.
    """
    if scripts := [name for name in files if name.endswith((".py", ".so", ".pyc"))]:
        raise _remote_code(folder, f"its file {scripts[0]}")
    for name in ("tokenizer_config.json", "processor_config.json"):
        if name in files and "auto_map" in read_object(folder / name):
            raise _remote_code(folder / name, "auto_map")
    if "auto_map" in config:
        raise _remote_code(folder / "config.json", "auto_map")


def _remote_code(where: Path, what: str) -> UserError:
    return UserError(
        f'"{where}" is refused: it wants to run code of its own ({what}).',
        code="checkpoint_remote_code",
        hint="Use a checkpoint that the installed transformers runs by itself, "
        "or remove the code and auto_map if it does.",
    )


def _require_tokenizer(folder: Path, names: set[str]) -> None:
    if not any(names.issuperset(kind) for kind in TOKENIZERS):
        raise UserError(
            f'"{folder}" holds no tokenizer.',
            code="checkpoint_no_tokenizer",
            hint="Copy tokenizer.json and tokenizer_config.json from the model it was trained from.",
        )


def _has_chat_template(folder: Path, files: tuple[str, ...]) -> bool:
    if "chat_template.jinja" in files or "chat_template.json" in files:
        return True
    return "tokenizer_config.json" in files and bool(
        read_object(folder / "tokenizer_config.json").get("chat_template")
    )


def _max_model_len(folder: Path, config: dict[str, Any]) -> int | None:
    limits = folder / "sentence_bert_config.json"
    if limits.exists() and (length := _whole(read_object(limits).get("max_seq_length"))):
        return length
    return next((length for key in _LENGTHS if (length := _whole(config.get(key)))), None)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
