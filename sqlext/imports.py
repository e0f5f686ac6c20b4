"""`action="import"` and `!llm imports`: checkpoints into the model store, and what is in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from runtime.checkpoints.import_config import ImportConfig, read_config
from runtime.checkpoints.import_source import Wanted
from runtime.checkpoints.locations import shown, unreachable
from runtime.checkpoints.model_import import Imported, import_models
from runtime.checkpoints.model_store import Manifest, ModelStore
from runtime.errors import Fatal, UserError
from sqlext import options
from sqlext.options import Resolved
from sqlext.statements import Run

if TYPE_CHECKING:
    from sqlext.connection import Connection


def import_checkpoints(run: Run, said: Resolved, connection: Connection) -> pa.Table:
    """One row for each checkpoint: imported, present already, or failed and why.

    Raises:
        UserError: the statement or its config is wrong, or the store cannot be reached.
        Cancelled: the user stopped it; the next import goes on from there.
    """
    values: Mapping[str, Any] = {**options.defaults("import"), **said.values}
    store = ModelStore(str(values["store"] or ""))
    wanted = _wanted(run, values, store, connection)

    def tell(text: str) -> None:
        connection.check_stopped()
        connection.session.on_job(text)

    try:
        ended = import_models(
            wanted,
            store,
            retries=values["retries"],
            max_parallel_jobs=values["max_parallel_jobs"],
            overwrite=values["overwrite"],
            tell=tell,
        )
    finally:
        connection.session.on_job("")
    return pa.Table.from_pylist([_row(each) for each in ended], _ENDED)


def imports(_: Connection, location: str = "") -> pa.Table:
    """One row for each model of the store, and for each import that has not ended well.

    Raises:
        UserError: the store cannot be reached.
    """
    store = ModelStore(location)
    try:
        rows = [row for name in store.names() for row in _status(store, name)]
    except OSError as error:
        raise unreachable(store.location, error) from None
    return pa.Table.from_pylist(rows, _STATUS)


def _wanted(run: Run, values: Mapping[str, Any], store: ModelStore, connection: Connection) -> Sequence[Wanted]:
    source = str(values["localModelDir"] or run.path)
    if values["config"]:
        if extra := [name for name in ("name", "revision") if values[name]] + (["a path"] if source else []):
            raise UserError(
                f"The config says which checkpoints to import, and the statement gives {extra[0]}.",
                code="option_value",
                hint="Leave it out, or leave config out.",
            )
        return _of_config(read_config(str(values["config"])), store, connection)
    if not source:
        raise UserError(
            "The statement names no checkpoint.",
            code="checkpoint_missing",
            hint='Write the path or URL between the backquotes, LLM.`/path`, or add AND config="models.yaml".',
        )
    name = str(values["name"] or Path(shown(source).rstrip("/")).name)
    return [Wanted(name, source, str(values["revision"] or ""))]


def _of_config(config: ImportConfig, store: ModelStore, connection: Connection) -> Sequence[Wanted]:
    for name, place in config.members:
        if store.find(name) is None:
            raise UserError(
                f'"{name}" is neither one of the checkpoints nor a model of the store.',
                code="import_config",
                hint="Add it to checkpoints, or correct the name.",
                place=place,
            )
    if config.others:
        connection.session.notify(
            f"Checked, and not needed to import: {', '.join(config.others)}. "
            'Models are served by action="infer", "bundle" and "serve".'
        )
    return [Wanted(each.name, each.path, each.revision, each.expected, each.about) for each in config.checkpoints]


def _row(ended: Imported) -> dict[str, Any]:
    return {name: getattr(ended, name) for name in _ENDED.names} | {
        "error": f"{ended.error} {ended.error.hint or ''}".strip() if ended.error else None
    }


def _status(store: ModelStore, name: str) -> Iterator[dict[str, Any]]:
    try:
        whole, begun = store.find(name), store.begun(name)
    except Fatal as error:
        yield {"name": name, "state": "damaged", "error": error.message}
        return
    if whole:
        yield _described(whole, "ready") | {"progress": 100.0, "path": store.path(whole)}
    if begun:
        there = store.there(replace(begun, error=""))
        done = sum(file.bytes for file in begun.files if file.name in there)
        progress = round(100 * done / begun.bytes, 1) if begun.bytes else 0.0
        state = "failed" if begun.error else "incomplete"
        yield _described(begun, state) | {"progress": progress, "error": begun.error or None}


def _described(model: Manifest, state: str) -> dict[str, Any]:
    return {
        "name": model.name,
        "state": state,
        "bytes": model.bytes,
        "files": len(model.files),
        "model_arch": model.about.get("model_arch"),
        "parameters": model.about.get("parameters"),
        "source": model.source,
        "revision": model.revision or None,
        "imported": model.time,
    }


_TEXT, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
_ENDED = pa.schema(
    {
        "name": _TEXT,
        "state": _TEXT,
        "bytes": _INT,
        "files": _INT,
        "copied_bytes": _INT,
        "seconds": _FLOAT,
        "error": _TEXT,
        "path": _TEXT,
    }
)
_STATUS = pa.schema(
    {
        "name": _TEXT,
        "state": _TEXT,
        "progress": _FLOAT,
        "bytes": _INT,
        "files": _INT,
        "model_arch": _TEXT,
        "parameters": _INT,
        "source": _TEXT,
        "revision": _TEXT,
        "imported": _TEXT,
        "path": _TEXT,
        "error": _TEXT,
    }
)
