"""`action="convert"` and `action="merge"`: from the options of a statement to a checkpoint of another form.

They stand together because their options and their row are the same. The work is done in this process, piece by
piece, so that it needs neither Ray nor room for a model.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from runtime.errors import UserError, did_you_mean
from sqlext.options import Resolved
from sqlext.statements import Run

if TYPE_CHECKING:
    from runtime.checkpoints.convert import Converted
    from sqlext.connection import Connection

_KINDS = ("deepspeed", "fsdp", "lora", "custom")  # of pretrainedModelType, before the slash
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("files", pa.list_(pa.string())),
        ("bytes", pa.int64()),
        ("parameters", pa.int64()),
        ("dtype", pa.string()),
        ("seconds", pa.float64()),
        ("max_logit_difference", pa.float64()),
    ]
)


def convert(run: Run, said: Resolved, connection: Connection) -> pa.Table:
    """One row that tells of the converted checkpoint.

    Raises:
        UserError: an option or a file is wrong; nothing was written.
    """
    from runtime.checkpoints import convert as conversions  # torch and transformers come with it

    values = _values(run, said, "convert")
    wanted = conversions.Conversion(
        model=_named(values, "modelNameOrPath", run.path, "the folder of the model"),
        target=_text(values, "savePath"),
        to=_text(values, "to"),
        dtype=_text(values, "dtype"),
        training=_text(values, "checkpointDir"),
        tag=_text(values, "tag"),
        **_switches(values),
    )
    return _row(_watched(connection, "convert", lambda progress: conversions.convert(wanted, progress)))


def merge(run: Run, said: Resolved, connection: Connection) -> pa.Table:
    """One row that tells of the merged model.

    Raises:
        UserError: an option or a file is wrong, or peft is not installed; nothing was written.
    """
    values = _values(run, said, "merge")
    if not find_spec("peft"):
        raise UserError(
            "Merging needs the package peft.", code="peft_missing", hint='Run: pip install "sqlext[train]".'
        )
    from runtime.checkpoints import merge as merging

    wanted = merging.Merge(
        adapter=_named(values, "adapterNameOrPath", run.path, "the folder of the adapter"),
        target=_text(values, "savePath"),
        model=_text(values, "modelNameOrPath"),
        dtype=_text(values, "dtype"),
        **_switches(values),
    )
    return _row(_watched(connection, "merge", lambda progress: merging.merge(wanted, progress)))


def _values(run: Run, said: Resolved, action: str) -> dict[str, Any]:
    kind = _text(said.values, "pretrainedModelType").partition("/")[0].lower()
    if kind and kind not in _KINDS:
        near = did_you_mean(kind, _KINDS)
        raise UserError(
            f'pretrainedModelType begins with "{kind[:40]}", which {action} does not know.',
            code="model_type_unknown",
            hint=f'Did you mean "{near}/…"?' if near else "Leave it out: the files say what they are.",
        )
    return dict(said.values)


def _text(values: Any, name: str) -> str:
    return str(values.get(name) or "")


def _named(values: dict[str, Any], name: str, path: str, what: str) -> str:
    """A folder that the statement must name."""
    if found := _text(values, name) or path:
        return found
    raise UserError(
        f"The statement does not name {what}.", code="option_missing", hint=f'Add AND {name}="/path/of/the/folder".'
    )


def _switches(values: dict[str, Any]) -> dict[str, bool]:
    return {name: bool(values.get(name)) for name in ("overwrite", "allow_pickle", "check")}


def _watched(
    connection: Connection, action: str, work: Callable[[Callable[[int, int], None]], Converted]
) -> Converted:
    """Do the work, told as it goes on; Ctrl-C stops it, and nothing is left."""

    def progress(done: int, total: int) -> None:
        connection.check_stopped()
        connection.session.on_job(f"{action}: {done / 1e9:,.2f} of {total / 1e9:,.2f} GB")

    try:
        return work(progress)
    finally:
        connection.session.on_job("")


def _row(made: Converted) -> pa.Table:
    row = {name: getattr(made, name) for name in SCHEMA.names}
    return pa.Table.from_pylist([row | {"files": list(made.files), "seconds": round(made.seconds, 2)}], SCHEMA)
