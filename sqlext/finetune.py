"""`action="finetune"`: from the options of a statement to a training job that runs.

Everything that can be wrong is found before the job starts: options, parameters, model, table, columns, partitions,
room. What fails leaves no folder behind.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import pyarrow as pa

from runtime import cluster
from runtime.checkpoints.folder import check_roots, open_folder
from runtime.cluster import jobs
from runtime.errors import UserError, did_you_mean
from runtime.prompts.style import find_style
from runtime.prompts.template import read_template
from runtime.secrets import redact
from runtime.training import job_roots, own_weights, parameters
from runtime.training.beginning import check_beginning
from runtime.training.folder import JobFolder, JobRequest, new_folder
from runtime.training.loop import require_packages
from runtime.training.plan import TrainingPlan, Way
from runtime.training.strategies import check_deepspeed, completed
from sqlext import options
from sqlext.jobs import require_free, started, waited
from sqlext.statements import Option, Run
from sqlext.training_rows import RowSource, row_source

if TYPE_CHECKING:
    from sqlext.connection import Connection


def finetune(run: Run, said: options.Resolved, connection: Connection) -> pa.Table:
    """Start a training job; one row that tells of it, or, with detached=false, of the model it has made.

    Raises:
        UserError: an option, a parameter, the model or the table is wrong; nothing was started.
        SqlextError: the job failed that was waited for.
    """
    settings = connection.session.settings
    require_packages()
    plan = _plan(run, said.values, connection)
    base = redact(plan.model)
    source = row_source(run, said.values, connection)
    output = str(said.values.get("outputTable") or "")
    if output:
        require_free(connection, output, source)
    _tell_of_best(plan, source, connection)
    cluster.connect(settings["ray_address"])
    plan = _with_ranks(plan, settings, bool(cluster.free().total.get("GPU")))
    partitions = source.partitions_for(plan.ranks) if said.values.get("keepPartitionNum") else 0
    completed(plan, parameters.with_defaults(plan))
    jobs.require_fit(plan)
    root = _root(said.values)
    folder = new_folder(root, plan.way, str(said.values.get("name") or ""))
    try:
        rows = _write(source, folder, bool(partitions), connection)
        plan = replace(_with_fetched(plan, folder, connection), folder=str(folder.path), partitions=partitions)
        check_beginning(plan)
        folder.update(state="queued", rows=rows, queued=time.time())
        request = JobRequest(
            plan,
            name=str(said.values.get("name") or ""),
            base=base,
            output_table=output,
        )
        job_roots.remember(root)
        connected = jobs.start(folder, request, settings["ray_address"])
    except BaseException:  # Ctrl-C too
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    row = started(folder, connection, connected)
    return row if said.values.get("detached", True) else waited(folder, connection, cancels=True)


def _plan(run: Run, values: Mapping[str, Any], connection: Connection) -> TrainingPlan:
    """The plan as far as the statement alone decides it."""
    way = _way(str(values.get("pretrainedModelType") or ""))
    plan = TrainingPlan(
        "",
        way,
        model=str(values.get("localModelDir") or run.path),
        weights=str(values.get("initial_base_model_ckpt_path") or ""),
        adapter=str(values.get("initial_adapter_model_ckpt_path") or ""),
        parameters=_parameters(way, run.options, values, connection),
        deepspeed=str(values.get("deepspeedConfig") or ""),
        quantization=_bits(str(values.get("quantization") or "")),
    )
    plan = _with_model(plan)
    check_beginning(plan)
    if plan.deepspeed:
        check_deepspeed(plan.deepspeed)
    local = "" if own_weights.is_address(plan.model) else plan.model
    said_format = str(values.get("prompt_format") or "")
    template = read_template(str(values["chat_template"])) if "chat_template" in values else ""
    style = find_style(local, said_format, template)
    if style.prompt_format:
        style.prompt_format.require_trainable()
    return replace(plan, prompt_format=said_format, chat_template=template)


def _way(word: str) -> Way:
    """The way of training that a `pretrainedModelType` asks for; what stands behind its slash is only a hint."""
    if not word:
        raise UserError(
            "The statement does not say how to train.",
            code="option_missing",
            hint='Add pretrainedModelType="sft/auto" to fine-tune, or "sfft/auto" to pretrain.',
        )
    way = word.partition("/")[0].lower()
    if way in get_args(Way):
        return cast(Way, way)
    near = did_you_mean(way, get_args(Way))
    hint = (
        f'Did you mean "{near}/{word.partition("/")[2] or "auto"}"?' if near else 'Write "sft/auto" or "sfft/auto".'
    )
    raise UserError(f'pretrainedModelType="{word}" is no way of training.', code="model_type_unknown", hint=hint)


def _parameters(
    way: Way, said: Iterable[Option], values: Mapping[str, Any], connection: Connection
) -> Mapping[str, Any]:
    """The training parameters of `config` and of the typed keys, checked; the typed ones win.

    Raises:
        UserError: at the option that is wrong.
    """
    config: dict[str, Any] = json.loads(str(values.get("config") or "{}"))
    typed: dict[str, Any] = {}
    for key in values:
        prefix, _, rest = key.partition(".")
        if prefix not in get_args(Way):
            continue
        name = rest.partition(".")[2]
        place = next((option.place for option in said if option.key.lower().endswith(f".{name.lower()}")), None)
        if prefix != way:
            raise UserError(
                f"{key} belongs to {prefix}, and this trains by {way}.",
                code="option_unknown",
                hint=f'Write `{way}.{rest}`, or pretrainedModelType="{prefix}/auto".',
                place=place,
            )
        try:
            parameters.resolve(way, {name: values[key]})
        except UserError as error:
            error.place = place
            raise
        typed[name] = values[key]
    merged = {**parameters.resolve(way, config), **parameters.resolve(way, typed)}
    for key, why in parameters.meaningless({**config, **typed}).items():
        connection.session.notify(f"Accepted, but without meaning here: {key} ({why}).")
    return parameters.resolve(way, merged)


def _bits(word: str) -> str:
    return {"true": "4", "false": ""}.get(word, word)


def _with_model(plan: TrainingPlan) -> TrainingPlan:
    """The plan with real paths of what it begins with; addresses as they were said."""
    if plan.weights and not plan.model:
        plan = replace(plan, model=plan.weights, weights="")
    if not plan.model and plan.way == "sft":
        raise UserError(
            "The statement names no model to fine-tune.",
            code="checkpoint_missing",
            hint='Add AND localModelDir="/path/to/model", or write the path between the backquotes: LLM.`/path`.',
        )
    return replace(plan, model=_real(plan.model), weights=_real(plan.weights), adapter=_real(plan.adapter))


def _real(path: str) -> str:
    """The real path of a folder; an address as it is."""
    if not path:
        return ""
    if own_weights.is_address(path):
        own_weights.check_address(path)
        return path
    return str(open_folder(own_weights.local_path(path)))


def _tell_of_best(plan: TrainingPlan, source: RowSource, connection: Connection) -> None:
    if source.valid_table and not parameters.keeps_best(plan.parameters):
        connection.session.notify(
            "Not the best model is kept but the last: save_strategy and eval_strategy are not both steps, or epoch."
        )


def _with_ranks(plan: TrainingPlan, settings: Mapping[str, Any], gpus_there: bool) -> TrainingPlan:
    """How wide to train: a rank for each GPU of each worker, on CPUs one for each worker."""
    workers, gpus = int(settings["num_workers"]), settings["gpus_per_worker"]
    gpus = float(gpus_there) if gpus is None else float(gpus)
    ranks = workers
    if gpus > 1:
        if not gpus.is_integer():
            raise UserError(f"num_gpus={gpus:g} ranks cannot be.", code="option_value", hint="Use a whole number.")
        ranks, gpus = workers * int(gpus), 1.0
    custom = {key.removeprefix("resource."): value for key, value in settings.items() if key.startswith("resource.")}
    cpus = float(settings["cpus_per_worker"])
    if cpus == options.defaults("single")["cpus_per_worker"]:  # made for models that mostly wait
        cpus = 1.0 if gpus else jobs.free_cpus(ranks)
    return replace(plan, ranks=ranks, gpus_per_rank=gpus, cpus_per_rank=cpus, resources=custom)


def _root(values: Mapping[str, Any]) -> Path:
    """The folder in which the job gets its own."""
    said = str(values.get("localPathPrefix") or "")
    if not said:
        return job_roots.default_root()
    root = Path(os.path.realpath(os.path.expanduser(own_weights.local_path(said))))
    check_roots(root)
    return root


def _write(source: RowSource, folder: JobFolder, keep_partitions: bool, connection: Connection) -> int:
    tell = connection.session.on_job
    try:
        tell(f"{folder.id}: writing the rows of {source.name}")
        return source.write(folder.data, keep_partitions)
    finally:
        tell("")


def _with_fetched(plan: TrainingPlan, folder: JobFolder, connection: Connection) -> TrainingPlan:
    """The plan with folders in place of addresses: what they hold is brought into the job's folder."""

    def tick(text: str) -> None:
        connection.check_stopped()
        connection.session.on_job(f"{folder.id}: {text}")

    def here(said: str, name: str) -> str:
        if not own_weights.is_address(said):
            return said
        return str(own_weights.fetch(said, folder.path / "fetched" / name, tick))

    try:
        return replace(
            plan,
            model=here(plan.model, "model"),
            weights=here(plan.weights, "weights"),
            adapter=here(plan.adapter, "adapter"),
        )
    finally:
        connection.session.on_job("")
