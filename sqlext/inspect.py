"""`action="inspect"`: what a checkpoint is and which engines can run it, as one row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from runtime import cluster
from runtime.checkpoints.profile import SPECIAL_TOKENS, Profile, profile
from runtime.checkpoints.suitability import Suitability, suitable
from runtime.errors import UserError
from sqlext.options import Resolved
from sqlext.statements import Run

if TYPE_CHECKING:
    from sqlext.connection import Connection


def inspect(run: Run, said: Resolved, _: Connection) -> pa.Table:
    """One row: the checkpoint, its files, and every engine with whether it runs it, where, and the memory it needs.

    Raises:
        UserError: no path, or what is wrong with the folder.
    """
    path = str(said.values.get("localModelDir") or run.path)
    found = profile(path, hashes=bool(said.values.get("hashes")))
    engines = suitable(found, cluster.machines(), _base(found))
    return pa.Table.from_pylist([_row(found, engines)], SCHEMA)


def _base(found: Profile) -> Profile | None:
    """The base of an adapter, where it is on this machine and can be read."""
    try:
        return profile(found.adapter.folder) if found.adapter and found.adapter.folder else None
    except UserError:
        return None


def _row(found: Profile, engines: list[Suitability]) -> dict[str, Any]:
    named = {name: getattr(found, name) for name in SCHEMA.names if hasattr(found, name)}
    return named | {
        "task": str(found.task) if found.task else None,
        "files": [_fields(file, _FILE) for file in found.files],
        "adapter": found.adapter and _fields(found.adapter, _ADAPTER),
        "quantization": found.quantization and _fields(found.quantization, _QUANTIZATION),
        "special_tokens": {**found.special_tokens, "additional": found.additional_tokens},
        "has_chat_template": found.chat_template is not None,
        "engines": [
            {name: value or None for name, value in _fields(engine, _ENGINE).items()}
            | {"runs": engine.runs, "machines": [name or "this machine" for name in engine.machines]}
            for engine in engines
        ],
    }


def _fields(item: Any, kind: pa.StructType) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in kind}


_TEXT, _INT, _BOOL = pa.string(), pa.int64(), pa.bool_()
_TEXTS = pa.list_(_TEXT)
_FILE = pa.struct({"name": _TEXT, "bytes": _INT, "sha256": _TEXT})
_ADAPTER = pa.struct({"kind": _TEXT, "base": _TEXT, "r": _INT, "alpha": pa.float64(), "targets": _TEXTS})
_QUANTIZATION = pa.struct({"method": _TEXT, "bits": _INT, "group_size": _INT})
_ENGINE = pa.struct(
    {
        "engine": _TEXT,
        "runs": _BOOL,
        "device": _TEXT,
        "dtype": _TEXT,
        "memory_bytes": _INT,
        "least_bytes": _INT,
        "machines": _TEXTS,
        "why": _TEXT,
    }
)
SCHEMA = pa.schema(
    {
        "path": _TEXT,
        "task": _TEXT,
        "model_arch": _TEXT,
        "architectures": _TEXTS,
        "seq_length": _INT,
        "vocab_size": _INT,
        "parameters": _INT,
        "dtype": _TEXT,
        "bytes": _INT,
        "engines": pa.list_(_ENGINE),
        "adapter": _ADAPTER,
        "quantization": _QUANTIZATION,
        "special_tokens": pa.struct({**dict.fromkeys(SPECIAL_TOKENS, _TEXT), "additional": _TEXTS}),
        "has_chat_template": _BOOL,
        "chat_template": _TEXT,
        "files": pa.list_(_FILE),
    }
)
