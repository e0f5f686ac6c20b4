"""Settings and options against the one table."""

from __future__ import annotations

import pytest

from runtime.errors import Place, UserError
from runtime.spec import PoolSpec
from sqlext import option_table, options
from sqlext.parser import PRESET_NAMES
from sqlext.statements import Option, Run, Scalar

PLACE = Place(3, 7)


def option(key: str, value: Scalar) -> Option:
    return Option(key, value, PLACE)


def values(scope: str, *pairs: tuple[str, Scalar]) -> dict[str, object]:
    return dict(options.resolve([option(*pair) for pair in pairs], scope).values)


@pytest.mark.parametrize("scope", options.scopes())
def test_no_two_options_of_a_scope_share_a_name(scope: str) -> None:
    """Names and aliases are distinct, also without regard to case and underscores."""
    names = [
        name.lower().replace("_", "")
        for spec in option_table.TABLE
        if scope in spec.scopes
        for name in (spec.name, *spec.aliases)
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("spec", option_table.TABLE, ids=lambda spec: f"{spec.scopes[0]}:{spec.name}")
def test_every_option_is_declared_in_full(spec: option_table.OptionSpec) -> None:
    """It has one line of explanation, known scopes, and a default that is allowed."""
    assert spec.doc
    assert spec.doc.endswith(".")
    assert "\n" not in spec.doc
    assert spec.scopes
    assert set(spec.scopes) <= {"setup", "TableRepartition", *(action.name for action in options.ACTIONS)}
    if spec.default is not None:
        assert isinstance(spec.default, str | int | float | bool)
        for scope in spec.scopes:
            assert values(scope, (spec.name, spec.default)) == {spec.name: spec.default}


def test_the_parser_and_the_table_know_the_same_presets() -> None:
    """A preset that parses has its defaults."""
    assert tuple(options.PRESETS) == PRESET_NAMES


def test_defaults_are_those_of_the_pool() -> None:
    """A session that set nothing deploys as `PoolSpec` says."""
    pool, known = PoolSpec(), options.defaults("single")
    for name in ("num_workers", "gpus_per_worker", "cpus_per_worker", "load_balance"):
        assert known[name] == getattr(pool, name)
    assert known["load_timeout"] == pool.load_timeout_s
    assert known["timeout"] == pool.batch_timeout_s


def test_a_preset_starts_from_the_defaults() -> None:
    """`data` and `retrieval` need no GPU; the others are the plain defaults."""
    assert options.defaults("sft") == options.defaults("single") == options.defaults("setup")
    assert options.defaults("data") == {**options.defaults("single"), "gpus_per_worker": 0.0}


@pytest.mark.parametrize(
    ("scope", "key", "said", "name", "value"),
    [
        ("setup", "num_workers", "2", "num_workers", 2),
        ("setup", "maxConcurrency", "2", "num_workers", 2),
        ("setup", "numWorkers", 2, "num_workers", 2),
        ("setup", "workerMaxConcurrency", "3", "worker_concurrency", 3),
        ("setup", "workerConcurrency", 3.0, "worker_concurrency", 3),
        ("setup", "num_gpus", "0.4", "gpus_per_worker", 0.4),
        ("setup", "gpusPerWorker", "0", "gpus_per_worker", 0.0),
        ("setup", "num_cpus", 2, "cpus_per_worker", 2.0),
        ("setup", "rayAddress", "auto", "ray_address", "auto"),
        ("setup", "modelWaitServerReadyTimeout", "300", "load_timeout", 300.0),
        ("setup", "infer_backend", "ray/vllm", "infer_backend", "vllm"),
        ("setup", "infer_backend", "ray/deepspeed", "infer_backend", "deepspeed"),
        ("setup", "infer_backend", "of_another_package", "infer_backend", "of_another_package"),
        ("setup", "load_balance", "LRU", "load_balance", "lru"),
        ("setup", "resource.master", "0.01", "resource.master", 0.01),
        ("setup", "RESOURCE.Master", "1", "resource.Master", 1.0),
        ("setup", "on_error", "FAIL", "on_error", "fail"),
        ("infer", "udfname", "chat", "udfName", "chat"),
        ("infer", "udf_name", "chat", "udfName", "chat"),
        ("infer", "quatization", "4", "quantization", "4"),
        ("infer", "quantization", True, "quantization", "true"),
        ("infer", "reconnect", "false", "reconnect", False),
        ("infer", "backend.max_model_len", "4096", "backend.max_model_len", 4096),
        ("infer", "backend.gpu_memory_utilization", "0.9", "backend.gpu_memory_utilization", 0.9),
        ("infer", "backend.enforce_eager", "true", "backend.enforce_eager", True),
        ("infer", "backend.dtype", "bfloat16", "backend.dtype", "bfloat16"),
        ("infer", "generation.stop_token_ids", "[7, 8]", "generation.stop_token_ids", (7, 8)),
        ("infer", "generation.stop", "[not json", "generation.stop", "[not json"),
        ("infer", "gen.temperature", 1, "generation.temperature", 1),
        ("infer", "saas.api_key", "12345", "saas.api_key", "12345"),
        ("infer", "saas.retry_count", 3, "saas.retry_count", "3"),
        ("infer", "gpt_url", "ws://x", "saas.gpt_url", "ws://x"),
        ("infer", "prompt_format", '{"user": "{instruction}"}', "prompt_format", '{"user": "{instruction}"}'),
        ("finetune", "sft.int.max_seq_length", "512", "sft.int.max_seq_length", 512),
        ("finetune", "sft.float.learning_rate", "1e-4", "sft.float.learning_rate", 1e-4),
        ("finetune", "sfft.bool.x", "TRUE", "sfft.bool.x", True),
        ("finetune", "sft.str.optim", "adamw", "sft.str.optim", "adamw"),
        ("finetune", "sft.list.betas", "[0.9, 0.95]", "sft.list.betas", (0.9, 0.95)),
        ("finetune", "sft.list.modules", "q_proj, v_proj", "sft.list.modules", ("q_proj", "v_proj")),
        ("finetune", "sft.dict.kwargs", '{"a": 1}', "sft.dict.kwargs", '{"a": 1}'),
        ("benchmark", "num_concurrent_requests", "1,4", "num_concurrent_requests", ("1", "4")),
        ("benchmark", "num_requests", "4", "num_requests", 4),
        ("TableRepartition", "partitionCols", "a,b", "partitionCols", ("a", "b")),
    ],
)
def test_an_option_is_read_in_its_type(scope: str, key: str, said: Scalar, name: str, value: object) -> None:
    """Aliases, case, underscores, patterns and other spellings lead to the table's name and type."""
    found = values(scope, (key, said))
    assert found == {name: value}
    assert type(found[name]) is type(value)


@pytest.mark.parametrize(
    ("scope", "key", "said", "code", "hint"),
    [
        ("setup", "num_worker", "2", "option_unknown", 'Did you mean "num_workers"?'),
        ("setup", "maxConcurency", "2", "option_unknown", 'Did you mean "maxConcurrency"?'),
        ("setup", "xyzzy", "2", "option_unknown", '!llm help "setup"; lists them.'),
        ("setup", "resource", "2", "option_unknown", None),
        ("setup", "resource.", "2", "option_unknown", None),
        ("setup", "udfName", "x", "option_unknown", "It belongs into the WHERE of a RUN, action infer or benchmark or bundle."),
        ("infer", "num_workers", "2", "option_unknown", 'It is a setting: !llm setup "num_workers=…";'),
        ("infer", "udfNam", "x", "option_unknown", 'Did you mean "udfName"?'),
        ("infer", "outputTable", "x", "option_unknown", "It is an option of finetune."),
        ("finetune", "sft.in.max_length", "1", "option_unknown", 'Did you mean "sft.int.max_length"?'),
        ("setup", "num_workers", "two", "option_value", "1 or more."),
        ("setup", "num_workers", "1.5", "option_value", "1 or more."),
        ("setup", "num_workers", True, "option_value", "1 or more."),
        ("setup", "num_workers", float("inf"), "option_value", "1 or more."),
        ("setup", "num_workers", "9" * 5000, "option_value", "1 or more."),
        ("setup", "num_workers", 0, "option_value", "1 or more."),
        ("setup", "num_gpus", "-1", "option_value", "0 or more."),
        ("setup", "num_gpus", "nan", "option_value", "0 or more."),
        ("setup", "timeout", "0", "option_value", "0.001 or more."),
        ("infer", "reconnect", "yes", "option_value", None),
        ("setup", "on_error", "recrod", "option_value", 'Did you mean "record"?'),
        ("setup", "cache", "maybe", "option_value", "Allowed: on, off, read."),
        ("infer", "model", "a_table", "option_value", "Allowed: command."),
        ("infer", "prompt_format", "{broken", "option_value", None),
        ("infer", "prompt_format", "[1]", "option_value", None),
        ("finetune", "sft.list.x", "[" * 100_000, "option_value", None),
        ("finetune", "sft.list.x", "[{}]", "option_value", None),
        ("serve", "port", "70000", "option_value", "From 1 to 65535."),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_clear_error(scope: str, key: str, said: Scalar, code: str, hint: str | None) -> None:
    """Its code, its place, and what to type instead; never the value."""
    with pytest.raises(UserError) as caught:
        values(scope, (key, said))
    assert (caught.value.code, caught.value.place) == (code, PLACE)
    if hint:
        assert caught.value.hint == hint
    assert len(str(caught.value)) < 300


def test_an_option_said_twice_by_two_names_is_an_error() -> None:
    """An alias counts as the option itself, and the error tells where the first stands."""
    with pytest.raises(UserError) as caught:
        options.resolve([Option("num_workers", "2", Place(1, 12)), option("maxConcurrency", "3")], "setup")
    assert caught.value.code == "option_duplicate"
    assert caught.value.hint == "It is first given at line 1, column 12; keep one of them."


def test_old_settings_without_meaning_give_one_notice() -> None:
    """They change nothing, and one line names them all with the reason."""
    found = options.resolve(
        [option("pythonExec", "python"), option("runIn", "executor"), option("num_gpus", 0)], "setup"
    )
    assert dict(found.values) == {"gpus_per_worker": 0.0}
    (notice,) = found.notices
    assert "pythonExec (" in notice
    assert "runIn (" in notice


def test_an_unknown_action_names_the_nearest() -> None:
    """The error stands at the option, not at the statement's beginning."""
    run = Run("run", "command", "LLM", "", (option("action", "infr"),), None, Place(1, 1))
    with pytest.raises(UserError) as caught:
        options.action("infr", run)
    assert (caught.value.place, caught.value.hint) == (PLACE, 'Did you mean "infer"?')
    assert options.action("INFER", run).available


def test_help_lists_actions_and_settings_and_explains_each() -> None:
    """`help` alone, with an action, with a setting, with an option by any of its names."""
    width = {len(row) for row in options.help_rows()}
    assert width == {len(options.HELP_COLUMNS)}
    rows = options.help_rows()
    assert {row[1] for row in rows if row[0] == "action"} == {action.name for action in options.ACTIONS}
    assert "num_workers" in {row[1] for row in rows if row[0] == "setup"}
    assert "udfName" in {row[1] for row in options.help_rows("infer")}
    assert {row[1] for row in options.help_rows("num_gpus")} == {"gpus_per_worker"}
    assert {row[0] for row in options.help_rows("udfname")} == {"infer", "benchmark", "bundle"}


def test_help_about_nothing_known_names_the_nearest() -> None:
    """A misspelled word of help is an error with a way on."""
    with pytest.raises(UserError) as caught:
        options.help_rows("inferr")
    assert caught.value.hint == 'Did you mean "infer"?'
