"""`action="benchmark"`: a load test of deployed functions, or of a service that speaks OpenAI's protocol.

Every model is asked with every number of requests in flight, one run after the other; a run is a row. What was seen
of each request is the table `llm_benchmark_requests`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from runtime.errors import UserError, did_you_mean
from runtime.spec import Task
from sqlext.options import Resolved, defaults
from sqlext.statements import Run
from udfs.arguments import options_from
from udfs.signatures import quote

if TYPE_CHECKING:
    from runtime.benchmark.load import Load, Tell
    from runtime.benchmark.observation import Observation
    from runtime.benchmark.summary import Plan, Summary
    from runtime.benchmark.workload import Request
    from sqlext.connection import Connection

OPEN_LOOP = "real_workload"
CONCURRENCY = 10
MAX_WARMUP = 8
_TEXT, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
_SPREAD = pa.struct(
    [(name, _FLOAT) for name in ("p5", "p25", "p50", "p75", "p90", "p95", "p99", "mean", "min", "max", "stddev")]
)
_METRICS = (
    *("ttft_s", "tpot_s", "itl_s", "end_to_end_latency_s", "output_throughput_token_per_s"),
    *("input_tokens", "output_tokens"),
)
RUNS = pa.schema(
    [
        *(("run", _INT), ("model", _TEXT), ("mode", _TEXT), ("concurrency", _INT), ("qps", _FLOAT)),
        *(("started", _INT), ("completed", _INT), ("errors", _INT), ("error_rate", _FLOAT)),
        ("error_codes", pa.map_(_TEXT, _INT)),
        *(("seconds", _FLOAT), ("completed_per_min", _FLOAT), ("total_output_throughput_token_per_s", _FLOAT)),
        *((metric, _SPREAD) for metric in (*_METRICS, "start_delay_s")),
        *(("summary", _TEXT), ("individual_responses", _TEXT), ("report", _TEXT)),
    ]
)
REQUESTS = pa.schema(
    [
        *(("run", _INT), ("model", _TEXT), ("concurrency", _INT), ("number", _INT)),
        *((name, _FLOAT) for name in ("start_s", "end_s", "start_delay_s", "ttft_s", "tpot_s")),
        ("itl_s", pa.list_(_FLOAT)),
        *((name, _FLOAT) for name in ("end_to_end_latency_s", "output_throughput_token_per_s")),
        *((name, _INT) for name in ("input_tokens", "output_tokens", "max_tokens")),
        *((name, _TEXT) for name in ("finish_reason", "error_code", "error_msg")),
    ]
)


class _Target:
    """What is asked: its name, the folder of its tokenizer, and how a load is put on it."""

    def __init__(self, name: str, tokenizer: str, measure: Callable[[Load, Tell], list[Observation]]) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.measure = measure


def benchmark(run: Run, said: Resolved, connection: Connection) -> pa.Table:
    """One row for each model and number of requests in flight.

    Raises:
        UserError: an option, a function, an address or the table is wrong; nothing was sent.
    """
    from runtime.benchmark.results import write_results
    from runtime.benchmark.summary import responses, summarize

    values = {name: value for name, value in ({**defaults("benchmark"), **said.values}).items() if value is not None}
    runs = list(_runs(values, _targets(values, connection), _prompts(run, values, connection)))
    done: list[tuple[Summary, list[dict[str, Any]]]] = []
    files: list[tuple[Path, Path] | None] = []
    folder = Path(str(values["results_dir"])).expanduser() if values.get("results_dir") else None
    try:
        for number, (plan, target, load) in enumerate(runs, 1):
            tell = _progress(connection, f"run {number} of {len(runs)}, {_name(plan)}", len(load.requests))
            rows = responses(target.measure(load, tell))
            summary = summarize(plan, rows)
            done.append((summary, rows))
            files.append(write_results(folder, summary, rows) if folder else None)
    finally:
        connection.session.on_job("")
        connection.session.benchmark = _requests(done)
    return _table(done, files, _report(folder, done))


def _runs(
    values: Mapping[str, Any], targets: Sequence[_Target], prompts: Sequence[str] | None
) -> Iterator[tuple[Plan, _Target, Load]]:
    """Every model with every number of requests in flight, with the same requests for each model."""
    from runtime.benchmark.load import Load
    from runtime.benchmark.summary import Plan
    from runtime.benchmark.workload import arrivals

    mode, seed = str(values["mode"]), int(values["seed"])
    deciding = tuple((name, values[name]) for name in _DECIDING if name in values)
    limits = {"timeout_s": values["timeout"], "request_timeout_s": values["request_timeout"]}
    for target in targets:
        requests, spare = _asked(values, target, prompts)
        for concurrency in (
            [None] if mode == OPEN_LOOP else _numbers(values.get("num_concurrent_requests", CONCURRENCY))
        ):
            times = (
                arrivals(len(requests), values["qps"], values["qps_distribution"], seed) if not concurrency else None
            )
            warmup = spare[: concurrency or 1] if values["warmup"] else ()
            plan = Plan(target.name, mode, concurrency, None if concurrency else values["qps"], deciding)
            yield plan, target, Load(requests, warmup, concurrency, times, **limits)


_DECIDING = (
    *("mean_input_tokens", "stddev_input_tokens", "mean_output_tokens", "stddev_output_tokens"),
    *("num_requests", "qps_distribution", "timeout", "request_timeout", "warmup", "seed", "sampling_params"),
)


def _asked(
    values: Mapping[str, Any], target: _Target, prompts: Sequence[str] | None
) -> tuple[list[Request], list[Request]]:
    """The requests, and others of their kind for the warm-up."""
    from runtime.benchmark.tokenizer import exact_text
    from runtime.benchmark.workload import Lengths, custom, synthetic

    if prompts is not None:
        requests = custom(prompts, int(values["max_tokens"]) if "max_tokens" in values else None)
        return requests, requests[:MAX_WARMUP]
    folder = str(values.get("tokenizer") or target.tokenizer)
    if not folder:
        raise UserError(
            f'To make prompts of exact lengths, the tokenizer of "{target.name}" is needed.',
            code="tokenizer_missing",
            hint='Add AND tokenizer="/path/of/the/checkpoint", or give prompts: mode="custom" and inputTable.',
        )
    inputs = Lengths(values["mean_input_tokens"], values["stddev_input_tokens"])
    outputs = Lengths(values["mean_output_tokens"], values["stddev_output_tokens"])
    count = int(values["num_requests"])
    made = synthetic(exact_text(folder), count + MAX_WARMUP, inputs, outputs, int(values["seed"]))
    return made[:count], made[count:]


def _targets(values: Mapping[str, Any], connection: Connection) -> list[_Target]:
    url, names = str(values.get("url") or ""), _words(values.get("udfName"))
    if bool(url) == bool(names):
        raise UserError(
            "A load test needs either functions or the address of a service.",
            code="option_missing",
            hint='Add AND udfName="chat", or AND url="http://127.0.0.1:8000/v1" AND `saas.model`="…".',
        )
    parameters = json.loads(str(values.get("sampling_params") or "{}"))
    return (
        [_endpoint(url, values, parameters)] if url else [_function(name, parameters, connection) for name in names]
    )


def _endpoint(url: str, values: Mapping[str, Any], parameters: Mapping[str, Any]) -> _Target:
    from runtime.address import service_address
    from runtime.benchmark import bench
    from runtime.benchmark.endpoint import refuse_reserved
    from runtime.secrets import resolve

    model = str(values.get("saas.model") or "")
    if not model:
        raise UserError(
            "The statement does not say which model of the service to ask.",
            code="option_missing",
            hint='Add AND `saas.model`="…", by the name the service gives it.',
        )
    address = service_address(url, "url")
    refuse_reserved(parameters)
    key = resolve(str(values["saas.api_key"])) if values.get("saas.api_key") else None
    return _Target(model, "", lambda load, tell: bench.measure_endpoint(address, model, key, parameters, load, tell))


def _function(name: str, parameters: Mapping[str, Any], connection: Connection) -> _Target:
    from runtime.benchmark import bench

    gateways = connection.session.functions.gateways()
    gateway = gateways.get(name.lower())
    if gateway is None:
        near = did_you_mean(name.lower(), gateways)
        raise UserError(
            f'There is no model function "{name}" in this session.',
            code="model_unknown",
            hint=f'Did you mean "{near}"?' if near else 'Deploy it first, with action="infer".',
        )
    if gateway.info.task is not Task.GENERATE:
        raise UserError(
            f'"{name}" is made to {gateway.info.task}; a load test needs a function that generates text.',
            code="benchmark_task",
            hint="Time the others with a query, and read !llm usage;",
        )
    options = options_from(dict(parameters))
    return _Target(
        name.lower(),
        gateway.pool.spec.path,
        lambda load, tell: bench.measure_function(gateway, options, load, tell),
    )


def _prompts(run: Run, values: Mapping[str, Any], connection: Connection) -> list[str] | None:
    """The prompts of the user's table; None where they are made."""
    named = str(values.get("inputTable") or "") or (run.input_table if run.input_table.lower() != "command" else "")
    if not named and values["mode"] != "custom":
        return None
    if not named:
        raise UserError(
            'mode="custom" needs a table with a column "prompt".',
            code="option_missing",
            hint='Add AND inputTable="questions", or write RUN questions AS LLM.',
        )
    with connection.own_sql() as execute:
        rows = execute(f"SELECT prompt::VARCHAR FROM {quote(named)} WHERE prompt IS NOT NULL").fetchall()
    if not rows:
        raise UserError(
            f"The table {named} has no prompts.", code="table_empty", hint="Fill it, or take another one."
        )
    return [prompt for (prompt,) in rows]


def _progress(connection: Connection, name: str, requests: int) -> Tell:
    begun = time.monotonic()

    def tell(sent: int, ended: int) -> None:
        connection.check_stopped()
        seconds = time.monotonic() - begun
        done = f"{ended:,} of {requests:,} answers, {sent - ended:,} in flight" if sent else "warming up"
        connection.session.on_job(f"{name}: {done} · {seconds:.0f} s")

    return tell


def _name(plan: Plan) -> str:
    return f"{plan.model} with {plan.concurrency} at once" if plan.concurrency else f"{plan.model} at {plan.qps:g}/s"


def _report(folder: Path | None, done: Sequence[tuple[Summary, list[dict[str, Any]]]]) -> str | None:
    if folder is None:
        return None
    from runtime.benchmark.report import report

    path = folder / "report.html"
    path.write_text(report(done), encoding="utf-8")
    return str(path)


def _table(
    done: Sequence[tuple[Summary, list[dict[str, Any]]]],
    files: Sequence[tuple[Path, Path] | None],
    report: str | None,
) -> pa.Table:
    rows = [
        {
            "run": number,
            **{field.name: getattr(summary.plan, field.name) for field in fields(summary.plan)},
            **{name: getattr(summary, name) for name in RUNS.names if hasattr(summary, name)},
            **{metric: asdict(spread) for metric, spread in summary.spreads},
            "start_delay_s": asdict(summary.start_delay_s),
            "individual_responses": str(written[0]) if written else None,
            "summary": str(written[1]) if written else None,
            "report": report,
        }
        for number, ((summary, _), written) in enumerate(zip(done, files, strict=True), 1)
    ]
    return pa.Table.from_pylist(rows, RUNS)


def _requests(done: Sequence[tuple[Summary, list[dict[str, Any]]]]) -> pa.Table:
    rows = [
        {"run": number, "model": summary.plan.model, "concurrency": summary.plan.concurrency, **row}
        for number, (summary, seen) in enumerate(done, 1)
        for row in seen
    ]
    return pa.Table.from_pylist(rows, REQUESTS)


def _words(said: Any) -> list[str]:
    return [word.strip() for word in str(said or "").split(",") if word.strip()]


def _numbers(said: Any) -> list[int]:
    """Numbers of requests in flight.

    Raises:
        UserError: option_value.
    """
    words = said if isinstance(said, (list, tuple)) else [said]
    if not all(str(word).strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(
            "num_concurrent_requests must be a positive whole number, or several.",
            code="option_value",
            hint='For example num_concurrent_requests="1,4,16".',
        )
    return [int(word) for word in words]
