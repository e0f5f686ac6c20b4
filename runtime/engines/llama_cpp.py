"""Text generation with llama.cpp: GGUF files, and checkpoints of Hugging Face that are converted once and kept.

Alone because llama.cpp is a library of its own, with its own quantised numbers. Its Python package decodes one row at
a time: rows of a batch come one after the other, each as soon as it is ready, and what a row shares with the one
before it at its beginning is not read again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from runtime.checkpoints.conversions import kept_conversion
from runtime.checkpoints.convert import Conversion, convert
from runtime.checkpoints.gguf_header import gguf_model, read_gguf
from runtime.checkpoints.inspect import Checkpoint, inspect
from runtime.engines.gguf_tokenizer import GgufTokenizer
from runtime.engines.loading import (
    engine_options,
    free_memory,
    load_generation_config,
    load_tokenizer,
    loading,
    whole_number,
)
from runtime.engines.microbatch import failed
from runtime.engines.sampling import EXTRA, all_ends, choice, end_with, own_ends, read_extra, row_seed
from runtime.engines.telling import Telling
from runtime.engines.wording import Read, Wording
from runtime.errors import DeployError, Fatal, UserError
from runtime.prompts.chat import DEFAULT_MAX_TOKENS
from runtime.prompts.style import find_style
from runtime.spec import Answers, Batch, CallOptions, Delta, EngineInfo, ModelSpec, Task

OPTIONS = ("dtype", "max_model_len", "n_gpu_layers", "prompt_format", "chat_template")
FORM = "gguf-1"
KINDS = {"auto": "f16", "float32": "f32", "float16": "f16", "bfloat16": "f16"}
"""Type of the matrices of a kept conversion, by `dtype`; `dtype` may also be one of GGUF's types, such as q8_0."""

PARAMETERS: dict[str, Callable[[Any], Any]] = {
    **{name: EXTRA[name] for name in ("repetition_penalty", "min_p", "typical_p", "suppress_tokens")},
    **{name: EXTRA[name] for name in ("stop_token_ids", "ignore_eos")},
    "presence_penalty": float,
    "frequency_penalty": float,
}
_THEIR_NAMES = {"repetition_penalty": "repeat_penalty"}

BATCH_ROWS = 64
USUAL_MODEL_LEN = 8_192  # tokens that memory is taken for when nothing is said; many models could read far more
_SPACE = 'space ::= ""\n'  # a schema's answer is compact


class LlamaCppEngine:
    """A GGUF model.

    Args:
        llama: a loaded `llama_cpp.Llama`.
        info: what was loaded.
        wording: how prompts become its token ids, and ids answers.
        generation: how the checkpoint wants to be asked.
    """

    def __init__(self, llama: Any, info: EngineInfo, wording: Wording, generation: GenerationConfig) -> None:
        self.info = info
        self._llama = llama
        self._wording = wording
        self._generation = generation
        self._decoding = threading.Lock()

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers | Delta]:
        """Answer the prompts, one after the other.

        Raises:
            Fatal: a generation parameter is unknown or out of its range, or the schema cannot be a grammar.
        """
        begun = time.perf_counter()
        options = batch.options
        extra = read_extra(options, PARAMETERS)
        own = own_ends(self._wording.tokenizer, self._generation)
        ends = all_ends(options, self._wording.tokenizer, own, extra.pop("stop_token_ids", ()))
        suppressed = {*extra.pop("suppress_tokens", ()), *(own if extra.pop("ignore_eos", False) else ())}
        said = {_THEIR_NAMES.get(name, name): value for name, value in extra.items()}
        settings = {**_drawn(options, self._generation), **said, "logits_processor": _without(suppressed)}
        read, errors = self._wording.read(batch)
        if errors:
            yield failed(errors, _ms_since(begun))
        telling = Telling(batch.stream, options.stop, self._wording.style.prompt_format)
        for row, asked in sorted(read.items(), key=lambda item: item[1].ids):  # equal beginnings side by side
            new: list[int] = []
            reason = ""
            for reason in self._written(asked, new, ends, options, settings):
                if stop.is_set():
                    return
                if not reason and (delta := telling.more(row, lambda new=new: self._wording.decode([new])[0])):  # type: ignore[misc]
                    yield delta
            yield Answers(
                rows=[row],
                outputs=self._wording.answers([new], ends, options.stop),
                finish_reasons=[reason],
                prompt_tokens=[len(asked.ids)],
                completion_tokens=[len(new)],
                latency_ms=_ms_since(begun),
            )

    def count_tokens(self, batch: Batch) -> list[int]:
        """Tokens of each prompt with all that the chat template adds; 0 for one that cannot be asked."""
        return self._wording.count_tokens(batch)

    def close(self) -> None:
        """Give back the memory."""
        self._llama.close()
        free_memory()

    def _written(
        self, asked: Read, new: list[int], ends: frozenset[int], options: CallOptions, settings: dict[str, Any]
    ) -> Iterator[str]:
        """Add the tokens of an answer to `new`; after each '', 'stop' or 'length'."""
        import llama_cpp

        with self._decoding:
            seed = llama_cpp.LLAMA_DEFAULT_SEED if options.seed is None else row_seed(options.seed, asked.ids)
            self._llama.set_seed(seed & 0xFFFFFFFF)
            with closing(self._llama.generate(asked.ids, grammar=_grammar(options.schema), **settings)) as tokens:
                for token in tokens:
                    new.append(int(token))
                    ended = token in ends or bool(options.stop and self._wording.stopped(new, options.stop))
                    reason = "stop" if ended else "length" if len(new) >= asked.limit else ""
                    yield reason
                    if reason:
                        return


def load(spec: ModelSpec) -> LlamaCppEngine:
    """Load `spec.path`: a .gguf file, a folder with one, or a checkpoint of Hugging Face, which is converted once.

    Options: dtype (of a conversion: auto, float32, float16, or a type of GGUF such as q8_0); max_model_len (tokens of
    prompt and answer); n_gpu_layers; prompt_format or chat_template, instead of the checkpoint's own.

    Raises:
        UserError: engine_missing; the file, the folder or an option is wrong.
        DeployError: the model did not load.
    """
    if find_spec("llama_cpp") is None:
        raise UserError(
            "The engine llama_cpp needs the package llama-cpp-python where the workers run.",
            code="engine_missing",
            hint='Run: pip install "sqlext[llama-cpp]"; it is compiled, which takes some minutes.',
        )
    options = engine_options(spec, OPTIONS)
    path = Path(spec.path)
    own = gguf_model(path)
    checkpoint = None if own else inspect(spec.path, Task.GENERATE)
    # Of a model in several files llama.cpp finds the others by itself.
    file = _converted(checkpoint, str(options.get("dtype", "auto"))) if checkpoint else own[0]
    header = read_gguf(file)
    own_len = header.of_model("context_length")
    length = whole_number(options, "max_model_len") or min(own_len or USUAL_MODEL_LEN, USUAL_MODEL_LEN)
    llama = _loaded(file, length, whole_number(options, "n_gpu_layers"))
    folder = file.parent if checkpoint is None else Path(checkpoint.path)
    style = find_style(folder, str(options.get("prompt_format", "")), str(options.get("chat_template", "")))
    wording, generation = _speak(llama, checkpoint, style, length)
    notes = [f"{file.name}: {', '.join(header.counted)}", f"{llama.context_params.n_threads} threads"]
    if own_len and length < own_len:
        notes.append(f"{length} of {own_len} tokens: backend.max_model_len says another length")
    info = EngineInfo(
        engine="llama_cpp",
        task=Task.GENERATE,
        device="cuda:0" if _offloads() else "cpu",
        dtype=max(header.counted, key=lambda kind: header.counted[kind], default="").lower(),
        max_model_len=length,
        max_batch_rows=BATCH_ROWS,
        max_answer_tokens=spec.defaults.max_tokens or DEFAULT_MAX_TOKENS,
        architectures=checkpoint.architectures if checkpoint else (header.architecture,),
        chat_template=wording.has_template,
        schemas=True,
        streams=True,
        notes=tuple(notes),
    )
    engine = LlamaCppEngine(llama, info, wording, generation)
    try:
        read_extra(spec.defaults, PARAMETERS)
        choice(spec.defaults, generation)
    except Fatal as error:  # a wrong default fails the deployment, not its rows
        engine.close()
        raise UserError(error.message, code=error.code, hint=error.hint) from None
    return engine


def _converted(checkpoint: Checkpoint, dtype: str) -> Path:
    """The checkpoint as a kept GGUF file."""
    kind = KINDS.get(dtype, dtype)
    if dtype == "auto" and checkpoint.dtype == "float32":
        kind = "f32"

    def make(place: Path) -> None:
        convert(Conversion(model=checkpoint.path, target=str(place / "model.gguf"), to=kind))

    return kept_conversion(Path(checkpoint.path), f"{FORM}-{kind}", make) / "model.gguf"


def _loaded(file: Path, length: int, gpu_layers: int | None) -> Any:
    import llama_cpp

    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    layers = gpu_layers if gpu_layers is not None else -1 if _offloads() else 0
    try:
        return llama_cpp.Llama(
            str(file),
            n_ctx=length,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=layers,
            verbose=False,
        )
    except (ValueError, RuntimeError, AssertionError) as error:
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DeployError(
            f'llama.cpp did not load "{file}": {cause[:200]}',
            code="model_not_loaded",
            hint="Check that the installed llama-cpp-python is new enough for the model.",
        ) from None


def _offloads() -> bool:
    import llama_cpp

    return bool(llama_cpp.llama_supports_gpu_offload())


def _speak(llama: Any, checkpoint: Checkpoint | None, style: Any, length: int) -> tuple[Wording, GenerationConfig]:
    if checkpoint is None:
        tokenizer = GgufTokenizer(llama)
        return Wording(tokenizer, style, length), GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    with loading(checkpoint):
        wording = Wording(load_tokenizer(checkpoint), style, length)
        generation = load_generation_config(checkpoint)
    if (end := wording.end_token) is not None:
        end_with(end, generation, wording.tokenizer)
    return wording, generation


def _drawn(options: CallOptions, generation: GenerationConfig) -> dict[str, Any]:
    """How a token is chosen, in llama.cpp's names; what is not said is off."""
    drawn = choice(options, generation)
    return {
        "temp": drawn.get("temperature", 0.0),
        "top_p": drawn.get("top_p", 1.0),
        "top_k": drawn.get("top_k", 0),
        "min_p": 0.0,
    }


def _without(suppressed: set[int]) -> Any:
    """What keeps these tokens from being chosen."""
    if not suppressed:
        return None
    import llama_cpp

    places = sorted(suppressed)

    def suppress(_: Any, scores: Any) -> Any:
        scores[places] = -float("inf")
        return scores

    return llama_cpp.LogitsProcessorList([suppress])


def _grammar(schema: str | None) -> Any:
    if schema is None:
        return None
    from llama_cpp.llama_grammar import LlamaGrammar, json_schema_to_gbnf

    try:
        rules = json_schema_to_gbnf(schema).splitlines(keepends=True)
        return LlamaGrammar.from_string(
            "".join(_SPACE if rule.startswith("space ::=") else rule for rule in rules), verbose=False
        )
    except Exception as error:  # it refuses in many ways
        raise Fatal(
            f"llama.cpp makes no grammar of the schema: {type(error).__name__}.",
            code="schema_unsupported",
            hint='Write a simpler type, or deploy the model with !llm setup "infer_backend=transformers".',
        ) from None


def _ms_since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1000.0
