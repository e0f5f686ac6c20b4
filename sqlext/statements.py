"""Statements: one frozen dataclass for each kind of statement a script can hold.

They are the border between the parser and the session: the parser only makes them, the session only reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from runtime.errors import Place

Scalar: TypeAlias = str | int | float | bool
VariableKind: TypeAlias = Literal["text", "defaultParam", "sql"]
SaveMode: TypeAlias = Literal["overwrite", "append", "errorIfExists", "ignore"]
RunVerb: TypeAlias = Literal["run", "train", "predict"]
Algorithm: TypeAlias = Literal["LLM", "TableRepartition"]


@dataclass(frozen=True, slots=True)
class Option:
    """One `key="value"`: the key as typed, the value a text unless it was a bare number, true or false."""

    key: str
    value: Scalar
    place: Place


@dataclass(frozen=True, slots=True)
class Sql:
    """A statement of DuckDB's, verbatim but for `${…}`."""

    text: str
    place: Place


@dataclass(frozen=True, slots=True)
class SetVariable:
    """`SET name='…'`. Kind 'defaultParam' sets only an unset name; 'sql' runs the value and takes its first value."""

    name: str
    value: str
    kind: VariableKind
    place: Place


@dataclass(frozen=True, slots=True)
class Load:
    """``LOAD format.`path` WHERE … AS table``."""

    format: str
    path: str
    options: tuple[Option, ...]
    table: str
    place: Place


@dataclass(frozen=True, slots=True)
class Save:
    """``SAVE mode table AS format.`path` WHERE … PARTITION BY …``; mode as in Byzer, the default errorIfExists."""

    mode: SaveMode
    table: str
    format: str
    path: str
    options: tuple[Option, ...]
    partition_by: tuple[str, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Run:
    """``RUN table AS LLM.`path` WHERE … AS result``."""

    verb: RunVerb
    input_table: str
    algorithm: Algorithm
    path: str
    options: tuple[Option, ...]
    result: str | None
    place: Place


@dataclass(frozen=True, slots=True)
class Setup:
    """`!llm setup preset "key=value" …`; the preset, when there is one, comes before the settings."""

    preset: str | None
    settings: tuple[Option, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Llm:
    """Every other `!llm` form; the verb is its words ('model exists'), `args` what follows them."""

    verb: str
    args: tuple[str, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class ExplainLlm:
    """`EXPLAIN LLM query`."""

    query: str
    place: Place


Statement: TypeAlias = Sql | SetVariable | Load | Save | Run | Setup | Llm | ExplainLlm
