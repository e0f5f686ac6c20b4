"""The rows of a job as token ids: prepared once by rank 0, read by all ranks, dealt out in a seeded order.

It stands alone because what a rank reads, and in which order, must be the same after a restart.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from runtime.errors import Cancelled, UserError
from runtime.prompts.style import Style
from runtime.training.folder import JobFolder
from runtime.training.models import saved_tokenizer
from runtime.training.plan import TrainingPlan
from runtime.training.rows import form_of
from runtime.training.token_file import NO_LABEL, TokenFile
from runtime.training.tokenizer import train_tokenizer
from runtime.training.tokens import Prepared, prepare
from runtime.training.whole import write_text

Example: TypeAlias = Mapping[str, Any]
VALID = "valid"
COUNTS = ("rows", "bad_rows", "truncated", "examples", "sequences", "loss_tokens")
_POLL_S = 0.2
_TELL_S = 1.0
_CHUNK = 1 << 16
GROUPED = "group_by_length"
GROUP_BATCHES = 100
"""Batches whose sequences are grouped by length together."""


@dataclass(frozen=True, slots=True)
class Data:
    """Token ids of a job.

    Attributes:
        parts: one for each rank when the table has partitions, else one for all.
        valid: what to evaluate on.
        counts: 'rows', 'bad_rows', 'truncated', … of the training rows, 'valid_rows' and 'valid_bad_rows', for the
            job's status; 'repeated': sequences of shorter partitions that are trained on again in each epoch.
        conversations: rows are conversations, not plain texts.
    """

    parts: tuple[TokenFile, ...]
    valid: TokenFile | None
    counts: Mapping[str, int]
    conversations: bool


def prepared(
    plan: TrainingPlan,
    folder: JobFolder,
    parameters: Mapping[str, Any],
    tokenizer: Any,
    style: Style,
    rank: int,
    *,
    can_pack: bool = True,
) -> Data:
    """The job's data; what lies there from an earlier start is used again.

    Args:
        can_pack: the model can keep the examples of a packed sequence apart.

    Raises:
        UserError: no row can be used; training_partitions; option_value: packing, and the model cannot.
        Cancelled: while rows were tokenised, or waited for.
    """
    tokens = folder.data / "tokens"
    sources = _sources(plan, folder)
    if rank == 0:
        for name, files in sources.items():
            if not (tokens / name).is_dir():
                _prepare(plan, folder, parameters, tokenizer, style, files, tokens / name, can_pack)
        _list_bad_rows(folder, {name: Prepared.read(tokens / name) for name in sources})
    for name in sources:
        wait_for(tokens / name, folder)
    names = [name for name in sources if name != VALID]
    found = [Prepared.read(tokens / name) for name in names]
    counts = {name: sum(getattr(each, name) for each in found) for name in COUNTS}
    if VALID in sources:
        valid = Prepared.read(tokens / VALID)
        counts |= {"valid_rows": valid.rows, "valid_bad_rows": valid.bad_rows}
    if len(names) > 1:  # ranks take equally many steps, so that shorter partitions begin again
        batch = parameters["per_device_train_batch_size"]
        longest = -(-max(each.sequences for each in found) // batch) * batch
        counts["repeated"] = sum(longest - each.sequences for each in found)
    return Data(
        parts=tuple(TokenFile(tokens / name) for name in names),
        valid=TokenFile(tokens / VALID) if VALID in sources else None,
        counts=counts,
        conversations=found[0].form != "text",
    )


def trained_tokenizer(folder: JobFolder, parameters: Mapping[str, Any], style: Style, rank: int) -> Any:
    """A tokenizer of the job's own, trained from its table.

    Raises:
        UserError, Cancelled: see `train_tokenizer`.
    """
    out = folder.data / "tokenizer"
    if rank == 0 and not out.is_dir():
        train_tokenizer(
            table_files(folder), parameters["vocab_size"], out, style=style, stop=lambda: folder.cancelled
        )
    wait_for(out, folder)
    return saved_tokenizer(str(out))


def wait_for(path: Path, folder: JobFolder) -> None:
    """Wait for what rank 0 makes. A rank that fails ends the whole job, so nobody waits for ever.

    Raises:
        Cancelled: the job was asked to stop.
    """
    while not path.exists():
        if folder.cancelled:
            raise Cancelled("The training was cancelled.")
        time.sleep(_POLL_S)


def table_files(folder: JobFolder) -> list[Path]:
    """The files of the training rows, in the order of their partitions."""
    return sorted(folder.data.glob("data*.jsonl"))


def _sources(plan: TrainingPlan, folder: JobFolder) -> dict[str, list[Path]]:
    """The files behind each folder of token ids."""
    files = table_files(folder)
    if plan.partitions > 1:
        if len(files) != plan.ranks:
            raise UserError(
                f"The table has {len(files)} partitions and {plan.ranks} ranks are to train.",
                code="training_partitions",
                hint="Make them equal with TableRepartition, or leave keepPartitionNum out.",
            )
        sources = {f"train-{number:05}": [file] for number, file in enumerate(files)}
    else:
        sources = {"train": files}
    valid = folder.data / "valid.jsonl"
    return sources | ({VALID: [valid]} if valid.exists() else {})


def _prepare(
    plan: TrainingPlan,
    folder: JobFolder,
    parameters: Mapping[str, Any],
    tokenizer: Any,
    style: Style,
    files: Sequence[Path],
    out: Path,
    can_pack: bool,
) -> None:
    blocks = parameters["packing"] and plan.way == "sfft" and form_of(files).is_text
    if not (can_pack or blocks) and plan.parameters.get("packing"):
        raise UserError(
            "packing: the model's layers cannot keep the examples of a sequence apart.",
            code="option_value",
            hint="Leave packing out.",
        )
    total = folder.status().get("rows", 0)
    due = time.monotonic() + _TELL_S

    def tell(made: Prepared) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _TELL_S
            folder.update(doing=f"{made.rows:,} of {total:,} rows read")

    prepare(
        files,
        out,
        tokenizer,
        style=style,
        max_length=parameters["max_seq_length"],
        packing=parameters["packing"] and (can_pack or blocks),
        blocks=blocks,
        stop=lambda: folder.cancelled,
        progress=tell,
    )


def _list_bad_rows(folder: JobFolder, made: Mapping[str, Prepared]) -> None:
    """Numbers and causes of the rows that cannot be used; never their text.

    Of a table in partitions the number is that of the row in its partition, which is named, from 0.
    """
    lines = [json.dumps({**_place(name), **asdict(bad)}) for name, each in made.items() for bad in each.bad]
    if lines:
        folder.logging.mkdir(parents=True, exist_ok=True)
        write_text(folder.bad_rows, "".join(f"{line}\n" for line in lines))


def _place(source: str) -> dict[str, Any]:
    """Which rows a folder of token ids was made from."""
    if source == VALID:
        return {"table": "valid"}
    partition = source.partition("-")[2]
    return {"table": "train", **({"partition": int(partition)} if partition else {})}


class Joined(Dataset):
    """Several token files as one, one after the other."""

    def __init__(self, parts: Sequence[TokenFile]) -> None:
        self._parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        at = bisect_right(self._ends, index)
        return self._parts[at][index - (self._ends[at - 1] if at else 0)]


class Order(Sampler[int]):
    """The order of an epoch: by seed and epoch alone, so that a resumed job reads on where it was.

    With several parts, batches are taken from each in turn, so that rank r gets those of part r; parts that are
    shorter than the longest begin again. It takes 8 bytes of memory for each sequence; grouped by length, up to 28.

    Args:
        parts: token files, or how many sequences each part has.
        batch: sequences of a batch of one rank.
        epoch: tells the present epoch, from 0.
        strategy: 'random', 'sequential', or 'group_by_length': random, but that sequences of about equal length, of
            a hundred batches, make a batch, so that little is padded; of token files only.
    """

    def __init__(
        self,
        parts: Sequence[Sized],
        batch: int,
        seed: int,
        epoch: Callable[[], int],
        *,
        strategy: str = "random",
    ) -> None:
        self._lengths = tuple(len(part) for part in parts)
        self._batch = batch
        self._seed = seed
        self._epoch = epoch
        self._strategy = strategy
        self._tokens = [torch.from_numpy(part.lengths()) for part in parts] if strategy == GROUPED else []  # type: ignore[attr-defined]

    def __len__(self) -> int:
        if len(self._lengths) == 1:
            return self._lengths[0]
        return self._rounds() * self._batch * len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator()
        draw.manual_seed(self._seed + self._epoch())
        orders = [self._order(part, draw) for part in range(len(self._lengths))]
        if len(orders) == 1:
            for chunk in orders[0].split(_CHUNK):
                yield from chunk.tolist()
            return
        starts = [0, *accumulate(self._lengths[:-1])]
        for each in range(self._rounds()):
            for start, order in zip(starts, orders, strict=True):
                wanted = torch.arange(each * self._batch, (each + 1) * self._batch) % len(order)
                yield from (order[wanted] + start).tolist()

    def _order(self, part: int, draw: torch.Generator) -> torch.Tensor:
        if self._strategy == "sequential":
            return torch.arange(self._lengths[part])
        order = torch.randperm(self._lengths[part], generator=draw)
        if self._strategy != GROUPED:
            return order
        order = torch.cat([self._alike(part, some) for some in order.split(GROUP_BATCHES * self._batch)])
        full = len(order) - len(order) % self._batch  # a batch that is not full stays the last
        batches = order[:full].view(-1, self._batch)
        drawn = batches[torch.randperm(len(batches), generator=draw)]
        return torch.cat([drawn.flatten(), order[full:]])

    def _alike(self, part: int, some: torch.Tensor) -> torch.Tensor:
        """These sequences, the longest first, so that neighbours are of about equal length."""
        return some[torch.argsort(self._tokens[part][some], descending=True, stable=True)]

    def _rounds(self) -> int:
        return -(-max(self._lengths) // self._batch)


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes a batch: tensors (sequences, tokens), padded at the right, and `tokens`, the number that is no padding.

    Sequences with positions are packed: they get no attention mask, because transformers keeps attention inside an
    example only then; what is padded there is an example of its own, without loss. Flash attention looks at positions
    only where a batch is one row: there the sequences stand one after the other, and nothing is padded.

    Attributes:
        pad_id: what padding is filled with.
        length: pad to so many tokens; 0 = to the longest of the batch.
        multiple: pad to a multiple of this.
        flat: put packed sequences into one row.
    """

    pad_id: int
    length: int = 0
    multiple: int = 1
    flat: bool = False

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        if self.flat and "position_ids" in examples[0]:
            return _flattened(examples)
        lengths = [len(example["input_ids"]) for example in examples]
        width = -(-max(self.length, *lengths) // self.multiple) * self.multiple
        ids = torch.full((len(examples), width), self.pad_id)
        labels = torch.full((len(examples), width), NO_LABEL)
        for row, (example, n) in enumerate(zip(examples, lengths, strict=True)):
            ids[row, :n] = torch.from_numpy(example["input_ids"])
            labels[row, :n] = torch.from_numpy(example["labels"])
        batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "tokens": sum(lengths)}
        places = torch.arange(width)
        if "position_ids" in examples[0]:
            batch["position_ids"] = torch.stack([_positions(example["position_ids"], places) for example in examples])
            labels[batch["position_ids"] == 0] = NO_LABEL  # nothing in its own example comes before it
        elif min(lengths) < width:
            batch["attention_mask"] = (places < torch.tensor(lengths)[:, None]).long()
        return batch


def _flattened(examples: Sequence[Example]) -> dict[str, Any]:
    row = {name: np.concatenate([example[name] for example in examples])[None] for name in examples[0]}
    row["labels"][row["position_ids"] == 0] = NO_LABEL
    return {**{name: torch.from_numpy(values) for name, values in row.items()}, "tokens": row["labels"].size}


def _positions(of_example: Any, places: torch.Tensor) -> torch.Tensor:
    known = torch.from_numpy(of_example)
    return torch.cat([known, places[: len(places) - len(known)]])
