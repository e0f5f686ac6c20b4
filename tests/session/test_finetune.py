"""`action="finetune"`: what a statement becomes, and every mistake found before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_training
import pytest

import sqlext
from runtime.cluster import jobs
from runtime.errors import Cancelled, DeployError, Fatal, UserError
from runtime.training import job_roots
from runtime.training.folder import JobFolder
from runtime.training.plan import TrainingPlan

ROWS = """CREATE TABLE t AS SELECT 'say ' || i AS instruction, 'it' AS output, i AS other FROM range(6) r(i)"""


@pytest.fixture
def con(con: sqlext.Connection, monkeypatch: pytest.MonkeyPatch) -> sqlext.Connection:
    """With a table to train on, and a training that needs no model; nothing of it runs on the cluster's GPUs."""
    monkeypatch.setattr(jobs, "train_on_ranks", fake_training.train)
    con.execute(f'{ROWS}; !llm setup sft "num_gpus=0"')
    return con


@pytest.fixture
def tune(con: sqlext.Connection, checkpoints: dict[str, Path]) -> Callable[..., JobFolder]:
    """tune(key=value, …): the folder of a job that has ended; model, table, name and way unless they are said."""

    def run(head: str = "RUN command AS LLM.``", detached: str = "false", **said: object) -> JobFolder:
        options = {"pretrainedModelType": "sft/llama2", "localModelDir": checkpoints["chat"], "inputTable": "t"}
        options |= {"name": "run", "detached": detached, **{key.replace("__", "."): v for key, v in said.items()}}
        where = " AND ".join(f"`{key}`='''{value}'''" for key, value in options.items() if value is not None)
        con.execute(f"{head} WHERE {where}")
        return job_roots.find(con.fetchone()[0])

    return run


def rows_of(folder: JobFolder, name: str = "data.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.data / name).open()]


def test_a_job_is_made_of_a_statement(
    con: sqlext.Connection, tune: Callable[..., JobFolder], checkpoints: dict[str, Path]
) -> None:
    """Its rows lie in its folder as DuckDB has them; its plan says what was asked, checked."""
    con.execute("CREATE TABLE v AS FROM t LIMIT 2")
    folder = tune(
        validTable="v",
        outputTable="out",
        config='{"lr": 0.5, "epochs": 3}',
        **{"sft__int__max_seq_length": 128, "sft__float__learning_rate": "1e-4", "sft__list__target_modules": "q_proj,v_proj"},
    )  # fmt: skip
    request = folder.request()
    assert (request.name, request.base, request.output_table) == ("run", str(checkpoints["chat"]), "out")
    assert request.plan == TrainingPlan(
        str(folder.path),
        "sft",
        model=str(checkpoints["chat"]),
        parameters={
            "learning_rate": 1e-4,
            "num_train_epochs": 3.0,
            "max_seq_length": 128,
            "target_modules": ["q_proj", "v_proj"],
        },
        ranks=1,
        cpus_per_rank=request.plan.cpus_per_rank,
    )
    assert [row["instruction"] for row in rows_of(folder)] == [f"say {i}" for i in range(6)]
    assert len(rows_of(folder, "valid.jsonl")) == 2
    assert folder.path.parent == job_roots.default_root()


def test_the_action_is_the_default_and_the_table_may_stand_after_run(tune: Callable[..., JobFolder]) -> None:
    """RUN t AS LLM; the path between the backquotes is the model; model_id means the same."""
    assert len(rows_of(tune("RUN t AS LLM.``", inputTable=None))) == 6


def test_a_job_that_is_waited_for_answers_with_its_model_and_makes_its_table(
    con: sqlext.Connection, tune: Callable[..., JobFolder]
) -> None:
    """Figures of the training, as a table of the database under the name that was said."""
    folder = tune(outputTable="tuned", name="run")
    row = con.execute("FROM tuned").fetchall()
    names = [column[0] for column in con.description]
    found = dict(zip(names, row[0], strict=True))
    assert found.pop("seconds") >= 0
    assert found == {
        "job": folder.id,
        "state": "finished",
        "model": str(folder.final),
        "way": "sft",
        "base": folder.request().base,
        "rows": 6,
        "steps": 5,
        "train_loss": 0.5,
        "eval_loss": 0.25,
        "tokens": 500,
    }
    assert con.execute("SELECT temporary FROM duckdb_tables() WHERE table_name = 'tuned'").fetchall() == [(False,)]


def test_a_detached_job_answers_at_once(
    con: sqlext.Connection, tune: Callable[..., JobFolder], tmp_path: Path
) -> None:
    """While it runs; its folder lies under the prefix that was said, and is found there."""
    folder = tune(detached="true", name="wait", localPathPrefix=tmp_path / "jobs")
    assert folder.path.parent == tmp_path / "jobs"
    assert jobs.status(folder)["state"] in ("queued", "running")
    con.execute(f'!llm cancel "{folder.id}"')


def test_a_failure_of_a_job_that_is_waited_for_is_raised(
    con: sqlext.Connection, tune: Callable[..., JobFolder]
) -> None:
    """The job's own error; it stays listed."""
    with pytest.raises(Fatal) as caught:
        tune(name="raise")
    assert caught.value.code == "training_failed"
    assert con.execute("SELECT state FROM llm_jobs").fetchall() == [("failed",)]


def test_ctrl_c_cancels_a_job_that_is_waited_for(con: sqlext.Connection, tune: Callable[..., JobFolder]) -> None:
    """And says how it goes on."""
    con.session.on_job = lambda text: con.interrupt() if "5 of 5" in text else None
    with pytest.raises(Cancelled):
        tune(name="wait")
    assert con.execute("SELECT state FROM llm_jobs").fetchall() == [("cancelled",)]
    assert any("!llm resume" in notice for notice in con.session.notices)


@pytest.mark.parametrize(
    ("setup", "way", "ranks", "gpus"),
    [
        ('"num_gpus=0"', "sft/x", 1, 0.0),
        ('"num_gpus=4"', "sft/x", 4, 1.0),
        ('"num_gpus=2" "num_workers=2"', "sft/x", 4, 1.0),
        ('"num_gpus=0" "num_workers=2"', "sft/x", 2, 0.0),
        ('"num_gpus=3"', "sfft/x", 3, 1.0),
        ('"num_gpus=0" "num_workers=2"', "sfft/x", 2, 0.0),
        ('"num_gpus=0.5" "num_workers=2"', "sfft/x", 2, 0.5),
        ('"num_workers=2"', "sfft/x", 2, 1.0),
    ],
)  # fmt: skip
def test_ranks_follow_from_the_settings(
    con: sqlext.Connection, tune: Callable[..., JobFolder], setup: str, way: str, ranks: int, gpus: float
) -> None:
    """A rank for each GPU, on CPU one for each worker; in both ways of training."""
    con.execute(f'!llm setup sft {setup} "cpus_per_worker=0.25" "resource.master=0.1"')
    plan = tune(pretrainedModelType=way).request().plan
    assert (plan.ranks, plan.gpus_per_rank, plan.cpus_per_rank) == (ranks, gpus, 0.25)
    assert plan.resources == {"master": 0.1}


def test_more_ranks_than_the_cluster_can_hold_are_refused(
    con: sqlext.Connection, tune: Callable[..., JobFolder]
) -> None:
    """Ray would wait for them in silence."""
    con.execute('!llm setup sfft "num_gpus=12"')
    with pytest.raises(DeployError, match="12 ranks"):
        tune(pretrainedModelType="sfft/llama2")


def test_partitions_are_kept(con: sqlext.Connection, tune: Callable[..., JobFolder]) -> None:
    """As many as ranks; else the error holds the statement that makes it so."""
    con.execute('!llm setup sfft "num_gpus=0" "num_workers=2" "cpus_per_worker=1"')
    with pytest.raises(UserError, match="t has no partitions, and the training has 2 ranks") as caught:
        tune(pretrainedModelType="sfft/x", keepPartitionNum="true")
    fix = str(caught.value.hint).partition(";")[0]
    assert fix == 'RUN t AS TableRepartition.`` WHERE partitionNum="2" AS t_2'
    con.execute(fix)
    folder = tune(pretrainedModelType="sfft/x", keepPartitionNum="true", inputTable="t_2")
    assert folder.request().plan.partitions == 2
    assert sorted(file.name for file in folder.data.iterdir()) == [
        "data-00000-of-00002.jsonl",
        "data-00001-of-00002.jsonl",
    ]
    con.execute('RUN t AS TableRepartition.`` WHERE partitionNum="3" AS t_3')
    with pytest.raises(UserError, match="t_3 has 3 partitions, and the training has 2 ranks"):
        tune(pretrainedModelType="sfft/x", keepPartitionNum="true", inputTable="t_3")


def test_a_folder_of_texts_may_stand_in_place_of_a_table(tune: Callable[..., JobFolder], tmp_path: Path) -> None:
    """Each file is a row; folders in it are read too, and its name may hold what a pattern is made of."""
    texts = tmp_path / "my [texts]*"
    (texts / "sub").mkdir(parents=True)
    (texts / "a.txt").write_text("one\ntwo")
    (texts / "sub" / "b.md").write_text("drei ä")
    folder = tune(inputTable=None, localDataDir=texts, pretrainedModelType="sfft/llama2")
    assert sorted(row["text"] for row in rows_of(folder)) == ["drei ä", "one\ntwo"]


def test_weights_of_ones_own_are_fetched_into_the_jobs_folder(
    tune: Callable[..., JobFolder], checkpoints: dict[str, Path]
) -> None:
    """Any address that fsspec knows; the plan has the folder they lie in. No key of the address stays behind."""
    import fsspec

    fsspec.filesystem("memory").put(f"{checkpoints['chat']}/", "/bucket/mine/", recursive=True)
    folder = tune(initial_base_model_ckpt_path="memory://bucket/mine")
    weights = Path(folder.request().plan.weights)
    assert weights == folder.path / "fetched" / "weights"
    assert (weights / "model.safetensors").read_bytes() == (checkpoints["chat"] / "model.safetensors").read_bytes()
    assert folder.request().plan.model == str(checkpoints["chat"])


def test_own_weights_alone_are_the_model(tune: Callable[..., JobFolder], checkpoints: dict[str, Path]) -> None:
    """A whole checkpoint needs no other to give the architecture."""
    plan = tune(localModelDir=None, initial_base_model_ckpt_path=f"file://{checkpoints['chat']}").request().plan
    assert (plan.model, plan.weights) == (str(checkpoints["chat"]), "")


def test_prompt_format_and_chat_template_reach_the_plan(tune: Callable[..., JobFolder], tmp_path: Path) -> None:
    """A template may stand in a file."""
    assert tune(prompt_format=FORMAT).request().plan.prompt_format == FORMAT
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    plan = tune(chat_template=f"file:{tmp_path}/t.jinja").request().plan
    assert (plan.prompt_format, plan.chat_template) == ("", "{{ messages[0].content }}")


def test_old_keys_without_meaning_get_a_notice(con: sqlext.Connection, tune: Callable[..., JobFolder]) -> None:
    """They change nothing."""
    plan = tune(sft__str__report_to="tensorboard", model="command").request().plan
    assert plan.parameters == {}
    assert any("report_to" in notice for notice in con.session.notices)


FORMAT = '{"system": "{instruction}", "user": "{instruction}", "assistant": "{instruction}"}'
MISTAKES: list[tuple[dict[str, object], str, str]] = [
    ({"pretrainedModelType": None}, "option_missing", "how to train"),
    ({"pretrainedModelType": "sftt/llama2"}, "model_type_unknown", 'Did you mean "sft/llama2"?'),
    ({"pretrainedModelType": "custom/auto"}, "model_type_unknown", "no way of training"),
    ({"inputTable": None}, "option_missing", 'inputTable="t"'),
    ({"inputTable": "tt"}, "table_unknown", 'Did you mean "t"?'),
    ({"inputTable": "empty"}, "training_no_rows", "empty has no rows"),
    ({"inputTable": "numbers"}, "training_columns", ""),
    ({"validTable": "numbers"}, "training_columns", ""),
    ({"validTable": "empty"}, "training_no_rows", "empty has no rows"),
    ({"localDataDir": "/tmp"}, "input_table", "two sources"),
    ({"inputTable": None, "localDataDir": "/no/such"}, "text_files", "no folder"),
    ({"localModelDir": None}, "checkpoint_missing", "names no model"),
    ({"localModelDir": "/no/such"}, "checkpoint_missing", "no folder"),
    ({"model_id": "/no/such"}, "option_duplicate", "model_id"),
    ({"initial_base_model_ckpt_path": "/no/such"}, "checkpoint_missing", "no folder"),
    ({"initial_adapter_model_ckpt_path": "/tmp"}, "checkpoint_adapter", "no LoRA adapter"),
    ({"initial_base_model_ckpt_path": "nosuch://x"}, "weights_unreachable", "could not be fetched"),
    ({"sft__int__max_seq_lenght": 5}, "option_unknown", 'Did you mean "max_seq_length"?'),
    ({"sft__int__max_seq_length": 1}, "option_value", "out of range"),
    ({"sfft__int__max_length": 5}, "option_unknown", "belongs to sfft"),
    ({"sft__int__max_length": 5, "sft__int__max_seq_length": 6}, "option_duplicate", "says again"),
    ({"config": '{"learnin_rate": 1}'}, "option_unknown", 'Did you mean "learning_rate"?'),
    ({"config": "{"}, "option_value", "config takes a JSON object"),
    ({"deepspeedConfig": "{'stage': 3}"}, "option_value", "deepspeedConfig takes a JSON object"),
    ({"deepspeedConfig": '{"zero_optimization": {"stage": 7}}'}, "deepspeed_config", ""),
    ({"deepspeedConfig": "{}", "sft__str__strategy": "fsdp"}, "deepspeed_contradiction", "Leave one of them out."),
    ({"prompt_format": '{"user": "{instruction}"}'}, "prompt_format", "is missing"),
    ({"chat_template": "{% for"}, "chat_template", ""),
    ({"chat_template": "{{ messages }}", "prompt_format": FORMAT}, "option_value", "each replaces the other"),
    ({"quantization": "3"}, "option_value", ""),
    ({"quantization": "4", "sft__bool__full": "true"}, "option_value", "cannot be trained"),
    ({"quantization": "4", "pretrainedModelType": "sfft/x"}, "option_value", "cannot be trained"),
    ({"name": "../x"}, "option_value", "no name for a job"),
    ({"localPathPrefix": "/proc/none"}, "job_folder", "cannot be made"),
    ({"partitionNum": "2"}, "option_unknown", "TableRepartition"),
    ({"sft__int__max_seq_length": 513}, "option_value", "512 tokens"),
    ({"pretrainedModelType": "sfft/x", "sfft__int__hidden_size": 8}, "option_value", "shapes a new model"),
    ({"sft__str__tokenizer_path": "/tmp"}, "checkpoint_no_tokenizer", "no tokenizer"),
    ({"outputTable": "t"}, "output_table", "that the training reads"),
    ({"outputTable": "T"}, "output_table", "that the training reads"),
    ({"outputTable": "main.t"}, "output_table", "no outcome"),
    ({"outputTable": "numbers"}, "output_table", "no outcome"),
    ({"outputTable": "seen"}, "output_table", "a view of this name"),
    ({"outputTable": "passing"}, "output_table", "a temporary table of this name"),
    ({"outputTable": "nosuch.out"}, "output_table", "does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "code", "told"), MISTAKES)
def test_mistakes_are_found_before_anything_starts(
    con: sqlext.Connection, tune: Callable[..., JobFolder], said: dict[str, object], code: str, told: str
) -> None:
    """A clear error with its place; no folder is left and no job listed."""
    con.execute("CREATE TABLE numbers AS SELECT 1 AS x, 2 AS y; CREATE TABLE empty AS FROM t LIMIT 0")
    con.execute("CREATE VIEW seen AS FROM t; CREATE TEMP TABLE passing AS FROM t")
    with pytest.raises(UserError) as caught:
        tune(**said)
    assert caught.value.code == code
    assert told in str(caught.value)
    assert caught.value.place is not None
    assert con.execute("SELECT count(*) FROM llm_jobs").fetchone() == (0,)
    assert list(job_roots.default_root().glob("*-*")) == []
    assert con.execute("SELECT count(*) FROM t").fetchone() == (6,)


def test_an_output_table_takes_the_place_of_an_earlier_outcome_alone(
    con: sqlext.Connection, tune: Callable[..., JobFolder], tmp_path: Path
) -> None:
    """In a schema or another database too; a database that is read-only is found before anything starts."""
    con.execute("CREATE SCHEMA s")
    for name in ("s.tuned", "tuned"):
        first, second = tune(outputTable=name), tune(outputTable=name)
        assert con.execute(f"SELECT job FROM {name}").fetchall() == [(second.id,)] != [(first.id,)]
    con.execute(f"ATTACH '{tmp_path}/other.db' AS other; CREATE TABLE other.x AS SELECT 1; DETACH other")
    con.execute(f"ATTACH '{tmp_path}/other.db' AS other (READ_ONLY)")
    with pytest.raises(UserError, match="read-only") as caught:
        tune(outputTable="other.out")
    assert caught.value.code == "output_table"


def test_an_adapter_of_another_kind_is_found_before_anything_starts(
    tune: Callable[..., JobFolder], tmp_path: Path
) -> None:
    """peft has many; training goes on from LoRA's."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(UserError, match="no plain LoRA") as caught:
        tune(initial_adapter_model_ckpt_path=tmp_path)
    assert caught.value.code == "checkpoint_adapter"


def test_a_model_without_weights_takes_those_that_are_named(
    tune: Callable[..., JobFolder], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The document's own weights: the model is configuration and tokenizer, the weights are a folder of their own."""
    bare, weights = tmp_path / "bare", tmp_path / "weights"
    shutil.copytree(checkpoints["chat"], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    weights.mkdir()
    shutil.copy(checkpoints["chat"] / "model.safetensors", weights)
    plan = tune(localModelDir=bare, initial_base_model_ckpt_path=weights).request().plan
    assert (plan.model, plan.weights) == (str(bare), str(weights))
    with pytest.raises(UserError) as caught:
        tune(localModelDir=bare)
    assert caught.value.code == "checkpoint_no_weights"


def test_a_moved_job_finds_what_was_fetched(tune: Callable[..., JobFolder], tmp_path: Path) -> None:
    """Its request names it as seen from its folder."""
    import fsspec
    import models

    model = models.language_model(tmp_path / "model")
    fsspec.filesystem("memory").put(f"{model}/", "/bucket/moved/", recursive=True)
    folder = tune(localModelDir="memory://bucket/moved")
    moved = JobFolder(folder.path.rename(tmp_path / folder.id))
    plan = moved.request().plan
    assert (plan.folder, plan.model) == (str(moved.path), str(moved.path / "fetched" / "model"))
    assert (Path(plan.model) / "config.json").is_file()


def test_it_is_said_when_the_best_model_is_not_kept(con: sqlext.Connection, tune: Callable[..., JobFolder]) -> None:
    """Evaluations after epochs and checkpoints after steps never meet."""
    con.execute("CREATE TABLE v AS FROM t LIMIT 2")
    tune(validTable="v", sft__str__save_strategy="steps", sft__int__save_steps=2)
    assert not any("best" in notice for notice in con.session.notices)
    tune(validTable="v", sft__str__save_strategy="steps", sft__str__eval_strategy="epoch")
    assert any("Not the best model is kept" in notice for notice in con.session.notices)


def test_paths_are_held_to_the_allowed_roots(
    tune: Callable[..., JobFolder], checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's folder, the texts and addresses, as well as the model."""
    monkeypatch.setenv("SQLEXT_ROOTS", str(checkpoints["chat"]))
    for said in (
        {"localPathPrefix": tmp_path},
        {"inputTable": None, "localDataDir": tmp_path},
        {"initial_base_model_ckpt_path": "memory://bucket"},
        {"initial_adapter_model_ckpt_path": tmp_path},
    ):
        with pytest.raises(UserError) as caught:
            tune(**said)
        assert caught.value.code == "checkpoint_outside_roots"
