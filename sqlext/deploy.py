"""`action="infer"`: from the options of a statement to a model that answers in SQL.

Everything that can be wrong is found before a function is registered: options, checkpoint, resources, loading, and a
first row. What fails leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from runtime import cluster, engines, secrets
from runtime.checkpoints.adapter import model_and_adapter
from runtime.checkpoints.fingerprint import checkpoint_fingerprint
from runtime.checkpoints.inspect import inspect
from runtime.checkpoints.model_types import AUTO, ModelType, pretrained_model_type
from runtime.errors import UserError
from runtime.gateway import Gateway, RetryPolicy
from runtime.prompts.style import find_style
from runtime.prompts.template import read_template
from runtime.spec import CallOptions, ModelSpec, PoolSpec, Task
from sqlext import options
from sqlext.session import Session
from sqlext.statements import Run
from udfs.arguments import options_from
from udfs.signatures import sql_type

LOCAL_CONCURRENCY = 1
REMOTE_CONCURRENCY = 32  # batches of one worker, so that requests stay in flight where one batch ends
_CHAT = ("prompt_format", "chat_template")
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
    kind = pretrained_model_type(str(said.values.get("pretrainedModelType") or AUTO))
    name = _function_name(str(said.values.get("udfName") or "").lower(), session)
    reconnect = said.values.get("reconnect")
    started = time.monotonic()
    connected = cluster.connect(session.settings["ray_address"])
    if reconnect:
        pool = cluster.attach(name)
    else:
        if kind.remote:
            spec = remote_spec(name, kind.remote, said.values, run.path, here=connected.nodes == 1)
        else:
            spec = model_spec(name, kind.task, said.values, run, session)
        pool = cluster.deploy(spec, pool_spec(session.settings, kind), progress=progress)
    try:
        settings = session.settings
        policy = RetryPolicy(attempts=settings["attempts"], row_deadline_s=settings["row_timeout"])
        replaced = session.functions.put(name, Gateway(pool, session.store, policy=policy))
    except BaseException:
        if not reconnect:
            cluster.retire(pool)
        raise
    if replaced:
        replaced.close()
    if not reconnect:
        cluster.retire_older(pool)
    return _report(pool, time.monotonic() - started)


def model_spec(name: str, task: Task | None, values: Mapping[str, Any], run: Run, session: Session) -> ModelSpec:
    """What to load, from the statement's options and the session's settings.

    Raises:
        UserError: the checkpoint is missing or wrong, or an option belongs to remote models.
    """
    _refuse(values, ("saas.",), 'It belongs to remote models: pretrainedModelType="saas/openai".')
    wanted = session.settings["infer_backend"]
    path = values.get("localModelDir") or run.path
    extra = _engine_options(values)
    defaults = _generation_defaults(values)
    if wanted != "transformers":
        engines.require(wanted)
        return ModelSpec(name, wanted, path, task, extra, defaults, _fingerprint(wanted, path, task or "", extra))
    path, adapter = model_and_adapter(str(path or ""), str(values.get("adapter") or ""))
    if not path:
        raise UserError(
            "The statement names no checkpoint.",
            code="checkpoint_missing",
            hint='Add AND localModelDir="/path/to/model", or write the path between the backquotes: LLM.`/path`.',
        )
    checkpoint = inspect(path, task)
    if adapter and checkpoint.task is not Task.GENERATE:
        raise UserError(
            f'"{checkpoint.path}" is made to {checkpoint.task}; an adapter is put on models that generate.',
            code="adapter_task",
            hint='Merge the two, action="merge", and deploy the result.',
        )
    if checkpoint.task is not Task.GENERATE:
        _refuse(values, _CHAT, f"It belongs to models that generate; this one is made to {checkpoint.task}.")
    engine, store = _ENGINES[checkpoint.task], session.store
    content = checkpoint_fingerprint(Path(checkpoint.path), store) if store else ""
    extra = tuple(option for option in extra if option[0] != "adapter")
    deciding: list[Any] = [engine, content, checkpoint.task, extra]
    if adapter:
        deciding.append(checkpoint_fingerprint(Path(adapter), store) if store else "")
        extra = tuple(sorted((*extra, ("adapter", adapter))))
    fingerprint = _fingerprint(*deciding) if content else ""
    return ModelSpec(name, engine, checkpoint.path, checkpoint.task, extra, defaults, fingerprint)


def remote_spec(name: str, engine: str, values: Mapping[str, Any], path: str, *, here: bool) -> ModelSpec:
    """Which model of a provider to ask, from the statement's options.

    Args:
        path: what stands between the statement's backquotes.
        here: all workers run on this machine.

    Raises:
        UserError: a checkpoint is named, or an option belongs to checkpoints.
    """
    local = ("backend.", "quantization", "adapter", "localModelDir", *_CHAT)
    _refuse(values, local, "It belongs to checkpoints; a remote model takes saas.* and generation.* options.")
    if path:
        raise UserError(
            "A remote model has no checkpoint.", code="option_value", hint="Leave the path empty: LLM.``."
        )
    said = {key.removeprefix("saas."): value for key, value in values.items() if key.startswith("saas.")}
    # Not of its key, nor of how it is asked.
    deciding = [(option, said.get(option, "")) for option in ("model", "task")]
    fingerprint = _fingerprint(engine, str(said.get("base_url", "")).rstrip("/"), *deciding)
    if key := said.get("api_key"):
        said["api_key"] = secrets.travelling(str(key), here=here)
    return ModelSpec(name, engine, "", None, tuple(sorted(said.items())), _generation_defaults(values), fingerprint)


def _fingerprint(*deciding: Any) -> str:
    """Of what decides a model's answers."""
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()


def _refuse(values: Mapping[str, Any], prefixes: tuple[str, ...], hint: str) -> None:
    if wrong := next((key for key in values if key.startswith(prefixes)), None):
        raise UserError(f"{wrong} means nothing to this kind of model.", code="option_unknown", hint=hint)


def pool_spec(settings: dict[str, Any], kind: ModelType) -> PoolSpec:
    """Where and how wide to run, from the session's settings; what they leave open, by the kind of model."""
    gpus, batches = settings["gpus_per_worker"], settings["worker_concurrency"]
    return PoolSpec(
        num_workers=settings["num_workers"],
        worker_concurrency=batches or (REMOTE_CONCURRENCY if kind.remote else LOCAL_CONCURRENCY),
        gpus_per_worker=0.0 if kind.remote and gpus is None else gpus,
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
    said |= {name: values[name] for name in ("quantization", "adapter", *_CHAT) if name in values}
    if "chat_template" in said:
        said["chat_template"] = read_template(str(said["chat_template"]))
    find_style("", *(str(said.get(name, "")) for name in _CHAT))  # a wrong one fails here, not on a worker
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
