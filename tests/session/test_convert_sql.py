"""Converting, merging and serving adapters in SQL, in the spellings of the documents too."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file

import sqlext
from runtime.errors import UserError
from runtime.spec import ModelSpec
from sqlext.deploy import model_spec
from sqlext.options import resolve
from sqlext.parser import parse
from sqlext.script import split
from sqlext.statements import Run

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
import trained

PROMPTS = "(VALUES ('good morning'), ('select name'), ('the fox'), ('how are you')) t(p)"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model."""
    return models.language_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """What a LoRA training leaves: an adapter with a copy of its base inside."""
    folder = tmp_path_factory.mktemp("job") / "finetune_model"
    trained.adapter(base, folder / "final", target_modules="all-linear", r=8, lora_alpha=64)
    shutil.copytree(base, folder / "final" / "pretrained_model")
    return folder


def row(con: sqlext.Connection, script: str) -> dict[str, object]:
    """The one row of a statement."""
    table = con.execute(script).to_arrow_table()
    assert table.num_rows == 1
    return table.to_pylist()[0]


def test_the_documents_merge(con: sqlext.Connection, job: Path) -> None:
    """The second convert example of the Byzer-LLM document merges an adapter and its base."""
    made = row(
        con,
        f"""!byzerllm setup single;
        run command as LLM.`` where
        action="convert"
        and pretrainedModelType="deepspeed/llama"
        and model_dir="{job}/final/pretrained_model"
        and checkpoint_dir="{job}/final"
        and savePath="{job}/merge";""",
    )
    assert (made["path"], made["dtype"], made["max_logit_difference"]) == (f"{job}/merge", "float32", None)
    assert "model.safetensors" in made["files"]


def test_the_documents_convert(con: sqlext.Connection, base: Path, tmp_path: Path) -> None:
    """The first one turns an epoch of a training into a model; a result table keeps the row."""
    epoch = trained.perturbed(base, tmp_path / "checkpoints" / "Epoch-1")
    con.execute(
        f"""!byzerllm setup single;
        run command as LLM.`` where
        action="convert"
        and pretrainedModelType="deepspeed/llama3b"
        and modelNameOrPath="{base}"
        and checkpointDir="{tmp_path}/checkpoints"
        and tag="Epoch-1"
        and savePath="{tmp_path}/my_3b"
        as made;"""
    )
    assert con.sql("SELECT path, bytes > 0, parameters > 0 FROM made").fetchall() == [
        (f"{tmp_path}/my_3b", True, True)
    ]
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "my_3b", epoch))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_merge_by_its_own_name(con: sqlext.Connection, job: Path, base: Path, tmp_path: Path) -> None:
    """With the spelling of Byzer's merge, with the path between backquotes, and with a check of the logits."""
    for number, (path, said) in enumerate(
        [
            (
                "",
                f'adapterNameOrPath="{job}/final" AND model_name_or_path="{base}" AND pretrainedModelType="lora/llama"',
            ),
            (f"{job}/final", 'dtype="bfloat16" AND check="true"'),
        ]
    ):
        made = row(
            con, f'RUN command AS LLM.`{path}` WHERE action="merge" AND {said} AND savePath="{tmp_path}/{number}"'
        )
        difference = made["max_logit_difference"]
        assert 0 < float(str(difference)) < 5 if number else difference is None
    assert made["dtype"] == "bfloat16"


def test_formats_in_sql(con: sqlext.Connection, base: Path, tmp_path: Path) -> None:
    """safetensors to .bin, which is read again only when allowed; then GGUF; overwrite replaces."""
    run = 'RUN command AS LLM.`{}` WHERE action="convert" AND to="{}" AND savePath="{}"'
    row(con, run.format(base, "bin", tmp_path / "bin"))
    with pytest.raises(UserError, match='allow_pickle="true"') as raised:
        con.execute(run.format(tmp_path / "bin", "bfloat16", tmp_path / "bf16"))
    assert raised.value.code == "checkpoint_pickled"
    assert raised.value.place
    made = row(con, run.format(tmp_path / "bin", "safetensors", tmp_path / "back") + ' AND allow_pickle="true"')
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    with pytest.raises(UserError) as raised:
        con.execute(run.format(base, "q8_0", tmp_path / "back"))
    assert raised.value.code == "output_exists"
    made = row(con, run.format(base, "q8_0", tmp_path / "back") + " AND overwrite=true AND check=true")
    assert made["files"] == ["model-q8_0.gguf"]
    assert 0 < float(str(made["max_logit_difference"])) < 1


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ('action="convert" AND to="bin"', "option_missing"),
        ('action="convert" AND modelNameOrPath="{base}" AND to="bin"', "output_missing"),
        ('action="convert" AND modelNameOrPath="{base}" AND savePath="{out}" AND to="safetensor"', "option_value"),
        ('action="convert" AND modelNameOrPath="{base}" AND savePth="{out}" AND to="bin"', "option_unknown"),
        ('action="convert" AND modelNameOrPath="/nowhere" AND savePath="{out}" AND to="bin"', "checkpoint_missing"),
        ('action="merge" AND savePath="{out}"', "option_missing"),
        ('action="merge" AND adapterNameOrPath="{base}" AND savePath="{out}"', "checkpoint_adapter"),
        (
            'action="convert" AND pretrainedModelType="depspeed/x" AND modelNameOrPath="{base}" AND savePath="{out}"'
            ' AND to="bin"',
            "model_type_unknown",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(
    con: sqlext.Connection, base: Path, tmp_path: Path, said: str, code: str
) -> None:
    """One clear error with code, place and hint, and nothing made."""
    with pytest.raises(UserError) as raised:
        con.execute(f"RUN command AS LLM.`` WHERE {said.format(base=base, out=tmp_path / 'out')}")
    assert raised.value.code == code
    assert raised.value.place
    assert raised.value.hint
    assert not list(tmp_path.iterdir())


def test_it_takes_no_table(con: sqlext.Connection, base: Path) -> None:
    """A table that would not be read is an error."""
    for action in ("convert", "merge"):
        with pytest.raises(UserError) as raised:
            con.execute(f'RUN goods AS LLM.`{base}` WHERE action="{action}"')
        assert raised.value.code == "input_table"


def test_progress_is_told_and_ctrl_c_stops(con: sqlext.Connection, base: Path, tmp_path: Path) -> None:
    """The session hears how far it is; what raises there stops the work, and nothing is left."""
    said: list[str] = []
    con.session.on_job = said.append
    run = f'RUN command AS LLM.`{base}` WHERE action="convert" AND to="bf16" AND savePath="{tmp_path}/'
    con.execute(run + 'a"')
    assert said[0].startswith("convert: 0.00 of 0.00 GB")
    assert said[-1] == ""

    def stop(text: str) -> None:
        if text:
            raise KeyboardInterrupt

    con.session.on_job = stop
    with pytest.raises(KeyboardInterrupt):
        con.execute(run + 'b"')
    assert [child.name for child in tmp_path.iterdir()] == ["a"]


def answers(con: sqlext.Connection, name: str) -> list[str]:
    """What a model function says to some prompts."""
    return [text for (text,) in con.sql(f"SELECT {name}(p, max_tokens := 12) FROM {PROMPTS} ORDER BY p").fetchall()]


def test_the_folder_of_a_training_is_served_as_if_it_were_merged(
    con: sqlext.Connection, deploy: Callable[..., None], job: Path, base: Path, tmp_path: Path
) -> None:
    """An adapter with its base inside is deployed by its path alone; it answers as the merged model does, and
    its notes tell of it."""
    con.execute(
        f'RUN command AS LLM.`{job}/final` WHERE action="merge" AND modelNameOrPath="{base}" AND savePath="{tmp_path}/m"'
    )
    deploy(job / "final", "alone", "num_gpus=0")
    deploy(tmp_path / "m", "merged", "num_gpus=0")
    assert answers(con, "alone") == answers(con, "merged")
    assert f"{job}/final" in con.session.functions.gateways()["alone"].info.notes[-1]


def said(con: sqlext.Connection, **options: object) -> ModelSpec:
    """What would be deployed."""
    written = " AND ".join(f'{key}="{value}"' for key, value in options.items())
    run = parse(split(f'RUN command AS LLM.`` WHERE action="infer" AND udfName="x" AND {written};')[0], {})
    assert isinstance(run, Run)
    return model_spec("x", None, resolve(run.options, "infer").values, run, con.session)


def test_which_base_is_meant(con: sqlext.Connection, base: Path, job: Path, tmp_path: Path) -> None:
    """The named one, the one inside the folder, the one that the adapter names; else the error says what to add."""
    final = job / "final"
    assert said(con, localModelDir=base, adapter=final).path == str(base)
    assert said(con, localModelDir=final).path == str(final / "pretrained_model")
    alone = tmp_path / "alone"
    shutil.copytree(final, alone, ignore=shutil.ignore_patterns("pretrained_model"))
    assert said(con, localModelDir=alone).path == said(con, adapter=alone).path == str(base)
    config = (alone / "adapter_config.json").read_text()
    (alone / "adapter_config.json").write_text(config.replace(str(base), "somebody/llama"))
    with pytest.raises(UserError, match='adapter="') as raised:
        said(con, localModelDir=alone)
    assert raised.value.code == "adapter_base"


def test_stored_answers_belong_to_base_and_adapter(
    con: sqlext.Connection, base: Path, job: Path, tmp_path: Path
) -> None:
    """The fingerprint covers both, and not where they lie."""
    copy = tmp_path / "copy"
    shutil.copytree(job / "final", copy)
    other = trained.adapter(base, tmp_path / "other", seed=5)
    one = said(con, localModelDir=base, adapter=job / "final").fingerprint
    assert one == said(con, localModelDir=base, adapter=copy).fingerprint
    others = said(con, localModelDir=base, adapter=other).fingerprint, said(con, localModelDir=base).fingerprint
    assert len({one, *others}) == 3


def test_adapters_are_for_models_that_generate(
    con: sqlext.Connection, deploy: Callable[..., None], checkpoints: dict[str, Path], job: Path, base: Path
) -> None:
    """Encoders, classifiers, remote models and adapters of another base refuse them, before anything is registered."""
    for path in (checkpoints["encoder"], checkpoints["classifier"]):
        with pytest.raises(UserError) as raised:
            deploy(path, "x", "num_gpus=0", adapter=job / "final")
        assert raised.value.code == "adapter_task"
    with pytest.raises(UserError) as raised:
        deploy(base, "x", "num_gpus=0", adapter=base)
    assert raised.value.code == "checkpoint_adapter"
    with pytest.raises(UserError) as raised:
        con.execute(
            'RUN command AS LLM.`` WHERE action="infer" AND udfName="x" AND pretrainedModelType="saas/openai"'
            f' AND `saas.model`="m" AND adapter="{job}/final"'
        )
    assert raised.value.code == "option_unknown"
    assert con.session.functions.gateways() == {}
