"""Text generation with OpenVINO GenAI on a CPU: all batches in flight share one running set.

Alone because its continuous batching computes and schedules by itself. Token ids go in and come out: prompts become
ids, and ids answers, as in every engine, so that counts, ends and errors are the same. The checkpoint is carried over
once (`openvino_graph.py`) and kept.

- The type of computing and of the cache is that of the weights: bfloat16, where the CPU computes with it; float32 for
  float32 and float16 weights, as in the engine `transformers`. Greedy answers in float32 are transformers'; in
  bfloat16 a sum may round otherwise, and an answer take another way where two tokens are almost equally likely.
- Prefix caching is off: openvino-genai 2026.4.1 gives wrong answers with it where a prompt goes on in the middle of a
  block that several rows find in the cache (`test_openvino.py` tells when that has changed).
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
import psutil
from openvino_tokenizers import convert_tokenizer
from transformers import GenerationConfig

from runtime.checkpoints.conversions import kept_conversion
from runtime.checkpoints.inspect import Checkpoint, inspect
from runtime.checkpoints.model_config import read_config
from runtime.checkpoints.model_folder import open_model
from runtime.engines.choice import OPTIONS, cannot_carry
from runtime.engines.loading import (
    engine_options,
    free_memory,
    load_generation_config,
    load_tokenizer,
    loading,
    whole_number,
)
from runtime.engines.microbatch import failed
from runtime.engines.openvino_graph import FORM, write_graph
from runtime.engines.parameters import truth
from runtime.engines.sampling import EXTRA, all_ends, choice, end_with, own_ends, read_extra, row_seed
from runtime.engines.stepping import Loop
from runtime.engines.telling import Telling
from runtime.engines.wording import Wording
from runtime.errors import ErrorInfo, Fatal, UserError
from runtime.prompts.chat import DEFAULT_MAX_TOKENS
from runtime.prompts.style import find_style
from runtime.spec import Answers, Batch, CallOptions, Delta, EngineInfo, ModelSpec, Task, Value

ROWS = 64  # that run at once
BATCHED_TOKENS = 2_048  # that one step reads
BATCH_SETS = 2  # a batch holds this many times the rows that run at once; with two in flight the set stays full
CHARS_PER_ROW = 2_000
CACHED_TOKENS = 1_024  # of each row, before the cache is full and rows wait
KNOWN: dict[str, Callable[[Any], Any]] = {
    **{name: EXTRA[name] for name in ("repetition_penalty", "min_new_tokens", "min_p", "stop_token_ids")},
    "presence_penalty": float,
    "frequency_penalty": float,
    "ignore_eos": truth,
}
_TOKENIZER = "openvino_tokenizer.xml"


@dataclass(slots=True, eq=False)
class Params:
    """How one row is asked: its configuration, the ids and texts that end it, and whether someone follows it."""

    config: Any
    ends: frozenset[int]
    stop: tuple[str, ...]
    followed: bool = False


@dataclass(slots=True, eq=False)
class Written:
    """A row in the pipeline: `new` ids so far; `reason`: why it ended, "ignored" for no room."""

    request_id: str
    handle: Any
    prompt: Sequence[int]
    params: Params
    new: list[int] = field(default_factory=list)
    reason: str = ""

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return bool(self.reason)


class Pipeline:
    """OpenVINO's pipeline behind the calls that `Loop` makes."""

    def __init__(self, pipeline: Any, wording: Wording) -> None:
        self._pipeline = pipeline
        self._wording = wording
        self._rows: dict[str, Written] = {}

    @property
    def engine_core(self) -> Pipeline:
        """Itself: there is no process of its own."""
        return self

    def shutdown(self) -> None:
        """Give back the memory."""
        self.abort_request(list(self._rows))
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        self._pipeline = None

    def add_request(self, name: str, prompt: Mapping[str, Any], params: Params, **_: Any) -> None:
        """Put a row into the running set; ValueError: it is refused."""
        ids = prompt["prompt_token_ids"]
        try:
            handle = self._pipeline.add_request(int(name), ov.Tensor(np.array([ids], np.int64)), params.config)
        except RuntimeError as error:
            raise ValueError(str(error).strip().splitlines()[-1]) from None
        self._rows[name] = Written(name, handle, ids, params)

    def abort_request(self, names: Sequence[str]) -> None:
        """Nobody wants these rows any more."""
        for name in names:
            if row := self._rows.pop(name, None):
                row.handle.cancel()

    def has_unfinished_requests(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._rows or self._pipeline.has_non_finished_requests())  # of dropped rows the cache is freed

    def step(self) -> list[Written]:
        """One more token for every row; the rows that ended, and those that are followed."""
        self._pipeline.step()
        told = []
        for row in list(self._rows.values()):
            self._read(row)
            if row.finished:
                del self._rows[row.request_id]
            if row.finished or row.params.followed:
                told.append(row)
        return told

    def _read(self, row: Written) -> None:
        while not row.reason and row.handle.can_read():
            for output in row.handle.read().values():
                for token in output.generated_ids:
                    row.new.append(token)
                    if self._ends(row):
                        row.reason = "stop"
                        row.handle.cancel()
                        return
                if output.finish_reason != genai.GenerationFinishReason.NONE:
                    stopped = output.finish_reason == genai.GenerationFinishReason.STOP
                    row.reason = row.reason or ("stop" if stopped else "length")
        if not row.reason and row.handle.get_status() == genai.GenerationStatus.IGNORED:
            row.reason = "ignored"

    def _ends(self, row: Written) -> bool:
        params = row.params
        return row.new[-1] in params.ends or bool(params.stop and self._wording.stopped(row.new, params.stop))


class OpenVinoEngine:
    """A checkpoint in OpenVINO.

    Args:
        loop: the thread that steps it.
        info: what was loaded.
        wording: how prompts become token ids, and ids answers.
        generation: how the checkpoint wants to be asked.
    """

    def __init__(self, loop: Loop, info: EngineInfo, wording: Wording, generation: GenerationConfig) -> None:
        self.info = info
        self._loop = loop
        self._wording = wording
        self._generation = generation

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers | Delta]:
        """Answer the prompts; a row comes as soon as its last token is there, one that is followed also before.

        Raises:
            EngineLost: OpenVINO failed; only a new process can answer.
            Fatal: a generation parameter is unknown or out of its range; the schema cannot guide the model.
        """
        begun = time.perf_counter()
        wording = self._wording
        asking = parameters(batch.options, wording.tokenizer, self._generation)
        read, errors = wording.read(batch)
        if errors:
            yield failed(errors, _ms_since(begun))
        if not read:
            return
        asked = self._loop.ask(
            {
                row: (each.ids, asking.row(each.ids, each.limit, followed=row in batch.stream))
                for row, each in read.items()
            }
        )
        telling = Telling(batch.stream, asking.stop, wording.style.prompt_format)
        try:
            for said in asked.outcomes(len(read), stop):
                yield from self._pieces(said, asking, telling, begun)
        finally:
            self._loop.drop(asked)

    def count_tokens(self, batch: Batch) -> list[int]:
        """Tokens of each prompt with all that the chat template adds; 0 for one that cannot be asked."""
        return self._wording.count_tokens(batch)

    def close(self) -> None:
        """Give back the memory."""
        self._loop.close()
        free_memory()

    def _pieces(
        self, said: list[tuple[int, Any]], asking: Asking, telling: Telling, begun: float
    ) -> Iterator[Answers | Delta]:
        refused = {row: outcome for row, outcome in said if isinstance(outcome, ErrorInfo)}
        refused |= {row: _NO_ROOM for row, outcome in said if row not in refused and outcome.reason == "ignored"}
        if refused:
            yield failed(refused, _ms_since(begun))
        written = [(row, outcome) for row, outcome in said if row not in refused]
        for row, outcome in written:
            ids = list(outcome.new)
            delta = telling.more(row, lambda ids=ids: self._wording.decode([ids])[0])  # type: ignore[misc]
            if delta and not outcome.finished:
                yield delta
        if ended := [(row, outcome) for row, outcome in written if outcome.finished]:
            ids = [outcome.new for _, outcome in ended]
            yield Answers(
                rows=[row for row, _ in ended],
                outputs=self._wording.answers(ids, asking.ends, asking.stop),
                finish_reasons=[outcome.reason for _, outcome in ended],
                prompt_tokens=[len(outcome.prompt) for _, outcome in ended],
                completion_tokens=[len(each) for each in ids],
                latency_ms=_ms_since(begun),
            )


_NO_ROOM = ErrorInfo(
    "out_of_memory", "The cache of the engine has no room for this row.", "Shorten the prompt, or lower max_tokens."
)


@dataclass(frozen=True, slots=True)
class Asking:
    """What the options of a batch come to: `fields` of a GenerationConfig, and what ends an answer."""

    fields: Mapping[str, Any]
    own_end: int
    schema: str | None
    ends: frozenset[int]
    stop: tuple[str, ...]
    seed: int | None

    def row(self, ids: Sequence[int], limit: int, *, followed: bool = False) -> Params:
        """How a row with these ids is asked."""
        config = genai.GenerationConfig(**self.fields, max_new_tokens=limit)
        config.set_eos_token_id(self.own_end)
        if self.schema:
            config.structured_output_config = genai.StructuredOutputConfig(json_schema=self.schema)
        if config.do_sample:
            config.rng_seed = random.getrandbits(62) if self.seed is None else row_seed(self.seed, ids)
        return Params(config, self.ends, self.stop, followed)


def parameters(options: CallOptions, tokenizer: Any, generation: GenerationConfig) -> Asking:
    """What the options of a batch come to.

    Raises:
        Fatal: option_unknown with the nearest name, option_value.
    """
    extra = read_extra(options, KNOWN)
    more, ignore = extra.pop("stop_token_ids", ()), extra.pop("ignore_eos", False)
    own = own_ends(tokenizer, generation)
    said = all_ends(options, tokenizer, (), more)
    ends = said if ignore else frozenset((*own, *said))
    settings = choice(options, generation)
    if settings.get("top_k") == 0:
        del settings["top_k"]
    fields = {**extra, **settings, "ignore_eos": ignore, "stop_token_ids": set(ends)}
    asking = Asking(fields, own[0] if own else 0, options.schema, ends, options.stop, options.seed)
    try:
        asking.row((), 1).config.validate()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise Fatal(f"OpenVINO refuses the generation parameters: {reason}", code="option_value") from None
    return asking


def load(spec: ModelSpec) -> OpenVinoEngine:
    """Load the checkpoint in `spec.path`: safetensors only, no code of its own, nothing from a hub; on the CPU.

    Options: dtype (auto, float32, bfloat16); max_model_len; max_num_seqs and max_num_batched_tokens (rows that run at
    once, and tokens of one step); prompt_format or chat_template, instead of the checkpoint's own.

    Raises:
        UserError: the folder or an option is wrong, or it cannot be carried over.
        DeployError: the model did not load.
    """
    options = engine_options(spec, OPTIONS)
    checkpoint = inspect(spec.path, Task.GENERATE)
    config = read_config(Path(checkpoint.path))
    if why := cannot_carry(config):
        raise UserError(
            f'"{checkpoint.path}": {why}.', code="engine_unfit", hint='Type !llm setup "infer_backend=transformers".'
        )
    precision, notes = _precision(checkpoint, options.get("dtype"))
    style = find_style(checkpoint.path, str(options.get("prompt_format", "")), str(options.get("chat_template", "")))
    own_len, asked_len = checkpoint.max_model_len, whole_number(options, "max_model_len")
    with loading(checkpoint):
        tokenizer = load_tokenizer(checkpoint)
        generation = load_generation_config(checkpoint)
        folder = kept_conversion(Path(checkpoint.path), FORM, lambda target: _convert(checkpoint, tokenizer, target))
        wording = Wording(tokenizer, style, min((each for each in (own_len, asked_len) if each), default=None))
        rows = whole_number(options, "max_num_seqs") or ROWS
        scheduler = _scheduler(config, options, rows, precision, wording.max_model_len)
        pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", _properties(precision))
    if (end := wording.end_token) is not None:
        end_with(end, generation, tokenizer)
    try:
        parameters(spec.defaults, tokenizer, generation)
    except Fatal as error:  # a wrong default fails the deployment, not its rows
        raise UserError(error.message, code=error.code, hint=error.hint) from None
    info = EngineInfo(
        engine="openvino",
        task=Task.GENERATE,
        device="cpu",
        dtype=precision,
        max_model_len=wording.max_model_len,
        max_batch_rows=BATCH_SETS * rows,
        max_batch_chars=BATCH_SETS * rows * CHARS_PER_ROW,
        max_answer_tokens=spec.defaults.max_tokens or DEFAULT_MAX_TOKENS,
        architectures=checkpoint.architectures,
        chat_template=wording.has_template,
        schemas=(folder / _TOKENIZER).is_file(),
        streams=True,
        notes=(*notes, f"up to {rows} rows at once"),
    )
    return OpenVinoEngine(Loop(Pipeline(pipeline, wording), "OpenVINO"), info, wording, generation)


def _convert(checkpoint: Checkpoint, tokenizer: Any, target: Path) -> None:
    """The checkpoint as OpenVINO reads it; with the tokenizer where it can be had, which only schemas need."""
    shards = open_model(checkpoint.path).shards
    write_graph(
        Path(checkpoint.path), {name: each for shard in shards.values() for name, each in shard.items()}, target
    )
    try:
        made = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception:  # whatever it says: answers do not need it
        return
    for name, model in zip((_TOKENIZER, "openvino_detokenizer.xml"), made, strict=True):
        ov.save_model(model, target / name)


def _precision(checkpoint: Checkpoint, dtype: Value | None) -> tuple[str, tuple[str, ...]]:
    """'float32' or 'bfloat16', with a note for a choice that was not asked for.

    Raises:
        UserError: option_value.
    """
    wanted = {"bf16": "bfloat16", "fp32": "float32"}.get(str(dtype or "auto").lower(), str(dtype or "auto").lower())
    if wanted not in ("auto", "float32", "bfloat16"):
        raise UserError(
            f'dtype="{dtype}" is none that the engine openvino computes with.',
            code="option_value",
            hint="Known: auto, float32, bfloat16.",
        )
    if wanted != "auto":
        return wanted, ()
    if checkpoint.dtype != "bfloat16":
        return "float32", ()
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "float32", ("float32: this CPU does not compute with bfloat16",)
    return "bfloat16", ()


def _properties(precision: str) -> dict[str, Any]:
    kind = {"float32": "f32", "bfloat16": "bf16"}[precision]
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0)  # a worker's share of the machine; 0: all
    return {"INFERENCE_PRECISION_HINT": kind, "KV_CACHE_PRECISION": kind, "INFERENCE_NUM_THREADS": threads}


def _scheduler(
    config: Mapping[str, Any], options: Mapping[str, Value], rows: int, precision: str, length: int | None
) -> Any:
    """How much runs at once, and the cache: `CACHED_TOKENS` of each row, but one whole row at the least."""
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    kept = int(config.get("num_key_value_heads") or heads) * width * {"float32": 4, "bfloat16": 2}[precision]
    token_bytes = 2 * kept * int(config["num_hidden_layers"])
    tokens = min(rows * CACHED_TOKENS, psutil.virtual_memory().available // (4 * token_bytes))
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = max(1, -(-max(tokens, length or 0) * token_bytes // 2**30))
    scheduler.max_num_seqs = rows
    scheduler.max_num_batched_tokens = whole_number(dict(options), "max_num_batched_tokens") or BATCHED_TOKENS
    scheduler.enable_prefix_caching = False
    return scheduler


def _ms_since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1000.0
