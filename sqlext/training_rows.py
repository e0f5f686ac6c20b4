"""The rows of a training: which table or folder they come from, and how they get into the job's folder.

Alone because DuckDB itself writes them, streaming, on the user's cursor, where temporary tables and model functions
are known.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from runtime.checkpoints.folder import check_roots
from runtime.errors import UserError
from runtime.training.rows import find_form
from sqlext import repartition
from sqlext.sources import literal
from sqlext.statements import Run

if TYPE_CHECKING:
    from sqlext.connection import Connection


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where rows come from.

    Attributes:
        table: '' when they come from `text_files`.
        valid_table: rows to evaluate on; '' = none.
        text_files: folder of text files.
    """

    connection: Connection
    table: str = ""
    valid_table: str = ""
    text_files: str = ""

    @property
    def name(self) -> str:
        """What to call it."""
        return self.table or self.text_files

    def partitions_for(self, ranks: int) -> int:
        """The number of partitions the table has, which must be the number of ranks.

        Raises:
            UserError: partitions, with the statement that makes them equal.
        """
        with self.connection.own_sql() as execute:
            found = repartition.partitioning_of(execute, self.connection, self.table) if self.table else None
        count = found.count if found else 0
        if count == ranks:
            return count
        has = f"has {count} partitions" if found else "has no partitions"
        table = self.table or "t"
        raise UserError(
            f'keepPartitionNum="true": {self.name} {has}, and the training has {ranks} ranks.',
            code="partitions",
            hint=f'RUN {table} AS TableRepartition.`` WHERE partitionNum="{ranks}" AS {table}_{ranks}; '
            f'then inputTable="{table}_{ranks}"; or leave keepPartitionNum out.',
        )

    def write(self, folder: Path, keep_partitions: bool) -> int:
        """Write the rows as JSON lines; the number of rows to train on.

        Raises:
            UserError: training_no_rows, partition_empty, text_files.
        """
        with self.connection.own_sql() as execute:
            if keep_partitions:
                how = repartition.partitioning_of(execute, self.connection, self.table)
                assert how is not None, "partitions_for has found it"
                count = repartition.write_parts(execute, self.table, folder, how)
            else:
                count = self._copy(execute, folder / "data.jsonl")
            if count == 0:
                raise _no_rows(self.name)
            if self.valid_table:
                query = f"FROM {repartition.quoted(self.valid_table)}"
                if repartition.copy(execute, query, folder / "valid.jsonl") == 0:
                    raise _no_rows(self.valid_table)
        return count

    def _copy(self, execute: Any, file: Path) -> int:
        if self.table:
            return repartition.copy(execute, f"FROM {repartition.quoted(self.table)}", file)
        pattern = os.path.join(glob.escape(self.text_files), "**")
        query = f"SELECT content AS text, filename AS file FROM read_text({literal(pattern)})"
        try:
            return repartition.copy(execute, query, file)
        except duckdb.Error as error:
            raise UserError(
                f'The files in "{self.text_files}" cannot be read: {str(error).partition(chr(10))[0]}',
                code="text_files",
                hint="localDataDir takes a folder of text files in UTF-8.",
            ) from None


def row_source(run: Run, values: Mapping[str, Any], connection: Connection) -> RowSource:
    """Where the statement says that rows come from; its tables are there and have columns to train on.

    Raises:
        UserError: input_table, option_missing, table_unknown, training_columns, text_files.
    """
    before = "" if run.input_table.lower() == "command" else run.input_table
    named = str(values.get("inputTable") or "")
    files = str(values.get("localDataDir") or "")
    said = dict.fromkeys(filter(None, (before, named, files)))
    if len(said) > 1:
        raise UserError(
            f"The statement names two sources of rows: {' and '.join(said)}.",
            code="input_table",
            hint="Keep one: the table after RUN, inputTable, or localDataDir.",
        )
    if not said:
        raise UserError(
            "The statement names no rows to train on.",
            code="option_missing",
            hint='Add AND inputTable="t", or write RUN t AS LLM.',
        )
    source = RowSource(connection, before or named, str(values.get("validTable") or ""), _text_folder(files))
    with connection.own_sql() as execute:
        for table in filter(None, (source.table, source.valid_table)):
            find_form(repartition.columns_of(execute, table))
    return source


def _text_folder(said: str) -> str:
    if not said:
        return ""
    folder = os.path.realpath(os.path.expanduser(said.removeprefix("file://")))
    check_roots(Path(folder))
    if not os.path.isdir(folder):
        raise UserError(
            f'There is no folder "{said}".', code="text_files", hint="localDataDir takes a folder of text files."
        )
    return folder


def _no_rows(table: str) -> UserError:
    return UserError(f"{table} has no rows.", code="training_no_rows", hint="Fill the table before the training.")
