"""Training jobs as tables: `!llm jobs`, `job`, `logs`, `wait`, `cancel`, `resume`, `jobs remove`, `llm_jobs`, ….

They read the jobs' folders and so are true at any time, also for jobs of other sessions and programs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from runtime import cluster
from runtime.cluster import jobs as cluster_jobs
from runtime.cluster.jobs import Status
from runtime.errors import Cancelled, Fatal, SqlextError, UserError
from runtime.secrets import redact
from runtime.training import job_roots
from runtime.training.folder import JobFolder, JobRequest
from runtime.training.plan import TrainingPlan
from sqlext import sources
from sqlext.progress_lines import job_line, left_out_line

if TYPE_CHECKING:
    from sqlext.connection import Connection
    from sqlext.training_rows import RowSource

LOG_LINES = 100


def jobs(connection: Connection) -> pa.Table:
    """One row for each job, the oldest first."""
    return job_table().select(_SHORT)


def job(connection: Connection, word: str) -> pa.Table:
    """All that is known of one job, a row for each thing."""
    folder = job_roots.find(word)
    request = folder.request()
    row = _row(folder)
    plan = asdict(request.plan)
    for name in ("folder", "way", "parameters", "deepspeed", "prompt_format", "chat_template", "model"):
        plan.pop(name)
    files = {"report": folder.report, "log": folder.log, "bad_rows_file": folder.bad_rows}
    there = {name: str(file) for name, file in files.items() if file.exists()}
    facts = {**row, **plan, **there, **request.plan.parameters}
    told = {
        name: _text(value) for name, value in facts.items() if name not in _INSIDE and value not in (None, "", {})
    }
    return pa.table({"name": list(told), "value": list(told.values())})


def logs(connection: Connection, word: str, last: str = str(LOG_LINES)) -> pa.Table:
    """The last lines that a job's processes have printed."""
    if not last.isdecimal():
        raise UserError(f'"{last}" is no number of lines.', code="option_value", hint='Write !llm logs "id" "100";')
    lines = [redact(line) for line in job_roots.find(word).log_lines(int(last))]
    return pa.table({"line": pa.array(lines, pa.string())})


def wait(connection: Connection, word: str) -> pa.Table:
    """Wait until a job is over, and make its output table; one row that tells how it did.

    Raises:
        SqlextError: the job has failed, or its process is gone.
    """
    return waited(job_roots.find(word), connection)


def cancel(connection: Connection, word: str) -> pa.Table:
    """Stop a job; its checkpoints stay. Its row of `!llm jobs`."""
    folder = job_roots.find(word)
    if cluster_jobs.status(folder)["state"] not in cluster_jobs.OVER:
        _cancelled(folder, connection)
    _forget(folder, connection)
    return _table([_row(folder)]).select(_SHORT)


def remove(connection: Connection, word: str) -> pa.Table:
    """Delete the folder of a job that is over, with its checkpoints and its model; the row it had in `!llm jobs`.

    Raises:
        UserError: job_running; job_folder: it cannot be deleted.
    """
    folder = job_roots.find(word)
    row = _table([_row(folder)]).select(_SHORT)
    if cluster_jobs.status(folder)["state"] not in cluster_jobs.OVER:
        raise UserError(
            f'The job "{folder.id}" is running.', code="job_running", hint=f'Stop it: !llm cancel "{folder.id}";'
        )
    try:
        with folder.take():
            shutil.rmtree(folder.path)
    except OSError as error:
        raise UserError(
            f'The folder "{folder.path}" cannot be deleted: {error.strerror}.', code="job_folder"
        ) from None
    return row


def resume(connection: Connection, word: str) -> pa.Table:
    """Let a job that is over and not finished go on; its row of `!llm jobs`."""
    folder = job_roots.find(word)
    connected = cluster_jobs.resume(folder, connection.session.settings["ray_address"])
    return started(folder, connection, connected)


def started(folder: JobFolder, connection: Connection, on: cluster.ClusterInfo) -> pa.Table:
    """Remember a job that has begun when it would end with this process; its row."""
    if on.started_here:
        connection.session.own_jobs.append(folder)
        connection.wait_at_exit()
    return _table([_row(folder)]).select(_STARTED)


def waited(folder: JobFolder, connection: Connection, *, cancels: bool = False) -> pa.Table:
    """Wait for a job and make its output table; one row that tells of the trained model.

    Args:
        cancels: when the waiting is stopped, so is the job.

    Raises:
        SqlextError: the job has failed, or its process is gone.
    """
    try:
        said = cluster_jobs.wait(folder, lambda said: _tick(folder, said, connection))
    except (Cancelled, KeyboardInterrupt):
        if cancels:
            _cancelled(folder, connection, stoppable=False)
            connection.session.notify(resume_hint(folder))
            _forget(folder, connection)
        raise
    finally:
        connection.session.on_job("")
    _forget(folder, connection)
    if error := cluster_jobs.error_of(said):
        raise error
    if said["state"] == "lost":
        raise Fatal(f'The process of the job "{folder.id}" is gone.', code="job_lost", hint=resume_hint(folder))
    if said["state"] == "cancelled":
        return _table([_row(folder)]).select(_OUTCOME)
    return _kept(folder, connection)


def finish(connection: Connection) -> None:
    """Wait for the jobs that would end with this process; make their output tables.

    Raises:
        SqlextError: the first failure, when all are over.
        KeyboardInterrupt: the waiting was stopped; the jobs are cancelled.
    """
    errors = []
    while own := connection.session.own_jobs:
        try:
            waited(own[0], connection, cancels=True)
        except Cancelled:
            raise
        except SqlextError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def stop(connection: Connection) -> None:
    """Cancel the jobs that would end with this process, and say how they go on."""
    while own := connection.session.own_jobs:
        folder = own.pop()
        _cancelled(folder, connection, stoppable=False)
        connection.session.notify(resume_hint(folder))


def resume_hint(folder: JobFolder) -> str:
    """What to type to let a job go on."""
    return f'!llm resume "{folder.id}"; lets the job go on from its last whole checkpoint.'


def job_table() -> pa.Table:
    """`llm_jobs`: every job there is, the oldest first."""
    return _table([_row(folder) for folder in job_roots.all_jobs()])


def metrics() -> pa.RecordBatchReader:
    """`llm_job_metrics`: what the jobs have told of their steps, one job in memory at a time."""
    return pa.RecordBatchReader.from_batches(_METRICS, _told())


def _told() -> Iterator[pa.RecordBatch]:
    names = [name for name in _METRICS.names if name != "job"]
    for folder in job_roots.all_jobs():
        rows = [{"job": folder.id, **{name: line.get(name) for name in names}} for line in folder.metrics()]
        yield pa.RecordBatch.from_pylist(rows, _METRICS)


def _tick(folder: JobFolder, said: Status, connection: Connection) -> None:
    connection.check_stopped()
    connection.session.on_job(job_line(folder.id, said))


def _cancelled(folder: JobFolder, connection: Connection, *, stoppable: bool = True) -> None:
    def tick(said: Status) -> None:
        if stoppable:
            connection.check_stopped()
        connection.session.on_job(f"{job_line(folder.id, said)} · cancelling")

    try:
        said = cluster_jobs.cancel(folder, tick)
    finally:
        connection.session.on_job("")
    if said["state"] not in cluster_jobs.OVER:
        connection.session.notify(
            f'"{folder.id}" does not stop, and runs on a cluster that this program is not connected to. It has been '
            'asked to, and does when it can; to end it, cancel it with that cluster\'s "ray_address".'
        )


def _forget(folder: JobFolder, connection: Connection) -> None:
    own = connection.session.own_jobs
    if folder in own:
        own.remove(folder)


def _kept(folder: JobFolder, connection: Connection) -> pa.Table:
    """The outcome of a finished job, also kept as the table that its statement named."""
    row = _row(folder)
    outcome = _table([row]).select(_OUTCOME)
    if told := left_out_line(row):
        connection.session.notify(f'{told} hint: !llm job "{folder.id}"; tells more.')
    name = folder.request().output_table
    if name:
        sources.keep_for_good(connection.raw, name, outcome)
    return outcome


def require_free(connection: Connection, name: str, source: RowSource) -> None:
    """Check that `name` can become an output table: nothing that is not one stands there, and it can be written.

    Raises:
        UserError: output_table.
    """
    read = {table.lower() for table in (source.table, source.valid_table)}
    if name.lower() in read:
        raise UserError(
            f'outputTable "{name}" is a table that the training reads.',
            code="output_table",
            hint="Choose another name for the outcome.",
        )
    with connection.own_sql() as execute:
        sources.require_replaceable(execute, name, _OUTCOME)


def _row(folder: JobFolder) -> dict[str, Any]:
    said = cluster_jobs.status(folder)
    try:
        request = folder.request()
    except UserError:
        request = JobRequest(TrainingPlan(str(folder.path), "sft"))
    error = said.get("error") or {}
    return {
        **said,
        "job": folder.id,
        "name": request.name or None,
        "way": request.plan.way,
        "ranks": request.plan.ranks,
        "base": request.base or None,
        "folder": str(folder.path),
        "model": str(folder.final) if said.get("model") else None,  # it may have been moved
        "train_loss": said.get("train_loss", said.get("loss")),
        "started": _time(said.get("started")),
        "ended": _time(said.get("ended")),
        "error": f"{error['code']}: {error['message']}" if error else None,
        "hint": error.get("hint"),
    }


def _time(seconds: float | None) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def _text(value: Any) -> str:
    if isinstance(value, dict | list | tuple | bool):
        return json.dumps(value)
    return f"{value:%Y-%m-%d %H:%M:%S}" if isinstance(value, datetime) else str(value)


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, _JOBS)


_INT, _FLOAT, _WORD, _WHEN = pa.int64(), pa.float64(), pa.string(), pa.timestamp("s", tz="UTC")
_JOBS = pa.schema(
    {
        **dict.fromkeys(("job", "name", "way", "state"), _WORD),
        **dict.fromkeys(("ranks", "step", "steps"), _INT),
        **dict.fromkeys(("epoch", "loss", "train_loss", "eval_loss", "tokens_per_s", "seconds_left"), _FLOAT),
        **dict.fromkeys(("rows", "bad_rows", "truncated", "tokens"), _INT),
        "seconds": _FLOAT,
        **dict.fromkeys(("started", "ended"), _WHEN),
        **dict.fromkeys(("base", "model", "error", "hint", "folder"), _WORD),
    }
)
_METRICS = pa.schema(
    {
        "job": _WORD,
        "step": _INT,
        **dict.fromkeys(("epoch", "loss", "eval_loss", "learning_rate", "grad_norm"), _FLOAT),
        "tokens": _INT,
        **dict.fromkeys(("tokens_per_s", "seconds"), _FLOAT),
    }
)
_INSIDE = ("pid", "process_started", "queued", "began", "cluster", "placement_group")
_SHORT = [
    *("job", "way", "state", "step", "steps", "epoch", "loss", "eval_loss", "tokens_per_s", "seconds_left"),
    *("started", "model", "error"),
]
_STARTED = ["job", "state", "way", "base", "rows", "ranks", "folder"]
_OUTCOME = [
    *("job", "state", "model", "way", "base", "rows", "steps", "train_loss", "eval_loss", "seconds", "tokens"),
]
