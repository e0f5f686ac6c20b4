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
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from runtime import cluster, engines, secrets
from runtime.checkpoints.adapter import model_and_adapter, open_adapter
from runtime.checkpoints.fingerprint import checkpoint_fingerprint
from runtime.checkpoints.gguf_header import gguf_model
from runtime.checkpoints.inspect import inspect
from runtime.checkpoints.model_config import read_config
from runtime.checkpoints.model_types import AUTO, ModelType, pretrained_model_type
from runtime.engines import choice
from runtime.errors import DeployError, UserError
from runtime.gateway import Gateway, RetryPolicy
from runtime.prompts import names
from runtime.prompts.style import find_style
from runtime.prompts.template import read_template
from runtime.spec import CallOptions, ModelSpec, PoolSpec, Task
from sqlext import options
from sqlext.session import Session
from sqlext.statements import Run
from udfs.arguments import options_from
from udfs.signatures import given, sql_type

LOCAL_CONCURRENCY = 1
OWN_QUEUE_CONCURRENCY = 2  # of engines that keep rows of several batches in one running set
REMOTE_CONCURRENCY = 32  # batches of one worker, so that requests stay in flight where one batch ends
_CHAT = ("prompt_format", "chat_template")
_OWN_QUEUE = ("vllm", choice.FASTEST)
_GENERATORS = (choice.AUTO, choice.REFERENCE, choice.FASTEST, "vllm", "deepspeed", "llama_cpp")  # of whole folders
_ENGINES = {
    Task.GENERATE: "transformers",
    Task.EMBED: "embeddings",
    Task.CLASSIFY: "classification",
    Task.RANK: "reranking",
    Task.DRAW: "diffusers",
    Task.TRANSCRIBE: "transcription",
    Task.SPEAK: "speech",
}
_DRAWN_ANEW = (Task.DRAW, Task.SPEAK)  # by chance, unless a seed is said: every row has an answer of its own


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
    if said.values.get("base"):
        return infer_adapter(run, said, session)
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
        pool = _deployed(
            spec,
            session,
            kind,
            lambda: model_spec(name, kind.task, said.values, run, session, choice.REFERENCE),
            progress,
        )
    try:
        replaced = session.functions.put(name, _gateway(pool, session))
    except BaseException:
        if not reconnect:
            cluster.retire(pool)
        raise
    if replaced:
        replaced.close()
    if not reconnect:
        cluster.retire_older(pool)
    return _report(pool, time.monotonic() - started)


def _deployed(
    spec: ModelSpec,
    session: Session,
    kind: ModelType,
    reference: Callable[[], ModelSpec],
    progress: Callable[[cluster.DeployProgress], None],
) -> cluster.Pool:
    """The workers of a model; where an engine that was chosen here does not load it, those of the reference."""
    try:
        return cluster.deploy(spec, pool_spec(session.settings, kind, spec.engine), progress=progress)
    except (UserError, DeployError) as error:
        if (
            session.settings["infer_backend"] != choice.AUTO
            or spec.engine != choice.FASTEST
            or error.code == "no_room"
        ):
            raise
        note = f"engine {choice.REFERENCE}: {choice.FASTEST} did not load it ({error.message.splitlines()[0]})"
        spec = replace(reference(), notes=(note,))
        return cluster.deploy(spec, pool_spec(session.settings, kind, spec.engine), progress=progress)


def model_spec(
    name: str, task: Task | None, values: Mapping[str, Any], run: Run, session: Session, backend: str = ""
) -> ModelSpec:
    """What to load, from the statement's options and the session's settings.

    Args:
        backend: the engine, instead of the session's.

    Raises:
        UserError: the checkpoint is missing or wrong, or an option belongs to remote models.
    """
    _refuse(values, ("saas.",), 'It belongs to remote models: pretrainedModelType="saas/openai".')
    wanted = backend or session.settings["infer_backend"]
    path = values.get("localModelDir") or run.path
    extra = _engine_options(values)
    defaults = _generation_defaults(values)
    if wanted not in _GENERATORS:
        engines.require(wanted)
        return ModelSpec(name, wanted, path, task, extra, defaults, _fingerprint(wanted, path, task or "", extra))
    if wanted == "llama_cpp" and (files := gguf_model(Path(str(path or "")))):
        content = "".join(checkpoint_fingerprint(file, session.store) for file in files) if session.store else ""
        fingerprint = _fingerprint(wanted, content, extra) if content else ""
        return ModelSpec(name, wanted, str(path), Task.GENERATE, extra, defaults, fingerprint)
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
    sees = checkpoint.images and wanted in (choice.AUTO, choice.REFERENCE)
    engine, store = "vision" if sees else _ENGINES[checkpoint.task], session.store
    notes: tuple[str, ...] = ()
    if engine == choice.REFERENCE:
        engine = wanted
        if wanted == choice.AUTO:
            asked = {**dict(extra), **({"adapter": adapter} if adapter else {})}
            config = read_config(Path(checkpoint.path))
            engine, why = choice.choose(config, checkpoint.dtype, asked, gpus=_has_gpus(session))
            notes = (why,)
    if checkpoint.task in _DRAWN_ANEW:
        defaults = replace(defaults, temperature=1.0)
    content = checkpoint_fingerprint(Path(checkpoint.path), store) if store else ""
    extra = tuple(option for option in _with_template(extra, checkpoint.path) if option[0] != "adapter")
    deciding: list[Any] = [engine, content, checkpoint.task, extra]
    if adapter:
        deciding.append(checkpoint_fingerprint(Path(adapter), store) if store else "")
        extra = tuple(sorted((*extra, ("adapter", adapter))))
    fingerprint = _fingerprint(*deciding) if content else ""
    return ModelSpec(name, engine, checkpoint.path, checkpoint.task, extra, defaults, fingerprint, notes)


def _has_gpus(session: Session) -> bool:
    """Whether the workers will have GPUs; as `cluster.deploy` decides it where nobody says."""
    said = session.settings["gpus_per_worker"]
    return bool(cluster.free().total.get("GPU") if said is None else said)


def infer_adapter(run: Run, said: options.Resolved, session: Session) -> pa.Table:
    """Register a function over the workers of another model, with a LoRA adapter; one row that tells what was done.

    Raises:
        UserError: the adapter does not fit, the base is not there or takes none, or an option belongs to deployments.
        DeployError: a first row was not answered.
    """
    values, started = said.values, time.monotonic()
    _refuse(
        values,
        ("backend.", "saas.", "quantization", "localModelDir", "pretrainedModelType", "reconnect", *_CHAT),
        "It belongs to the statement that deploys the base.",
    )
    name = _function_name(str(values.get("udfName") or "").lower(), session)
    base = str(values["base"]).lower()
    if name == base:
        raise UserError("udfName and base are the same.", code="option_value", hint="Choose another udfName.")
    adapter = open_adapter(str(values.get("adapter") or run.path))
    cluster.connect(session.settings["ray_address"])
    content = checkpoint_fingerprint(adapter.path, session.store) if session.store else ""
    pool = cluster.AdaptedPool(name, cluster.attach(base), str(adapter.path), content, _generation_defaults(values))
    try:
        pool.probe()
        replaced = session.functions.put(name, _gateway(pool, session))
    except BaseException:
        pool.close()
        raise
    if replaced:
        replaced.close()
    cluster.remove(name)  # a model of its own that had this name
    return _report(pool, time.monotonic() - started)


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


def pool_spec(settings: dict[str, Any], kind: ModelType, engine: str) -> PoolSpec:
    """Where and how wide to run, from the session's settings; what they leave open, by the kind of model."""
    gpus, batches = settings["gpus_per_worker"], settings["worker_concurrency"]
    usual = OWN_QUEUE_CONCURRENCY if engine in _OWN_QUEUE else LOCAL_CONCURRENCY
    return PoolSpec(
        num_workers=settings["num_workers"],
        worker_concurrency=batches or (REMOTE_CONCURRENCY if kind.remote else usual),
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
        idle_timeout_s=settings.get("idle_timeout"),
    )


def _gateway(pool: cluster.Pool | cluster.AdaptedPool, session: Session) -> Gateway:
    settings = session.settings
    policy = RetryPolicy(attempts=settings["attempts"], row_deadline_s=settings["row_timeout"])
    return Gateway(pool, session.store, policy=policy)


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


def _with_template(extra: tuple[tuple[str, Any], ...], folder: str) -> tuple[tuple[str, Any], ...]:
    """The options with the text that chat_template="auto" stands for: stored answers belong to it."""
    if ("chat_template", names.AUTO) not in extra or "adapter" in dict(extra):  # an adapter may bring one
        return extra
    text = names.automatic(Path(folder))
    return tuple(
        (key, text if key == "chat_template" else value) for key, value in extra if key != "chat_template" or text
    )


def _generation_defaults(values: Mapping[str, Any]) -> CallOptions:
    prefix = "generation."
    return options_from({key.removeprefix(prefix): v for key, v in values.items() if key.startswith(prefix)})


def _report(pool: cluster.Pool | cluster.AdaptedPool, seconds: float) -> pa.Table:
    info = pool.info
    return pa.table(
        {
            "function": [f"{pool.name}({', '.join(given(info))})"],
            "answers": [sql_type(info)],
            "engine": [info.engine],
            "device": [info.device],
            "dtype": [info.dtype],
            "workers": pa.array([pool.workers], pa.int32()),
            "seconds": [round(seconds, 1)],
            "notes": ["; ".join(info.notes)],
        }
    )
