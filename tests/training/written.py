"""What the tests of training write and read: tables as JSON lines, and sequences as text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.training.token_file import NO_LABEL, TokenFile


def table(file: Path, rows: Iterable[Any]) -> list[Path]:
    """A table of these rows as DuckDB writes it; a text among them stands as it is."""
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return [file]


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    """A row of the form `messages`: question, answer, question, answer, …"""
    turns = [{"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents)]
    return {"messages": [*([{"role": "system", "content": system}] if system is not None else []), *turns]}


def texts(tokenizer: Any, data: TokenFile) -> list[str]:
    """The whole text of each sequence."""
    return [tokenizer.decode(data[place]["input_ids"]) for place in range(len(data))]


def learnt(tokenizer: Any, data: TokenFile) -> list[list[str]]:
    """The text of each stretch of labels that are not -100, per sequence."""
    found = []
    for place in range(len(data)):
        row = data[place]
        assert len(row["input_ids"]) == len(row["labels"])
        stretches: list[list[int]] = [[]]
        for id_, label in zip(row["input_ids"].tolist(), row["labels"].tolist(), strict=True):
            assert label in (id_, NO_LABEL)
            if label == NO_LABEL:
                stretches.append([])
            else:
                stretches[-1].append(label)
        found.append([tokenizer.decode(stretch) for stretch in stretches if stretch])
    return found
