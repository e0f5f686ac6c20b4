"""The SQL of the Byzer-LLM document runs as it stands: here, that it reads."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pytest

from sqlext import options
from sqlext.dialects import from_spark
from sqlext.parser import parse, trailing_name
from sqlext.script import split
from sqlext.statements import Load, Run, Setup, SetVariable, Sql, Statement

FILE = Path(__file__).parent / "byzer.sql"
BLOCKS = dict(block.split("\n", 1) for block in FILE.read_text(encoding="utf-8").split("-- block: ")[1:])


def statements(block: str) -> list[Statement]:
    """The block's statements, with the variables that its own SET statements make."""
    variables: dict[str, str] = {}
    found = []
    for chunk in split(BLOCKS[block]):
        statement = parse(chunk, variables)
        if isinstance(statement, SetVariable):
            variables[statement.name] = statement.value
        found.append(statement)
    return found


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_the_document_reads_whole(block: str) -> None:
    """Each statement is told apart, its options are known, and its values have their types."""
    found = statements(block)
    assert len(found) == BLOCKS[block].count(";") - BLOCKS[block].count("days;")
    for statement in found:
        if isinstance(statement, Setup):
            options.resolve(statement.settings, "setup")
        elif isinstance(statement, Run) and statement.algorithm == "LLM":
            word = next((str(it.value) for it in statement.options if it.key == "action"), options.DEFAULT_ACTION)
            options.resolve(statement.options, options.action(word, statement).name)
        elif isinstance(statement, Run):
            options.resolve(statement.options, "TableRepartition")


def test_the_document_has_fifteen_blocks() -> None:
    """None is left out."""
    assert len(BLOCKS) == 15


def test_the_pretraining_block_is_read_in_full() -> None:
    """A block string with JSON, a stray AND, comments between clauses, a variable in a block string."""
    found = statements("pretrain")
    assert [type(it).__name__ for it in found] == ["SetVariable", "Load", "Sql", "Run", "Setup", "Setup", "Run"]
    load, select, repartition, train = found[1], found[2], found[3], found[-1]
    assert isinstance(load, Load)
    assert (load.format, load.path, load.table) == ("text", "file:///data/raw_data/*", "trainData")
    assert isinstance(select, Sql)
    assert trailing_name(select.text) == ("select value as text,file from trainData", "newTrainData")
    assert isinstance(repartition, Run)
    assert (repartition.algorithm, repartition.result) == ("TableRepartition", "finalTrainData")
    assert isinstance(train, Run)
    values = options.resolve(train.options, "finetune").values
    assert json.loads(str(values["deepspeedConfig"]))["optimizer"]["params"]["lr"] == 1e-8
    assert values["sfft.int.max_length"] == 128
    assert values["sfft.bool.setup_nccl_socket_ifname_by_ip"] is True
    assert values["detached"] is True


def test_old_keys_without_meaning_are_told_in_one_notice() -> None:
    """`modelTable` and `model` are accepted, and one line says that they do nothing; keepPartitionNum counts."""
    run = statements("pretrain")[-1]
    assert isinstance(run, Run)
    found = options.resolve(run.options, "finetune")
    (notice,) = found.notices
    assert "model (" in notice
    assert found.values["keepPartitionNum"] is True


def test_the_second_convert_example_is_a_merge() -> None:
    """`convert` with `model_dir` means merging an adapter into its base."""
    run = statements("merge")[-1]
    assert isinstance(run, Run)
    assert options.action("convert", run).name == "merge"
    values = options.resolve(run.options, "merge").values
    assert values["modelNameOrPath"] == "/models/sft/jobs/sft-william/finetune_model/final/pretrained_model"
    assert values["adapterNameOrPath"] == "/models/sft/jobs/sft-william/finetune_model/final"


def test_the_query_of_the_document_becomes_duckdbs() -> None:
    """`map`, `array` and double-quoted strings are translated; the model's function keeps its name."""
    (query,) = statements("query")
    assert isinstance(query, Sql)
    tail = trailing_name(query.text)
    assert tail is not None
    assert tail[1] == "q1"
    con = duckdb.connect()
    con.execute("CREATE MACRO llm_prompt(t, a) AS replace(t, '{0}', a[1])")
    con.execute("CREATE MACRO llm_param(m) AS m")
    con.execute("CREATE MACRO llama2_chat(m) AS m['user_role'] || ':' || trim(m['instruction'], ' \n')")
    assert con.execute(from_spark(tail[0])).fetchall() == [("User:Please remenber my name: Zhu William",)]
