"""From a table's rows to token ids on disk: streamed, in constant memory, and the same in every run.

Alone because it is the one place that knows all steps: a line of JSON, a row of its form, a rendered text, ids, a
sequence. What goes wrong with one row is counted and listed; the others go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.errors import Cancelled, RowError, UserError
from runtime.prompts.chat import Rendered, render_examples
from runtime.prompts.encoding import Encoded, Encoder
from runtime.prompts.style import Style, training_style
from runtime.training.packing import Blocks, Packed, Sequences, Single
from runtime.training.rows import Conversation, Form, form_of, lines_of, read_row, row_of
from runtime.training.token_file import DATA, LOSS, TokenFile, TokenWriter, token_writer
from runtime.training.whole import whole_folder, write_json

__all__ = ["BadRow", "Prepared", "TokenFile", "prepare"]

BATCH_ROWS = 1000
BATCH_CHARS = 1 << 20  # the tokenizer needs some 100 bytes for each token of a batch
MAX_TEXT_CHARS = 4 << 20
LISTED_BAD_ROWS = 1000


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be used: its number in the table, from 1, and why."""

    row: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What became of a table.

    Attributes:
        form: 'messages', 'alpaca', 'moss' or 'text'.
        rows: rows read; `bad_rows` of them could not be used, the first 1,000 are in `bad`.
        examples: conversations or texts that are trained on.
        sequences: rows of the `TokenFile`: examples, packed ones or blocks.
        tokens: of all sequences; `loss_tokens` of them the model is to write itself.
        truncated: examples cut at max_length, by `tokens_cut` tokens together.
        packed: several examples stand in one sequence, with positions of their own.
        packing_efficiency: tokens ÷ (sequences · max_length).
    """

    form: str = ""
    rows: int = 0
    bad_rows: int = 0
    bad: tuple[BadRow, ...] = ()
    examples: int = 0
    sequences: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    packed: bool = False
    packing_efficiency: float = 0.0

    @classmethod
    def read(cls, out: Path) -> Prepared:
        """What `prepare` left in `out`."""
        said = json.loads((out / DATA).read_text(encoding="utf-8"))
        return cls(**{**said, "bad": tuple(BadRow(**each) for each in said["bad"])})


def prepare(
    rows: Sequence[Path],
    out: Path,
    tokenizer: Any,
    *,
    style: Style,
    max_length: int,
    packing: bool = False,
    blocks: bool = False,
    window: int = 2048,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Prepared], None] = lambda _: None,
) -> Prepared:
    """Tokenise the rows of `rows` into the folder `out`, which appears whole or not at all.

    Args:
        rows: files of JSON lines, in their order.
        out: what stands there is replaced.
        tokenizer: a fast one of transformers.
        style: how conversations are written, see `runtime.prompts.style.training_style`.
        max_length: most tokens of a sequence; longer examples are cut.
        packing: several examples in one sequence, with positions that start again.
        blocks: of a table of plain texts: documents joined by the end token and cut into blocks (pretraining).
        window: examples that packing looks at together.
        stop: asked between batches.
        progress: told after each batch.

    Raises:
        UserError: training_columns, training_no_rows, tokenizer_slow, prompt_format.
        Cancelled: `stop` said so; nothing is left.
    """
    work = _Preparation(form_of(rows), tokenizer, training_style(tokenizer, style), max_length)
    with whole_folder(out) as unfinished:
        with token_writer(unfinished) as writer:
            work.begin(writer, packing, blocks, window)
            for lines in _batches(rows):
                if stop():
                    raise Cancelled("The rows were not made ready: somebody has asked the job to stop.")
                work.take(lines)
                progress(work.told())
            told = work.end()
        write_json(unfinished / DATA, asdict(told))
    return told


class _Part(NamedTuple):
    """A text for the tokenizer; a very long one comes in several parts."""

    row: int
    text: Rendered
    is_last: bool


class _Preparation:
    """One run of `prepare`: the way of a batch of lines, and what has been counted."""

    def __init__(self, form: Form, tokenizer: Any, style: Style, max_length: int) -> None:
        self._form = form
        self._tokenizer = tokenizer
        self._style = style
        self._encoder = Encoder(tokenizer)
        self._end_token = self._encoder.end_token(style)
        self._max_length = max_length
        self._held: list[Encoded] = []
        self._bad: list[BadRow] = []
        self._rows = self._bad_rows = self._last_bad = 0
        self._examples = self._truncated = self._tokens_cut = 0

    def begin(self, writer: TokenWriter, packing: bool, blocks: bool, window: int) -> None:
        """Choose how examples become sequences."""
        self._writer = writer
        self._blocks = blocks and self._form.is_text
        self._packed = packing and not self._blocks
        self._sequences: Sequences = Single(writer.write)
        if self._blocks:
            self._sequences = Blocks(writer.write, self._max_length)
        elif self._packed:
            self._sequences = Packed(writer.write, self._max_length, window)

    def take(self, lines: list[bytes]) -> None:
        """The next lines of the table."""
        parts: list[_Part] = []
        for line in lines:
            self._rows += 1
            try:
                for text in self._texts(line):
                    *before, last = _parts(text)
                    parts += [*(_Part(self._rows, each, False) for each in before), _Part(self._rows, last, True)]
            except RowError as error:
                self._refuse(self._rows, error)
        for group in _groups(parts, [len(part.text.text) for part in parts]):
            for part, encoded in zip(group, self._encoder.encode([part.text for part in group]), strict=True):
                self._held.append(encoded)
                if part.is_last:
                    held, self._held = self._held, []
                    self._add(part.row, *self._marked(held))

    def told(self) -> Prepared:
        """The counts so far."""
        written = self._writer
        return Prepared(
            form=self._form.name,
            rows=self._rows,
            bad_rows=self._bad_rows,
            bad=tuple(self._bad),
            examples=self._examples,
            sequences=written.sequences,
            tokens=written.tokens,
            loss_tokens=written.loss_tokens,
            truncated=self._truncated,
            tokens_cut=self._tokens_cut,
            packed=self._packed,
            packing_efficiency=round(written.tokens / max(1, written.sequences * self._max_length), 4),
        )

    def end(self) -> Prepared:
        """Write what is left; the counts.

        Raises:
            UserError: training_no_rows, when no row can be used.
        """
        self._sequences.end()
        told = self.told()
        if not told.examples:
            raise _no_rows(told)
        return told

    def _texts(self, line: bytes) -> list[Rendered]:
        said = read_row(self._form, row_of(line))
        if isinstance(said, str):
            return [Rendered(said, add_special_tokens=True)]
        self._require_questions(said)
        return render_examples(self._tokenizer, said, self._style)

    def _require_questions(self, turns: Conversation) -> None:
        """Refuse empty turns of the user, but where the format adds nothing to them: they are as if left out."""
        prompt_format = self._style.prompt_format
        if prompt_format and prompt_format.verbatim_user:
            return
        if any(turn.role == "user" and not turn.content.strip() for turn in turns):
            raise RowError("A turn of the user is empty.", code="row_empty")

    def _marked(self, held: list[Encoded]) -> tuple[Any, Any]:
        """Ids and marks of an example. One that does not tell that it is over gets the end token."""
        ids = held[0].ids if len(held) == 1 else [id_ for each in held for id_ in each.ids]
        end = self._tokenizer.eos_token_id
        answers: tuple[tuple[int, int], ...] = ((0, len(ids)),)
        ended = ids[-1:] == [end]
        if not self._form.is_text:
            answers = held[0].answers
            ended = self._encoder.is_ended(ids[slice(*answers[-1])], self._end_token)
        if end is not None and not ended:
            answers = (*answers, (len(ids), len(ids) + 1))
            ids = [*ids, end]
        marks = np.zeros(len(ids), np.uint8)
        for start, stop in answers:
            marks[start:stop] = LOSS
        return np.asarray(ids, np.int32), marks

    def _add(self, row: int, ids: Any, marks: Any) -> None:
        cut = 0 if self._blocks else max(0, len(ids) - self._max_length)
        if cut:
            ids, marks = ids[: self._max_length], marks[: self._max_length]
        if not self._blocks and not marks[1:].any():  # nothing stands before the first token
            why = f"No answer is left at max_length={self._max_length}." if cut else "There is nothing to learn."
            self._refuse(row, RowError(why, code="row_too_long" if cut else "row_empty"))
            return
        self._examples += 1
        self._truncated += cut > 0
        self._tokens_cut += cut
        self._sequences.add(ids, marks)

    def _refuse(self, row: int, error: RowError) -> None:
        if row == self._last_bad:  # another example of it is bad already
            return
        self._last_bad = row
        self._bad_rows += 1
        if len(self._bad) < LISTED_BAD_ROWS:
            self._bad.append(BadRow(row, error.code, error.message))


def _parts(text: Rendered) -> list[Rendered]:
    """A very long plain text in several, cut before a line's end or a blank; anything else as it is."""
    whole = text.text
    if len(whole) <= MAX_TEXT_CHARS or not text.add_special_tokens:
        return [text]
    parts: list[Rendered] = []
    start = 0
    while start < len(whole):
        end = start + MAX_TEXT_CHARS
        if end < len(whole):
            end = max(whole.rfind("\n", start + 1, end), whole.rfind(" ", start + MAX_TEXT_CHARS // 2, end), 0) or end
        parts.append(Rendered(whole[start:end], add_special_tokens=start == 0))
        start = end
    return parts


def _batches(rows: Sequence[Path]) -> Iterator[list[bytes]]:
    """Lines in groups of bounded size."""
    lines: list[bytes] = []
    size = 0
    for line in lines_of(rows):
        lines.append(line)
        size += len(line)
        if len(lines) == BATCH_ROWS or size >= BATCH_CHARS:
            yield lines
            lines, size = [], 0
    if lines:
        yield lines


def _groups(parts: list[_Part], sizes: list[int]) -> Iterator[list[_Part]]:
    """Parts in groups of bounded size."""
    start = total = 0
    for place, size in enumerate(sizes):
        total += size
        if total >= BATCH_CHARS:
            yield parts[start : place + 1]
            start, total = place + 1, 0
    if start < len(parts):
        yield parts[start:]


def _no_rows(told: Prepared) -> UserError:
    first = told.bad[0]
    return UserError(
        f"None of the {told.rows:,} rows can be trained on; row {first.row}: {first.message}",
        code="training_no_rows",
        hint="Correct the rows, or raise max_length when answers are cut away.",
    )
