"""Embeddings with sentence-transformers, for every checkpoint that reads text.

Alone because vectors come from sentence-transformers' own modules, exactly as its `encode` gives them.

- A sentence-transformers checkpoint (modules.json) is used as it is, its default prompt included.
- A plain encoder gets mean pooling; a causal language model gets mean pooling and vectors of length 1.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from runtime.checkpoints.inspect import Checkpoint, inspect
from runtime.engines.loading import (
    Placement,
    engine_options,
    free_memory,
    loading,
    place,
    whole_number,
)
from runtime.engines.reading import OPTIONS, answers_to_texts, batch_bounds, piece_of, tokens_of_texts
from runtime.engines.sentences import Read, Sentences
from runtime.spec import Answers, Batch, EngineInfo, ModelSpec, Task


class EmbeddingsEngine:
    """A SentenceTransformer behind the engine protocol.

    Args:
        model: in evaluation mode.
        info: what was loaded; `dimension` is set.
        piece: most rows and padded tokens of one forward.
    """

    def __init__(self, model: SentenceTransformer, info: EngineInfo, piece: tuple[int, int]) -> None:
        self.info = info
        self._model = model
        self._piece = piece
        self._sentences = Sentences(model, info.max_model_len)

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        """Vectors as float32 (rows, dimension), a piece at a time. A text cut to the model's length ends 'length'.

        Raises:
            OutOfMemory: a piece does not fit.
        """
        return answers_to_texts(batch, stop, self._piece, self._sentences.read, self._answer)

    def count_tokens(self, batch: Batch) -> list[int]:
        """Tokens that the model reads of each text."""
        return tokens_of_texts(batch, self._sentences.read)

    def close(self) -> None:
        """Give back the memory."""
        del self._model, self._sentences
        free_memory()

    def _answer(self, read: Read, rows: list[int]) -> tuple[Any, list[str]]:
        """A float32 array (rows, dimension), and how each ended."""
        vectors = self._model(self._sentences.piece(read, rows))["sentence_embedding"].float().cpu().numpy()
        return vectors, self._sentences.finish_reasons(read, rows)


def load(spec: ModelSpec) -> EmbeddingsEngine:
    """Load the checkpoint in `spec.path` for embedding.

    Options: dtype; max_model_len (tokens read of a text).

    Raises:
        UserError: the folder or an option is wrong.
        DeployError: the model did not load.
    """
    options = engine_options(spec, OPTIONS)
    checkpoint = inspect(spec.path, Task.EMBED)
    placement = place(checkpoint, options.get("dtype"))
    with loading(checkpoint):
        model = _load_model(checkpoint, placement)
        if asked := whole_number(options, "max_model_len"):
            model.max_seq_length = min(asked, model.max_seq_length or asked)
    piece = piece_of(placement)
    rows, chars = batch_bounds(piece)
    info = EngineInfo(
        engine="embeddings",
        task=Task.EMBED,
        device=str(model.device),
        dtype=placement.dtype_name,
        dimension=model.get_embedding_dimension(),
        max_model_len=model.max_seq_length,
        max_batch_rows=rows,
        max_batch_chars=chars,
        architectures=checkpoint.architectures,
        notes=placement.notes,
    )
    return EmbeddingsEngine(model, info, piece)


def _load_model(checkpoint: Checkpoint, placement: Placement) -> SentenceTransformer:
    device = str(placement.device)
    arguments = {"dtype": placement.dtype, "use_safetensors": True}
    causal = checkpoint.architectures and checkpoint.architectures[0].endswith(("ForCausalLM", "LMHeadModel"))
    if checkpoint.sentence_transformers or not causal:
        return SentenceTransformer(
            checkpoint.path, device=device, local_files_only=True, trust_remote_code=False, model_kwargs=arguments
        ).eval()
    body = Transformer(  # told to read plain text: with a chat template it would make every text a conversation
        checkpoint.path,
        model_kwargs={**arguments, "local_files_only": True},
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    modules = [body, Pooling(body.get_embedding_dimension(), "mean"), Normalize()]
    return SentenceTransformer(modules=modules, device=device).eval()
