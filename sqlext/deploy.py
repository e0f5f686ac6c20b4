"""`action="infer"`: from the options of a statement to a model that answers in SQL.

Everything that can be wrong is found before a function is registered: options, checkpoint, resources, loading, and a
first row. What fails leaves nothing behind.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from runtime import cluster, engines
from runtime.checkpoints.inspect import inspect
from runtime.checkpoints.model_types import AUTO, pretrained_model_type
from runtime.errors import UserError
from runtime.gateway import Gateway
from runtime.spec import CallOptions, ModelSpec, PoolSpec, Task
from sqlext import options
from sqlext.session import Session
from sqlext.statements import Run
from udfs.arguments import options_from
from udfs.signatures import sql_type

_ENGINES = {Task.GENERATE: "transformers", Task.EMBED: "embeddings", Task.CLASSIFY: "classification"}


def infer(
    run: Run, said: options.Resolved, session: Session, progress: Callable[[cluster.DeployProgress], None]
) -> pa.Table:
    """Deploy a model, or reconnect to one, and register its functions; one row that tells what was done.

    Args:
        said: the statement's options, checked.

    Raises:
        UserError: an option, the name or the checkpoint is wrong.
        DeployError: the model did not come up; nothing was registered and no process is left.
    """
    task = pretrained_model_type(str(said.values.get("pretrainedModelType") or AUTO))
    options.require_available(run.options, "infer")
    for notice in said.notices:
        session.notify(notice)
    name = _function_name(str(said.values.get("udfName") or "").lower(), session)
    reconnect = said.values.get("reconnect")
    started = time.monotonic()
    cluster.connect(session.settings["ray_address"])
    if reconnect:
        pool = cluster.attach(name)
    else:
        spec = model_spec(name, task, said.values, run, session.settings)
        pool = cluster.deploy(spec, pool_spec(session.settings), progress=progress)
    try:
        replaced = session.functions.put(name, Gateway(pool))
    except BaseException:
        if not reconnect:
            cluster.retire(pool)
        raise
    if replaced:
        replaced.close()
    if not reconnect:
        cluster.retire_older(pool)
    return _report(pool, time.monotonic() - started)


def model_spec(
    name: str, task: Task | None, values: Mapping[str, Any], run: Run, settings: dict[str, Any]
) -> ModelSpec:
    """What to load, from the statement's options and the session's settings."""
    wanted = settings["infer_backend"]
    path = values.get("localModelDir") or run.path
    extra = _engine_options(values)
    defaults = _generation_defaults(values)
    if wanted != "transformers":
        engines.require(wanted)
        return ModelSpec(name, wanted, path, task, extra, defaults)
    if not path:
        raise UserError(
            "The statement names no checkpoint.",
            code="checkpoint_missing",
            hint='Add AND localModelDir="/path/to/model", or write the path between the backquotes: LLM.`/path`.',
        )
    checkpoint = inspect(path, task)
    return ModelSpec(name, _ENGINES[checkpoint.task], checkpoint.path, checkpoint.task, extra, defaults)


def pool_spec(settings: dict[str, Any]) -> PoolSpec:
    """Where and how wide to run, from the session's settings."""
    return PoolSpec(
        num_workers=settings["num_workers"],
        worker_concurrency=settings["worker_concurrency"],
        gpus_per_worker=settings["gpus_per_worker"],
        cpus_per_worker=settings["cpus_per_worker"],
        resources=tuple(
            sorted(
                (key.removeprefix("resource."), value)
                for key, value in settings.items()
                if key.startswith("resource.")
            )
        ),
        load_balance=settings["load_balance"],
        load_timeout_s=settings["load_timeout"],
        batch_timeout_s=settings["timeout"],
    )


def _function_name(name: str, session: Session) -> str:
    if not name:
        raise UserError(
            "The statement does not say how the function is to be called.",
            code="option_missing",
            hint='Add AND udfName="chat".',
        )
    if not re.fullmatch(r"[A-Za-z_]\w{0,62}", name, re.ASCII):
        raise UserError(
            f'udfName "{name[:80]}" is no name for a function.',
            code="option_value",
            hint="Use letters, digits and underscores, beginning with a letter; at most 63.",
        )
    if session.is_taken(name):
        raise UserError(
            f'"{name}" is already a function, or a word of SQL.',
            code="option_value",
            hint=f'Choose another udfName, for example "{name}_llm".',
        )
    return name


def _engine_options(values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    said = {key.removeprefix("backend."): value for key, value in values.items() if key.startswith("backend.")}
    if "quantization" in values:
        said["quantization"] = values["quantization"]
    return tuple(sorted(said.items()))


def _generation_defaults(values: Mapping[str, Any]) -> CallOptions:
    prefix = "generation."
    return options_from({key.removeprefix(prefix): v for key, v in values.items() if key.startswith(prefix)})


def _report(pool: cluster.Pool, seconds: float) -> pa.Table:
    info = pool.info
    return pa.table(
        {
            "function": [f"{pool.name}(prompt)"],
            "answers": [sql_type(info)],
            "engine": [info.engine],
            "device": [info.device],
            "dtype": [info.dtype],
            "workers": pa.array([pool.workers], pa.int32()),
            "seconds": [round(seconds, 1)],
            "notes": ["; ".join(info.notes)],
        }
    )
