"""A failure as data: what a worker sends instead of an exception.

An exception of a library in a worker may not exist, or not unpickle, in the process that asked; and its text may
quote a row. So workers send a word and a text, made here.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

from runtime import errors
from runtime.errors import ErrorInfo, SqlextError
from runtime.secrets import quotes, redact
from runtime.spec import Batch, ModelSpec

MAX_TEXT = 200  # characters of a foreign exception's text that are passed on


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of a worker. `kind` is the name of a class in `runtime.errors`."""

    kind: str
    info: ErrorInfo

    def error(self) -> SqlextError:
        """The exception it stands for."""
        kind: type[SqlextError] = getattr(errors, self.kind)
        return kind(self.info.message, code=self.info.code, hint=self.info.hint)


def failure(error: BaseException, spec: ModelSpec, batch: Batch | None = None) -> Failure:
    """`error` as data.

    Ours keep their class, code and text. Running out of memory, in whatever library, is `OutOfMemory`. Anything else
    becomes a `RowError` (so that the row that caused it is found by halving the batch), or a `DeployError` when no
    batch was running, with the place it came from and, unless it quotes a prompt, its text.
    """
    if isinstance(error, SqlextError):
        return Failure(_public_class(error), error.info)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failure("OutOfMemory", ErrorInfo("out_of_memory", "The model ran out of memory."))
    message = f"{type(error).__name__} in {_place(error)}"
    text = _text(error, spec, batch)
    return Failure(
        "RowError" if batch else "DeployError",
        ErrorInfo("engine_failed", f"{message}: {text}" if text else f"{message}."),
    )


def _public_class(error: SqlextError) -> str:
    """The nearest class of `error` that every process has."""
    return next(kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the engine"


def _text(error: BaseException, spec: ModelSpec, batch: Batch | None) -> str:
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a foreign exception may fail even at that
        return ""
    text = lines[0][: 10 * MAX_TEXT] if lines else ""
    if batch and quotes(text[:MAX_TEXT], batch.prompts, batch.options.system):
        return ""
    return redact(text, spec.options)[:MAX_TEXT]  # not cut before, or half a key would be no key any more
