"""How well a text answers a query: any cross-encoder of sentence-transformers, any classifier with one label.

Alone because it reads pairs. Scores are those of CrossEncoder's `predict`: a sigmoid of the model's number, or the
function that the checkpoint names.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TypeAlias

from sentence_transformers import CrossEncoder

from runtime.checkpoints.inspect import inspect
from runtime.engines.loading import engine_options, free_memory, loading, place, whole_number
from runtime.engines.reading import OPTIONS, answers_to, batch_bounds, piece_of, tokens_of
from runtime.engines.sentences import Read, Sentences
from runtime.errors import ErrorInfo, RowError
from runtime.prompts.chat import conversation
from runtime.spec import Answers, Batch, EngineInfo, ModelSpec, Task

_Pairs: TypeAlias = dict[int, tuple[str, str]]


class RerankingEngine:
    """A CrossEncoder behind the engine protocol.

    Args:
        model: in evaluation mode, with one score for each pair.
        info: what was loaded; `max_model_len` tokens of a pair are read.
        piece: most rows and padded tokens of one forward.
    """

    def __init__(self, model: CrossEncoder, info: EngineInfo, piece: tuple[int, int]) -> None:
        self.info = info
        self._model = model
        self._piece = piece
        self._sentences = Sentences(model, info.max_model_len)

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        """A score for each pair, a piece at a time. A pair cut to the model's length ends 'length'.

        Raises:
            OutOfMemory: a piece does not fit.
        """
        return answers_to(*_pairs(batch), stop, self._piece, self._sentences.read, self._answer)

    def count_tokens(self, batch: Batch) -> list[int]:
        """Tokens that the model reads of each pair."""
        return tokens_of(batch, _pairs(batch)[0], self._sentences.read)

    def close(self) -> None:
        """Give back the memory."""
        del self._model, self._sentences
        free_memory()

    def _answer(self, read: Read, rows: list[int]) -> tuple[list[float], list[str]]:
        scores = self._model.activation_fn(self._model(self._sentences.piece(read, rows))["scores"].float())
        return scores.reshape(len(rows)).tolist(), self._sentences.finish_reasons(read, rows)


def _pairs(batch: Batch) -> tuple[_Pairs, dict[int, ErrorInfo]]:
    """Query and text of each row that has both, by index, and the errors of the others."""
    pairs: _Pairs = {}
    errors: dict[int, ErrorInfo] = {}
    for index, prompt in enumerate(batch.prompts):
        try:
            turns = conversation(prompt)
            if len(turns) != 2:
                raise RowError(
                    "A reranker reads a query and a text.", code="prompt_bad", hint="Write rank(query, text)."
                )
            pairs[index] = turns[0].content, turns[1].content
        except RowError as error:
            errors[index] = error.info
    return pairs, errors


def load(spec: ModelSpec) -> RerankingEngine:
    """Load the checkpoint in `spec.path` for reranking.

    Options: dtype; max_model_len (tokens read of a pair).

    Raises:
        UserError: the folder or an option is wrong.
        DeployError: the model did not load.
    """
    options = engine_options(spec, OPTIONS)
    checkpoint = inspect(spec.path, Task.RANK)
    placement = place(checkpoint, options.get("dtype"))
    with loading(checkpoint):
        model = CrossEncoder(
            checkpoint.path,
            device=str(placement.device),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": placement.dtype, "use_safetensors": True},
        ).eval()
    if asked := whole_number(options, "max_model_len"):
        model.max_seq_length = min(asked, model.max_seq_length or asked)
    piece = piece_of(placement)
    rows, chars = batch_bounds(piece)
    info = EngineInfo(
        engine="reranking",
        task=Task.RANK,
        device=str(model.device),
        dtype=placement.dtype_name,
        max_model_len=model.max_seq_length,
        max_batch_rows=rows,
        max_batch_chars=chars,
        architectures=checkpoint.architectures,
        notes=placement.notes,
    )
    return RerankingEngine(model, info, piece)
