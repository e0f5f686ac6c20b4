"""`prompt(template, columns)`: a prompt for every row, with fields in an order that gives long equal beginnings.

`{name}` in the template stands for that field of `columns`. `{*}` stands for all fields that are not named, as lines
`name: value`, and allows their order to be chosen: engines that keep what they have read of one prompt need not read
the same beginning of the next one again. Prompts are cache keys, so an order is decided once and then stays.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from runtime.errors import UserError, did_you_mean

PARAMETERS = ("VARCHAR", "MAP(VARCHAR, VARCHAR)", "VARCHAR")
"""SQL types of the function behind the macro: template, fields as texts, fields as JSON (for nested values)."""

MACRO = (
    "prompt(template, columns) AS "
    "prompt__udf(template::VARCHAR, columns::MAP(VARCHAR, VARCHAR), to_json(columns)::VARCHAR)"
)

ALL = "*"
_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SAMPLE = 20_000  # values that an order is decided from
ENOUGH_ROWS = 16  # to decide an order
_JSON = json.JSONDecoder()

_Names: TypeAlias = tuple[str, ...]
_Columns: TypeAlias = Mapping[str, Sequence[str | None]]


@dataclass(frozen=True, slots=True)
class Template:
    """A template that fits the fields.

    Attributes:
        literals: the texts around the fields, one more than there are fields.
        fields: name of each field as `columns` spells it, or '*'.
        rest: the fields that '*' stands for, in the order of `columns`.
    """

    literals: tuple[str, ...]
    fields: _Names
    rest: _Names

    @classmethod
    @lru_cache(maxsize=1024)
    def read(cls, text: str, names: _Names) -> Template:
        """Find the fields in a template.

        Raises:
            UserError: prompt_field: there is no such field; prompt_template: a brace stands alone.
        """
        spelled = {name.lower(): name for name in names} | {name: name for name in (*names, ALL)}
        literals, fields, end = [""], [], 0
        for match in _PARTS.finditer(text):
            literals[-1] += text[end : match.start()]
            end = match.end()
            if match[0] in {"{{", "}}"}:
                literals[-1] += match[0][0]
                continue
            said = match[1]
            if said is None:
                raise _lone_brace(match.start())
            field = spelled.get(said) or spelled.get(said.lower())
            if field is None:
                raise _no_such_field(said, names, match.start())
            fields.append(field)
            literals.append("")
        literals[-1] += text[end:]
        return cls(tuple(literals), tuple(fields), tuple(name for name in names if name not in fields))

    def fill(self, columns: _Columns, rest: Sequence[str]) -> Iterable[str]:
        """One prompt for each row, with the fields of '*' in the order `rest`; without any field it does not end."""
        parts: list[Iterable[str]] = [itertools.repeat(self.literals[0])]
        for field, literal in zip(self.fields, self.literals[1:], strict=True):
            parts.append(_lines(columns, rest) if field == ALL else [value or "" for value in columns[field]])
            parts.append(itertools.repeat(literal))
        return map("".join, zip(*parts, strict=False))


def _lines(columns: _Columns, names: Sequence[str]) -> Iterable[str]:
    """For each row the fields as lines; a field that is NULL has none. Without fields this does not end."""
    if not names:
        return itertools.repeat("")
    shown = [[None if v is None else f"{name}: {v}" for v in columns[name]] for name in names]
    return ["\n".join(filter(None, row)) for row in zip(*shown, strict=True)]


def _lone_brace(position: int) -> UserError:
    return UserError(
        f"The template of prompt() has a single brace at character {position + 1}.",
        code="prompt_template",
        hint="Write {name} for a field, {*} for all others, and {{ or }} for a brace.",
    )


def _no_such_field(said: str, names: _Names, position: int) -> UserError:
    # What is no identifier may be any text between braces: it is not repeated.
    shown = f'"{said}"' if said.isidentifier() else f"as at character {position + 1}"
    near = did_you_mean(said, names)
    return UserError(
        f"The template of prompt() names a field {shown} that the columns do not have.",
        code="prompt_field",
        hint=(f"Did you mean {{{near}}}? " if near else f"Fields: {', '.join(names)}. ")
        + "Braces that are text are written {{ and }}.",
    )


class PromptOrders:
    """The order of the fields that `{*}` stands for, by template and field names. Thread-safe.

    It is decided from the first chunk of 16 rows or more, and then stays: equal rows give equal prompts. Fewer rows
    have their fields as they stand in `columns`, and so have all others of their statement.

    Args:
        recall: what was remembered under a key, also by other processes; None: nothing.
        remember: keeps a text under a key. When two processes do so at once, what `recall` then answers counts.
    """

    def __init__(
        self,
        recall: Callable[[str], str | None] | None = None,
        remember: Callable[[str, str], None] | None = None,
    ) -> None:
        kept: dict[str, str] = {}
        self._recall = recall or kept.get
        self._remember = remember or kept.__setitem__
        self._orders: dict[tuple[str, _Names], _Names] = {}
        self._undecided: set[tuple[str, _Names]] = set()
        self._lock = threading.Lock()

    def order(self, template: str, columns: _Columns, rest: _Names) -> _Names:
        """The order of the fields `rest`, decided from `columns` when it is not known yet."""
        known = self._orders.get((template, rest))
        if known is not None:
            return known
        with self._lock:
            key = "prompt_order:" + hashlib.sha256(json.dumps([template, rest]).encode()).hexdigest()
            known = self._orders.get((template, rest)) or _valid(self._recall(key), rest)
            if known is None:
                known = self._decided(key, columns, rest)
                if known is None:
                    known = rest
                    self._undecided.add((template, rest))
            self._orders[template, rest] = known
            return known

    def new_statement(self) -> None:
        """A statement begins: what an earlier one had too few rows for may be decided now."""
        with self._lock:
            for undecided in self._undecided:
                self._orders.pop(undecided, None)
            self._undecided.clear()

    def forget(self) -> None:
        """Decide anew, unless a decision is remembered elsewhere."""
        with self._lock:
            self._orders.clear()
            self._undecided.clear()

    def _decided(self, key: str, columns: _Columns, rest: _Names) -> _Names | None:
        if len(columns[rest[0]]) < ENOUGH_ROWS:
            return None
        chosen = best_order({name: columns[name] for name in rest})
        self._remember(key, json.dumps(chosen))
        return _valid(self._recall(key), rest) or chosen

    def prompts(self, templates: pa.ChunkedArray, fields: pa.ChunkedArray, objects: pa.ChunkedArray) -> pa.Array:
        """The Arrow function behind the macro: a prompt for each row, NULL where the template or the fields are.

        Raises:
            UserError: as `Template.read`.
        """
        texts: list[str | None] = templates.to_pylist()
        rows = _Rows(fields, objects)
        answers: list[str | None] = [None] * len(texts)
        groups: dict[tuple[str, _Names], list[int]] = {}
        for index, text in enumerate(texts):
            if text is not None and (names := rows.names[index]) is not None:
                groups.setdefault((text, names), []).append(index)
        for (text, names), indices in groups.items():
            template = Template.read(text, names)
            columns = rows.columns(names, indices)
            chosen = template.rest
            if ALL in template.fields and chosen:
                chosen = self.order(text, columns, chosen)
            for index, answer in zip(indices, template.fill(columns, chosen), strict=False):
                answers[index] = answer
        return pa.array(answers, pa.string())


class _Rows:
    """The fields of a chunk's rows as texts: lists and structs as JSON, all else as DuckDB writes it.

    Attributes:
        names: of each row's fields; None for a row that is NULL.
    """

    def __init__(self, fields: pa.ChunkedArray, objects: pa.ChunkedArray) -> None:
        maps = fields.combine_chunks()
        keys: list[str] = maps.keys.to_pylist()
        offsets = maps.offsets.to_numpy()
        self._values: list[str | None] = maps.items.to_pylist()
        self._starts: list[int] = offsets.tolist()
        edges = zip(self._starts, self._starts[1:], maps.is_valid().to_pylist(), strict=False)
        self.names: list[_Names | None] = [tuple(keys[low:high]) if valid else None for low, high, valid in edges]
        like_nested = pc.match_substring_regex(maps.items, r"^[\[{]").fill_null(False).to_numpy(zero_copy_only=False)
        found = np.flatnonzero(like_nested)
        written = objects.to_pylist() if len(found) else []
        rows = np.searchsorted(offsets, found, side="right") - 1
        for position, row in zip(found.tolist(), rows.tolist(), strict=True):
            self._values[position] = _nested(written[row]).get(keys[position], self._values[position])

    def columns(self, names: _Names, rows: Sequence[int]) -> _Columns:
        """The fields of some rows that all have these names."""
        values, starts = self._values, [self._starts[row] for row in rows]
        return {name: [values[start + number] for start in starts] for number, name in enumerate(names)}


def _nested(written: str) -> dict[str, str]:
    """The fields of a JSON object that are lists or objects themselves, as they are written in it.

    DuckDB writes an object without blanks: one character stands between a name and its value, and behind that.
    """
    found = {}
    at = 1
    while at < len(written) - 1:
        name, at = _JSON.raw_decode(written, at)
        _, end = _JSON.raw_decode(written, at + 1)
        if written[at + 1] in "[{":
            found[name] = written[at + 1 : end]
        at = end + 1
    return found


def _valid(kept: str | None, names: _Names) -> _Names | None:
    """A remembered order, if it is one of these names."""
    order = tuple(json.loads(kept)) if kept else ()
    return order if sorted(order) == sorted(names) else None


def best_order(columns: _Columns) -> _Names:
    """The order of fields with which sorted rows have most text in common with the row before.

    Sorted rows repeat the fields c1 … ci of the row before, but for as many rows as there are different (c1 … ci). So
    what is read anew are Σ length(ci) · distinct(c1 … ci) characters: the prefix hits of Liu et al., "Optimizing LLM
    Queries in Relational Data Analytics Workloads" (MLSys 2025), for one order of all rows. It is built from the
    front; of two fields the one that makes the sum smaller with the other right behind it comes first. So a long
    field that often repeats leads, and one that is different in each row ends, however long it is; fields that the
    ones before them determine follow these.

    Args:
        columns: values by field, in the order that holds where nothing speaks for another one.
    """
    count = max(2, _SAMPLE // len(columns))
    sample = {name: values[:count] for name, values in columns.items()}
    lengths = {name: sum(len(name) + 3 + len(v) for v in values if v is not None) for name, values in sample.items()}
    order: list[str] = []
    rest = list(sample)
    begun: Sequence[int] = [0] * len(sample[rest[0]])
    while rest:
        best = rest[0]
        for other in rest[1:]:
            both = _distinct(begun, sample[best], sample[other])
            first = lengths[best] * (both - _distinct(begun, sample[best]))
            if lengths[other] * (both - _distinct(begun, sample[other])) > first:
                best = other
        order.append(best)
        rest.remove(best)
        numbers: dict[tuple[int, str | None], int] = {}
        begun = [numbers.setdefault(pair, len(numbers)) for pair in zip(begun, sample[best], strict=True)]
    return tuple(order)


def _distinct(*columns: Sequence[object]) -> int:
    return len(set(zip(*columns, strict=True)))
