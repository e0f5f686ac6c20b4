"""Text generation with vLLM, on GPUs or a CPU: all batches in flight share one running set and one prefix cache.

Alone because vLLM computes and schedules by itself; prompts become token ids, and ids answers, as in every engine, so
that counts, ends and errors are the same.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from transformers import GenerationConfig
from vllm import LLMEngine
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.usage.usage_lib import UsageContext

from runtime.checkpoints.adapter import Adapter, open_adapter
from runtime.checkpoints.inspect import Checkpoint, inspect
from runtime.checkpoints.merge import require_fit
from runtime.engines.loading import free_memory, load_generation_config, load_tokenizer, loading
from runtime.engines.microbatch import failed
from runtime.engines.sampling import end_with
from runtime.engines.stepping import Loop, Outcome
from runtime.engines.telling import Telling
from runtime.engines.vllm_arguments import Sampling, engine_arguments, sampling
from runtime.engines.wording import Wording
from runtime.errors import EngineLost, ErrorInfo, Fatal, UserError
from runtime.prompts.chat import DEFAULT_MAX_TOKENS
from runtime.prompts.style import find_style
from runtime.spec import Answers, Batch, Delta, EngineInfo, ModelSpec, Task

BATCH_SETS = 2  # a batch holds this many times the rows that run at once; with two in flight the set stays full
CHARS_PER_ROW = 2_000


@dataclass(frozen=True, slots=True)
class Voice:
    """How the model speaks, with an adapter or without: its words, its ends, and vLLM's name for the adapter."""

    wording: Wording
    generation: GenerationConfig
    adapter: LoRARequest | None = None


class VllmEngine:
    """A checkpoint in vLLM.

    Args:
        loop: vLLM's engine.
        info: what was loaded.
        checkpoint, spec: what it was loaded from.
        voice: the base's own.
    """

    def __init__(self, loop: Loop, info: EngineInfo, checkpoint: Checkpoint, spec: ModelSpec, voice: Voice) -> None:
        self.info = info
        self._loop = loop
        self._checkpoint = checkpoint
        self._spec = spec
        self._voices = {"": voice}
        self._finding = threading.Lock()

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers | Delta]:
        """Answer the prompts; a row comes as soon as its last token is there, one that is followed also before.

        Raises:
            EngineLost: vLLM died; only a new process can answer.
            Fatal: a generation parameter is unknown or out of its range.
            UserError: the batch's adapter does not fit.
        """
        begun = time.perf_counter()
        voice = self._voice(batch.adapter)
        settings = sampling(batch.options, voice.wording.tokenizer, voice.generation)
        read, errors = voice.wording.read(batch)
        if errors:
            yield failed(errors, _ms_since(begun))
        if not read:
            return
        telling = Telling(batch.stream, settings.stop, voice.wording.style.prompt_format)
        params = {row: (r.ids, settings.params(r, followed=row in batch.stream)) for row, r in read.items()}
        asked = self._loop.ask(params, voice.adapter)
        try:
            for outcomes in asked.outcomes(len(read), stop):
                yield from _pieces(outcomes, voice.wording, settings, telling, begun)
        finally:
            self._loop.drop(asked)

    def count_tokens(self, batch: Batch) -> list[int]:
        """Tokens of each prompt with all that the chat template adds; 0 for one that cannot be asked."""
        return self._voice(batch.adapter).wording.count_tokens(batch)

    def close(self) -> None:
        """Give back the memory."""
        self._loop.close()
        self._voices.clear()
        gc.collect()
        cleanup_dist_env_and_memory()
        free_memory()

    def prepare(self, adapter: str) -> None:
        """Let every batch without an adapter of its own have this one. Raises as `run`."""
        self._voices[""] = self._voice(adapter)

    def _voice(self, adapter: str) -> Voice:
        with self._finding:
            if adapter not in self._voices:
                self._voices[adapter] = self._with(open_adapter(adapter), len(self._voices))
            return self._voices[adapter]

    def _with(self, adapter: Adapter, number: int) -> Voice:
        """The voice with an adapter, which is put into the engine."""
        if not self.info.adapters:
            raise UserError(
                f'The model "{self._spec.name}" was deployed without room for adapters.',
                code="adapter_unsupported",
                hint='Deploy it again with AND `backend.enable_lora`="true".',
            )
        require_fit(Path(self._checkpoint.path), adapter)
        request = LoRARequest(f"adapter-{number}", number, str(adapter.path))
        try:
            self._loop.do(lambda engine: engine.add_lora(request))
        except EngineLost:
            raise
        except Exception as error:
            cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(
                f'vLLM refuses the adapter "{adapter.path}": {cause[:300]}',
                code="adapter_unsupported",
                hint='Deploy the base with a larger `backend.max_lora_rank`, or merge the two: action="merge".',
            ) from None
        return replace(_speak(self._spec, self._checkpoint, self.info.max_model_len, adapter), adapter=request)


def load(spec: ModelSpec) -> VllmEngine:
    """Load the checkpoint in `spec.path`: safetensors only, no code of its own, nothing from a hub.

    Options: those of `vllm.EngineArgs`, but for what names another checkpoint or brings code; prompt_format or
    chat_template, instead of the checkpoint's own; adapter, the folder of a LoRA adapter.

    Raises:
        UserError: the folder or an option is wrong.
        DeployError: the model did not load.
    """
    checkpoint = inspect(spec.path, Task.GENERATE)
    adapter = str(dict(spec.options).get("adapter") or "")
    with loading(checkpoint):
        try:
            engine = LLMEngine.from_engine_args(
                engine_arguments(spec, checkpoint), usage_context=UsageContext.LLM_CLASS
            )
        except ValidationError as error:
            raise _refused(error) from None
    config = engine.vllm_config
    voice = _speak(spec, checkpoint, config.model_config.max_model_len)
    loop = Loop(engine, is_dead=lambda: _is_dead(engine))
    made = VllmEngine(loop, _info(spec, checkpoint, config, voice.wording, adapter), checkpoint, spec, voice)
    try:
        if adapter:
            made.prepare(adapter)
        sampling(spec.defaults, voice.wording.tokenizer, voice.generation)
    except Fatal as error:  # a wrong default fails the deployment, not its rows
        made.close()
        raise UserError(error.message, code=error.code, hint=error.hint) from None
    except BaseException:
        made.close()
        raise
    return made


def _is_dead(engine: Any) -> bool:
    """Whether vLLM's own process has ended; a step that waits for it is never told (vLLM 0.32)."""
    return bool(getattr(getattr(engine.engine_core, "resources", None), "engine_dead", False))


def _refused(error: ValidationError) -> UserError:
    """What vLLM found wrong with an option, by its name."""
    first = error.errors()[0]
    return UserError(
        f"vLLM refuses {'.'.join(map(str, first['loc'])) or 'the options'}: {first['msg'][:300]}",
        code="option_value",
        hint="Correct that backend.… option.",
    )


def _info(spec: ModelSpec, checkpoint: Checkpoint, config: Any, wording: Wording, adapter: str) -> EngineInfo:
    rows = config.scheduler_config.max_num_seqs
    model, parallel = config.model_config, config.parallel_config.tensor_parallel_size
    notes = [f"up to {rows} rows at once", "prefix caching" if config.cache_config.enable_prefix_caching else ""]
    if checkpoint.max_model_len and model.max_model_len < checkpoint.max_model_len:
        notes.append(f"{model.max_model_len} of {checkpoint.max_model_len} tokens")
    if parallel > 1:
        notes.append(f"over {parallel} GPUs")
    if adapter:
        notes.append(f"with the adapter {adapter}")
    return EngineInfo(
        engine="vllm",
        task=Task.GENERATE,
        device="cuda:0" if torch.cuda.is_available() else "cpu",
        dtype=model.quantization or str(model.dtype).removeprefix("torch."),
        max_model_len=model.max_model_len,
        max_batch_rows=BATCH_SETS * rows,
        max_batch_chars=BATCH_SETS * rows * CHARS_PER_ROW,
        max_answer_tokens=spec.defaults.max_tokens or DEFAULT_MAX_TOKENS,
        architectures=checkpoint.architectures,
        chat_template=wording.has_template,
        schemas=True,
        streams=True,
        adapters=config.lora_config is not None,
        notes=tuple(note for note in notes if note),
    )


def _speak(
    spec: ModelSpec, checkpoint: Checkpoint, max_model_len: int | None, adapter: Adapter | None = None
) -> Voice:
    """The voice of the checkpoint, or of an adapter that brings its own tokenizer or way of writing."""
    options = dict(spec.options)
    style = find_style(
        adapter.path if adapter and adapter.has_style else checkpoint.path,
        str(options.get("prompt_format", "")),
        str(options.get("chat_template", "")),
    )
    speaker = replace(checkpoint, path=str(adapter.path)) if adapter and adapter.has_tokenizer else checkpoint
    with loading(checkpoint):
        wording = Wording(load_tokenizer(speaker), style, max_model_len)
        generation = load_generation_config(checkpoint)
    if (end := wording.end_token) is not None:
        end_with(end, generation, wording.tokenizer)
    return Voice(wording, generation)


def _error(outcome: Any) -> ErrorInfo | None:
    """Why a row has no answer; None when it has one, or goes on."""
    if isinstance(outcome, ErrorInfo):
        return outcome
    reason = outcome.outputs[0].finish_reason
    return (
        None if reason in (None, "stop", "length") else ErrorInfo("engine_failed", f"vLLM ended the row: {reason}.")
    )


def _pieces(
    outcomes: Sequence[Outcome], wording: Wording, settings: Sampling, telling: Telling, begun: float
) -> Iterator[Answers | Delta]:
    refused = {row: error for row, outcome in outcomes if (error := _error(outcome))}
    if refused:
        yield failed(refused, _ms_since(begun))
    written = [(row, outcome) for row, outcome in outcomes if row not in refused]
    for row, output in written:
        if not output.finished:
            ids = list(output.outputs[0].token_ids)
            delta = telling.more(row, lambda ids=ids: wording.decode([ids])[0])  # type: ignore[misc]
            if delta:
                yield delta
    ended = [(row, output) for row, output in written if output.finished]
    if not ended:
        return
    ids = [list(output.outputs[0].token_ids) for _, output in ended]
    yield Answers(
        rows=[row for row, _ in ended],
        outputs=wording.answers(ids, settings.ends, settings.stop),
        finish_reasons=[cast(str, output.outputs[0].finish_reason) for _, output in ended],
        prompt_tokens=[len(output.prompt_token_ids) for _, output in ended],
        completion_tokens=[len(each) for each in ids],
        latency_ms=_ms_since(begun),
    )


def _ms_since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1000.0
