"""A tokenizer of one's own, trained from the table that a model is trained on.

Alone because only a model without a tokenizer needs it: byte-level BPE, so that it can spell anything, with digits
apart, and a token for each mark that conversations are written with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import Cancelled, RowError, UserError
from runtime.prompts.style import Style
from runtime.training.rows import form_of, lines_of, read_row, row_of
from runtime.training.whole import whole_folder

PAD, BOS, EOS = "<pad>", "<s>", "<|end|>"
ROLE_MARKS = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BYTES = 256
MAX_READ_BYTES = 1 << 29
"""Of the table; from a larger one every second row is read, every third, …"""

_MARK = re.compile(r"<\|[^|<>\s]+\|>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>|\[/?INST\]")


def train_tokenizer(
    rows: Sequence[Path],
    vocab_size: int,
    out: Path,
    *,
    style: Style = Style(),  # noqa: B008 - frozen
    stop: Callable[[], bool] = lambda: False,
) -> Any:
    """A tokenizer for the texts of `rows`, saved in the folder `out`, which appears whole or not at all.

    It begins texts with ``<s>`` and ends them with the mark that ends an answer in `style`, else ``<|end|>``. Trained
    on conversations without a style it gets a simple chat template; on plain texts none, as a model of them knows
    none.

    Args:
        rows: files of JSON lines, as for `prepare`.
        vocab_size: most tokens, special ones and the 256 bytes among them.
        stop: asked between rows.

    Raises:
        UserError: option_value, training_columns, training_no_rows.
        Cancelled: `stop` said so; nothing is left.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bos, eos, marks = _marks(style)
    special = list(dict.fromkeys((PAD, bos, eos, *ROLE_MARKS, *marks)))
    if vocab_size < BYTES + len(special):
        raise UserError(
            f"A vocabulary of {vocab_size} tokens is too small.",
            code="option_value",
            hint=f"Take {BYTES + len(special)} or more: the bytes and the special tokens are among them.",
        )
    form = form_of(rows)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(rows, stop), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=[mark for mark in special if mark not in (PAD, bos, eos)],
        chat_template=style.chat_template or (None if style.prompt_format or form.is_text else TEMPLATE),
    )
    _save(made, out)
    return made


def _marks(style: Style) -> tuple[str, str, tuple[str, ...]]:
    """The texts of the tokens that begin and end a text, and all marks of the style."""
    said = style.prompt_format
    if said is None:
        return BOS, EOS, tuple(_MARK.findall(style.chat_template))
    ends = _MARK.findall(said.after_answer)
    begins = _MARK.findall(said.bos)
    texts = (said.bos, said.system, said.user, said.assistant)
    return (
        begins[0] if begins else BOS,
        ends[0] if ends else EOS,
        tuple(mark for text in texts for mark in _MARK.findall(text)),
    )


def _texts(rows: Sequence[Path], stop: Callable[[], bool]) -> Iterator[str]:
    """What is said in the table; bad rows are left to `prepare`."""
    every = sum(file.stat().st_size for file in rows) // MAX_READ_BYTES + 1
    form = form_of(rows)
    for number, line in enumerate(lines_of(rows)):
        if number % every:
            continue
        if stop():
            raise Cancelled("No tokenizer was made: somebody has asked the job to stop.")
        try:
            said = read_row(form, row_of(line))
        except RowError:
            continue
        yield from (said,) if isinstance(said, str) else (turn.content for turn in said)


def _save(tokenizer: Any, out: Path) -> None:
    with whole_folder(out) as unfinished:
        tokenizer.save_pretrained(unfinished)
